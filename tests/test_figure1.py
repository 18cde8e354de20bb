"""The figure of a run: that each thing to be seen is drawn, at the place that the rows say."""

from typing import Any

import matplotlib.image
import numpy as np
import pytest
from matplotlib.colors import to_hex
from sweep_folder import FakeSweep, fedavg_row, noise_row, single_run, summary

from experiments import plot
from experiments.report import figure1
from experiments.report.figure1 import Panel, draw, read_panel


def made_up(rounds: int = 6, infeasible: tuple[int, ...] = (4,), warmup: int = 2) -> list[dict]:
    rows = [fedavg_row(t, 0.9 + t / 100) for t in range(1, rounds + 1)]
    for t in range(1, rounds + 1):
        on = t > warmup
        noise = {"strength": 0.1 * t * on, "calibration_tries": 3 * t * on, "protected": on}
        noise |= {"base_accuracy": 0.7 + t / 100, "feasible": t not in infeasible}
        rows.append(noise_row(t, 0.8 + t / 100, 0.5 + t / 100, 0.6 - t / 100, **noise))
    return rows


def axes_of(*runs: list[dict], scale: str = "absolute", cap: float | None = 0.6) -> list[Any]:
    return list(draw([Panel("title", rows, cap, scale) for rows in runs]).axes)


def line(axes: Any, name: str) -> Any:
    """The line drawn in the style called `name`, told by its label; None without."""
    label = figure1.STYLES[name]["label"]
    return next((line for line in axes.lines if line.get_label() == label), None)


def test_accuracies_stand_against_their_rounds():
    accuracy = axes_of(made_up())[0]
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
    assert line(accuracy, "shared") is None


def test_copies_of_no_pair_are_one_line_of_the_highest():
    rows = made_up(infeasible=())
    for row in rows:
        del row["plus_accuracy"], row["minus_accuracy"]
    figure = draw([Panel("", rows, None, "absolute")])
    drawn = line(figure.axes[0], "shared")
    np.testing.assert_array_equal(drawn.get_xdata(), [3, 4, 5, 6])
    np.testing.assert_allclose(drawn.get_ydata(), [0.57, 0.56, 0.55, 0.56])
    assert line(figure.axes[0], "plus") is line(figure.axes[0], "cap") is None
    named = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "highest shared copy" in named
    assert not {"shared W + ξ", "cap", "cap not held (infeasible)"} & set(named)


def test_a_round_that_shipped_nothing_has_no_shared_copy():
    rows = made_up()
    rows[-3] |= {"shipped": False, "feasible": False}  # round 4
    accuracy = axes_of(rows)[0]
    np.testing.assert_allclose(line(accuracy, "plus").get_ydata(), [0.53, np.nan, 0.55, 0.56])
    np.testing.assert_array_equal(line(accuracy, "infeasible").get_xdata(), [4])


def test_a_dead_model_is_no_accuracy():
    """Its row says 0, which would be drawn as a collapse to 0."""
    rows = [row for row in made_up() if row["run"] == "fedavg" or row["round"] < 6]
    rows[-1] |= {"finite": False, "owner_accuracy": 0.0, "base_accuracy": 0.0}
    accuracy = axes_of(rows)[0]
    for name in ("owner", "base"):
        np.testing.assert_array_equal(line(accuracy, name).get_xdata(), [1, 2, 3, 4])
    (said,) = accuracy.texts
    assert (said.get_text(), said.xy[0]) == ("W is NaN", 5)
    assert [5, 5] in [list(mark.get_xdata()) for mark in accuracy.lines]
    rows[-1] |= {"finite": True}
    rows[5] |= {"finite": False}
    accuracy = axes_of(rows)[0]
    assert [text.get_text() for text in accuracy.texts] == ["FedAvg is NaN"]
    assert line(accuracy, "fedavg").get_xdata()[-1] == 5


def test_infeasible_rounds_are_marked_in_both_panels_but_not_in_warm_up():
    accuracy, strength = axes_of(made_up(infeasible=(1, 4, 6)))[:2]
    np.testing.assert_array_equal(line(accuracy, "infeasible").get_xdata(), [4, 6])
    np.testing.assert_allclose(line(accuracy, "infeasible").get_ydata(), [0.56, 0.56])
    np.testing.assert_array_equal(line(strength, "infeasible").get_xdata(), [4, 6])


def test_warm_up_is_shaded():
    rows = made_up(warmup=2)
    rows[-1] |= {"protected": False}  # round 6 as well
    spans = [(one.get_x(), one.get_width()) for one in axes_of(rows)[0].patches]
    assert spans == [(0.5, 2), (5.5, 1)]
    assert len(axes_of(made_up(warmup=0))[0].patches) == 0


