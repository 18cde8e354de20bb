"""The driver in processes that are killed, interrupted, or out of room.

All are started again until the runs are done, and they are then, to the bit, as if nothing had
been.
"""

import json
import os
import re
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import small_runs
from small_runs import LIMIT, Processes, assert_complete, contents, found, main, one_line, wait

pytestmark = pytest.mark.slow

# Eight runs, four side by side; at a learning rate of 10 some break down in rounds 2 and 3. In
# chunks of two rounds, the last of which is not full.
GRID = ("--grid=learning_rate=0.1,10", "--grid=seed=0:2", "--lanes_at_once=4")
LONG = ("--rounds=7", "--rounds_per_chunk=2", "--checkpoint_every=1")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> list[str]:
    return [*small_runs.flags(tmp_path_factory), *LONG]


@pytest.fixture
def processes():
    with Processes() as started:
        yield started


# What a watcher of the folder sees; a process is stopped when it has changed and is not empty.
SEEN = {
    "checkpoint being written": "*/*/*tmp*",
    "checkpoint": "*/*/[0-9]",
    "rows": "metrics.jsonl",
    "run being written": "runs/*/seed=*/config.json",
    "run": "runs/*/seed=*/summary.json",
    "batch": "batches/*",
}
SINGLE = [
    *(("start", signal.SIGKILL), ("checkpoint", signal.SIGINT), ("rows", signal.SIGKILL)),
    *(("checkpoint being written", signal.SIGKILL), ("rows", signal.SIGTERM)),
]
SWEEP = [
    *(("checkpoint being written", signal.SIGKILL), ("run being written", signal.SIGKILL)),
    *(("run", signal.SIGKILL), ("batch", signal.SIGTERM), ("checkpoint", signal.SIGKILL)),
]


def watcher(out: Path, moment: str) -> Callable[[], bool]:
    """True once the moment has come."""
    if moment == "start":
        began = time.monotonic()
        return lambda: time.monotonic() - began > 1

    def look() -> set[Any]:
        size = moment == "rows"
        return {(str(f), f.stat().st_size if size else 0) for f in out.glob(SEEN[moment])}

    def come() -> bool:
        try:
            return bool(look() - before)
        except FileNotFoundError:  # between glob and stat
            return False

    before = look()
    return come


@pytest.mark.parametrize(
    ("args", "stops"),
    [(["--cpu_devices=2"], SINGLE), ([*GRID, "--cpu_devices=1"], SWEEP)],
    ids=["single", "sweep"],
)
def test_killed_at_any_moment_it_ends_with_the_same_bits(
    tiny, processes, tmp_path, capsys, args, stops
):
    """A driver that is done before its moment has come is begun anew in another folder."""
    command, whole = (*tiny, *args), tmp_path / "whole"
    code, err = processes.run(*command, f"--out={whole}")
    assert code == 0, err
    wanted, rng, folders = contents(whole), np.random.default_rng(0), 1
    if "--cpu_devices=2" in args:
        config = json.loads((whole / "config.json").read_text())
        assert config["device"] == "cpu, 2 x 1 of lanes x clients"
    else:
        failed = [summary["failed"] for *_, summary in found(whole) if summary["failed"]]
        assert len(found(whole)) == 8
        assert {one["round"] for one in failed} <= {2, 3}
        assert len(failed) > 1
    out, waiting = tmp_path / "out1", list(stops)
    while waiting:
        moment, number = waiting[0]
        come, process = watcher(out, moment), processes.start(*command, f"--out={out}")
        if wait(come, process):
            time.sleep(rng.uniform(0, 0.03))
            process.send_signal(signal.SIGSTOP)
            if moment == "batch":  # a second driver is refused
                jax.devices()  # before `main` can split the CPU for the other tests
                assert main(*command, f"--out={out}") == 2
                assert "another process is writing there" in one_line(capsys)
            process.send_signal(number)
            process.send_signal(signal.SIGCONT)
        _, err = process.communicate(timeout=LIMIT)
        if process.returncode == 0:  # it was quicker
            assert contents(out) == wanted
            folders += 1
            assert folders < 5
            out = tmp_path / f"out{folders}"
            continue
        waiting.pop(0)
        if number == signal.SIGKILL:
            assert process.returncode == -signal.SIGKILL
        else:
            assert process.returncode == 130, err
            last = err.splitlines()[-1]
            assert "interrupted; go on with: python -m experiments.run" in last
            assert last.endswith(f"--out={out}")
        for name, content in contents(out, "summary.json").items():
            assert content == wanted[name]
    code, err = processes.run(*command, f"--out={out}")
    assert code == 0, err
    assert contents(out) == wanted
    if "--cpu_devices=1" in args:
        assert_complete(out)
        assert (out / "sweep.json").read_bytes() == (whole / "sweep.json").read_bytes()


