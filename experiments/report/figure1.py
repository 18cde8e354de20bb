"""Figure 1 of the source: accuracy against the round, and below it the noise and what it took."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.report.results import DAMAGED, Frame, Row, option, rounds
from noisefl.errors import refuse

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
    "shared": {"color": VERMILION, "lw": 1.1, "marker": "D", "ms": 3,
               "label": "highest shared copy"},
    "cap": {"color": PURPLE, "ls": "-.", "lw": 1.2, "label": "cap"},
    "one_copy": {"color": VERMILION, "ls": "", "marker": "*", "ms": 10, "mec": BLACK, "mew": 0.6,
                 "clip_on": False, "zorder": 6, "label": "best thief, one copy"},
    "coalition": {"color": GREEN, "ls": "", "marker": "P", "ms": 8, "mec": BLACK, "mew": 0.6,
                  "clip_on": False, "zorder": 6, "label": "best thief, two clients"},
    "scratch": {"color": GREY, "ls": "", "marker": "s", "ms": 6, "mec": BLACK, "mew": 0.6,
                "clip_on": False, "zorder": 6, "label": "one client without a copy"},
    "infeasible": {"color": BLACK, "ls": "", "marker": "x", "ms": 6, "mew": 1.4,
                   "label": "cap not held (infeasible)"},
    "warm-up": {"color": "0.93", "lw": 0, "zorder": 0, "label": "warm-up, no noise"},
}  # fmt: skip
SIZES: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9,
    "legend.fontsize": 8,
    "text.parse_math": False,  # --noise_layers or a folder's name may hold a $
}


class Panel(NamedTuple):
    """One run folder's worth: a column of the picture."""

    title: str
    rows: Sequence[Row]
    cap: float | None
    noise_scale: str
    thieves: Row | None = None  # of summary.json


def figure1(
    rows: Sequence[Row], cap: float | None, path: str | Path, noise_scale: str = "absolute",
    thieves: Row | None = None,
) -> None:  # fmt: skip
    """Draws accuracy against the round, and below it the noise's strength and the tries it took.

    Args:
      rows: of `metrics.jsonl`, of both runs.
      cap: as a share of 1; None where nothing is capped.
      path: a .png file.
      noise_scale: of `noise.Where`: whether strengths are σ or r = σ/RMS.
      thieves: of summary.json: what they come to in the end, drawn at the right edge.

    Raises:
      ValueError: no rows, or without what is drawn.
    """
    draw([Panel("", rows, cap, noise_scale, thieves)]).savefig(path, format="png")


def read_panel(folder: Path) -> Panel:
    """The run in a folder; its title is the folder's name.

    Raises:
      ValueError: the folder holds no run.
    """
    try:
        options = json.loads((folder / "config.json").read_text())["options"]
        summary = folder / "summary.json"
        thieves = json.loads(summary.read_text()).get("thieves") if summary.exists() else None
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        cap, scale = option(options, "cap"), option(options, "noise_scale", "absolute")
        rounds(rows)
        if not isinstance(scale, str) or not isinstance(cap, float | int | None):
            raise TypeError(f"noise_scale is {scale!r}, cap is {cap!r}")
    except DAMAGED as error:
        raise refuse("folder", str(folder), f"holds no run ({error!r})") from None
    names = folder.resolve().parts
    title = ", ".join(names[-2:] if names[-1].startswith("seed=") else names[-1:])
    return Panel(title, rows, cap, scale, thieves)


@matplotlib.rc_context(SIZES)
def draw(panels: Sequence[Panel]) -> Figure:
    """`figure1` of one run or of several side by side, with shared axes."""
    figure = blank(7.0 if len(panels) == 1 else 1.0 + 3.6 * len(panels), 5.0, 300)
    axes = figure.subplots(2, len(panels), squeeze=False, sharex=True, height_ratios=(2.6, 1))
    same_unit = len({panel.noise_scale for panel in panels}) == 1
    frames = [rounds(panel.rows) for panel in panels]
    noised = [frame[(frame["run"] == "noise") & frame["protected"]] for frame in frames]
    for column, (panel, frame) in enumerate(zip(panels, frames, strict=True)):
        accuracy, strength = axes[:, column]
        if column:
            accuracy.sharey(axes[0, 0])
        if column and same_unit:
            strength.sharey(axes[1, 0])
        _draw_accuracy(accuracy, frame, panel.cap)
        _draw_thieves(accuracy, panel.thieves, frame["round"].max())
        bars = _draw_strength(strength, frame, noised[column])
        alike: Frame = pd.concat(noised if same_unit else [noised[column]])
        bars.set_ylim(0, 1.05 * np.fmax(alike["calibration_tries"].max(), 1))
        if column == 0 or not same_unit:
            strength.set_ylabel("noise σ" if panel.noise_scale == "absolute" else "noise σ / RMS")
        if column == len(panels) - 1 or not same_unit:
            bars.set_ylabel("tries (bars)", color=GREY)
        above = alike["strength"][alike["strength"] > 0]
        if above.max() > 30 * above.min():  # NaN of none is no decades
            strength.set_yscale("log")
        else:
            strength.set_ylim(0, 1.1 * np.fmax(alike["strength"].max(), 1e-6))
        accuracy.set_title(panel.title)
        accuracy.label_outer()
    axes[0, 0].set_ylabel("test accuracy")
    axes[0, 0].set_xlim(0.5, max(frame["round"].max() for frame in frames) + 0.5)
    drawn = [artist for one in axes[0] for artist in [*one.lines, *one.patches]]
    by_label = {artist.get_label(): artist for artist in drawn if _seen(artist)}
    labels = [style["label"] for style in STYLES.values() if style["label"] in by_label]
    figure.legend(
        handles=[by_label[label] for label in labels], loc="outside upper center", ncols=4,
        frameon=False, handlelength=2.6, columnspacing=1.6,
    )  # fmt: skip
    return figure


