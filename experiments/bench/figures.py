"""From single calibrations to the figures, table and picture of `experiments.bench_calibration`."""

import itertools
import math
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

CAP = 0.6
RATIOS = np.geomspace(0.4, 1.3, 48).astype(np.float32)


def strength_ratio(around: np.ndarray, bare: float) -> float | None:
    """The strength over the smallest on the grid that holds the cap on test for the same draw;
    None where none does, or where the bare base already did."""
    if bare <= CAP:
        return None
    held = np.flatnonzero(around <= np.float32(CAP))
    return float(1 / RATIOS[held[0]]) if len(held) else None


def summary(name: str, guarantee: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of one calibrator.

    A round that says it is infeasible is counted as such, and its violation is not one of the
    guarantee's. Of a proxy, which vouches for nothing, all rounds count. The upper bound is that of
    independent calibrations, which those on one base or one validation split are not quite.
    """
    claimed = [row for row in rows if row["feasible"]] if guarantee != "none" else rows
    over, count = sum(row["over"] for row in claimed), len(claimed)
    ratios = [row["ratio"] for row in claimed if row["ratio"] is not None]
    upper = stats.beta.ppf(0.95, over + 1, count - over) if over < count else 1.0
    return {
        "calibrator": name,
        "guarantee": guarantee,
        "calibrations": len(rows),
        "tries_mean": float(np.mean([row["tries"] for row in rows])),
        "images_per_round": float(np.mean([row["samples"] for row in rows])),
        "strength_ratio_median": float(np.median(ratios)) if ratios else None,
        "violations": over,
        "claimed": count,
        "violation_rate": over / count if count else None,
        "violation_rate_upper95": float(upper) if count else None,
        "infeasible_rate": 1 - sum(row["feasible"] for row in rows) / len(rows),
    }


def against_source(results: list[dict[str, Any]]) -> None:
    """Adds the paired difference of the owners to those of the source's loop, with its 95 %
    interval by Student's t over the seeds."""
    for source in [r for r in results if r["calibrator"] == "additive"]:
        for result in results:
            difference = np.subtract(result["run_owner_accuracy"], source["run_owner_accuracy"])
            seeds, half = len(difference), None
            if seeds > 1:
                spread = np.std(difference, ddof=1) / math.sqrt(seeds)
                half = float(stats.t.ppf(0.975, seeds - 1) * spread)
            result["owner_minus_source"] = float(np.mean(difference))
            result["owner_minus_source_ci95"] = half


def line(result: dict[str, Any]) -> dict[str, str]:
    """Of the table."""
    ratio, over = result["strength_ratio_median"], result["violation_rate"]
    return {
        "calibrator": result["calibrator"],
        "tries": f"{result['tries_mean']:.1f}",
        "images": f"{result['images_per_round']:,.0f}",
        "share of round": f"{result['wall_share']:.1%}",
        "σ / smallest": "–" if ratio is None else f"{ratio:.2f}",
        "over cap (95 % up to)": (
            "–" if over is None else f"{over:.1%} ({result['violation_rate_upper95']:.1%})"
        ),
        "infeasible": f"{result['infeasible_rate']:.0%}",
        "owner at end": f"{np.mean(result['run_owner_accuracy']):.3f}",
        "run s": f"{result['run_seconds']:.1f}",
    }


def picture(results: list[dict[str, Any]], path: str) -> None:
    """Images forwarded a calibration against the rate of violations, with its upper 95 % bound.

    The legend gives the owner's accuracy in whole runs: a dead model would hold every cap. A
    calibrator that called no round feasible has no rate, and no mark.
    """
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    drawn = [result for result in results if result["claimed"]]
    for result, marker in zip(drawn, itertools.cycle("osD^v<>P*X"), strict=False):
        rate, upper = 100 * result["violation_rate"], 100 * result["violation_rate_upper95"]
        share = result["claimed"] / result["calibrations"]
        label = f"{result['calibrator']}, owner {np.mean(result['run_owner_accuracy']):.1%}"
        axes.errorbar(
            max(result["images_per_round"], 1), rate, [[0], [upper - rate]],  # no 0 on a log axis
            fmt=marker, capsize=3, markersize=7,
            label=label if share == 1 else f"{label}\n(of {share:.0%} of the rounds)",
        )  # fmt: skip
    axes.axhline(1, color="0.6", linewidth=1, linestyle="--")
    axes.text(0.01, 1.1, "δ = 1 %", color="0.4", transform=axes.get_yaxis_transform())
    axes.set(
        xscale="log",
        yscale="symlog",
        xlabel="images forwarded per calibration (unverified: none)",
        ylabel="pairs over the cap on 10,000 test images, %",
        title="What a calibration costs, how often it breaks the cap (to 95 % bounds)",
        ylim=(-0.2, 100),
    )
    ticks = (0, 1, 2, 5, 10, 20, 50, 100)
    axes.set_yticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)
