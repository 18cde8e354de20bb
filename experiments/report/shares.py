"""The picture of what schemes protect: the share of the model that each thief has, at one look."""

from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.report.figure1 import GREY, SIZES, blank
from experiments.report.owners import SEEN, of_most_seeds

Frame = Any

COLOURS = {"V1": "#0072b2", "V2": "#56b4e9", "V3": "#d55e00", "V4": "#cc79a7"}
MARKERS = {"V1": "o", "V2": "^", "V3": "s", "V4": "D"}
EDGE = 0.3  # beyond 0 and 1 what a thief has is drawn at the edge


@matplotlib.rc_context(SIZES)
def picture(best: Frame, said: str) -> Figure:
    """λ of the best thief with its interval: a row a scheme, a panel a partition.

    Args:
      best: of `frontier.best_thieves`, of one data set, model and population; of each scheme its
        middle strength counts. Of coalitions of one round the smallest is shown, of all rounds the
        largest.
      said: of what it is, for those who do not see it.
    """
    best = best[(best["scheme"] != "none") & (best["view"] != "V5")]
    schemes = list(dict.fromkeys(best["scheme"]))
    partitions = list(dict.fromkeys(best["partition"]))
    of_view = best.groupby("view")["members"]
    members = {**of_view.max().to_dict(), **{"V3": int(of_view.min().get("V3", 0))}}
    views = [(view, members[view]) for view in MARKERS if members.get(view)]
    figure = blank(3.2 + 2.9 * len(partitions), 1.1 + 0.62 * len(schemes), 150)
    figure.set_label(said)
    panels = figure.subplots(1, len(partitions), squeeze=False)[0]
    for axes, partition in zip(panels, partitions, strict=True):
        some = best[best["partition"] == partition]
        labels = []
        for row, scheme in enumerate(schemes):
            curve = some[some["scheme"] == scheme]
            strengths = sorted(set(curve["strength"].dropna()))
            if strengths:
                curve = curve[curve["strength"] == strengths[len(strengths) // 2]]
            labels.append(f"{scheme}\n{_owner(curve)}" if len(curve) else scheme)
            for place, (view, number) in enumerate(views):
                of = curve[(curve["view"] == view) & (curve["members"] == number)]
                if len(of):
                    _point(axes, row + 0.16 * (place - (len(views) - 1) / 2), view, of.iloc[0])
            if curve["lambda"].isna().all():
                why = _why(curve.iloc[0]) if len(curve) else "not run"
                axes.text(0.5, row, why, color=GREY, ha="center", va="center", fontsize=8)
        axes.set_yticks(range(len(schemes)), labels, fontsize=8)
        axes.set_ylim(len(schemes) - 0.5, -0.5)
        axes.set_xlim(-EDGE, 1 + EDGE)
        for x in (0, 1):
            axes.axvline(x, color=GREY, lw=0.8, zorder=0)
        axes.set_title(f"{partition}: FedAvg {_percent(of_most_seeds(some)['fedavg'])}")
        axes.set_xlabel("λ: 0 nothing is stolen, 1 all of it")
    handles = [
        Line2D([], [], color=COLOURS[view], marker=MARKERS[view], ls="", label=SEEN[view].format(n))
        for view, n in views
    ]
    said = "hollow: beyond the edge; none: no λ"
    handles.append(Line2D([], [], color=GREY, mfc="white", ls="", marker="o", label=said))
    wide = min(len(handles), 2 * len(partitions))
    figure.legend(handles=handles, loc="outside upper center", ncols=wide, frameon=False)
    return figure


def _point(axes: Axes, at: float, view: str, one: Any) -> None:
    """With its interval; what lies beyond an edge stands on it, hollow. Nothing where λ is not
    defined."""
    if np.isnan(one["lambda"]):
        return
    x = float(np.clip(one["lambda"], -EDGE, 1 + EDGE))
    low, high = np.clip([one["lambda_low"], one["lambda_high"]], -EDGE, 1 + EDGE)
    colour = COLOURS[view]
    if not np.isnan(low):
        axes.plot([low, high], [at, at], color=colour, lw=1)
    inside = x == one["lambda"]
    axes.plot(
        x, at, color=colour, marker=MARKERS[view], ms=5, mec=colour,
        mfc=colour if inside else "white", clip_on=False, zorder=3,
    )  # fmt: skip


def _why(first: Any) -> str:
    """What there is no λ for."""
    return "a run broke down" if first["failed"] else "nothing to steal: owner not above scratch"


def _owner(curve: Frame) -> str:
    """Accuracy of the protected owner, and how many of its runs broke down."""
    first = curve.iloc[0]
    said = f"owner {_percent(first['owner_of_rest'])}"
    return f"{said} ({first['failed']} of {first['seeds']} broke)" if first["failed"] else said


def _percent(share: float) -> str:
    return "–" if np.isnan(share) else f"{100 * share:.1f}"
