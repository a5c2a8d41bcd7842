"""How good are the methods at a size? Matrix factorisation of clicks, with every method, at every size.

python -m benchmarks.quality run --dataset ml-100k             # finished runs are not made again
python -m benchmarks.quality run --dataset gowalla --gowalla gowalla.zip --methods full cce ce
python -m benchmarks.quality levers --dataset ml-100k          # CCE's settings, one changed at a time, on another split
python -m benchmarks.quality trials --dataset ml-100k          # changes of CCE that are not settings, on that split
python -m benchmarks.quality siblings --dataset ml-100k        # the settings of the methods beside CCE, on that split, too
python -m benchmarks.quality spread --dataset ml-100k          # they and the authors' own, seed by seed
python -m benchmarks.quality pointers --dataset gowalla --gowalla gowalla.zip --seeds 1   # which bytes are worth having
python -m benchmarks.quality page                              # quality, siblings and pointers in docs/results
"""

import argparse

from benchmarks.quality import plans, pointers, siblings
from benchmarks.quality.data import DATASETS
from benchmarks.quality.page import TITLES, write_page
from benchmarks.quality.store import POINTERS, publish, records, run_missing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "levers", "trials", "siblings", "spread", "pointers", "page"))
    parser.add_argument("--dataset", choices=DATASETS, default="ml-100k")
    for name, known in (("methods", plans.METHOD_NAMES), ("levers", tuple(plans.LEVERS))):
        told = f"default: all, {'; '.join(known)}"
        parser.add_argument(f"--{name}", nargs="+", choices=known, default=known, metavar=name[:-1].upper(), help=told)
    parser.add_argument("--params", nargs="+", type=int, help="of both tables together (default: those of the page)")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: those of the page")
    parser.add_argument("--movielens", help="folder of its archive (default: the user's cache)")
    parser.add_argument("--gowalla", help="its zip")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, a thread each")
    args = parser.parse_args()
    if args.what == "page":
        runs = [run for run in records() if not pointers.is_of_grid(run)]
        publish(runs)
        write_page(runs)
        siblings.write_page(runs, TITLES)
        pointers.write_page([run for run in records(published=POINTERS) if pointers.is_of_grid(run)], TITLES)
        return
    seeds = args.seeds or (siblings.SEEDS if args.what == "spread" else plans.SEEDS)
    if args.what == "run":
        plan = plans.reported(args.dataset, args.methods, args.params or plans.BUDGETS[args.dataset], seeds)
    elif args.what == "trials":
        plan = plans.trials(args.dataset, args.params or plans.LEVER_BUDGETS[args.dataset], seeds)
    elif args.what == "siblings":
        plan = siblings.tried(args.dataset, args.methods, args.params or siblings.PARAMS[args.dataset], seeds)
    elif args.what == "spread":
        plan = siblings.spread(args.dataset, args.params or siblings.PARAMS[args.dataset], seeds)
    elif args.what == "pointers":
        plan = pointers.grid(args.dataset, args.params or pointers.PARAMS[args.dataset], seeds)
    else:
        plan = plans.levers(args.dataset, args.levers, args.params or plans.LEVER_BUDGETS[args.dataset], seeds)
    run_missing(plan, {"ml-100k": args.movielens, "gowalla": args.gowalla}, args.jobs)


if __name__ == "__main__":
    main()
