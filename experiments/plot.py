"""Figure 1 of the source, and `python -m experiments.plot` to set several runs side by side."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from absl import flags
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from noisefl.config import refuse

Row = dict[str, Any]

# Okabe and Ito's palette, told apart by colour-blind readers; line styles and markers tell the
# lines apart in grey.
BLACK, GREY, BLUE, VERMILION, GREEN, PURPLE = (
    "#000000", "#777777", "#0072B2", "#D55E00", "#009E73", "#CC79A7",
)  # fmt: skip
STYLES: dict[str, dict[str, Any]] = {
    "fedavg": {"color": BLACK, "ls": (0, (5, 2)), "lw": 1.4, "label": "FedAvg"},
    "owner": {"color": BLUE, "lw": 2.2, "label": "owner G"},
    "base": {"color": BLUE, "ls": ":", "lw": 1.1, "label": "base W"},
    "plus": {"color": VERMILION, "lw": 1.1, "marker": "^", "ms": 4, "label": "shared W + ξ"},
    "minus": {"color": GREEN, "lw": 1.1, "marker": "v", "ms": 4, "label": "shared W − ξ"},
    "cap": {"color": PURPLE, "ls": "-.", "lw": 1.2, "label": "cap"},
    "infeasible": {"color": BLACK, "ls": "", "marker": "x", "ms": 6, "mew": 1.4,
                   "label": "cap not held (infeasible)"},
}  # fmt: skip
_SIZES: dict[Any, Any] = {
    "font.size": 9,
    "axes.labelsize": 9,
    "legend.fontsize": 8,
    "axes.titlesize": 10,
}


class Panel(NamedTuple):
    """One run folder's worth: a column of the picture."""

    title: str
    rows: Sequence[Row]
    cap: float
    noise_scale: str


def figure1(
    rows: Sequence[Row], cap: float, path: str | Path, noise_scale: str = "absolute"
) -> None:
    """Draws accuracy against the round, and below it the noise's strength and the tries it took.

    Args:
      rows: of `metrics.jsonl`, of both runs.
      cap: as a share of 1.
      path: a .png file.
      noise_scale: of `Config`: whether strengths are σ or r = σ/RMS.
    """
    draw([Panel("", rows, cap, noise_scale)]).savefig(path)


def draw(panels: Sequence[Panel]) -> Figure:
    """`figure1` of one run or of several side by side, with shared axes."""
    width = 7.0 if len(panels) == 1 else 1.0 + 3.6 * len(panels)
    with matplotlib.rc_context(_SIZES):
        figure = Figure(figsize=(width, 5.0), dpi=300, layout="constrained")
        FigureCanvasAgg(figure)
        same_unit = len({panel.noise_scale for panel in panels}) == 1
        axes = figure.subplots(
            2, len(panels), squeeze=False, sharex=True, height_ratios=(2.6, 1),
        )  # fmt: skip
        strengths = [_column(_noised(panel.rows), "strength") for panel in panels]
        tries = [_column(_noised(panel.rows), "calibration_tries") for panel in panels]
        for column, panel in enumerate(panels):
            accuracy, strength = axes[:, column]
            if column:
                accuracy.sharey(axes[0, 0])
                if same_unit:
                    strength.sharey(axes[1, 0])
            _draw_accuracy(accuracy, panel)
            bars = _draw_strength(strength, panel, first=column == 0 or not same_unit)
            own = tries if same_unit else [tries[column]]
            bars.set_ylim(0, 1.05 * max([1.0, *np.concatenate(own)]))
            if panel is panels[-1] or not same_unit:
                bars.set_ylabel("tries (bars)", color=GREY)
            if _spans_decades(strengths if same_unit else [strengths[column]]):
                strength.set_yscale("log")
            else:
                strength.set_ylim(bottom=0)
            accuracy.set_title(panel.title)
            accuracy.label_outer()
        axes[0, 0].set_ylabel("test accuracy")
        axes[0, 0].set_xlim(0.5, max(row["round"] for panel in panels for row in panel.rows) + 0.5)
        figure.legend(
            handles=_legend(), loc="outside upper center", ncols=4, frameon=False,
            handlelength=2.6, columnspacing=1.6,
        )  # fmt: skip
        return figure