def blank(width: float, height: float, dpi: int = 200) -> Figure:
    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def clean(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    axes.grid(color="0.9", lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _seen(artist: Any) -> bool:
    """The legend names what at least one panel shows."""
    return not hasattr(artist, "get_ydata") or bool(np.isfinite(artist.get_ydata()).any())


def _draw_accuracy(axes: Axes, frame: Frame, cap: float | None) -> None:
    alive = frame[frame["finite"]]  # a dead model's accuracy is 0, and no result
    noise, fedavg = (alive[alive["run"] == kind] for kind in ("noise", "fedavg"))
    _shade_warm_up(axes, noise)
    if cap is not None:
        axes.axhline(cap, **STYLES["cap"])
    dot = "." if frame["round"].max() == 1 else None  # a line has two ends
    axes.plot(fedavg["round"], fedavg["owner_accuracy"], marker=dot, **STYLES["fedavg"])
    for name in ("base", "owner"):
        axes.plot(noise["round"], noise[f"{name}_accuracy"], marker=dot, **STYLES[name])
    protected = noise[noise["protected"]]
    every = max(len(noise) // 30, 1)  # markers of 100 rounds would merge
    for name in ("plus", "minus") if noise["plus_accuracy"].notna().any() else ("shared",):
        shared = protected[f"{name}_accuracy"].where(protected["shipped"])
        axes.plot(protected["round"], shared, markevery=every, **STYLES[name])
    failed = protected[~protected["feasible"]]
    axes.plot(failed["round"], failed["shared_accuracy"], zorder=5, **STYLES["infeasible"])
    for kind, dead in frame[~frame["finite"]].groupby("run")["round"].min().items():
        axes.axvline(dead, color=BLACK, lw=1.0, ls=(0, (1, 1.5)))
        axes.annotate(
            f"{'FedAvg' if kind == 'fedavg' else 'W'} is NaN", (dead, 0.03), xytext=(3, 0),
            textcoords="offset points", fontsize="small",
        )  # fmt: skip
    clean(axes)
    axes.set_ylim(0, 1.02)


def _draw_thieves(axes: Axes, stolen: Row | None, last: int) -> None:
    """At the last round, side by side: figures that lie on each other would hide each other."""
    if stolen is None:
        return
    two = next((row for row in stolen["coalitions"] if row["members"] == 2), None)
    found = {
        "scratch": stolen["scratch"].get("1"),
        "one_copy": stolen["one_copy"]["accuracy"],
        "coalition": two and two["accuracy"],
    }
    for place, (name, accuracy) in enumerate(found.items()):
        if accuracy is not None:
            axes.plot([last + 0.022 * last * (place - 0.5)], [accuracy], **STYLES[name])


def _draw_strength(axes: Axes, frame: Frame, noised: Frame) -> Axes:
    """The strength as a line; the tries as bars on the second axis, which is returned."""
    _shade_warm_up(axes, frame[frame["run"] == "noise"])
    axes.plot(noised["round"], noised["strength"], color=BLACK, lw=1.2, marker="o", ms=2.2)
    failed = noised[~noised["feasible"]]
    axes.plot(failed["round"], failed["strength"], zorder=5, **STYLES["infeasible"])
    axes.set_xlabel("round")
    clean(axes)
    bars = axes.twinx()
    bars.bar(noised["round"], noised["calibration_tries"], width=0.6, color="0.84")
    bars.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    bars.tick_params(axis="y", colors=GREY)
    bars.spines["top"].set_visible(False)
    bars.set_zorder(0)  # behind the line
    axes.set_zorder(1)
    axes.patch.set_visible(False)
    return bars


def _shade_warm_up(axes: Axes, noise: Frame) -> None:
    """The rounds without protection, in which clients hold the clean model."""
    bare = noise.loc[~noise["protected"], "round"]
    for _, block in bare.groupby((bare.diff() != 1).cumsum()):
        axes.axvspan(block.min() - 0.5, block.max() + 0.5, **STYLES["warm-up"])
