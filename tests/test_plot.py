"""The figure: that each thing to be seen is drawn, at the place that the rows say."""

import json
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from matplotlib.colors import to_hex

from experiments import plot


def made_up(rounds: int = 6, infeasible: tuple[int, ...] = (4,), warmup: int = 2) -> list[dict]:
    rows = []
    for run in ("fedavg", "noise"):
        for t in range(1, rounds + 1):
            protected = run == "noise" and t > warmup
            rows.append(
                {
                    "run": run,
                    "round": t,
                    "protected": protected,
                    "owner_accuracy": (0.9 if run == "fedavg" else 0.8) + t / 100,
                    "base_accuracy": 0.7 + t / 100,
                    "plus_accuracy": 0.5 + t / 100,
                    "minus_accuracy": 0.6 - t / 100,
                    "strength": 0.1 * t if protected else 0.0,
                    "calibration_tries": 3 * t if protected else 0,
                    "feasible": t not in infeasible,
                    "finite": True,
                }
            )
    return rows


def panel(rows, noise_scale="absolute"):
    return plot.Panel("title", rows, 0.6, noise_scale)


def axes_of(*panels) -> list[Any]:
    return list(plot.draw(panels).axes)


def line(axes: Any, name: str) -> Any:
    """The line drawn in the style called `name`, told by its label."""
    label = plot.STYLES[name]["label"]
    return next(line for line in axes.lines if line.get_label() == label)


def test_accuracies_stand_against_their_rounds():
    accuracy = axes_of(panel(made_up()))[0]
    rounds = np.arange(1, 7)
    for name, start, wanted in (
        ("fedavg", 1, 0.9 + rounds / 100),
        ("owner", 1, 0.8 + rounds / 100),
        ("base", 1, 0.7 + rounds / 100),
        ("plus", 3, 0.5 + rounds / 100),  # in warm-up nothing degraded is shared
        ("minus", 3, 0.6 - rounds / 100),
    ):
        drawn = line(accuracy, name)
        np.testing.assert_array_equal(drawn.get_xdata(), rounds[start - 1 :])
        np.testing.assert_allclose(drawn.get_ydata(), wanted[start - 1 :])
    assert set(line(accuracy, "cap").get_ydata()) == {0.6}


def test_a_dead_model_is_no_accuracy():
    """Its row says 0, which would be drawn as a collapse to 0."""
    rows = [row for row in made_up() if row["run"] == "fedavg" or row["round"] < 6]
    rows[-1] |= {"finite": False, "owner_accuracy": 0.0, "base_accuracy": 0.0}
    accuracy = axes_of(panel(rows))[0]
    for name in ("owner", "base"):
        np.testing.assert_array_equal(line(accuracy, name).get_xdata(), [1, 2, 3, 4])
    (said,) = accuracy.texts
    assert (said.get_text(), said.xy[0]) == ("W is NaN", 5)
    assert [5, 5] in [list(mark.get_xdata()) for mark in accuracy.lines]
    assert [5, 5] not in [list(mark.get_xdata()) for mark in axes_of(panel(made_up()))[0].lines]


def test_infeasible_rounds_are_marked_in_both_panels():
    accuracy, strength = axes_of(panel(made_up(infeasible=(4, 6))))[:2]
    np.testing.assert_array_equal(line(accuracy, "infeasible").get_xdata(), [4, 6])
    np.testing.assert_allclose(line(accuracy, "infeasible").get_ydata(), [0.56, 0.56])
    np.testing.assert_array_equal(line(strength, "infeasible").get_xdata(), [4, 6])


def test_an_infeasible_warm_up_round_is_no_failure():
    accuracy = axes_of(panel(made_up(infeasible=(1,))))[0]
    assert len(line(accuracy, "infeasible").get_xdata()) == 0


def test_warm_up_is_shaded():
    def shaded(warmup):
        patches = axes_of(panel(made_up(warmup=warmup)))[0].patches
        return sorted(patch.get_x() + 0.5 for patch in patches)

    assert shaded(2) == [1, 2]
    assert shaded(0) == []


def test_strength_and_tries_share_the_lower_panel():
    _, strength, tries = axes_of(panel(made_up()))
    np.testing.assert_allclose(strength.lines[0].get_ydata(), [0.3, 0.4, 0.5, 0.6])
    assert [bar.get_height() for bar in tries.patches] == [9, 12, 15, 18]
    assert strength.get_ylabel() == "noise σ"
    relative = axes_of(panel(made_up(), "relative"))[1]
    assert relative.get_ylabel() == "noise σ / RMS"


def test_strength_over_decades_is_logarithmic():
    rows = made_up()
    assert axes_of(panel(rows))[1].get_yscale() == "linear"
    rows[-1]["strength"] = 100.0
    assert axes_of(panel(rows))[1].get_yscale() == "log"


def test_missing_values_and_no_protected_round_are_drawn():
    rows = made_up(warmup=6)
    rows[-1]["owner_accuracy"] = None
    accuracy = axes_of(panel(rows))[0]
    assert np.isnan(line(accuracy, "owner").get_ydata()[-1])


def test_lines_differ_in_grey_too():
    styles = list(plot.STYLES.values())
    looks = {(str(s.get("ls")), s.get("marker"), s.get("lw", 0) > 2) for s in styles}
    assert len(looks) == len(styles)
    colours = {to_hex(plot.STYLES[name]["color"]) for name in ("fedavg", "owner", "plus", "minus")}
    assert len(colours) == 4


def test_figure1_is_a_300_dpi_png(tmp_path):
    plot.figure1(made_up(), 0.6, tmp_path / "figure1.png")
    pixels = matplotlib.image.imread(tmp_path / "figure1.png")
    assert pixels.shape[:2] == (1500, 2100)
    assert pixels[..., :3].std() > 0.05  # not a blank sheet


def write_run(folder, rows):
    folder.mkdir()
    options = {"cap": 0.6, "noise_scale": "absolute"}
    (folder / "config.json").write_text(json.dumps({"options": options}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_several_folders_side_by_side_share_axes(tmp_path):
    write_run(tmp_path / "one", made_up())
    write_run(tmp_path / "two", made_up(rounds=9))
    axes = axes_of(*(plot.read_panel(tmp_path / name) for name in ("one", "two")))
    first, second = axes[:2]
    assert [first.get_title(), second.get_title()] == ["one", "two"]
    assert first.get_xlim() == second.get_xlim() == (0.5, 9.5)
    assert first.get_ylim() == second.get_ylim()
    lower = axes[2:4]
    assert lower[0].get_ylim() == lower[1].get_ylim()


def test_command_line(tmp_path):
    write_run(tmp_path / "one", made_up())
    out = tmp_path / "both.png"
    assert plot.main(["plot", str(tmp_path / "one"), str(tmp_path / "one"), f"--out={out}"]) == 0
    assert matplotlib.image.imread(out).shape[1] > 2100


@pytest.mark.parametrize("args", [[], ["nowhere"], ["--ou=x"]])
def test_command_line_complains_in_one_line(args, capsys):
    assert plot.main(["plot", *args]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