def test_strength_and_tries_share_the_lower_panel():
    _, strength, tries = axes_of(made_up())
    np.testing.assert_allclose(strength.lines[0].get_ydata(), [0.3, 0.4, 0.5, 0.6])
    assert [bar.get_height() for bar in tries.patches] == [9, 12, 15, 18]
    assert (strength.get_ylabel(), strength.get_yscale()) == ("noise σ", "linear")
    assert strength.get_ylim()[0] == 0
    assert strength.get_ylim()[1] > 0.65  # the highest mark is not cut
    rows = made_up()
    rows[-1]["strength"] = 100.0
    relative = axes_of(rows, scale="relative")[1]
    assert (relative.get_ylabel(), relative.get_yscale()) == ("noise σ / RMS", "log")


def test_missing_values_no_protected_round_and_a_single_one_are_drawn():
    rows = made_up(warmup=6)
    rows[-1]["owner_accuracy"] = None
    assert np.isnan(line(axes_of(rows)[0], "owner").get_ydata()[-1])
    one = axes_of(made_up(rounds=1))[0]
    assert line(one, "owner").get_marker() == "."  # a line of one point is not seen
    assert 1 in one.get_xticks()
    assert all(tick % 1 == 0 for tick in one.get_xticks())


def test_lines_differ_in_grey_too():
    styles = [style for name, style in figure1.STYLES.items() if name != "warm-up"]
    looks = {(str(s.get("ls")), s.get("marker"), s.get("lw", 0) > 2) for s in styles}
    assert len(looks) == len(styles)
    names = ("fedavg", "owner", "plus", "minus")
    assert len({to_hex(figure1.STYLES[name]["color"]) for name in names}) == 4


def test_figure1_is_a_300_dpi_png(tmp_path):
    figure1.figure1(made_up(), 0.6, tmp_path / "figure1.png")
    pixels = matplotlib.image.imread(tmp_path / "figure1.png")
    assert pixels.shape[:2] == (1500, 2100)
    assert pixels[..., :3].std() > 0.05  # not a blank sheet


def test_several_folders_side_by_side_share_axes(tmp_path):
    single_run(tmp_path / "one", made_up(), None)
    single_run(tmp_path / "two$a$", made_up(rounds=9), None)
    panels = [read_panel(tmp_path / name) for name in ("one", "two$a$")]
    assert (panels[0].cap, panels[0].noise_scale) == (0.6, "absolute")
    axes = draw(panels).axes
    first, second = axes[:2]
    assert [first.get_title(), second.get_title()] == ["one", "two$a$"]
    assert first.get_xlim() == second.get_xlim() == (0.5, 9.5)
    assert first.get_ylim() == second.get_ylim()
    lower = axes[2:4]
    assert lower[0].get_ylim() == lower[1].get_ylim()
    other = draw([panels[0], panels[1]._replace(noise_scale="relative")]).axes[2:4]
    assert other[0].get_ylim() != other[1].get_ylim()  # other units
    assert other[1].get_ylabel() == "noise σ / RMS"


def test_command_line(tmp_path, capsys):
    single_run(tmp_path / "one", made_up(), None)
    sweep = FakeSweep(tmp_path, {"cap": [0.4]})  # whose runs can be set beside others
    path = sweep.run("3f2a", 0, {"cap": 0.4}, summary(0.8), made_up()[6:], "", 0.4)
    assert read_panel(tmp_path / path)[:4:2] == ("3f2a, seed=0", 0.4)
    out = tmp_path / "both.png"
    assert plot.main(["plot", str(tmp_path / "one"), str(tmp_path / path), f"--out={out}"]) == 0
    assert f"{out} shows 2 runs" in capsys.readouterr().out
    assert matplotlib.image.imread(out).shape[1] > 2100


@pytest.mark.parametrize(
    "args", [[], ["nowhere"], ["--ou=x"], ["EMPTY"], ["OTHER"], ["--out=a/b/c.png"]]
)
def test_command_line_complains_in_one_line(args, capsys, tmp_path):
    single_run(tmp_path / "EMPTY", [], None)
    single_run(tmp_path / "OTHER", [{"run": "noise", "round": 1}], None)
    if args[:1] == ["--out=a/b/c.png"]:
        single_run(tmp_path / "DONE", made_up(), None)
        args = [*args, "DONE"]
    args = [str(tmp_path / arg) if arg.isupper() else arg for arg in args]
    assert plot.main(["plot", *args]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert args == [] or args[0].strip("-=x").replace("=a", "='a") in said
