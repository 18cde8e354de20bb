"""Pictures that set the configurations of a sweep side by side. Each is None where the sweep has
no such comparison to show."""

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from matplotlib.transforms import offset_copy

from experiments.plot import BLACK, BLUE, GREEN, GREY, PURPLE, STYLES, VERMILION
from experiments.sweep_canvas import SIZES, blank, caption, clean, left_out
from experiments.sweep_results import Configuration, Run, Sweep, describe, digest, shown
from experiments.sweep_statistics import ci95, clopper_pearson, each, mean, pooled

MOST_LINES = 8
ORANGE, SKY = "#E69F00", "#56B4E9"  # of the same palette
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, GREY, BLACK)
MARKERS = "osD^v<>P"


@matplotlib.rc_context(SIZES)
def owner_against_cap(sweep: Sweep) -> Figure | None:
    """The owner's last accuracy with 95 % intervals, a line a combination of the other flags."""
    lines: dict[str, list[Configuration]] = {}
    for one in sweep.configurations:
        if "cap" in one.values and each(one.sound, "owner_accuracy"):
            others = {flag: value for flag, value in one.values.items() if flag != "cap"}
            lines.setdefault(describe(others) or "owner", []).append(one)
    caps = sorted({one.sound[0].cap for line in lines.values() for one in line})
    if len(caps) < 2:
        return None
    drawn = list(lines.items())[:MOST_LINES]
    figure = blank(7.5, 4.2 + 0.1 * len(drawn))
    axes = figure.subplots()
    heights = _draw_fedavg(axes, sweep, [line for _, line in drawn])
    for place, (label, line) in enumerate(drawn):
        aside = 3 * (place - (len(drawn) - 1) / 2)
        heights += _draw_owners(
            axes, line, color=COLOURS[place], marker=MARKERS[place], label=label,
            transform=offset_copy(axes.transData, figure, x=aside, units="points"),
        )  # fmt: skip
    # Matplotlib cannot see the limits of lines that are set apart.
    axes.set_xlim(*_around([100 * cap for cap in caps]))
    axes.set_ylim(*_around([min(max(height, 0), 100) for height in heights]))
    axes.set_xlabel("cap on the accuracy of shared copies, %")
    axes.set_ylabel("owner's accuracy on test\nafter the last round, %")
    axes.set_title("Means over the seeds; bars: 95 % intervals (Student's t), none for one seed")
    if len(caps) <= 10:
        axes.set_xticks([100 * cap for cap in caps], [f"{100 * cap:g}" for cap in caps])
    clean(axes)
    figure.legend(loc="outside upper center", ncols=2, frameon=False, handlelength=2.6)
    apart = "Lines are set apart sideways, so that their intervals do not hide each other."
    notes = [apart if len(drawn) > 1 else "", left_out(list(lines), MOST_LINES)]
    caption(figure, " ".join(note for note in notes if note))
    return figure


def _draw_owners(axes: Axes, line: Sequence[Configuration], **look: Any) -> list[float]:
    """Means with their intervals; returns the ends of these."""
    line = sorted(line, key=lambda one: one.sound[0].cap)
    owners = [each(one.sound, "owner_accuracy") for one in line]
    means = np.array([100 * float(np.mean(values)) for values in owners])
    ci95s = [ci95(values) for values in owners]
    halves = np.array([np.nan if half is None else 100 * half for half in ci95s])
    caps = [100 * one.sound[0].cap for one in line]
    axes.errorbar(caps, means, yerr=halves, ms=5, lw=1.3, capsize=3, **look)
    halves = np.nan_to_num(halves)
    return [*(means - halves), *(means + halves)]


def _draw_fedavg(axes: Axes, sweep: Sweep, lines: Sequence[Sequence[Configuration]]) -> list[float]:
    """A dashed line for each FedAvg that stands beside these lines: black if it is the only one,
    else in the colour of the first line beside it. Returns their heights."""
    found: dict[str, dict[str, Run]] = {}
    colours: dict[str, str] = {}
    for line, colour in zip(lines, COLOURS, strict=False):
        for run in (run for one in line for run in map(sweep.baseline, one.sound) if run):
            if run.summary["owner_accuracy"] is not None:
                found.setdefault(digest(run.path), {})[run.path] = run
                colours.setdefault(digest(run.path), colour)
    heights = []
    for name, runs in found.items():
        heights.append(100 * float(np.mean(each(runs.values(), "owner_accuracy"))))
        values = next(iter(runs.values())).values
        which = describe({flag: value for flag, value in values.items() if flag != "seed"})
        label = f"FedAvg, {which}" if which else "FedAvg"
        colour = BLACK if len(found) == 1 else colours[name]
        axes.axhline(heights[-1], **{**STYLES["fedavg"], "color": colour, "label": label})
    return heights


def _around(values: Sequence[float]) -> tuple[float, float]:
    """Limits that leave a margin."""
    margin = 0.08 * (max(values) - min(values)) or 1.0
    return min(values) - margin, max(values) + margin


@matplotlib.rc_context(SIZES)
def cost_against_violations(sweep: Sweep) -> Figure | None:
    """Images forwarded a calibrated round against the share of rounds over the cap.

    The legend gives the owner's accuracy: a dead model would hold every cap.
    """
    figure = blank(8.5, 4.2)
    axes = figure.subplots()
    marks = 0
    for name in sweep.grid.get("calibrator", []):
        alike = [one for one in sweep.configurations if one.values.get("calibrator") == name]
        runs = [run for one in alike for run in one.sound]
        rounds_, over, images = (
            pooled(runs, of)
            for of in ("protected_rounds", "rounds_over_cap", "calibration_samples")
        )
        if not rounds_:
            continue
        low, high = clopper_pearson(over, rounds_)
        rate = over / rounds_
        owner = mean(each(runs, "owner_accuracy"))
        axes.errorbar(
            max(images / rounds_, 1),  # a logarithmic axis has no 0
            100 * rate,
            yerr=[[100 * (rate - low)], [100 * (high - rate)]],
            fmt=MARKERS[marks % len(MARKERS)], color=COLOURS[marks % len(COLOURS)], capsize=3,
            label=f"{shown(name)}: owner {'–' if owner is None else f'{100 * owner:.1f} %'},\n"
            f"{over:,} of {rounds_:,} rounds over the cap, {len(runs)} runs",
        )  # fmt: skip
        marks += 1
    if marks < 2:
        return None
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
    clean(axes)
    figure.legend(loc="outside right upper", frameon=False, labelspacing=1.0)
    flags = [flag for flag in sweep.grid if flag != "calibrator"]
    over_flags = f"Each mark pools all runs, over {', '.join(flags)}. " if flags else ""
    caption(
        figure,
        f"{over_flags}Bars: 95 % intervals of Clopper and Pearson, "
        "which take the rounds of a run as independent.",
    )
    return figure
