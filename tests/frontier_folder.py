"""A sweep with thieves, made by hand: the folder that the frontier reads."""

import json
from pathlib import Path
from typing import Any

OWNERS, FEDAVG, SERVER = {"iid": 0.9, "shards": 0.8}, 0.95, 0.7


SINGLES, MEMBERS = (0, 1), 2


FIELDS = [
    *("scheme", "strength", "thief", "view", "members", "which", "dataset", "model"),
    *("partition", "num_clients"),
    *("seed", "owner", "fedavg", "thief_accuracy", "thief_accuracy_best", "scratch"),
    *("server_alone", "copy", "lambda", "over_scratch", "images_needed", "fidelity", "copies"),
]


# Of V1: fine-tuning wins; in V3 of shards the average does, and of iid one member's own attack.
V1 = {"iid": {"bare_copy": 0.4, "ridge": 0.7, "fine_tune": 0.76},
      "shards": {"bare_copy": 0.45, "ridge": 0.5, "fine_tune": 0.48}}  # fmt: skip


V3 = {"iid": {"average": 0.72}, "shards": {"average": 0.74, "ridge": 0.3}}


SCRATCH = {"iid": (0.6, 0.7), "shards": (0.2, 0.4)}  # with one client's images, and with two's


def line(thief: str, view: str, members: int, which: int, accuracy: float | None, **others: Any):
    best = None if accuracy is None else round(accuracy + 0.01, 4)
    found = {
        "run": "noise", "thief": thief, "view": view, "members": members, "which": which,
        "accuracy": accuracy, "accuracy_best": best, "fidelity": accuracy, "round": 4,
        "copies": members, "images": 50 * members, **others,
    }  # fmt: skip
    return found


def stolen(partition: str, seed: int, protected: bool) -> list[dict]:
    """Of a run: the second single thief is 2 points better, and seed 1 is 1 point better."""
    by = 0.01 * seed
    owner = OWNERS[partition] + by if protected else FEDAVG
    lines = [line("owner", "V0", 0, 0, owner, accuracy_best=owner, fidelity=1.0, images=0)]
    tried = V1[partition] if protected else {"bare_copy": FEDAVG}
    lines += [line(thief, "V1", 1, which, round(x + by + 0.02 * which, 4))
              for thief, x in tried.items() for which in SINGLES]  # fmt: skip
    if protected:
        return [*lines, *(line(thief, "V3", 2, 0, x + by) for thief, x in V3[partition].items())]
    one, two = SCRATCH[partition]
    lines += [line("scratch", "V1", 1, which, round(one + 0.02 * which, 4), images=50 + 50 * which)
              for which in SINGLES]  # fmt: skip
    lines += [line("scratch", "V3", 2, 0, two, images=150)]
    return [*lines, line("server_alone", "V0", 0, 0, SERVER, images=60)]


def folder_of(out: Path, change: Any = lambda lines: lines) -> dict[str, tuple[str, Any]]:
    """A sweep of two partitions, two strengths and two seeds; returns its curves."""
    runs, curves = {}, {}
    for partition in OWNERS:
        for seed in (0, 1):
            baseline = f"runs/f-{partition}/seed={seed}"
            runs[baseline] = {"run": "fedavg", "seed": seed, "baseline": None}
            write(out / baseline, partition, seed, change(stolen(partition, seed, False)))
            for cap in (0.8, 0.6):
                path = f"runs/{partition}-{cap}/seed={seed}"
                runs[path] = {"run": "noise", "seed": seed, "baseline": baseline}
                curves[path] = "pair", cap
                lines = stolen(partition, seed, True)
                if cap == 0.8:  # weaker: all thieves 5 points better
                    lines = [{**one, "accuracy": round(one["accuracy"] + 0.05, 4)} for one in lines]
                write(out / path, partition, seed, change(lines), cap)
    runs["runs/other/seed=0"] = {"run": "noise", "seed": 0, "baseline": None}  # of no curve
    (out / "sweep.json").write_text(json.dumps({"runs": runs}))
    return curves


def write(folder: Path, partition: str, seed: int, lines: list[dict], cap: float | None = None):
    folder.mkdir(parents=True)
    own = {
        "dataset": "mnist",
        "model": "lenet5",
        "partition": partition,
        "num_clients": 6,
        "validation_size": 60,
        "seed": seed,
    }
    summary = {
        "cap": cap, "shared_accuracy_max_test": cap and cap - 0.05, "rounds_over_cap_test": seed,
        "infeasible_rounds": 2, "failed": None, "owner_accuracy_final": 0.5,
        "copy_bytes": 2000.0 + 1000 * seed, "calibration_ratio": cap and 0.25,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps({"options": own}))
    (folder / "summary.json").write_text(json.dumps(summary))
    text = "".join(json.dumps(one, allow_nan=False) + "\n" for one in lines)
    (folder / "thieves.jsonl").write_text(text)


STRENGTHS = {"pair": "cap"}