KILLS = int(os.environ.get("NOISEFL_KILLS") or 6)  # of all drivers together
FRONTIER = [
    "--schemes=pair,two-way", "--partitions=iid", "--clients=6", "--seeds=0", "--rounds=3",
    "--coalitions=2", "--singles=1", "--copies=2", "--strengths=1", "--thief_images=50",
    "--attacks=bare_copy+scratch+average", "--checkpoint_every=1", "--max_tries=9",
    "--calibrator=geometric", "--server_images=60", "--cpu_devices=1",
]  # fmt: skip
DRIVERS = {
    "run": ("experiments.run", ["--cpu_devices=2"]),
    "sweep": ("experiments.run", [*GRID, "--cpu_devices=1"]),
    "frontier": ("experiments.frontier", FRONTIER),
}
RESULTS = (
    *("config.json", "metrics.jsonl", "thieves.jsonl", "summary.json"),
    *("frontier.csv", "frontier.md"),
)


@pytest.mark.parametrize("driver", DRIVERS)
def test_killed_at_random_moments_it_ends_with_the_same_bits(tiny, processes, tmp_path, driver):
    """A third of `KILLS` each, anywhere between the start of Python and the last file:

    NOISEFL_KILLS=100 .venv/bin/python -m pytest -m slow tests/test_kills.py -k random
    """
    module, args = DRIVERS[driver]
    if driver == "frontier":
        kept = ("--dataset", "--model", "--clients_per_round", "--compilation")
        tiny = [flag for flag in tiny if flag.startswith(kept)]
    place = list(DRIVERS).index(driver)
    left, rng = (KILLS + len(DRIVERS) - 1 - place) // len(DRIVERS), np.random.default_rng(place)
    wanted, lasts, folders = {}, 0.0, 1
    for whole in (tmp_path / "cold", tmp_path / "warm"):  # the second finds its programs compiled
        begin = time.monotonic()
        code, err = processes.run(*tiny, *args, f"--out={whole}", module=module)
        assert code == 0, err
        wanted, lasts, before = contents(whole, *RESULTS), time.monotonic() - begin, wanted
        assert before in ({}, wanted)
    assert len(wanted) > 2
    while left:
        out = tmp_path / f"out{folders}"
        process = processes.start(*tiny, *args, f"--out={out}", module=module)
        try:
            _, err = process.communicate(timeout=rng.uniform(0, lasts))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            left -= 1
            assert contents(out, "summary.json").items() <= wanted.items()
        else:  # it was quicker, and the next one begins anew
            assert process.returncode == 0, err
            assert contents(out, *RESULTS) == wanted
            folders += 1
    out = tmp_path / f"out{folders}"
    code, err = processes.run(*tiny, *args, f"--out={out}", module=module)
    assert code == 0, err
    assert contents(out, *RESULTS) == wanted
    assert not list(out.glob("batches/*"))


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="Linux alone has it")
def test_no_room_for_a_checkpoint_is_one_line(tiny, processes, tmp_path):
    """Files of the checkpoints are written by other code than ours, and it fails otherwise."""
    command = (*tiny, f"--out={tmp_path}", "--cpu_devices=1")
    process = processes.start(*command)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (100_000, 100_000))
    err = process.communicate(timeout=LIMIT)[1]
    said = re.findall(r"experiments\.run: .*", err)  # perhaps within a line of another thread
    assert (process.returncode, len(said)) == (2, 1), err
    assert "File too large" in said[0]
    assert not (tmp_path / "summary.json").exists()
    code, err = processes.run(*command)
    assert code == 0, err
    assert len(small_runs.rows(tmp_path)) == 14
