"""Made-up folders of runs and sweeps, as the driver leaves them."""

import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def noise_row(
    t: int, owner: float | None, plus: float | None, minus: float | None, **others: Any
) -> Row:
    """One round of metrics.jsonl, protected unless said otherwise."""
    shared = max((x for x in (plus, minus) if x is not None), default=None)
    return {
        "run": "noise", "round": t, "protected": True, "owner_accuracy": owner,
        "base_accuracy": 0.7, "plus_accuracy": plus, "minus_accuracy": minus,
        "shared_accuracy": shared, "strength": 0.1, "relative_strength": 1.0,
        "calibration_tries": 3, "calibration_samples": 400, "training_samples": 1000,
        "feasible": True, "shipped": True, "finite": owner is not None, **others,
    }  # fmt: skip


def fedavg_row(t: int, owner: float | None) -> Row:
    return noise_row(t, owner, 0.1, 0.1, run="fedavg", protected=False, calibration_samples=0)


def summary(owner: float | None, **others: Any) -> Row:
    return {
        "cap": 0.6, "rounds": 3, "owner_accuracy_final": owner, "owner_accuracy_best": owner,
        "shared_accuracy_max_test": None, "rounds_over_cap_test": 0, "protected_rounds": 2,
        "infeasible_rounds": 0, "skipped_rounds": 0, "collapsed": False,
        "calibration_samples": 800, "training_samples": 1000, "failed": None, **others,
    }  # fmt: skip


def single_run(folder: Path, rows: list[Row], results: Row | None) -> Path:
    """The folder of a run without a grid; without results it is under way."""
    options = {"seed": 3, "scheme.calibrator.cap": 0.6, "noise_scale": "absolute"}
    fedavg = {"run": "fedavg", "seed": 3, "cap": None, "grid": {}, "baseline": None}
    noise = {**fedavg, "run": "noise", "cap": 0.6, "baseline": "fedavg"}
    config = {"run": "noise", "runs": {"fedavg": fedavg, "noise": noise}, "options": options}
    _write(folder, config, rows, results)
    return folder


def _write(folder: Path, config: Row, rows: list[Row], results: Row | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    lines = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(lines)
    if results is not None:
        (folder / "summary.json").write_text(json.dumps(results))


class FakeSweep:
    """Writes a sweep's folder run by run.

    A run is of FedAvg without a `baseline`; with one, which may be "", it is of noise.
    """

    def __init__(self, folder: Path, grid: dict[str, list[Any]]):
        self.folder, self.grid = folder, grid
        self.runs: dict[str, Row] = {}
        folder.mkdir(exist_ok=True)

    def plan(self, name: str, seed: int, values: Row, baseline: str | None, cap: float) -> str:
        """A run that is not done; its path."""
        path, noise = f"runs/{name}/seed={seed}", baseline is not None
        self.runs[path] = {
            "run": "noise" if noise else "fedavg", "seed": seed, "cap": cap if noise else None,
            "grid": values | ({"seed": seed} if "seed" in self.grid else {}),
            "baseline": baseline or None,
        }  # fmt: skip
        plan = {"grid": self.grid, "runs": self.runs, "options": {}}
        (self.folder / "sweep.json").write_text(json.dumps(plan))
        return path

    def run(
        self, name: str, seed: int, values: Row, results: Row, rows: list[Row] | None = None,
        baseline: str | None = None, cap: float = 0.6,
    ) -> str:  # fmt: skip
        """A complete run, of one round unless rows are given; its path."""
        path = self.plan(name, seed, values, baseline, cap)
        if rows is None:
            rows = [fedavg_row(1, 0.9) if baseline is None else noise_row(1, 0.8, 0.3, 0.3)]
        own = {} if baseline is None else {"cap": cap}
        options = {"seed": seed, "partition": "iid", **values, **own}
        _write(self.folder / path, {"options": options}, rows, results)
        return path


BROKEN = {"round": 2, "cause": "run noise, round 2: the model is NaN"}


def small_sweep(folder: Path) -> Path:
    """All that a sweep may hold: a full configuration, one with a failed run, a single seed, one
    of which nothing is done, and FedAvg with a failed run; out of order."""
    grid = {"cap": [0.5, 0.4], "seed": [0, 1, 2], "calibrator": ["sequential", "bisection"]}
    sweep, broken = FakeSweep(folder, grid), summary(None, failed=BROKEN)
    fedavg = [
        sweep.run("f", 0, {}, summary(0.95, protected_rounds=0)),
        sweep.run("f", 1, {}, summary(0.97, protected_rounds=0)),
        sweep.run("f", 2, {}, broken, [fedavg_row(1, None)]),
    ]

    def noise(name: str, cap: float, rule: str, seed: int, results: Row | None = None) -> None:
        values = {"cap": cap, "calibrator": rule}
        sweep.plan(name, seed, values, fedavg[seed], cap)
        if results:
            sweep.run(name, seed, values, results, None, fedavg[seed], cap)

    noise("single", 0.4, "sequential", 0)
    noise("single", 0.4, "sequential", 1, summary(0.8, shared_accuracy_max_test=0.39))
    noise("single", 0.4, "sequential", 2)
    owners, shared, images = (0.90, 0.92, 0.97), (0.45, 0.51, 0.48), (800, 1000, 1800)
    for seed in (0, 1, 2):
        counted = {"rounds_over_cap_test": seed, "infeasible_rounds": 2 * seed}
        counted |= {"shared_accuracy_max_test": shared[seed], "calibration_samples": images[seed]}
        noise("full", 0.5, "sequential", seed, summary(owners[seed], **counted))
        noise("nothing", 0.4, "bisection", seed)
    noise("broken", 0.5, "bisection", 0, summary(0.9))
    noise("broken", 0.5, "bisection", 2, broken)
    noise("broken", 0.5, "bisection", 1, summary(0.8, protected_rounds=0))
    return folder
