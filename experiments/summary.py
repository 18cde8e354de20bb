"""From the rows of a folder to its summary, and to the table that ends a run. Pure."""

import math
from collections.abc import Sequence
from typing import Any

from rich.table import Table

Row = dict[str, Any]


def summarise(rows: Sequence[Row], cap: float, num_classes: int, timing: dict[str, float]) -> Row:
    """What both runs came to.

    Only rounds count for the cap in which it applied (past warm-up) and in which copies were
    really distributed. Accuracies and cap are shortest decimals of float32, so 0.6 is not above
    0.6.

    Args:
      rows: of `metrics.jsonl`, both runs complete.
      cap: as such a decimal.
      num_classes: C; chance is 1 / C.
      timing: seconds of this process by name, taken over as they are.

    Returns:
      JSON values by name; accuracies are shares of 1, None where no round counted.
    """
    noise = [row for row in rows if row["run"] == "noise"]
    baseline = [row["owner_accuracy"] for row in rows if row["run"] == "fedavg"]
    owner = [row["owner_accuracy"] for row in noise]
    protected = [row for row in noise if row["protected"]]
    shipped = [row for row in protected if row["shipped"]]
    local = [row["local_accuracy_mean"] for row in shipped]
    calibration = sum(row["calibration_samples"] for row in noise)
    training = sum(row["training_samples"] for row in noise)
    return {
        "cap": cap,
        "owner_accuracy_final": owner[-1],
        "owner_accuracy_best": max(owner),
        "baseline_accuracy_final": baseline[-1],
        "baseline_accuracy_best": max(baseline),
        "gap_final": round(baseline[-1] - owner[-1], 6),
        "gap_best": round(max(baseline) - max(owner), 6),
        **_shared("test", shipped, "", cap),
        **_shared("validation", shipped, "_validation", cap),
        "protected_rounds": len(protected),
        "infeasible_rounds": sum(not row["feasible"] for row in protected),
        "skipped_rounds": len(protected) - len(shipped),
        "collapsed": _collapsed(owner, 1 / num_classes),
        "local_accuracy_mean": round(sum(local) / len(local), 6) if local else None,
        "calibration_samples": calibration,
        "training_samples": training,
        "calibration_ratio": round(calibration / training, 6) if training else None,
        "seconds": round(sum(row["seconds"] for row in rows), 3),
        **timing,
    }


def of_one_run(rows: Sequence[Row], cap: float | None, num_classes: int, cause: str | None) -> Row:
    """What one run of a sweep came to, in the terms of `summarise`.

    Args:
      rows: of the run, up to the one that broke down.
      cap: as the shortest decimal of its float32; None of FedAvg.
      num_classes: C.
      cause: of a run that broke down; its accuracies are then not a result.
    """
    owner = [row["owner_accuracy"] for row in rows]
    protected = [row for row in rows if row["protected"]]
    shipped = [row for row in protected if row["shipped"]]
    local = [row["local_accuracy_mean"] for row in shipped]
    shared = _shared("test", shipped, "", math.inf if cap is None else cap)
    return {
        "rounds": len(rows),
        "cap": cap,
        "owner_accuracy": None if cause else owner[-1],
        "owner_accuracy_best": max(owner),
        "max_shared_accuracy": shared["shared_accuracy_max_test"],
        "rounds_over_cap": shared["rounds_over_cap_test"],
        "protected_rounds": len(protected),
        "infeasible_rounds": sum(not row["feasible"] for row in protected),
        "skipped_rounds": len(protected) - len(shipped),
        "collapsed": _collapsed(owner, 1 / num_classes),
        "local_accuracy_mean": round(sum(local) / len(local), 6) if local else None,
        "calibration_samples": sum(row["calibration_samples"] for row in rows),
        "training_samples": sum(row["training_samples"] for row in rows),
        "failed": {"round": rows[-1]["round"], "cause": cause} if cause else None,
    }


def _shared(split: str, shipped: Sequence[Row], suffix: str, cap: float) -> Row:
    highest = [
        max(row[f"plus{suffix}_accuracy"], row[f"minus{suffix}_accuracy"]) for row in shipped
    ]
    return {
        f"shared_accuracy_max_{split}": max(highest, default=None),
        f"rounds_over_cap_{split}": sum(accuracy > cap for accuracy in highest),
    }


def _collapsed(owner: Sequence[float], chance: float) -> bool:
    """The owner fell to within 5 points of chance after it had been above 60 %."""
    risen = next((t for t, accuracy in enumerate(owner) if accuracy > 0.6), len(owner))
    return any(accuracy <= chance + 0.05 for accuracy in owner[risen:])


def table(summary: Row, seed: int, out: str) -> Table:
    """The table that ends a run. The cap never stands without the owner's accuracy beside it."""
    counted = summary["protected_rounds"]
    result = Table(
        title=f"{out}: {summary['rounds']} rounds, one seed ({seed})",
        caption="One seed is one draw: repeat with other --seed values before you compare.",
        title_justify="left",
        caption_justify="left",
    )
    result.add_column("")
    for heading in ("final", "best"):
        result.add_column(heading, justify="right")
    percent = _percent
    for name, label in (("owner", "owner accuracy"), ("baseline", "FedAvg accuracy")):
        result.add_row(
            label, *(percent(summary[f"{name}_accuracy_{w}"]) for w in ("final", "best"))
        )
    result.add_row("gap, points", *(f"{100 * summary[f'gap_{w}']:.2f}" for w in ("final", "best")))
    result.add_section()
    result.add_row(f"of {counted} protected rounds", "test", "validation", style="dim")
    result.add_row(
        "highest shared accuracy",
        *(percent(summary[f"shared_accuracy_max_{s}"]) for s in ("test", "validation")),
    )
    result.add_row(
        f"rounds over the cap of {percent(summary['cap'])}",
        *(str(summary[f"rounds_over_cap_{s}"]) for s in ("test", "validation")),
    )
    result.add_section()
    result.add_row("infeasible rounds", str(summary["infeasible_rounds"]), "")
    result.add_row("clients' own models, mean", percent(summary["local_accuracy_mean"]), "")
    ratio = summary["calibration_ratio"]
    result.add_row("calibration / training samples", "–" if ratio is None else f"{ratio:.2f}", "")
    if summary["collapsed"]:
        result.add_row("[bold]the owner collapsed to chance[/bold]", "", "")
    return result


def _percent(accuracy: float | None) -> str:
    return "–" if accuracy is None else f"{100 * accuracy:.2f} %"
