"""Pictures of a sweep: the accuracies of its configurations by round, and its comparisons."""

import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from experiments.plot import STYLES, VERMILION
from experiments.plot_comparison import cost_against_violations, owner_against_cap
from experiments.sweep_canvas import SIZES, blank, caption, clean, left_out
from experiments.sweep_results import Configuration, Row, Run, Sweep, rounds

MOST_PANELS = 6
OWNER, FEDAVG, CAP = STYLES["owner"], STYLES["fedavg"], STYLES["cap"]
HIGHER = {"color": VERMILION, "lw": 1.2, "label": "higher of the two shared copies"}


@matplotlib.rc_context(SIZES)
def accuracies(sweep: Sweep) -> Figure | None:
    """A panel a configuration: medians over its seeds, with bands from lowest to highest.

    Raises:
      ValueError: a metrics.jsonl is missing or damaged.
    """
    drawable = [one for one in sweep.configurations if one.sound]
    if not drawable:
        return None
    drawn = drawable[:MOST_PANELS]
    across = 2 if len(drawn) == 4 else min(len(drawn), 3)
    down = -(-len(drawn) // across)
    figure = blank(max(0.8 + 3.0 * across, 7.0), 1.3 + 2.7 * down)
    panels = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True).ravel()
    for place, one in enumerate(drawn):
        axes = panels[place]
        _draw_accuracies(axes, sweep, one)
        if place % across == 0:
            axes.set_ylabel("accuracy on test, %")
        if place + across >= len(drawn):  # nothing below it
            axes.set_xlabel("round")
            axes.tick_params(labelbottom=True)
    for axes in panels[len(drawn) :]:
        axes.remove()
    figure.legend(
        handles=[Line2D([], [], **style) for style in (OWNER, FEDAVG, HIGHER, CAP)],
        title="lines: medians over the seeds that did not fail (NaN); bands: lowest to highest",
        loc="outside upper center", ncols=4, frameon=False, handlelength=2.6,
    )  # fmt: skip
    caption(figure, left_out([one.label for one in drawable], MOST_PANELS))
    return figure


def _draw_accuracies(axes: Axes, sweep: Sweep, one: Configuration) -> None:
    fedavg = {run.path: run for run in map(sweep.baseline, one.sound) if run is not None}
    axes.axhline(100 * one.sound[0].cap, **CAP)
    _draw_band(axes, _curves(sweep, fedavg.values(), _owner), FEDAVG)
    both = _curves(sweep, one.sound, lambda row: (_owner(row), _higher(row)))
    for at, look in enumerate((OWNER, HIGHER)):
        _draw_band(axes, [{t: pair[at] for t, pair in curve.items()} for curve in both], look)
    title = textwrap.wrap(one.label, 42)
    failed, seeds = len(one.runs) - len(one.sound), len(one.sound)
    counts = ["1 seed" if seeds == 1 else f"{seeds} seeds"]
    counts += [f"{failed} more failed"] if failed else []
    counts += [f"{one.unfinished} unfinished"] if one.unfinished else []
    axes.set_title("\n".join([*title, ", ".join(counts)]))
    axes.set_ylim(0, 102)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    clean(axes)


def _owner(row: Row) -> float:
    return _number(row["owner_accuracy"])


def _higher(row: Row) -> float:
    """NaN in a round that distributed no degraded copy."""
    if not (row["protected"] and row["shipped"]):
        return np.nan
    return float(np.fmax(_number(row["plus_accuracy"]), _number(row["minus_accuracy"])))


def _number(value: float | None) -> float:
    return np.nan if value is None else value


def _curves(sweep: Sweep, runs: Iterable[Run], value: Callable[[Row], Any]) -> list[dict[int, Any]]:
    """Values by round, a curve a run."""
    return [{row["round"]: value(row) for row in rounds(sweep.folder, run)} for run in runs]


def _draw_band(axes: Axes, curves: Sequence[dict[int, float]], look: Row) -> None:
    """Of each round over the seeds that have a value then; a gap where none has."""
    at = sorted(set[int]().union(*curves))
    values = [[curve[t] for curve in curves if np.isfinite(curve.get(t, np.nan))] for t in at]
    low, middle, high = (
        [100 * float(of(some)) if some else np.nan for some in values]
        for of in (np.min, np.median, np.max)
    )
    axes.fill_between(at, low, high, color=look["color"], alpha=0.22, lw=0)
    axes.plot(at, middle, **look)


# The files of a report. A function gives None where there is nothing to draw.
PICTURES: dict[str, Callable[[Sweep], Figure | None]] = {
    "figure1.png": accuracies,
    "owner_against_cap.png": owner_against_cap,
    "cost_against_violations.png": cost_against_violations,
}
