"""From the rows of a run to its summary, and to the table that ends a single run. Pure."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from rich.table import Table

Row = dict[str, Any]
ACCURACIES = ("accuracy", "accuracy_best")


def summarise(
    rows: Sequence[Row], cap: float | None, num_classes: int, rounds: int,
    stolen: Sequence[Row] = (),
) -> Row:  # fmt: skip
    """What a run came to.

    Only rounds count for the cap in which it applied (past warm-up) and in which copies were
    really distributed. Accuracies and cap are shortest decimals of float32, so 0.6 is not above
    0.6.

    Args:
      rows: of a run, up to the one in which it broke down; perhaps those of FedAvg beside it.
      cap: as such a decimal; None without one.
      num_classes: C; chance is 1 / C.
      rounds: that were asked for.
      stolen: rows of thieves.jsonl.

    Returns:
      JSON values by name; accuracies are shares of 1, None where no round counted. The last one of
      a run that broke down is None too, because it is no result.
    """
    beside = [row for row in rows if row["run"] == "fedavg"]
    own = [row for row in rows if row["run"] != "fedavg"]
    own, beside = (own, beside) if own else (beside, [])
    owner = [row["owner_accuracy"] for row in own]
    failed = _failed(own)
    protected = [row for row in own if row["protected"]]
    shipped = [row for row in protected if row["shipped"]]
    local = [x for row in shipped if (x := row["local_accuracy_mean"]) is not None]
    calibration = sum(row["calibration_samples"] for row in own)
    training = sum(row["training_samples"] for row in own)
    found = {
        "rounds": rounds,
        "cap": cap,
        "owner_accuracy_final": None if failed else owner[-1],
        "owner_accuracy_best": max(owner),
        **_shared("test", shipped, "shared_accuracy", cap),
        **_shared("validation", shipped, "shared_validation_accuracy", cap),
        "protected_rounds": len(protected),
        "infeasible_rounds": sum(not row["feasible"] for row in protected),
        "skipped_rounds": len(protected) - len(shipped),
        "collapsed": _collapsed(owner, 1 / num_classes),
        "local_accuracy_mean": round(sum(local) / len(local), 6) if local else None,
        "calibration_samples": calibration,
        "training_samples": training,
        "copy_bytes": _mean([row["copy_bytes"] for row in shipped]),
        "calibration_ratio": round(calibration / training, 6) if training else None,
        "failed": failed,
        **({"thieves": thieves(stolen)} if stolen else {}),
    }
    if not beside:
        return found
    baseline = summarise(beside, None, num_classes, rounds)
    for when in ("final", "best"):
        theirs, ours = baseline[f"owner_accuracy_{when}"], found[f"owner_accuracy_{when}"]
        found[f"baseline_accuracy_{when}"] = theirs
        gap = None if theirs is None or ours is None else round(theirs - ours, 6)
        found[f"gap_{when}"] = gap
    return {**found, "baseline_failed": baseline["failed"]}


def thieves(stolen: Sequence[Row]) -> Row:
    """The best thieves of a run, and what they could have had without it.

    Of several single thieves the mean is meant. A coalition may do what a single thief does.

    Returns:
      "one_copy": of view V1, and "coalitions": of V3, each with its "members": the name of the best
      "thief" by "accuracy", and the bound "accuracy_best" of any of them; "scratch": accuracy by
      the number of members that pool their data; "server_alone".
    """
    own = [row for row in stolen if row["run"] != "fedavg"] or list(stolen)
    controls = ("scratch", "server_alone")

    def best(wanted: Callable[[Row], bool]) -> Row:
        names = dict.fromkeys(r["thief"] for r in own if wanted(r) and r["thief"] not in controls)
        each = []
        for name in names:
            mine = [
                r for r in own if wanted(r) and r["thief"] == name and r["accuracy"] is not None
            ]
            if mine:
                mean = (round(sum(r[n] for r in mine) / len(mine), 6) for n in ACCURACIES)
                each.append({"thief": name, **dict(zip(ACCURACIES, mean, strict=True))})
        if not each:
            return {"thief": None, **dict.fromkeys(ACCURACIES)}
        bound = max(one["accuracy_best"] for one in each)
        return {**max(each, key=lambda one: one["accuracy"]), "accuracy_best": bound}

    sizes = sorted({row["members"] for row in own if row["view"] == "V3"})
    scratch: dict[str, list[float]] = {}
    for row in stolen:
        accuracy = row["accuracy"] if row["thief"] == "scratch" else None
        if accuracy is not None and row["run"] == stolen[0]["run"]:
            scratch.setdefault(str(row["members"]), []).append(accuracy)
    alone = [row["accuracy"] for row in stolen if row["thief"] == "server_alone"]
    return {
        "one_copy": best(lambda row: row["view"] == "V1"),
        "coalitions": [
            {
                "members": size,
                **best(lambda row, size=size: row["view"] == "V1"
                       or (row["view"] == "V3" and row["members"] == size)),
            }
            for size in sizes
        ],
        "scratch": {size: round(sum(x) / len(x), 6) for size, x in scratch.items()},
        "server_alone": alone[0] if alone else None,
    }  # fmt: skip


def _mean(values: Sequence[float]) -> float | None:
    return round(sum(values) / len(values), 1) if values else None


def _shared(split: str, shipped: Sequence[Row], name: str, cap: float | None) -> Row:
    highest = [row[name] for row in shipped if row[name] is not None]
    over = sum(accuracy > (math.inf if cap is None else cap) for accuracy in highest)
    return {
        f"shared_accuracy_max_{split}": max(highest, default=None),
        f"rounds_over_cap_{split}": over,
    }


def _collapsed(owner: Sequence[float], chance: float) -> bool:
    """The owner fell to within 5 points of chance after it had been above 60 %."""
    risen = next((t for t, accuracy in enumerate(owner) if accuracy > 0.6), len(owner))
    return any(accuracy <= chance + 0.05 for accuracy in owner[risen:])


def _failed(rows: Sequence[Row]) -> Row | None:
    """The round in which a run ended with NaN or infinite parameters, and the likely cause."""
    last = rows[-1]
    if last["finite"]:
        return None
    line = f"run {last['run']}, round {last['round']}: the model is NaN or infinite; likely cause: "
    # A collapsed base needs no noise: the round that broke it may have been before.
    recent = [row for row in rows[-3:] if row["protected"] and row["strength"] is not None]
    if recent:
        worst = max(recent, key=lambda row: row["strength"])
        line += f"noise of strength {worst['strength']} in round {worst['round']} "
        line += "(see --strength_max, --cancellation), or "
    line += "--learning_rate too large (--clip_norm helps); rounds so far are kept"
    return {"round": last["round"], "cause": line}


def table(summary: Row, seed: int, out: str) -> Table:
    """The table that ends a run. The cap never stands without the owner's accuracy beside it."""
    result = Table(
        title=f"{out}: {summary['rounds']} rounds, one seed ({seed})",
        caption="One seed is one draw: repeat it with --grid=seed=0:5 before you compare.",
        title_justify="left",
        caption_justify="left",
    )
    result.add_column("")
    for heading in ("final", "best"):
        result.add_column(heading, justify="right")
    names = [("owner_accuracy", "owner accuracy")]
    names += [("baseline_accuracy", "FedAvg accuracy")] if "gap_final" in summary else []
    for name, label in names:
        result.add_row(label, *(_percent(summary[f"{name}_{w}"]) for w in ("final", "best")))
    if "gap_final" in summary:
        gaps = (summary[f"gap_{w}"] for w in ("final", "best"))
        result.add_row("gap, points", *("–" if g is None else f"{100 * g:.2f}" for g in gaps))
    result.add_section()
    splits = ("test", "validation")
    protected = f"of {summary['protected_rounds']} protected rounds"
    result.add_row(protected, *splits, style="dim")
    highest = (_percent(summary[f"shared_accuracy_max_{s}"]) for s in splits)
    result.add_row("best copy that was handed out", *highest)
    if summary["cap"] is not None:
        over = (str(summary[f"rounds_over_cap_{s}"]) for s in splits)
        result.add_row(f"rounds over the cap of {_percent(summary['cap'])}", *over)
    if stolen := summary.get("thieves"):
        _add_thieves(result, stolen, summary["owner_accuracy_final"])
    result.add_section()
    result.add_row("infeasible rounds", str(summary["infeasible_rounds"]), "")
    result.add_row("clients' own models, mean", _percent(summary["local_accuracy_mean"]), "")
    ratio = summary["calibration_ratio"]
    result.add_row("calibration / training samples", "–" if ratio is None else f"{ratio:.2f}", "")
    if summary["collapsed"]:
        result.add_row("the owner collapsed to chance", "", "", style="bold")
    return result


