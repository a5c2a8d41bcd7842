"""The data, the arithmetic and the words of `benchmarks/quality`."""

import json
import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.quality import data, gmf, page, plans, pointers, published, siblings, store, trials
from benchmarks.quality.gmf import Settings
from benchmarks.quality.lookups import use_cheap_gradients
from cce_torchrec import CCE, ReclusterConfig, recluster
from tests.example.archives import data_folder

SMALL = Settings(dataset="toy", split="report", method="cce", params=256, seed=1, dim=8, epochs=3, batch_size=64)


def pairs_of(rows: data.Rows) -> set[tuple[int, int]]:
    return set(zip(rows.users_N.tolist(), rows.items_N.tolist(), strict=True))


def toy_clicks(num_rows: int = 600) -> data.Clicks:
    """A click where user and item are of the same parity."""
    generator = torch.Generator().manual_seed(0)
    users_N, items_N = (torch.randint(size, (num_rows,), generator=generator) for size in (40, 60))
    rows = data.Rows(users_N, items_N, ((users_N + items_N) % 2 == 0).float())
    return data.Clicks(40, 60, rows[slice(0, 500)], rows[slice(500, None)])


def test_last_two_of_each_user_are_held_out() -> None:
    users = np.array([7, 3, 7, 7, 3, 7])
    times = np.array([5, 1, 9, 5, 0, 2])
    assert data._place_from_end(users, times).tolist() == [2, 0, 0, 1, 1, 3]  # equal times: file order


def test_movielens_is_split_as_published() -> None:
    report, tune = (data.load("ml-100k", split, data_folder()) for split in ("report", "tune"))
    assert (report.num_users, report.num_items, len(report.held_out)) == (943, 1642, 2 * 943)
    assert len(report.train) + len(report.held_out) == 72_855
    assert pairs_of(tune.held_out) <= pairs_of(report.train)
    assert pairs_of(tune.train) == pairs_of(report.train) - pairs_of(tune.held_out)


def gowalla_zip(folder: Path) -> tuple[str, set[tuple[int, int]], set[tuple[int, int]]]:
    random = np.random.default_rng(0)
    everything = np.unique(random.integers((30, 50), size=(400, 2)), axis=0)
    random.shuffle(everything)
    train, test = everything[:300], everything[300:]
    with zipfile.ZipFile(folder / "gowalla.zip", "w") as archive:
        for name, part in (("train", train), ("test", test)):
            lines = ["user_id:token\titem_id:token", *(f"{user}\t{item}" for user, item in part)]
            archive.writestr(f"Data/gowalla/gowalla.{name}.inter", "\n".join(lines))
    return str(folder / "gowalla.zip"), set(map(tuple, train.tolist())), set(map(tuple, test.tolist()))


def test_gowallas_negatives_are_no_check_ins(tmp_path: Path) -> None:
    path, train, test = gowalla_zip(tmp_path)
    report, tune = (data.load("gowalla", split, path) for split in ("report", "tune"))
    for rows, pairs in ((report.train, train), (report.held_out, test)):
        is_click = rows.labels_N == 1
        assert pairs_of(rows[is_click]) == pairs
        assert int(is_click.sum()) == int((~is_click).sum())
        assert not pairs_of(rows[~is_click]) & (train | test)
    clicks = [pairs_of(rows[rows.labels_N == 1]) for rows in (tune.train, tune.held_out)]
    assert clicks[0] | clicks[1] == train
    assert not clicks[0] & clicks[1]


def test_renumbered_ids_are_the_same_clicks_under_other_numbers() -> None:
    given, other = toy_clicks(), data.renumbered(toy_clicks())
    for before, after in ((given.train, other.train), (given.held_out, other.held_out)):
        assert torch.equal(before.labels_N, after.labels_N)
        for old_N, new_N, size in ((before.users_N, after.users_N, 40), (before.items_N, after.items_N, 60)):
            numbers = dict(zip(old_N.tolist(), new_N.tolist(), strict=True))
            assert [numbers[old] for old in old_N.tolist()] == new_N.tolist()  # one number an id
            assert len(set(numbers.values())) == len(numbers)
            assert max(numbers.values()) < size
            assert not torch.equal(old_N, new_N)
    assert gmf.run(replace(SMALL, renumbered=True), given)["best_bce"] == gmf.run(SMALL, other)["best_bce"]


def test_early_stop_needs_both_to_be_worse() -> None:
    history = gmf.History()
    assert not history.add(0.5, 0.8)
    assert not history.add(0.6, 0.8)  # BCE alone
    assert not history.add(0.5, 0.7)  # AUC alone
    assert history.add(0.506, 0.79)
    assert (history.best_bce, history.best_auc) == (0.5, 0.8)


