"""A sweep's accuracies by round: that what is drawn stands where the runs say."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from sweep_folder import FakeSweep, fedavg_row, noise_row, summary

from experiments import plot_sweep, sweep_results


def figure_of(draw: Any, folder: Path) -> Any:
    return draw(sweep_results.read(folder))


def by_label(axes: Any) -> dict[str, Any]:
    return {str(line.get_label()): line for line in axes.lines}


def text_of(figure: Any) -> str:
    legends = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    titles = [legend.get_title().get_text() for legend in figure.legends]
    return " ".join([figure.get_supxlabel(), *titles, *legends])


def add_runs(sweep: FakeSweep, name: str, values: dict, seeds: int = 3, cap: float = 0.6) -> None:
    """Owner 0.7, 0.71, 0.75 by seed, and a hundredth more each of 3 rounds; round 1 unprotected,
    round 3 of the last seed not shipped."""
    for seed in range(seeds):
        owner = (0.7, 0.71, 0.75)[seed % 3]
        shared = (0.3, 0.5, 0.2)[seed % 3]
        base = f"runs/f/seed={seed}"
        if base not in sweep.runs:
            rows = [fedavg_row(t, 0.9 + seed / 100 + t / 1000) for t in (1, 2, 3)]
            sweep.run("f", seed, {}, summary(rows[-1]["owner_accuracy"]), rows)
        rows = [
            noise_row(t, owner + t / 100, shared, shared + 0.02 * (-1) ** t, protected=t > 1)
            for t in (1, 2, 3)
        ]
        rows[-1]["shipped"] = seed < 2
        sweep.run(name, seed, values, summary(owner + 0.03), rows, baseline=base, cap=cap)


@pytest.fixture
def sweep(tmp_path) -> FakeSweep:
    sweep = FakeSweep(tmp_path, {"cap": [0.4, 0.6], "seed": [0, 1, 2]})
    add_runs(sweep, "n4", {"cap": 0.4}, cap=0.4)
    return sweep


def test_lines_are_medians_and_bands_reach_from_lowest_to_highest(sweep):
    figure = figure_of(plot_sweep.accuracies, sweep.folder)
    (axes,) = figure.axes
    lines = by_label(axes)
    bands = {tuple(band.get_facecolor()[0][:3]): band for band in axes.collections}
    for label, at, low, middle, high in (
        ("FedAvg", [1, 2, 3], [90.1, 90.2, 90.3], [91.1, 91.2, 91.3], [92.1, 92.2, 92.3]),
        ("owner G", [1, 2, 3], [71, 72, 73], [72, 73, 74], [76, 77, 78]),
        # The higher copy: 32, 52 and 22 % in round 2; 30 and 50 % in round 3, where the third
        # seed shipped nothing; nothing degraded in round 1.
        ("higher of the two shared copies", [2, 3], [22, 30], [32, 40], [52, 50]),
    ):
        drawn = np.array([lines[label].get_xdata(), lines[label].get_ydata()], float)
        drawn = drawn[:, np.isfinite(drawn[1])]
        np.testing.assert_array_equal(drawn[0], at)
        np.testing.assert_allclose(drawn[1], middle, err_msg=label)
        colour = to_rgb(lines[label].get_color())
        edges = np.concatenate([path.vertices for path in bands[colour].get_paths()])
        for t, wanted in zip(at, zip(low, high, strict=True), strict=True):
            reached = edges[edges[:, 0] == t, 1]
            assert (reached.min(), reached.max()) == pytest.approx(wanted), (label, t)
    assert set(lines["cap"].get_ydata()) == {40}


def test_the_legend_says_what_lines_and_bands_are(sweep):
    says = text_of(figure_of(plot_sweep.accuracies, sweep.folder))
    assert "lines: medians over the seeds that did not fail (NaN); bands: lowest to highest" in says
    for name in ("owner G", "FedAvg", "higher of the two shared copies", "cap"):
        assert name in says


def test_a_panel_a_configuration_with_its_own_cap(sweep):
    add_runs(sweep, "n6", {"cap": 0.6}, seeds=1)
    broken = summary(None, failed={"round": 1, "cause": "NaN"})
    sweep.run("n6", 1, {"cap": 0.6}, broken, baseline="runs/f/seed=1")
    sweep.plan("n6", 2, {"cap": 0.6}, "runs/f/seed=2")
    panels = figure_of(plot_sweep.accuracies, sweep.folder).axes
    titles = [axes.get_title() for axes in panels]
    assert titles[0] == "cap=0.4\n3 seeds"
    caps = [set(by_label(axes)["cap"].get_ydata()) for axes in panels]
    assert caps == [{40}, {60}]
    assert panels[0].get_ylim() == panels[1].get_ylim() == (0, 102)
    assert panels[0].get_ylabel() == "accuracy on test, %"
    assert all(axes.get_xlabel() == "round" for axes in panels)


def test_failed_runs_are_counted_and_not_drawn(sweep):
    broken = [noise_row(1, 0.1, 0.1, 0.1)]
    failed = summary(None, failed={"round": 1, "cause": "NaN"})
    base = "runs/f/seed=0"
    sweep.run("n4", 3, {"cap": 0.4}, failed, broken, baseline=base, cap=0.4)
    sweep.plan("n4", 4, {"cap": 0.4}, base)
    (axes,) = figure_of(plot_sweep.accuracies, sweep.folder).axes
    assert axes.get_title() == "cap=0.4\n3 seeds, 1 more failed, 1 unfinished"
    assert by_label(axes)["owner G"].get_ydata()[0] == pytest.approx(72)


def test_at_most_six_panels_and_which_are_left_out(tmp_path):
    caps = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
    sweep = FakeSweep(tmp_path, {"cap": caps})
    for cap in reversed(caps):
        add_runs(sweep, f"n{cap}", {"cap": cap}, seeds=1, cap=cap)
    for cap in caps[6:]:  # the rounds of what is not drawn are not read
        (tmp_path / f"runs/n{cap}/seed=0/metrics.jsonl").write_text("")
    figure = figure_of(plot_sweep.accuracies, tmp_path)
    drawn = [axes.get_title().split("\n")[0] for axes in figure.axes]
    assert drawn == [f"cap={cap}" for cap in caps[:6]]
    assert "The first 6 of 8" in figure.get_supxlabel()
    assert "Left out: cap=0.7; cap=0.8." in figure.get_supxlabel()


def test_null_accuracies_and_missing_fedavg_leave_gaps(tmp_path):
    sweep = FakeSweep(tmp_path, {"cap": [0.4]})
    rows = [
        noise_row(1, None, 0.3, 0.2),
        noise_row(2, 0.8, None, 0.25),
        noise_row(3, 0.9, 0.3, 0.2),
    ]
    sweep.run("n", 0, {"cap": 0.4}, summary(0.9), rows, baseline="runs/f/seed=0")
    (axes,) = figure_of(plot_sweep.accuracies, tmp_path).axes
    lines = by_label(axes)
    np.testing.assert_allclose(lines["owner G"].get_ydata(), [np.nan, 80, 90])
    np.testing.assert_allclose(lines["higher of the two shared copies"].get_ydata(), [30, 25, 30])
    assert len(lines["FedAvg"].get_xdata()) == 0
