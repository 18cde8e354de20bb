"""The picture of what protection costs: the owner against the best thief of each view."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from experiments.report.figure1 import BLACK, GREY, SIZES, blank

Frame = Any

SEEN = {
    "V1": "one client, one round", "V2": "one client, all its rounds",
    "V3": "{} clients, one round", "V4": "{} clients, all their rounds",
    "V5": "{} clients, and the owner's answers",
}  # fmt: skip
# Okabe and Ito's palette and markers: told apart by colour-blind readers, and in grey.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vP*X<>hd"


@matplotlib.rc_context(SIZES)
def picture(best: Frame, schemes: Sequence[str], said: str) -> Figure:
    """A panel a partition and view, of the view's largest coalition; a curve a scheme.

    Args:
      best: of `frontier.best_thieves`, of one data set, model and population.
      schemes: all that the frontier has, so that each looks alike in all of its pictures.
      said: of what it is, for those who do not see it.
    """
    looks: dict[str, dict[str, Any]] = {
        name: {"color": COLOURS[n % len(COLOURS)], "marker": MARKERS[n % len(MARKERS)]}
        for n, name in enumerate(schemes)
    }
    views = list(best.groupby("view", sort=True)["members"].max().items())
    partitions = list(dict.fromkeys(best["partition"]))
    figure = blank(1.2 + 2.5 * len(views), 1.3 + 2.3 * len(partitions), 150)
    figure.set_label(said)
    axes = figure.subplots(len(partitions), len(views), squeeze=False, sharey="row")
    for row, partition in enumerate(partitions):
        for column, (view, members) in enumerate(views):
            some = best[
                (best["partition"] == partition) & (best["view"] == view)
                & (best["members"] == members)
            ]  # fmt: skip
            _panel(axes[row, column], some, looks)
            if row == 0:
                axes[row, column].set_title(f"{view}: {SEEN[view].format(members)}")
            if row == len(partitions) - 1:
                axes[row, column].set_xlabel("best thief T, test accuracy")
        axes[row, 0].set_ylabel(f"{partition}\nowner O, test accuracy")
    handles = [Line2D([], [], lw=1.2, ms=5, label=name, **looks[name]) for name in schemes]
    handles += [
        Line2D([], [], color=BLACK, ls=(0, (5, 2)), lw=1, label="FedAvg's owner"),
        Line2D([], [], color=GREY, ls=":", lw=1, label="the server alone"),
        Line2D([], [], color=GREY, ls="-", lw=0.8, label="T = O: all is stolen"),
        Patch(color="0.88", label="scratch S: nothing is stolen"),
    ]
    if best["failed"].any():
        rest = "O without the runs that broke"
        handles.append(Line2D([], [], color=GREY, ls="", marker="o", mfc="white", label=rest))
    wide = min(5, 1 + len(views))
    figure.legend(handles=handles, loc="outside upper center", ncols=wide, frameon=False)
    return figure


def of_most_seeds(best: Frame) -> Any:
    """The row of a curve with the most seeds: FedAvg and the server alone are the same of every
    curve, but for seeds that some of them have not."""
    return best.sort_values("seeds", kind="stable").iloc[-1]


def _panel(axes: Axes, some: Frame, looks: Mapping[str, dict[str, Any]]) -> None:
    low = np.nanmin([some["scratch_low"].min(), some["thief_accuracy"].min()]) - 0.03
    span = (
        some["scratch_low"].min(),
        max(some["scratch_high"].max(), some["scratch_low"].min() + 0.004),
    )
    axes.axvspan(*span, color="0.88", lw=0, zorder=0)
    controls = of_most_seeds(some)
    axes.axhline(controls["fedavg"], color=BLACK, ls=(0, (5, 2)), lw=1)
    axes.axhline(controls["server_alone"], color=GREY, ls=":", lw=1)
    axes.plot([0, 1], [0, 1], color=GREY, lw=0.8, zorder=1)
    for name, look in looks.items():
        curve = some[some["scheme"] == name].sort_values("strength")
        axes.plot(curve["thief_accuracy"], curve["owner"], lw=1.2, ms=5, **look)
        broke = curve[curve["owner"].isna()]
        if len(broke):
            axes.plot(
                broke["thief_accuracy"], broke["owner_of_rest"], ls="", ms=5, mfc="white", **look
            )
    axes.set_xlim(max(low, 0), 1.005)
    lowest = (
        some[["owner_of_rest", "fedavg", "server_alone"]].min().min()
    )  # of those that did not break
    axes.set_ylim(max(lowest - 0.03, 0), 1.005)
    axes.grid(color="0.93", lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
