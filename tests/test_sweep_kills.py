"""The driver of sweeps in processes that are killed, interrupted, or out of room.

All are started again until the sweep is done, and it is then, to the bit, as if nothing had been.
"""

import json
import re
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import small_sweeps
from small_sweeps import GRID, SEEDS, Processes, assert_complete, contents, wait

from experiments import sweep


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> list[str]:
    folder = small_sweeps.shared(tmp_path_factory)
    return [*small_sweeps.flags(folder), *small_sweeps.LONG, "--cpu_devices=1"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    return small_sweeps.uninterrupted(tmp_path_factory)


@pytest.fixture
def processes():
    with Processes() as started:
        yield started


def test_the_sweep_is_worth_interrupting(uninterrupted):
    assert_complete(uninterrupted)
    runs = small_sweeps.found(uninterrupted)
    assert len(runs) == 12
    for _, rows, summary in runs:  # in chunks of two rounds, the last of which is not full
        rounds = summary["failed"]["round"] if summary["failed"] else 7
        assert [row["round"] for row in rows] == list(range(1, rounds + 1))
        sound = [True] * (rounds - 1) + [summary["failed"] is None]
        assert [row["finite"] for row in rows] == sound
    failed = [summary["failed"]["round"] for *_, summary in runs if summary["failed"]]
    assert len(failed) > 3
    assert set(failed) == {2, 3}


# What a watcher of the folder sees; a process is stopped when it has changed and is not empty.
SEEN: dict[str, str] = {
    "rows": "batches/*/metrics-0.jsonl",
    "checkpoint being written": "batches/*/state/*tmp*",
    "checkpoint": "batches/*/state/[0-9]",
    "run being written": "runs/*/.seed=*.new/summary.json",
    "run": "runs/*/seed=*",
    "batch": "batches/*",
}
STOPS = [
    *(("start", signal.SIGKILL), ("rows", signal.SIGKILL), ("checkpoint", signal.SIGINT)),
    *(("checkpoint being written", signal.SIGKILL), ("run being written", signal.SIGKILL)),
    *(("run", signal.SIGKILL), ("batch", signal.SIGTERM), ("checkpoint", signal.SIGKILL)),
]


def watcher(out: Path, moment: str) -> Callable[[], bool]:
    """True once the moment has come."""
    if moment == "start":
        began = time.monotonic()
        return lambda: time.monotonic() - began > 1

    def look() -> set[Any]:
        files = out.glob(SEEN[moment])
        return {(str(f), f.stat().st_size if moment == "rows" else 0) for f in files}

    before = look()
    return lambda: bool(look() - before)


def test_killed_at_any_moment_it_ends_with_the_same_bits(
    tiny, uninterrupted, processes, tmp_path, capsys
):
    """A driver that is done before its moment has come is a sweep more, from the beginning."""
    wanted, rng = contents(uninterrupted), np.random.default_rng(0)
    sweeps, waiting = 1, list(STOPS)
    out = tmp_path / "sweep1"
    while waiting:
        moment, number = waiting[0]
        args = (*tiny, *GRID, f"--out={out}")
        come = watcher(out, moment)
        process = processes.start(*args)
        if wait(come, process):
            time.sleep(rng.uniform(0, 0.03))
            if moment == "batch":
                a_second_driver_is_refused(args, capsys)
            process.send_signal(number)
        _, err = process.communicate(timeout=small_sweeps.LIMIT)
        if process.returncode == 0:  # it was quicker
            assert_same(out, uninterrupted)
            sweeps += 1
            assert sweeps < 5
            out = tmp_path / f"sweep{sweeps}"
            continue
        waiting.pop(0)
        if number == signal.SIGKILL:
            assert process.returncode == -signal.SIGKILL
        else:
            assert process.returncode == 130
            assert "interrupted; go on with: python -m experiments.sweep" in err.splitlines()[-1]
            assert err.splitlines()[-1].endswith(f"--out={out}")
        assert contents(out).items() <= wanted.items()  # no run is there by half
    code, err = processes.run(*tiny, *GRID, f"--out={out}")
    assert code == 0, err
    assert_same(out, uninterrupted)


def assert_same(out: Path, uninterrupted: Path) -> None:
    assert_complete(out)
    assert contents(out) == contents(uninterrupted)
    assert (out / "sweep.json").read_bytes() == (uninterrupted / "sweep.json").read_bytes()


def a_second_driver_is_refused(args: tuple[str, ...], capsys) -> None:
    jax.devices()  # before `main` can split the CPU for the other tests of this process
    assert sweep.main(["sweep", *args]) == 2
    printed, err = capsys.readouterr()
    assert printed == ""
    (line,) = err.splitlines()
    assert "another process is writing there" in line


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="Linux alone has it")
def test_no_room_for_a_checkpoint_is_one_line(tiny, uninterrupted, processes, tmp_path):
    """Files of the checkpoints are written by other code than ours, and it fails otherwise."""
    out = tmp_path / "sweep"
    args = (*tiny, "--grid=learning_rate=0.1", "--calibrator=geometric", SEEDS, f"--out={out}")

    process = processes.start(*args)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (100_000, 100_000))
    err = process.communicate(timeout=small_sweeps.LIMIT)[1]
    said = re.findall(r"experiments\.sweep: .*", err)  # perhaps within a line of another thread
    assert (process.returncode, len(said)) == (2, 1), err
    assert "File too large" in said[0]
    (batch,) = out.glob("batches/*")
    rows = (batch / "metrics-0.jsonl").read_text().splitlines()
    assert [json.loads(row)["round"] for row in rows if row] == [1, 2] * 4
    assert not list(out.glob("runs/*/*"))
    code, err = processes.run(*args)
    assert code == 0, err
    assert_complete(out)
    names = ("metrics.jsonl", "summary.json")
    ours, theirs = contents(out, *names), contents(uninterrupted, *names)
    assert len(ours) == 2 * 4
    assert ours.items() <= theirs.items()
