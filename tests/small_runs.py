"""Small runs by `experiments.run`, in this process and in others, and what they leave."""

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

import jax
import numpy as np
import pytest

from experiments import run
from experiments.sweep.prepare import Compiled, Lanes
from noisefl.sweep import Traced

ROOT = Path(__file__).parents[1]
LIMIT = 240  # seconds that a process may take on a busy machine

_traced: dict[Any, Traced] = {}
_programs: dict[Any, Compiled] = {}


def remember_programs(patch: pytest.MonkeyPatch) -> list[Any]:
    """From now on each program is traced and compiled once a process; returns the list of all
    their calls."""
    jax.devices()  # before `main` can split the CPU for the other tests of this process
    trace, compile, calls = Lanes.trace, Lanes.compile, []

    def key(self: Lanes, width: int, rounds_per_chunk: int) -> Any:
        first = self.group.runs[0]
        structure = jax.tree.structure((self.experiment(first), first.setup.measures))
        sizes = self.columns, first.setup.deal.num_clients, first.setup.deal.validation_size
        return structure, sizes, width, rounds_per_chunk

    def remembered_trace(self: Lanes, on: Any, *size: int) -> Traced:
        if (this := key(self, *size)) not in _traced:
            _traced[this] = trace(self, on, *size)
        return _traced[this]

    def remembered(self: Lanes, on: Any, *size: int) -> Compiled:
        if (this := key(self, *size)) not in _programs:
            _programs[this] = compile(self, on, *size)
        program = _programs[this].program

        def chunk(*given: Any) -> Any:
            calls.append(given)
            return program.chunk(*given)

        return _programs[this]._replace(program=program._replace(chunk=chunk))

    patch.setattr(Lanes, "trace", remembered_trace)
    patch.setattr(Lanes, "compile", remembered)
    return calls


def main(*args: str) -> int:
    """One command line in this process."""
    return run.main(["run", *args])


def shared(factory: pytest.TempPathFactory) -> Path:
    """One folder for all processes of the test session."""
    root = factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "runs"
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


def flags(factory: pytest.TempPathFactory) -> list[str]:
    """Of runs on 8 × 8 images that take milliseconds a round once compiled.

    Seed 1 has the wider table of clients of the two in `GRID`, whose program is thus that of a
    single run.
    """
    folder = shared(factory)
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
        *(f"--dataset={folder / 'tiny.npz'}", "--model=mlp", "--calibrator=geometric", "--cap=0.4"),
        *("--num_clients=6", "--clients_per_round=3", "--partition=lognormal", "--max_tries=9"),
        *("--validation_size=60", "--rounds=4", "--checkpoint_every=2"),
        *("--seed=1", "--thieves=none"),  # they would be compiled in every process
        f"--compilation_cache={folder / 'compiled'}",
    ]


# 2 caps × 2 seeds and their 2 FedAvg runs, in three batches of two: the program of a single run.
GRID = ("--grid=seed=0:2", "--grid=cap=0.3,0.5", "--lanes_at_once=2")


def finished(factory: pytest.TempPathFactory) -> Path:
    """The folder of the sweep of `GRID`, in this process."""
    tiny = flags(factory)
    with alone(shared(factory), "finished") as out, pytest.MonkeyPatch.context() as patch:
        if out is not None:
            remember_programs(patch)
            assert main(*tiny, *GRID, f"--out={out}") == 0
    return shared(factory) / "finished"


# What runs leave


def contents(out: Path, *names: str) -> dict[str, bytes]:
    """The files of all runs that do not depend on when and how fast they ran, by path."""
    names = names or ("config.json", "metrics.jsonl", "summary.json")
    files = [*out.glob("*"), *out.glob("runs/*/seed=*/*")]
    return {str(f.relative_to(out)): f.read_bytes() for f in sorted(files) if f.name in names}


def times(out: Path) -> dict[Path, int]:
    """When each file was written."""
    return {file: file.stat().st_mtime_ns for file in out.glob("**/*")}


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def found(out: Path, **values: Any) -> list[tuple[dict, list[dict], dict]]:
    """(config, rows, summary) of a sweep's runs with these options, or `run` of that kind."""
    runs = []
    for file in sorted(out.glob("runs/*/*/config.json")):
        config = json.loads(file.read_text())
        if {**config["options"], "run": config["run"]}.items() >= values.items():
            summary = json.loads((file.parent / "summary.json").read_text())
            runs.append((config, rows(file.parent), summary))
    return runs


def assert_complete(out: Path) -> None:
    """All planned runs, and nothing else: no batch, nothing half written."""
    planned = json.loads((out / "sweep.json").read_text())["runs"]
    there = sorted(str(folder.relative_to(out)) for folder in out.glob("runs/*/*"))
    assert there == sorted(planned)
    for one in planned:
        names = {"config.json", "metrics.jsonl", "summary.json", "timing.json"}
        assert {file.name for file in (out / one).iterdir()} == names
    assert not list(out.glob("batches/*"))
    assert {file.name for file in out.iterdir()} == {"sweep.json", "runs", "batches"}


def one_line(capsys: pytest.CaptureFixture[str], program: str = "experiments.run") -> str:
    """All that was said: one complaint."""
    printed, err = capsys.readouterr()
    assert printed == ""
    (line,) = err.splitlines()
    assert line.startswith(f"{program}: ")
    return line


def said(err: str) -> list[str]:
    """The complaints among what was said on standard error."""
    return [line for line in err.splitlines() if line.startswith("experiments.run: ")]


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

    def start(self, *args: str, module: str = "experiments.run") -> subprocess.Popen[str]:
        environment = {**os.environ, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        process = subprocess.Popen(
            [sys.executable, "-m", module, *args],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._all.append(process)
        return process

    def run(self, *args: str, module: str = "experiments.run") -> tuple[int, str]:
        """Exit code and what it said on standard error."""
        process = self.start(*args, module=module)
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
