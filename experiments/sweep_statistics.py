"""From the runs of a configuration to its row of the report. Pure."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from scipy import stats

from experiments.sweep_results import Configuration, Run, Sweep

# In the order of the table, after the grid's flags. Accuracies and gaps are shares of 1.
MEASURES = (
    "seeds",  # complete runs, failed ones among them
    "owner_accuracy_mean",
    "owner_accuracy_std",
    "owner_accuracy_ci95",
    "baseline_gap_mean",
    "max_shared_accuracy_mean",
    "rounds_over_cap_mean",
    "infeasible_rounds_mean",
    "failed_runs",
    "baseline_gap_ci95",
    "baseline_gap_seeds",  # those of which both runs are there
    "max_shared_accuracy_max",
    "protected_rounds_mean",
    "images_per_round_mean",  # that calibration forwarded, a protected round
    "unfinished_runs",
)
COUNTS = ("seeds", "failed_runs", "baseline_gap_seeds", "unfinished_runs")


def table(sweep: Sweep) -> tuple[list[str], list[dict[str, Any]]]:
    """The columns, and a row a configuration in the order of the grid; None where is no value."""
    flags = [flag for flag in sweep.grid if flag != "seed"]
    columns = [*flags, *MEASURES, *([] if "cap" in flags else ["cap"])]
    rows = []
    for one in sweep.configurations:
        row = {"cap": one.cap, **one.values, **measures(sweep, one)}
        rows.append({column: row[column] for column in columns})
    return columns, rows


def measures(sweep: Sweep, configuration: Configuration) -> dict[str, Any]:
    """`MEASURES` by name, over the runs that did not fail."""
    sound = configuration.sound
    gaps = paired_gaps(sweep, sound)
    owner, shared = each(sound, "owner_accuracy"), each(sound, "max_shared_accuracy")
    calibrated = [run.summary for run in sound if run.summary["protected_rounds"]]
    return {
        "seeds": len(configuration.runs),
        "owner_accuracy_mean": mean(owner),
        "owner_accuracy_std": std(owner),
        "owner_accuracy_ci95": ci95(owner),
        "baseline_gap_mean": mean(gaps),
        "baseline_gap_ci95": ci95(gaps),
        "baseline_gap_seeds": len(gaps),
        "max_shared_accuracy_mean": mean(shared),
        "max_shared_accuracy_max": max(shared, default=None),
        "rounds_over_cap_mean": mean(each(sound, "rounds_over_cap")),
        "infeasible_rounds_mean": mean(each(sound, "infeasible_rounds")),
        "protected_rounds_mean": mean(each(sound, "protected_rounds")),
        "images_per_round_mean": mean(
            [s["calibration_samples"] / s["protected_rounds"] for s in calibrated]
        ),
        "failed_runs": len(configuration.runs) - len(sound),
        "unfinished_runs": configuration.unfinished,
    }


def paired_gaps(sweep: Sweep, runs: Iterable[Run]) -> list[float]:
    """FedAvg's accuracy minus the owner's, of the seeds of which both are known."""
    gaps = []
    for run in runs:
        beside = sweep.baseline(run)
        if beside is not None:
            pair = each([beside, run], "owner_accuracy")
            gaps += [pair[0] - pair[1]] if len(pair) == 2 else []
    return gaps


def each(runs: Iterable[Run], name: str) -> list[float]:
    """What the summaries have under a name, where it is not null."""
    values = [run.summary[name] for run in runs]
    return [value for value in values if value is not None]


def pooled(runs: Iterable[Run], name: str) -> int:
    """The sum of a count over runs."""
    return int(sum(each(runs, name)))


def mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def std(values: Sequence[float]) -> float | None:
    """Of the population that the values are drawn from; one value tells nothing of it."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def ci95(values: Sequence[float]) -> float | None:
    """Half the width of the mean's 95 % interval by Student's t; None for one value."""
    spread = std(values)
    if spread is None:
        return None
    return float(stats.t.ppf(0.975, len(values) - 1)) * spread / math.sqrt(len(values))


def clopper_pearson(hits: int, trials: int) -> tuple[float, float]:
    """The exact 95 % interval of a rate, of at least one trial."""
    low = stats.beta.ppf(0.025, hits, trials - hits + 1) if hits else 0.0
    high = stats.beta.ppf(0.975, hits + 1, trials - hits) if hits < trials else 1.0
    return float(low), float(high)
