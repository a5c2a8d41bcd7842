"""The arithmetic of a sweep's results, and what its pictures hold."""

import csv
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba

from dlrm_example.config import TrainConfig
from dlrm_example.curves import Crossing, Measured, first_crossing, mean_and_spread
from dlrm_example.plots import Panel, draw_panels, save
from dlrm_example.records import RunFiles, write_json
from dlrm_example.sweep.grid import Case, expand
from dlrm_example.sweep.page import crossings_table, scores_table
from dlrm_example.sweep.results import Results, read_results, write_csv

SEEDS = (1, 2)


def curve(*means: float) -> list[Measured]:
    """Of sizes 10, 20, 30, .., the largest first."""
    return [Measured(10 * number, [mean]) for number, mean in enumerate(means, 1)][::-1]


@pytest.mark.parametrize(
    ("means", "size", "stays"),
    [
        ((0.6, 0.5, 0.4, 0.3), 30, True),
        ((0.3, 0.2), 10, True),  # from the smallest on
        ((0.6, 0.45, 0.45), 20, True),  # exactly at the level
        ((0.6, 0.4, 0.5, 0.3), 20, False),  # leaves it again
        ((0.6, 0.4, 0.3, 0.5), 20, False),  # at the end
        ((0.6, 0.5), None, None),  # never
        ((), None, None),
    ],
)
def test_the_first_crossing(means: tuple[float, ...], size: int | None, stays: bool | None) -> None:
    found = first_crossing(curve(*means), level=0.45)
    assert found == (None if size is None else Crossing(Measured(size, [means[size // 10 - 1]]), stays=bool(stays)))


def test_a_crossing_is_of_means() -> None:
    points = [Measured(10, [0.1, 0.9]), Measured(20, [0.3, 0.5])]
    found = first_crossing(points, level=0.4)
    assert found is not None
    assert found.at.size == 20, "one good seed is none"


def test_means_and_spreads() -> None:
    point = Measured(1, [0.4, 0.6])
    assert (point.mean, point.spread) == (pytest.approx(0.5), pytest.approx(0.02**0.5))
    assert Measured(1, [0.4]).spread == 0
    assert mean_and_spread([0.4, 0.6]) == "0.5000 ± 0.1414"
    assert mean_and_spread([0.4]) == "0.4000"


def results() -> Results:
    """Test BCE: full tables 0.50, `cce` below it at 2x, `ce` never; AUROC 1 - BCE; CCE stores 1000 bytes beside."""
    bce = {("full", 1.0): 0.5, ("cce", 2.0): 0.45, ("cce", 4.0): 0.55, ("ce", 2.0): 0.6, ("ce", 4.0): 0.7}
    return Results(
        {case: record(case, bce[case.method, case.compression]) for case in expand(["cce", "ce"], [2, 4], SEEDS)}, {}
    )


def record(case: Case, bce: float) -> dict[str, object]:
    bce += 0.01 * (case.seed - 1.5)
    params = int(8000 / case.compression)
    size = 4 * params + 1000 * (case.method == "cce")
    return {
        **{"method": case.method, "seed": case.seed, "embedding_params": params, "embedding_bytes": size},
        **{"compression_params": case.compression, "compression_bytes": 32000 / size},
        **{"best_val_bce": bce + 0.1, "best_val_auroc": 0.9 - bce, "test_bce": bce, "test_auroc": 1 - bce},
    }


def test_the_table_has_means_spreads_and_both_ratios() -> None:
    lines = scores_table(results()).splitlines()
    assert len(lines) == 2 + 5
    spread = f"{0.00005**0.5:.4f}"
    bces = f"0.5500 ± {spread} | 0.4500 ± {spread} | 0.4500 ± {spread} | 0.5500 ± {spread}"
    assert lines[3] == f"| `cce` | 2x | 4,000 | 17,000 | 2.0x | 1.9x | {bces} | 2 |"


def test_the_table_of_crossings() -> None:
    lines = crossings_table(results(), "test").splitlines()[2:]
    assert lines == ["| `cce` | 4,000 | 2.0x | 17,000 | 1.9x | yes |", "| `ce` | - | - | - | - | at no size tried |"]


def lines_of(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    """What is drawn, by label."""
    return {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.get_lines()}


def test_the_pictures_hold_every_series() -> None:
    figure = draw_panels(results().panels("test", floor=0.3))
    labels = ["embedding parameters", "bytes in all, assignments counted"]
    assert [axes.get_xlabel() for axes in figure.axes] == labels * 2
    assert [figure.axes[number].get_ylabel() for number in (0, 2)] == ["test BCE", "test AUROC"]
    for number, axes in enumerate(figure.axes):
        assert axes.get_xscale() == "log"
        drawn, is_auroc, in_bytes = lines_of(axes), number >= 2, number % 2
        sizes = [9000, 17000] if in_bytes else [2000, 4000]
        scores = [0.45, 0.55] if is_auroc else [0.55, 0.45]
        assert drawn["cce"] == [pytest.approx(point) for point in zip(sizes, scores, strict=True)]
        assert [y for _, y in drawn["full"]] == pytest.approx([0.5, 0.5])
        assert ("best possible" in drawn) == (not is_auroc)
        stars = [line for line in axes.get_lines() if line.get_marker() == "*"]
        if is_auroc:
            assert not stars
        else:
            assert [y for _, y in drawn["best possible"]] == [0.3, 0.3]
            (star,) = stars  # `ce` never crosses
            assert list(star.get_data()[0]) == [17000 if in_bytes else 4000]
            assert to_rgba(star.get_color()) == to_rgba("C0")
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert sorted(legend) == ["best possible", "cce", "ce", "full"]


def test_bands_are_standard_deviations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    fill_between = Axes.fill_between
    monkeypatch.setattr(Axes, "fill_between", lambda *args, **kw: drawn.append(args[1:]) or fill_between(*args, **kw))
    x = [Measured(200, [0.4, 0.6]), Measured(100, [0.7, 0.7])]
    panels = [Panel(curves={name: x}, level=Measured(300, [0.3]), size="s", score="BCE") for name in ("x", "y")]
    figure = draw_panels([panels])
    (sizes, low, high), _ = drawn
    assert sizes == [100, 200]
    assert low == pytest.approx([0.7, 0.5 - 0.02**0.5])
    assert high == pytest.approx([0.7, 0.5 + 0.02**0.5])
    colors = [lines_of_one.get_color() for axes in figure.axes for lines_of_one in axes.get_lines()[:1]]
    assert colors == ["C0", "C1"], "a method has one look in all panels"
    save(figure, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_pictures_without_anything_finished() -> None:
    assert len(draw_panels(Results({}, {}).panels("val", floor=None)).axes) == 4


def test_the_table_of_runs_has_whatever_their_records_have(tmp_path: Path) -> None:
    """Also metrics that some runs do not have, and that nothing here knows."""
    cases = expand([], [], SEEDS)
    runs = {
        case: TrainConfig(run_dir=str(tmp_path / case.name), seed=case.seed) for case in [*cases, Case("full", 1.0, 9)]
    }
    for case, extra in zip(cases, ({}, {"normalised_entropy": 0.1 + 0.2, "target": None}), strict=True):
        files = RunFiles(runs[case].run_dir, is_main=True)
        files.start(runs[case], {"commit": "c", "hardware": "h, 2 cores", "versions": {"torch": "2"}})
        write_json(files.folder / "summary.json", {**record(case, 1 / 3), **extra})
    write_csv(read_results(runs), tmp_path / "sweep.csv")
    with open(tmp_path / "sweep.csv", newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["run"], second["run"]) == ("full-seed1", "full-seed2")
    assert float(second["test_bce"]) == 1 / 3 + 0.01 * 0.5, "to the last bit"
    assert (first["normalised_entropy"], float(second["normalised_entropy"])) == ("", 0.1 + 0.2)
    assert (second["target"], second["commit"], second["hardware"], second["torch"]) == ("", "c", "h, 2 cores", "2")