def _add_thieves(result: Table, stolen: Row, owner: float | None) -> None:
    """What thieves come to in the end, which share of the model that is, and what they have without
    any copy."""
    result.add_section()
    result.add_row("in the end, on test", "accuracy", "picked on test", style="dim")

    def add(label: str, row: Row, members: int) -> None:
        name = "none" if row["thief"] is None else row["thief"].replace("_", " ")
        share = _share(owner, row["accuracy"], stolen["scratch"].get(str(members)))
        result.add_row(f"{label} ({name})", *(_percent(row[which]) for which in ACCURACIES))
        result.add_row("  its share of the model, λ", share, "")

    add("best thief with one copy", stolen["one_copy"], 1)
    for row in stolen["coalitions"]:
        add(f"best of {row['members']} colluding clients", row, row["members"])
    for members, accuracy in stolen["scratch"].items():
        data = "one client's images" if members == "1" else f"the images of {members} clients"
        result.add_row(f"without a copy, {data}", _percent(accuracy), "")
    if stolen["server_alone"] is not None:
        result.add_row("the server alone, its own images", _percent(stolen["server_alone"]), "")


def _share(owner: float | None, thief: float | None, scratch: float | None) -> str:
    """λ of one seed, (T − S) / (O − S)."""
    if owner is None or thief is None or scratch is None:
        return "–"
    return f"{(thief - scratch) / (owner - scratch):.2f}" if owner > scratch else "nothing to steal"


def _percent(accuracy: float | None) -> str:
    return "–" if accuracy is None else f"{100 * accuracy:.2f} %"