def _draw_accuracy(axes: Axes, panel: Panel) -> None:
    noise = [row for row in panel.rows if row["run"] == "noise" and row["finite"]]
    baseline = [row for row in panel.rows if row["run"] == "fedavg"]
    every = max(len(noise) // 30, 1)  # markers of 100 rounds would merge
    _shade_warmup(axes, noise)
    axes.axhline(panel.cap, **STYLES["cap"])
    axes.plot(_column(baseline, "round"), _column(baseline, "owner_accuracy"), **STYLES["fedavg"])
    for name in ("base", "owner"):
        axes.plot(_column(noise, "round"), _column(noise, f"{name}_accuracy"), **STYLES[name])
    for name in ("plus", "minus"):
        shared = [row for row in noise if row["protected"]]
        (line,) = axes.plot(
            _column(shared, "round"), _column(shared, f"{name}_accuracy"), **STYLES[name]
        )
        line.set_markevery(every)
    failed = [row for row in noise if row["protected"] and not row["feasible"]]
    worse = np.fmax(_column(failed, "plus_accuracy"), _column(failed, "minus_accuracy"))
    axes.plot(_column(failed, "round"), worse, zorder=5, **STYLES["infeasible"])
    for row in panel.rows:  # a dead model's accuracy is 0, and no result
        if not row["finite"]:
            axes.axvline(row["round"], color=BLACK, lw=1.0, ls=(0, (1, 1.5)))
            who = "FedAvg" if row["run"] == "fedavg" else "W"
            axes.annotate(
                f"{who} is NaN", (row["round"], 0.03), xytext=(3, 0), textcoords="offset points",
                fontsize="small",
            )  # fmt: skip
    axes.set_ylim(0, 1.02)
    axes.grid(color="0.9", lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_strength(axes: Axes, panel: Panel, first: bool) -> Axes:
    """The strength as a line; the tries as bars on the second axis, which is returned."""
    noised = _noised(panel.rows)
    _shade_warmup(axes, [row for row in panel.rows if row["run"] == "noise"])
    rounds, strength = _column(noised, "round"), _column(noised, "strength")
    axes.plot(rounds, strength, color=BLACK, lw=1.2, marker="o", ms=2.2)
    failed = [row for row in noised if not row["feasible"]]
    axes.plot(
        _column(failed, "round"), _column(failed, "strength"), zorder=5, **STYLES["infeasible"]
    )
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    if first:
        axes.set_ylabel("noise σ" if panel.noise_scale == "absolute" else "noise σ / RMS")
    axes.grid(color="0.9", lw=0.6)
    axes.spines["top"].set_visible(False)
    bars = axes.twinx()
    bars.bar(rounds, _column(noised, "calibration_tries"), width=0.6, color="0.84")
    bars.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    bars.tick_params(axis="y", colors=GREY)
    bars.spines["top"].set_visible(False)
    bars.set_zorder(0)  # behind the line
    axes.set_zorder(1)
    axes.patch.set_visible(False)
    return bars


def _shade_warmup(axes: Axes, noise: Sequence[Row]) -> None:
    """The rounds without protection, in which clients hold the clean model."""
    for row in noise:
        if not row["protected"]:
            axes.axvspan(row["round"] - 0.5, row["round"] + 0.5, color="0.93", lw=0, zorder=0)


def _legend() -> list[Any]:
    lines = [Line2D([], [], **style) for style in STYLES.values()]
    return [*lines, Patch(color="0.93", label="warm-up, no noise")]


def _noised(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["run"] == "noise" and row["protected"]]


def _column(rows: Sequence[Row], name: str) -> np.ndarray:
    """[rows], NaN for null."""
    return np.array([row[name] for row in rows], float)


def _spans_decades(strengths: Sequence[np.ndarray]) -> bool:
    every = np.concatenate(strengths)
    every = every[every > 0]
    return len(every) > 0 and every.max() > 30 * every.min()


def read_panel(folder: Path) -> Panel:
    """The run in a folder; its title is the folder's name.

    Raises:
      ValueError: the folder holds no run.
    """
    try:
        options = json.loads((folder / "config.json").read_text())["options"]
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
    except (OSError, ValueError, KeyError) as error:
        raise refuse("folder", str(folder), f"holds no run ({error})") from None
    return Panel(folder.resolve().name, rows, options["cap"], options["noise_scale"])


def main(argv: list[str]) -> int:
    """Runs one command line; returns the exit code."""
    values = flags.FlagValues()
    flags.DEFINE_string("out", "figure.png", "the picture to write", flag_values=values)
    values.set_gnu_getopt()  # flags may follow the folders
    try:
        folders = values(argv)[1:]
        if not folders:
            raise ValueError("usage: python -m experiments.plot FOLDER … [--out=figure.png]")
        draw([read_panel(Path(folder)) for folder in folders]).savefig(str(values["out"].value))
    except (ValueError, OSError, flags.Error) as error:
        print("experiments.plot:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
