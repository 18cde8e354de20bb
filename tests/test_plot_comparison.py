"""Pictures that set configurations side by side: that what is drawn stands where the runs say."""

import math
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from matplotlib.colors import same_color
from sweep_folder import FakeSweep, fedavg_row, noise_row, summary

from experiments import plot_comparison, plot_sweep, report, sweep_results

T1 = math.tan(0.475 * math.pi)  # Student's t at 97.5 %, 1 degree of freedom


def figure_of(draw: Any, folder: Path) -> Any:
    return draw(sweep_results.read(folder))


def by_label(axes: Any) -> dict[str, Any]:
    return {str(line.get_label()): line for line in axes.lines}


def two_by_two(folder: Path) -> FakeSweep:
    """Two caps, given from high to low, and two calibrators; one of four has a single seed."""
    sweep = FakeSweep(folder, {"cap": [0.6, 0.5], "calibrator": ["sequential", "bisection"]})
    owners = [0.95 + seed / 50 for seed in (0, 1)]
    base = [
        sweep.run("f", seed, {}, summary(owner), [fedavg_row(1, owner)])
        for seed, owner in enumerate(owners)
    ]
    for name, cap, calibrator, owners, over, images in (
        ("a", 0.6, "sequential", (0.90, 0.94), 0, 4000),
        ("b", 0.5, "sequential", (0.88,), 1, 8000),
        ("c", 0.6, "bisection", (0.80, 0.84), 10, 10),
        ("d", 0.5, "bisection", (0.70, 0.78), 10, 20),
    ):
        for seed, owner in enumerate(owners):
            counted = summary(
                owner, protected_rounds=10, rounds_over_cap=over, calibration_samples=images
            )
            rows = [noise_row(1, owner, 0.3, 0.3)]
            values = {"cap": cap, "calibrator": calibrator}
            sweep.run(name, seed, values, counted, rows, baseline=base[seed], cap=cap)
    return sweep


Marks = tuple[np.ndarray, np.ndarray, list[list[float]]]


def bars_of(axes: Any) -> dict[str, Marks]:
    """x, y and the ends of the interval of each mark, by the label of its line; no ends where no
    interval is drawn."""
    found = {}
    for container in axes.containers:
        line, _, (bars,) = container.lines
        ends = [sorted(map(float, part[:, 1])) if len(part) else [] for part in bars.get_segments()]
        x, y = (np.asarray(data, float) for data in (line.get_xdata(), line.get_ydata()))
        found[container.get_label()] = (x, y, ends)
    return found


def test_means_and_intervals_stand_at_their_caps(tmp_path):
    two_by_two(tmp_path)
    (axes,) = figure_of(plot_comparison.owner_against_cap, tmp_path).axes
    bars = bars_of(axes)
    x, y, ends = bars["calibrator=bisection"]
    np.testing.assert_allclose(x, [50, 60])
    np.testing.assert_allclose(y, [74, 82])
    halves = [T1 * 4, T1 * 2]  # of two values, the mean's error is half their distance
    np.testing.assert_allclose(
        ends, [[74 - halves[0], 74 + halves[0]], [82 - halves[1], 82 + halves[1]]]
    )
    x, y, ends = bars["calibrator=sequential"]
    np.testing.assert_allclose(y, [88, 92])
    assert [len(end) for end in ends] == [0, 2]  # a single seed has no interval
    assert axes.get_xlabel() == "cap on the accuracy of shared copies, %"
    assert axes.get_ylabel().endswith("%")


def test_limits_hold_all_that_is_drawn(tmp_path):
    two_by_two(tmp_path)
    (axes,) = figure_of(plot_comparison.owner_against_cap, tmp_path).axes
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    assert left < 50 < 60 < right
    assert bottom < 74 - 4 * T1
    assert top > 100  # an interval reaches above it; accuracies do not


def test_fedavg_is_dashed_at_its_mean(tmp_path):
    two_by_two(tmp_path)
    (axes,) = figure_of(plot_comparison.owner_against_cap, tmp_path).axes
    line = by_label(axes)["FedAvg"]
    np.testing.assert_allclose(line.get_ydata(), 96)
    assert line.is_dashed()
    assert same_color(line.get_color(), "black")


def test_several_fedavgs_are_named_and_have_the_colours_of_their_lines(tmp_path):
    sweep = FakeSweep(tmp_path, {"partition": ["iid", "shards"], "cap": [0.4, 0.5]})
    for partition, accuracy in (("iid", 0.9), ("shards", 0.7)):
        values = {"partition": partition}
        base = sweep.run(f"f{partition}", 0, values, summary(accuracy))
        for cap in (0.4, 0.5):
            own = {**values, "cap": cap}
            sweep.run(f"{partition}{cap}", 0, own, summary(0.6), baseline=base, cap=cap)
    (axes,) = figure_of(plot_comparison.owner_against_cap, tmp_path).axes
    lines = by_label(axes)
    drawn = {container.get_label(): container.lines[0] for container in axes.containers}
    for partition, accuracy in (("iid", 90), ("shards", 70)):
        line = lines[f"FedAvg, partition={partition}"]
        np.testing.assert_allclose(line.get_ydata(), accuracy)
        assert same_color(line.get_color(), drawn[f"partition={partition}"].get_color())