@pytest.mark.parametrize(("share", "expected"), [("equal", [320, 350]), ("proportion", [280, 420])])
def test_no_table_gets_more_than_a_full_one(share: str, expected: list[int]) -> None:
    assert gmf.budgets(replace(SMALL, share=share, params=700), (40, 60)) == expected  # 40 ids of 8 dims are 320


def test_a_run_learns_and_is_its_settings() -> None:
    clicks = toy_clicks()
    settings = replace(SMALL, epochs=20, learning_rate=0.02, method="full", params=None)
    record, again = (gmf.run(settings, clicks) for _ in range(2))
    assert record["best_bce"] < 0.6 < record["scores"][0][0]
    assert record["scores"] == again["scores"]
    assert record["params"] == (40 + 60) * 8
    assert gmf.run(replace(settings, seed=2), clicks)["scores"] != record["scores"]


def test_cheap_gradients_are_the_gradients() -> None:
    clicks = toy_clicks()
    sizes = (clicks.num_users, clicks.num_items)
    gradients = []
    for is_cheap in (False, True):
        torch.manual_seed(0)
        model = gmf.GMF(gmf.tables_of(SMALL, sizes, gmf.methods_of(SMALL, sizes)))
        if is_cheap:
            use_cheap_gradients(model)
        (model(gmf.as_ids(clicks.train)) * clicks.train.labels_N).sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, atol=1e-6, rtol=1e-5)


def test_budgets_and_reclusterings_are_kept() -> None:
    settings = replace(SMALL, recluster_count=2, recluster_stop=1.0)
    record = gmf.run(settings, toy_clicks())
    assert (record["params"], record["reclusterings"]) == (256, 2)
    assert record["total_bytes"] > record["codebook_bytes"] == 4 * 256
    assert "the smallest" in gmf.run(replace(settings, params=8), toy_clicks())["does_not_fit"]


def test_pq_is_of_the_trained_table() -> None:
    clicks = toy_clicks()
    full = replace(SMALL, method="full", params=None, epochs=20, learning_rate=0.02)
    pq = gmf.run(replace(full, method="pq", params=2 * 60 * 8, options={"num_columns": 1}), clicks)
    assert pq["scores"] == [pytest.approx(min(gmf.run(full, clicks)["scores"]), abs=1e-3)]  # a centroid an id


def test_finished_runs_are_found_again(tmp_path: Path) -> None:
    made_by = {"commit": "c", "hardware": "h", "torch": "t"}
    old, new = ({"settings": asdict(replace(SMALL, seed=seed)), "made_by": made_by} for seed in (1, 2))
    store.publish([old], tmp_path / "quality.json")
    (tmp_path / "new.jsonl").write_text(json.dumps(new) + "\n")
    assert store.records(tmp_path / "new.jsonl", tmp_path / "quality.json") == [old, new]


def record(method: str, params: int | None, seed: int, bce: float) -> dict:
    settings = asdict(plans.reported_settings("ml-100k", method, params, seed))
    sizes = {"params": params or 82_720, "codebook_bytes": 4, "total_bytes": 2 * (params or 82_720)}
    return {"settings": settings, "best_bce": bce, "best_auc": 0.7, **sizes, "made_by": {}}


def test_the_first_match_is_the_smallest_size_as_good_as_full() -> None:
    runs = [record("full", None, 1, 0.5), record("ce", 4_096, 1, 0.6)]
    runs += [record("ce", 16_384, seed, bce) for seed, bce in ((1, 0.4), (2, 0.56))]  # a mean of 0.48
    runs += [record("ce", 65_536, 1, 0.3), record("hashing_trick", 65_536, 1, 0.6)]
    curves = page.points(runs, "ml-100k")
    stars = [line for line in page.draw(curves, "title").axes[0].get_lines() if line.get_marker() == "*"]
    assert [list(star.get_xdata()) for star in stars] == [[16_384]]
    text = page._matches(curves)
    assert "| `ce` | 16,384 | 5.0x | 5.0x |" in text
    assert "| `hashing_trick` | at no size tried | - | - |" in text


def test_levers_are_tried_on_the_other_split_and_differ() -> None:
    settings = [plans.lever_settings("ml-100k", name, 4_096, 1) for name in plans.LEVERS]
    assert {one.split for one in settings} == {"tune"}
    assert len({store.key_of_settings(one) for one in settings}) == len(settings)


