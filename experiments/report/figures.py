"""Pictures of a sweep: accuracies by round, and configurations side by side. Each is None where
there is nothing to compare."""

import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter
from scipy import stats

from experiments.report import figure1, results
from experiments.report.figure1 import BLACK, BLUE, GREEN, GREY, PURPLE, STYLES, VERMILION
from experiments.report.results import Frame, Sweep, describe, last_part

MOST_PANELS, MOST_LINES = 6, 8
MOST_NAMED = 4  # of those left out; report.md has all
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, "#E69F00", "#56B4E9", GREY, BLACK)  # one palette
MARKERS = "osD^v<>P"


@matplotlib.rc_context(figure1.SIZES)
def accuracies(sweep: Sweep, _: Frame) -> Figure | None:
    """A panel a configuration: medians over its seeds, with bands from lowest to highest.

    Raises:
      ValueError: a metrics.jsonl is missing or damaged.
    """
    groups = sweep.noise.groupby("configuration", sort=False)
    drawable = [runs for name, runs in groups if name in set(sweep.sound["configuration"])]
    if not drawable:
        return None
    drawn = drawable[:MOST_PANELS]
    across = 2 if len(drawn) == 4 else min(len(drawn), 3)
    down = -(-len(drawn) // across)
    figure = figure1.blank(max(0.8 + 3.0 * across, 7.0), 1.3 + 2.7 * down)
    panels = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True).ravel()
    for place, runs in enumerate(drawn):
        _draw_accuracies(panels[place], sweep, runs)
        if place % across == 0:
            panels[place].set_ylabel("accuracy on test, %")
        if place + across >= len(drawn):  # nothing below it
            panels[place].set_xlabel("round")
            panels[place].tick_params(labelbottom=True)
    for axes in panels[len(drawn) :]:
        axes.remove()
    styles = [STYLES[name] for name in ("owner", "fedavg", "shared", "cap")]
    figure.legend(
        handles=[Line2D([], [], **style) for style in styles],
        title="lines: medians over the seeds that did not fail (NaN); bands: lowest to highest",
        loc="outside upper center", ncols=4, frameon=False, handlelength=2.6,
    )  # fmt: skip
    _caption(figure, _left_out([runs["label"].iloc[0] for runs in drawable], MOST_PANELS))
    return figure


