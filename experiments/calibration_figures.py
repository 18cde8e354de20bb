"""From single calibrations to the figures and the table of `experiments.bench_calibration`."""

import math
from typing import Any

import numpy as np
from rich.table import Table
from scipy import stats

from noisefl import calibrate

CAP = 0.6
RATIOS = np.geomspace(0.4, 1.3, 48).astype(np.float32)


def strength_ratio(around: np.ndarray, bare: float) -> float | None:
    """The strength over the smallest on the grid that holds the cap on test for the same draw;
    None where none does, or where the bare base already did."""
    if bare <= CAP:
        return None
    held = np.flatnonzero(around <= np.float32(CAP))
    return float(1 / RATIOS[held[0]]) if len(held) else None


def summary(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of one calibrator.

    A round that says it is infeasible is counted as such, and its violation is not one of the
    guarantee's. Of a proxy, which vouches for nothing, all rounds count. The upper bound is that of
    independent calibrations, which those on one base or one validation split are not quite.
    """
    vouches = calibrate.GUARANTEES[name] != "none"
    claimed = [row for row in rows if row["feasible"]] if vouches else rows
    over, count = sum(row["over"] for row in claimed), len(claimed)
    ratios = [row["ratio"] for row in claimed if row["ratio"] is not None]
    upper = stats.beta.ppf(0.95, over + 1, count - over) if over < count else 1.0
    return {
        "calibrator": name,
        "guarantee": calibrate.GUARANTEES[name],
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
    source = next((r for r in results if r["calibrator"] == "additive"), None)
    if source is None:
        return
    for result in results:
        difference = np.subtract(result["run_owner_accuracy"], source["run_owner_accuracy"])
        half = math.nan
        if len(difference) > 1:
            spread = np.std(difference, ddof=1) / math.sqrt(len(difference))
            half = float(stats.t.ppf(0.975, len(difference) - 1) * spread)
        result["owner_minus_source"] = float(np.mean(difference))
        result["owner_minus_source_ci95"] = None if math.isnan(half) else half


def violations(result: dict[str, Any]) -> str:
    if not result["claimed"]:
        return "–"
    return f"{result['violation_rate']:.1%} ({result['violation_rate_upper95']:.1%})"


def table(results: list[dict[str, Any]], title: str) -> Table:
    """A line a calibrator."""
    shown = Table(title=title, title_justify="left")
    for column in ("calibrator", "tries", "images", "share of round", "σ / smallest"):
        shown.add_column(column, justify="left" if column == "calibrator" else "right")
    for column in ("over cap (95 % up to)", "infeasible", "owner at end", "run s"):
        shown.add_column(column, justify="right")
    for r in results:
        ratio = r["strength_ratio_median"]
        shown.add_row(
            r["calibrator"],
            f"{r['tries_mean']:.1f}",
            f"{r['images_per_round']:,.0f}",
            f"{r['wall_share']:.1%}",
            "–" if ratio is None else f"{ratio:.2f}",
            violations(r),
            f"{r['infeasible_rate']:.0%}",
            f"{np.mean(r['run_owner_accuracy']):.3f}",
            f"{r['run_seconds']:.1f}",
        )
    return shown