def test_trials_differ_from_all_else() -> None:
    settings = [plans.trial_settings("ml-100k", name, 4_096, 1) for name in plans.TRIED]
    levers = [plans.lever_settings("ml-100k", name, 4_096, 1) for name in plans.LEVERS]
    assert len({store.key_of_settings(one) for one in settings + levers}) == len(settings) + len(levers)


def test_trials_are_changes_that_keep_the_budget_and_leave_nothing_patched() -> None:
    clicks, settings = toy_clicks(), replace(SMALL, recluster_count=3, learning_rate=0.02)
    plain = gmf.run(settings, clicks)
    for name in trials.TRIALS:
        other = gmf.run(replace(settings, trial=name), clicks)
        assert (other["params"], other["reclusterings"]) == (SMALL.params, 3)
        assert (other["scores"] == plain["scores"]) == (name in (None, "nothing changed")), name
    assert gmf.run(settings, clicks)["scores"] == plain["scores"]


def test_rotated_vectors_are_the_vectors() -> None:
    """With a centroid for every vector, a re-clustering in turned columns changes no prediction."""
    clicks, settings = toy_clicks(), replace(SMALL, params=None)
    torch.manual_seed(0)
    methods = [CCE(num_rows=60, num_columns=4, num_helper_rows=1), CCE(num_rows=60, num_columns=4, num_helper_rows=1)]
    model = gmf.GMF(gmf.tables_of(settings, (40, 60), methods))
    ids = gmf.as_ids(clicks.held_out)
    with trials.Rotation().training(model):
        before = model(ids)
        for seed in (1, 2):  # turned once more
            recluster(model, seed=seed, config=ReclusterConfig(gradient_step=0.0))
            torch.testing.assert_close(model(ids), before, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(gmf.GMF.forward(model, ids), before, atol=1e-3)


def test_directions_are_orthogonal_and_balanced() -> None:
    scales = torch.tensor([8.0, 4.0, 2.0, 1.0])
    points = torch.randn(5000, 4, generator=torch.Generator().manual_seed(0)) * scales
    turned = trials._balanced_directions(points, 2)
    torch.testing.assert_close(turned.T @ turned, torch.eye(4), atol=1e-5, rtol=0)
    variances = (points @ turned).var(dim=0).view(2, 2).prod(dim=1)  # 8 x 1 and 4 x 2
    torch.testing.assert_close(variances[0], variances[1], rtol=0.2, atol=0)


def test_differences_are_over_the_same_seeds() -> None:
    base = page.Point("cce", [record("cce", 4_096, seed, 0.1 * seed) for seed in (1, 2, 3)])
    changed = page.Point("ce", [record("ce", 4_096, 2, 0.25)])
    assert changed.difference(base) == pytest.approx(0.05)


def test_none_on_the_frontier_is_beaten_in_as_many_bytes() -> None:
    random = np.random.default_rng(0)
    cells = [
        pointers.Cell(4, None, False, 0, int(size), round(float(bce), 1), 1)
        for size, bce in zip(random.integers(1, 30, 60), random.random(60), strict=True)
    ]
    best = pointers.frontier(sorted(cells, key=lambda cell: (cell.num_bytes, cell.bce)))
    expected = {
        (c.num_bytes, c.bce)
        for c in cells
        if not any(o.num_bytes <= c.num_bytes and o.bce <= c.bce and o[4:6] != c[4:6] for o in cells)
    }
    assert [(c.num_bytes, c.bce) for c in best] == sorted(expected)


def test_runs_from_before_a_setting_existed_are_found() -> None:
    now = asdict(plans.lever_settings("gowalla", "the base", 65_536, 1))
    then = {name: value for name, value in now.items() if name != "warm_part"}
    record = {"settings": then, "best_bce": 0.5}
    assert store.found([record], lambda seed: plans.lever_settings("gowalla", "the base", 65_536, seed)) == [record]
    assert not pointers.is_of_grid(record)


@pytest.mark.parametrize("method", ["full", "ce", "cce", "residual_cce", "pq", "published_ce"])
def test_runs_from_before_a_default_changed_are_those_of_the_old_one(method: str) -> None:
    now = asdict(plans.reported_settings("gowalla", method, 65_536, 1))
    unknown = ("start_from_mean", "initial_assignments")
    then = {name: value for name, value in now.items() if name not in unknown} | {"optimizer_state": "reset"}
    record = {"settings": then, "best_bce": 0.5}

    def found(**changes: object) -> list:
        settings = plans.reported_settings("gowalla", method, 65_536, 1)
        return store.found([record], lambda seed: replace(settings, seed=seed, **changes))

    assert found() == ([] if method in ("cce", "residual_cce") else [record])
    assert found(start_from_mean=False, optimizer_state="reset", initial_assignments="hash") == [record]


def test_the_grid_of_pointers_knows_its_runs_and_counts_their_bytes() -> None:
    grid = pointers.grid("gowalla", [65_536], [1])
    assert len({str(settings) for settings in grid}) == len(grid) == 12
    assert all(pointers.is_of_grid({"settings": asdict(settings)}) for settings in grid)
    assert not any(pointers.is_of_grid({"settings": {**asdict(one), "gradient_steps": 0}}) for one in grid)
    quarter = pointers.settings("gowalla", 65_536, 8, 0.25, 1)
    methods = gmf.methods_of(quarter, (2000, 4000))
    assert [method.num_assigned_ids for method in methods] == [500, 1000]
    # 512 rows: 9 bits, and 4 bytes an id; 9 and 9 hash coefficients and a version
    assert gmf.packed_bytes(quarter, (2000, 4000), methods) == 4 * 65_536 + 1500 * (9 + 4) + 2 * 8 * (9 + 9 + 1)


def test_published_vectors_are_those_of_the_formula() -> None:
    """The rows of each id by Python's integers, one part of the vector after the other."""
    for method, parts in published.NUM_PARTS.items():
        embedding = published.PublishedEmbedding(method, num_params=52, dim=8)  # 6 rows, or 52 cells
        weight, ids = embedding.weight.detach(), [0, 1, 39, 2**31 - 2]
        width, expected = 8 // parts, []
        for number in ids:
            starts = [a * number % (2**31 - 1) % embedding.num_rows for a in embedding.multipliers_P.tolist()]
            assert len(starts) == parts
            if method == "robe":
                cells = [[float(weight[(start + z) % 52]) for z in range(width)] for start in starts]
            else:
                cells = [weight[start, part].tolist() for part, start in enumerate(starts)]
            expected.append([number for part in cells for number in part])
        assert torch.equal(embedding(torch.tensor(ids)).detach(), torch.tensor(expected))


def test_a_published_method_learns_and_is_its_seed() -> None:
    clicks = toy_clicks()
    settings = replace(SMALL, method="published_ce", params=2 * 60 * 8, epochs=20, learning_rate=0.02)
    record, again = (published.run_published(settings, clicks) for _ in range(2))
    assert record["best_bce"] < 0.6 < record["scores"][0][0]
    assert record["scores"] == again["scores"] != published.run_published(replace(settings, seed=2), clicks)["scores"]
    assert record["params"] == 2 * 60 * 8


def test_siblings_are_compared_with_the_authors_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [record("ce", 4_096, seed, bce) for seed, bce in ((1, 0.59), (2, 0.60), (7, 0.64))]
    runs += [record("published_ce", 4_096, seed, bce) for seed, bce in ((1, 0.61), (2, 0.65))]
    tuned = siblings.tried_settings("ml-100k", "ce", "8 columns", 4_096, 1)
    assert tuned.split == "tune"
    runs.append({**runs[0], "settings": asdict(tuned), "best_bce": 0.5432})
    monkeypatch.setattr(siblings, "RESULTS", tmp_path)
    siblings.write_page(runs, page.TITLES)
    text = (tmp_path / "siblings.md").read_text()
    assert "| `ce` | 4,096 | 0.6012 | 0.663 | 0.5950 ± 0.0071 | 0.7000 ± 0.0000 | -0.0062 | 2 |" in text
    assert (
        "| `ce` | 4,096 | 0.6012 | 0.6100 | 0.6300 ± 0.0283, 0.6100 .. 0.6500 | 0.6100 ± 0.0265, 0.5900 .. 0.6400 | 2 |"
        in text
    )
    assert "| 8 columns | 0.5432 |" in text


@pytest.mark.parametrize("dataset", siblings.AUTHORS)
def test_recorded_runs_are_no_worse_than_the_authors_numbers(dataset: str, tmp_path: Path) -> None:
    """What the pages say of each of their numbers, with the best of the settings that are held against it."""
    everything = [run for run in store.records(tmp_path / "none") if run["settings"]["split"] == "report"]
    for (method, params), (bce, _) in siblings.AUTHORS[dataset].items():
        runs = [run for run in everything if run["settings"]["method"] == method]
        means = []
        for name in siblings.OURS.get(method, (method,)):
            mine = siblings._reported(runs, dataset, name, params, plans.SEEDS)
            assert len(mine) == len(plans.SEEDS)
            means.append(np.mean([run["best_bce"] for run in mine]))
        assert min(means) <= bce, (method, params)