def _draw_accuracies(axes: Axes, sweep: Sweep, runs: Frame) -> None:
    axes.axhline(100 * runs["cap"].iloc[0], **STYLES["cap"])
    sound = sweep.sound[sweep.sound.index.isin(runs.index)]
    fedavg = [_curves(run)["owner"] for _, run in _beside(sweep, sound).iterrows()]
    noise = [_curves(run) for _, run in sound.iterrows()]
    bands = {name: [one[name] for one in noise] for name in ("owner", "shared")}
    for name, curves in {"fedavg": fedavg, **bands}.items():  # a gap where no seed has a value
        seeds, look = pd.DataFrame(dict(enumerate(curves)), dtype=float), STYLES[name]
        low, high, every = seeds.min(axis=1), seeds.max(axis=1), max(len(seeds) // 15, 1)
        axes.fill_between(seeds.index, low, high, color=look["color"], alpha=0.22, lw=0)
        axes.plot(seeds.index, seeds.median(axis=1), markevery=every, **look)
    counts = ["1 seed" if len(sound) == 1 else f"{len(sound)} seeds"]
    for of, some in (("more failed", runs["failed"]), ("unfinished", ~runs["complete"])):
        counts += [f"{some.sum()} {of}"] if some.any() else []
    axes.set_title("\n".join([*textwrap.wrap(runs["label"].iloc[0], 42), ", ".join(counts)]))
    figure1.clean(axes)
    axes.set_ylim(0, 102)


def _beside(sweep: Sweep, runs: Frame) -> Frame:
    """The sound FedAvg runs beside some noise runs."""
    return sweep.sound[sweep.sound.index.isin(runs["baseline"])]


def _curves(run: Any) -> Frame:
    """Percent by round; NaN in a round that distributed no degraded copy."""
    table = results.rounds(list(results.rows(run["folder"], run["run"]))).set_index("round")
    shared = table["shared_accuracy"].where(table["protected"] & table["shipped"])
    return 100 * pd.DataFrame({"owner": table["owner_accuracy"], "shared": shared})


@matplotlib.rc_context(figure1.SIZES)
def owner_against_cap(sweep: Sweep, table: Frame) -> Figure | None:
    """The owner's last accuracy with 95 % intervals, a line a combination of the other flags."""
    known = table[table["owner_accuracy_mean"].notna()]
    caps = 100 * np.unique(known["cap"].astype(float))
    if "cap" not in map(last_part, sweep.flags) or len(caps) < 2:
        return None
    labels = [describe(line, "cap") or "owner" for line in known[sweep.flags].to_dict("records")]
    lines = list(known.assign(label=labels).groupby("label", sort=False))
    drawn = lines[:MOST_LINES]
    figure = figure1.blank(7.5, 4.2 + 0.1 * len(drawn))
    axes = figure.subplots()
    _draw_fedavg(axes, sweep, [line.index for _, line in drawn])
    for place, (label, line) in enumerate(drawn):
        line = line.sort_values("cap")
        aside = 0.006 * np.ptp(caps) * (place - (len(drawn) - 1) / 2)
        axes.errorbar(
            100 * line["cap"].astype(float) + aside, 100 * line["owner_accuracy_mean"],
            yerr=100 * line["owner_accuracy_ci95"], ms=5, lw=1.3, capsize=3,
            color=COLOURS[place], marker=MARKERS[place], label=label,
        )  # fmt: skip
    figure1.clean(axes)
    axes.set_ylim(max(axes.get_ylim()[0], -2), min(axes.get_ylim()[1], 102))
    if len(caps) <= 10:
        axes.set_xticks(caps, [f"{cap:g}" for cap in caps])
    axes.set_xlabel("cap on the accuracy of shared copies, %")
    axes.set_ylabel("owner's accuracy on test\nafter the last round, %")
    axes.set_title("Means over the seeds; bars: 95 % intervals (Student's t), none for one seed")
    figure.legend(loc="outside upper center", ncols=2, frameon=False, handlelength=2.6)
    apart = "Lines are set apart sideways, so that their intervals do not hide each other."
    notes = [apart] if len(drawn) > 1 else []
    _caption(figure, " ".join([*notes, _left_out([label for label, _ in lines], MOST_LINES)]))
    return figure


def _draw_fedavg(axes: Axes, sweep: Sweep, lines: Sequence[Any]) -> None:
    """A dashed line for each FedAvg that stands beside these lines: black if it is the only one,
    else with the colour and the marker of the first line beside it."""
    found: dict[Any, tuple[int, Frame]] = {}
    for place, configurations in enumerate(lines):
        noise = sweep.sound[sweep.sound["configuration"].isin(configurations)]
        for name, runs in _beside(sweep, noise).groupby("configuration", sort=False):
            found.setdefault(name, (place, runs))
    for place, runs in found.values():
        which = describe(runs["grid"].iloc[0], "seed")
        look: Any = STYLES["fedavg"] | {"label": f"FedAvg, {which}" if which else "FedAvg"}
        line = axes.axhline(100 * runs["owner_accuracy_final"].mean(), **look)
        if len(found) > 1:
            line.set(color=COLOURS[place], marker=MARKERS[place], ms=5, clip_on=False)


@matplotlib.rc_context(figure1.SIZES)
def cost_against_violations(sweep: Sweep, _: Frame) -> Figure | None:
    """Images forwarded a calibrated round against the share of rounds over the cap.

    The legend gives the owner's accuracy: a dead model would hold every cap.
    """
    noise = sweep.sound[sweep.sound["run"] == "noise"]
    names = [results.shown(results.option(grid, "calibrator")) for grid in noise["grid"]]
    groups = noise.assign(calibrator=names).groupby("calibrator", sort=False)
    pools = [(n, runs) for n, runs in groups if n and runs["protected_rounds"].sum()]
    if len(pools) < 2:
        return None
    figure = figure1.blank(8.5, 4.2)
    axes = figure.subplots()
    for place, (name, runs) in enumerate(pools):
        over, of = (int(runs[n].sum()) for n in ("rounds_over_cap_test", "protected_rounds"))
        rate, interval = over / of, stats.binomtest(over, of).proportion_ci(0.95, method="exact")
        owner = runs["owner_accuracy_final"].mean()
        axes.errorbar(
            max(runs["calibration_samples"].sum() / of, 1),  # a logarithmic axis has no 0
            100 * rate, yerr=[[100 * (rate - interval.low)], [100 * (interval.high - rate)]],
            fmt=MARKERS[place % len(MARKERS)], color=COLOURS[place % len(COLOURS)], capsize=3,
            label=f"{name}: owner {'–' if np.isnan(owner) else f'{100 * owner:.1f} %'},\n"
            f"{over:,} of {of:,} rounds over the cap, {len(runs)} runs",
        )  # fmt: skip
    figure1.clean(axes)
    axes.set_xscale("log")
    axes.margins(x=0.15)
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 50 * low else (1,)))
    axes.xaxis.set_major_formatter(lambda images, _: f"{images:,.0f}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yscale("symlog", linthresh=2)
    ticks = (0, 1, 2, 5, 10, 20, 50, 100)
    axes.set_yticks(ticks, [str(tick) for tick in ticks], minor=False)
    axes.set_ylim(-0.2, 120)
    axes.set_xlabel("images forwarded by calibration in a protected round, mean")
    axes.set_ylabel("protected rounds over the cap on test, %\n(logarithmic above 2 %)")
    figure.legend(loc="outside right upper", frameon=False, labelspacing=1.0)
    others = ", ".join(flag for flag in sweep.grid if last_part(flag) != "calibrator")
    pooled = f"Each mark pools all runs, over {others}. " if others else ""
    exact = "Bars: 95 % intervals of Clopper and Pearson, which take the rounds of a run as "
    _caption(figure, f"{pooled}{exact}independent.")
    return figure


def _left_out(names: Sequence[str], most: int) -> str:
    """Says which of the configurations are not drawn; empty if all are."""
    rest = names[most:]
    more = f"; and {len(rest) - MOST_NAMED} more" if len(rest) > MOST_NAMED else ""
    named = f"Left out: {'; '.join(rest[:MOST_NAMED])}{more}."
    return f"The first {most} of {len(names)}, in the order of the grid. {named}" if rest else ""


def _caption(figure: Figure, text: str) -> None:
    columns = int(17 * figure.get_figwidth())
    if text:
        figure.supxlabel(textwrap.fill(text, columns), x=0.01, ha="left", fontsize=8)


# The files of a report.
PICTURES: dict[str, Callable[[Sweep, Frame], Figure | None]] = {
    "figure1.png": accuracies,
    "owner_against_cap.png": owner_against_cap,
    "cost_against_violations.png": cost_against_violations,
}
