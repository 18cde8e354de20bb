"""Made-up folders of sweeps, as `experiments.sweep` leaves them."""

import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def noise_row(
    t: int, owner: float | None, plus: float | None, minus: float | None, **others: Any
) -> Row:
    """One round of metrics.jsonl, protected unless said otherwise."""
    return {
        "run": "noise",
        "round": t,
        "protected": True,
        "owner_accuracy": owner,
        "base_accuracy": 0.7,
        "plus_accuracy": plus,
        "minus_accuracy": minus,
        "strength": 0.1,
        "calibration_samples": 400,
        "feasible": True,
        "shipped": True,
        "finite": owner is not None,
        "seconds": 0.5,
        **others,
    }


def fedavg_row(t: int, owner: float | None) -> Row:
    return noise_row(t, owner, 0.1, 0.1, run="fedavg", protected=False, calibration_samples=0)


def summary(owner: float | None, **others: Any) -> Row:
    return {
        "rounds": 3,
        "owner_accuracy": owner,
        "owner_accuracy_best": owner,
        "max_shared_accuracy": None,
        "rounds_over_cap": 0,
        "protected_rounds": 2,
        "infeasible_rounds": 0,
        "calibration_samples": 800,
        "training_samples": 1000,
        "failed": None,
        **others,
    }


class FakeSweep:
    """Writes a sweep's folder run by run.

    Args:
      folder: to write into.
      grid: of sweep.json.
    """

    def __init__(self, folder: Path, grid: dict[str, list[Any]]):
        self.folder = folder
        self.grid = grid
        self.runs: dict[str, Row] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def plan(
        self, name: str, seed: int, values: Row, baseline: str | None, cap: float = 0.6,
        kind: str | None = None,
    ) -> str:  # fmt: skip
        """A run that is not done, by default of noise if it has a baseline; its path."""
        path = f"runs/{name}/seed={seed}"
        kind = kind or ("fedavg" if baseline is None else "noise")
        self.runs[path] = {
            "run": kind,
            "seed": seed,
            "cap": cap if kind == "noise" else None,
            "grid": values | ({"seed": seed} if "seed" in self.grid else {}),
            "baseline": baseline,
        }
        self.write("sweep.json", {"grid": self.grid, "runs": self.runs})
        return path

    def run(
        self,
        name: str,
        seed: int,
        values: Row,
        results: Row,
        rows: list[Row] = [],  # noqa: B006 never changed
        *,
        baseline: str | None = None,
        cap: float = 0.6,
        kind: str | None = None,
    ) -> str:
        """A complete run, by default of noise if it has a baseline, else of FedAvg; its path."""
        path = self.plan(name, seed, values, baseline, cap, kind)
        planned = self.runs[path]
        config = {
            "run": planned["run"],
            # FedAvg has no flags that only noise has.
            "options": {"seed": seed, "partition": "iid", **values}
            | ({"cap": cap} if planned["run"] == "noise" else {}),
            "versions": {"jax": "0.10"},
        }
        self.write(f"{path}/config.json", config)
        self.write(f"{path}/summary.json", results)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (self.folder / path / "metrics.jsonl").write_text(lines)
        return path

    def write(self, name: str, content: Any) -> None:
        file = self.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content, allow_nan=False))


GRID = {"cap": [0.5, 0.4], "seed": [0, 1, 2], "calibrator": ["sequential", "bisection"]}
BROKEN = {"round": 2, "cause": "the model is NaN"}


def small_sweep(folder: Path) -> Path:
    """All that a sweep may hold: a full configuration, one with a failed run, a single seed, one
    of which nothing is done, and FedAvg with a failed and an unfinished run; out of order."""
    sweep = FakeSweep(folder, GRID)
    fedavg = [
        sweep.run("f", 0, {}, summary(0.95, protected_rounds=0), [fedavg_row(1, 0.95)]),
        sweep.run("f", 1, {}, summary(0.97, protected_rounds=0), [fedavg_row(1, 0.97)]),
        sweep.run("f", 2, {}, summary(None, failed=BROKEN), [fedavg_row(1, None)]),
    ]
    rows = [noise_row(1, 0.5, 0.3, 0.2, protected=False), noise_row(2, 0.8, 0.3, 0.35)]

    def noise(name: str, cap: float, calibrator: str, seed: int, results: dict) -> None:
        values = {"cap": cap, "calibrator": calibrator}
        sweep.run(name, seed, values, results, rows, baseline=fedavg[seed], cap=cap)

    noise("single", 0.4, "sequential", 1, summary(0.8, max_shared_accuracy=0.39))
    for seed in (0, 2):
        sweep.plan("single", seed, {"cap": 0.4, "calibrator": "sequential"}, fedavg[seed], 0.4)
    for seed, owner, shared, over, images in (
        (0, 0.90, 0.45, 0, 800),
        (1, 0.92, 0.51, 1, 1000),
        (2, 0.97, 0.48, 2, 1800),
    ):
        counted = {"rounds_over_cap": over, "infeasible_rounds": 2 * over}
        results = summary(owner, max_shared_accuracy=shared, calibration_samples=images, **counted)
        noise("full", 0.5, "sequential", seed, results)
    noise("broken", 0.5, "bisection", 0, summary(0.9, max_shared_accuracy=None))
    noise("broken", 0.5, "bisection", 2, summary(None, failed=BROKEN))
    noise("broken", 0.5, "bisection", 1, summary(0.8, protected_rounds=0))
    for seed in (0, 1, 2):
        sweep.plan("nothing", seed, {"cap": 0.4, "calibrator": "bisection"}, fedavg[seed], 0.4)
    return folder
