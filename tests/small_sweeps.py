"""Small sweeps by `experiments.sweep`, in this process and in others, and what they leave."""

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
# Compiles in half the time. Not this process's flags: other bits, so compare like with like.
QUICK = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
LIMIT = 240  # seconds that a process may take on a busy machine


def shared(factory: pytest.TempPathFactory) -> Path:
    """One folder for all processes of the test session."""
    root = factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "sweeps"
    folder.mkdir(exist_ok=True)
    return folder


@contextlib.contextmanager
def alone(folder: Path, name: str) -> Iterator[Path | None]:
    """The folder to make something in, once a session; None if it is made already."""
    with open(folder / f".{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = folder / f".{name}.done"
        yield None if done.exists() else folder / name
        done.touch()


def flags(folder: Path) -> list[str]:
    """Of sweeps on 8 × 8 images that take milliseconds a round once compiled."""
    with alone(folder, "tiny.npz") as file:
        if file is not None:
            rng = np.random.default_rng(0)
            centres = rng.integers(0, 256, (10, 8, 8))
            arrays = {}
            for name, count in (("train", 260), ("test", 100)):
                labels = rng.integers(0, 10, count)
                noisy = centres[labels] + rng.normal(0, 60, (count, 8, 8))
                arrays[f"x_{name}"] = np.clip(noisy, 0, 255).astype(np.uint8)
                arrays[f"y_{name}"] = labels
            np.savez(file, **arrays)
    return [
        *(f"--dataset={folder / 'tiny.npz'}", "--model=mlp", "--num_clients=6", "--max_tries=9"),
        *("--client_fraction=0.5", "--validation_size=60", "--rounds=4", "--checkpoint_every=2"),
        f"--compilation_cache={folder / 'compiled'}",
    ]


# 2 caps × 2 seeds and their 2 FedAvg runs, in two batches of three. Seeds vary slowest: the first
# batch is all of seed 0, whose table of clients is another's width.
SHORT = ("--grid=seed=0:2", "--grid=cap=0.3,0.5", "--partition=lognormal", "--lanes_at_once=3")


def finished(factory: pytest.TempPathFactory, main: Callable[..., int]) -> Path:
    """The folder of the sweep of `SHORT`, in this process."""
    folder = shared(factory)
    with alone(folder, "finished") as out:
        if out is not None:
            assert main(*flags(folder), *SHORT, f"--out={out}") == 0
    return folder / "finished"


# Two programs, three batches of four; at a learning rate of 10 some break down in rounds 2 and 3.
LONG = (
    *("--rounds=7", "--rounds_per_chunk=2", "--checkpoint_every=1", "--partition=lognormal"),
    "--lanes_at_once=4",
)
SEEDS, RATES = "--grid=seed=0:2", "--grid=learning_rate=0.1,10"
GRID = ("--grid=calibrator=geometric,fixed", RATES, SEEDS)


def uninterrupted(factory: pytest.TempPathFactory) -> Path:
    """The folder of the sweep of `LONG` and `GRID` by one process on one device."""
    folder = shared(factory)
    with alone(folder, "uninterrupted") as out, Processes() as processes:
        if out is not None:
            args = (*flags(folder), *LONG, *GRID, "--cpu_devices=1", f"--out={out}")
            code, err = processes.run(*args)
            assert code == 0, err
    return folder / "uninterrupted"


# What a sweep leaves


def contents(out: Path, *names: str) -> dict[str, bytes]:
    """The files of all runs that do not depend on when and how fast they ran, by path."""
    names = names or ("config.json", "metrics.jsonl", "summary.json")
    files = sorted(file for file in out.glob("runs/*/seed=*/*") if file.name in names)
    return {str(file.relative_to(out)): file.read_bytes() for file in files}


def found(out: Path, **values: Any) -> list[tuple[dict, list[dict], dict]]:
    """(config, rows, summary) of the runs with these options, or `run` of that kind."""
    runs = []
    for file in sorted(out.glob("runs/*/*/config.json")):
        config = json.loads(file.read_text())
        if {**config["options"], "run": config["run"]}.items() >= values.items():
            text = (file.parent / "metrics.jsonl").read_text()
            rows = [json.loads(line) for line in text.splitlines()]
            runs.append((config, rows, json.loads((file.parent / "summary.json").read_text())))
    return runs


def assert_complete(out: Path) -> None:
    """All planned runs, and nothing else: no batch, nothing half written."""
    planned = json.loads((out / "sweep.json").read_text())["runs"]
    there = sorted(str(folder.relative_to(out)) for folder in out.glob("runs/*/*"))
    assert there == sorted(planned)
    for run in planned:
        names = {"config.json", "metrics.jsonl", "summary.json", "timing.json"}
        assert {file.name for file in (out / run).iterdir()} == names
    assert not list(out.glob("batches/*"))
    assert {file.name for file in out.iterdir()} == {"sweep.json", "runs", "batches"}


# Processes


class Processes:
    """Starts drivers; none of them outlives it. Use as a context manager."""

    def __init__(self):
        self._all: list[subprocess.Popen[str]] = []

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for process in self._all:
            if process.poll() is None:
                process.kill()
            process.communicate()

    def start(self, *args: str) -> subprocess.Popen[str]:
        environment = {
            **os.environ,
            **{"JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICK},
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        process = subprocess.Popen(
            [sys.executable, "-m", "experiments.sweep", *args],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._all.append(process)
        return process

    def run(self, *args: str) -> tuple[int, str]:
        """Exit code and what it said on standard error."""
        process = self.start(*args)
        err = process.communicate(timeout=LIMIT)[1]
        return process.returncode, err


def wait(condition: Callable[[], Any], process: subprocess.Popen[str] | None = None) -> bool:
    """Polls until it is true; false if the process ends before that."""
    end = time.monotonic() + LIMIT
    while not condition():
        if process is not None and process.poll() is not None:
            return bool(condition())
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.002)
    return True