def test_at_most_eight_lines_and_which_are_left_out(tmp_path):
    models = [f"m{number}" for number in range(10)]
    sweep = FakeSweep(tmp_path, {"cap": [0.4, 0.5], "model": models})
    for model in models:
        for cap in (0.4, 0.5):
            values = {"cap": cap, "model": model}
            sweep.run(f"{model}{cap}", 0, values, summary(0.8), baseline="runs/f/seed=0", cap=cap)
    figure = figure_of(plot_comparison.owner_against_cap, tmp_path)
    assert list(bars_of(figure.axes[0])) == [f"model={model}" for model in models[:8]]
    assert "The first 8 of 10" in figure.get_supxlabel()
    assert "model=m8; model=m9" in " ".join(figure.get_supxlabel().split())


def test_cost_and_violations_are_pooled_over_rounds(tmp_path):
    two_by_two(tmp_path)
    figure = figure_of(plot_comparison.cost_against_violations, tmp_path)
    (axes,) = figure.axes
    (sequential, x, y, ends), (bisection, *others) = (
        (label, *found) for label, found in bars_of(axes).items()
    )
    # 1 violation in 30 rounds of 16,000 images; 40 in 40 rounds of 60.
    assert "sequential: owner 90.7 %,\n1 of 30 rounds over the cap, 3 runs" in sequential
    assert "bisection: owner 78.0 %,\n40 of 40 rounds over the cap, 4 runs" in bisection
    assert (x[0], y[0]) == pytest.approx((16_000 / 30, 100 / 30))
    low, high = (end / 100 for end in ends[0])
    assert (1 - low) ** 30 == pytest.approx(0.975)  # no violation: 97.5 %
    assert (1 - high) ** 30 + 30 * high * (1 - high) ** 29 == pytest.approx(0.025)
    assert (others[0][0], others[1][0]) == pytest.approx((1.5, 100))
    assert others[2][0] == pytest.approx([100 * 0.025 ** (1 / 40), 100])
    assert axes.get_xscale() == "log"
    bottom, top = axes.get_ylim()
    assert bottom < 0
    assert top > 100
    assert "Clopper and Pearson" in figure.get_supxlabel()
    assert "over cap" in figure.get_supxlabel()


def test_a_calibrator_that_costs_nothing_is_on_the_axis(tmp_path):
    sweep = FakeSweep(tmp_path, {"calibrator": ["fixed", "bisection"]})
    for name, images in (("fixed", 0), ("bisection", 900)):
        counted = summary(0.8, calibration_samples=images)
        sweep.run(name, 0, {"calibrator": name}, counted, baseline="runs/f/seed=0")
    (axes,) = figure_of(plot_comparison.cost_against_violations, tmp_path).axes
    assert [found[0][0] for found in bars_of(axes).values()] == [1, 450]


def pictures(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.png"))


def test_only_pictures_that_compare_something(tmp_path, capsys):
    two_by_two(tmp_path)
    assert report.main(["report", str(tmp_path)]) == 0
    assert pictures(tmp_path) == sorted(plot_sweep.PICTURES)
    said = capsys.readouterr().out
    for name in plot_sweep.PICTURES:
        assert matplotlib.image.imread(tmp_path / name)[..., :3].std() > 0.05  # no blank sheet
        assert name in said
    again = FakeSweep(tmp_path, {"cap": [0.5], "calibrator": ["sequential"]})
    values = {"cap": 0.5, "calibrator": "sequential"}
    rows = [noise_row(1, 0.8, 0.3, 0.3)]
    again.run("a", 0, values, summary(0.8), rows, baseline="runs/f/seed=0", cap=0.5)
    assert report.main(["report", str(tmp_path)]) == 0
    assert pictures(tmp_path) == ["figure1.png"]  # those of the older grid are gone


def test_labels_take_no_formulas(tmp_path):
    """A regular expression may hold two dollars, between which Matplotlib sees a formula, and
    raises if it is none."""
    layers = "^conv$^|^dense$"
    sweep = FakeSweep(tmp_path, {"noise_layers": [layers], "cap": [0.4, 0.5]})
    for cap in (0.4, 0.5):
        values = {"noise_layers": layers, "cap": cap}
        rows = [noise_row(1, 0.8, 0.3, 0.3)]
        sweep.run(f"n{cap}", 0, values, summary(0.8), rows, baseline="runs/f/seed=0", cap=cap)
    assert report.main(["report", str(tmp_path)]) == 0
    assert pictures(tmp_path) == ["figure1.png", "owner_against_cap.png"]
