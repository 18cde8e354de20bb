"""One command by two processes, over loopback, against one process."""

import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import small_runs
from small_runs import LIMIT, Processes, assert_complete, found, main, rows, wait

pytestmark = pytest.mark.slow

BOUND = 60  # seconds in which a process notices that another one is gone
GRID = ("--grid=learning_rate=0.1,10", "--grid=seed=0:2", "--lanes_at_once=4")
LONG = ("--rounds=7", "--rounds_per_chunk=2", "--checkpoint_every=1")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> list[str]:
    return [*small_runs.flags(tmp_path_factory), *LONG]


@pytest.fixture(scope="module")
def uninterrupted(tiny, tmp_path_factory) -> Path:
    """Of one process on one device."""
    out = tmp_path_factory.mktemp("uninterrupted")
    with pytest.MonkeyPatch.context() as patch:
        small_runs.remember_programs(patch)
        assert main(*tiny, *GRID, f"--out={out}") == 0
    return out


@pytest.fixture
def processes():
    with Processes() as started:
        yield started


def start_both(
    processes: Processes, *args: str, devices: int = 2, second: Sequence[str] = ()
) -> list[subprocess.Popen[str]]:
    """`second`: more flags of the second one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"--coordinator=127.0.0.1:{free.getsockname()[1]}"
    common = ("--distributed", place, "--num_processes=2", f"--cpu_devices={devices}")
    more = [(), second]
    return [processes.start(*args, *common, f"--process_id={i}", *more[i]) for i in (0, 1)]


def run_both(processes: Processes, *args: str, devices: int = 2) -> None:
    """To their end, at which the first alone says what there is."""
    both = start_both(processes, *args, devices=devices)
    said = [process.communicate(timeout=LIMIT) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert ["holds" in out for out, _ in said] == [True, False]


def assert_same_rows(ours: list[dict], theirs: list[dict], exact: bool) -> None:
    """Every number of every round, but for the last bit of a ratio of sums; where clients are
    summed otherwise, but for a few images of an accuracy and what comes of them."""
    names = ("run", "round", "protected", "training_samples", "finite")
    for row, other in zip(ours, theirs, strict=True):
        kept = set(row) - {"relative_strength"} if exact else names
        assert {name: row[name] for name in kept} == {name: other[name] for name in kept}
        for name, value in row.items():
            if name == "relative_strength" and exact and row["finite"]:
                assert value == pytest.approx(other[name], rel=1e-6, abs=0)
            if isinstance(value, float) and name.endswith("_accuracy"):
                assert value == pytest.approx(other[name], abs=0.05)


@pytest.mark.parametrize(
    ("victim", "seen", "more"),
    [(0, "batches/*/[2-9]", []), (1, "runs/*/*/summary.json", ["--client_devices=4"])],
    ids=["lanes", "clients"],
)
def test_one_is_killed_and_both_go_on(tiny, uninterrupted, processes, tmp_path, victim, seen, more):
    """Once with a lane on each device; once with three clients on four, so that each lane spans
    both processes."""
    command = (*tiny, *GRID, *more, f"--out={tmp_path}")
    both = start_both(processes, *command)
    assert wait(lambda: any(tmp_path.glob(seen)), both[0])
    both[victim].send_signal(signal.SIGKILL)
    killed, other = time.monotonic(), both[1 - victim]
    _, err = other.communicate(timeout=BOUND)
    assert time.monotonic() - killed < BOUND
    assert both[victim].wait(timeout=BOUND) == -signal.SIGKILL
    assert other.returncode != 0
    assert "another process is gone" in err or "Terminating process" in err
    assert len(list(tmp_path.glob("runs/*/*/summary.json"))) < 8  # in the middle
    run_both(processes, *command)
    assert_complete(tmp_path)
    theirs: Any = {
        _told(config): (lines, summary) for config, lines, summary in found(uninterrupted)
    }
    assert len(found(tmp_path)) == len(theirs) == 8
    for config, lines, summary in found(tmp_path):
        other_lines, other_summary = theirs[_told(config)]
        # At a learning rate of 10 no difference stays small.
        if not more or config["options"]["learning_rate"] < 1:
            assert_same_rows(lines, other_lines, exact=not more)
        if not more:
            assert summary == other_summary


def _told(config: dict) -> str:
    """What tells a run from all others."""
    return str([config["run"], sorted(map(str, config["options"].items()))])


def test_fedavg_may_be_one_process_and_the_scheme_the_other(tiny, processes, tmp_path):
    run_both(processes, *tiny, f"--out={tmp_path / 'both'}", devices=1)
    code, err = processes.run(*tiny, f"--out={tmp_path / 'one'}", "--cpu_devices=2")
    assert code == 0, err
    assert_same_rows(rows(tmp_path / "both"), rows(tmp_path / "one"), exact=True)


@pytest.mark.parametrize(
    ("second", "line"),
    [
        ("--checkpoint_every=3", "given the same flags and code: checkpoint_every"),
        ("--cap=0.3", "given the same flags and code: runs"),
        ("--client_devices=3", "client_devices=3: must divide the number of devices, 4"),
        ("--dataset=/nowhere.npz", "given the same flags and code: runs"),
    ],
)
def test_processes_of_different_flags_are_refused(tiny, processes, tmp_path, second, line):
    """They would wait for each other without end."""
    out = tmp_path / "run"
    both = start_both(processes, *tiny, f"--out={out}", second=[second])
    said = [process.communicate(timeout=LIMIT)[1] for process in both]
    assert [process.returncode for process in both] == [2, 2], said
    for err in said:
        assert line in err.splitlines()[-1]
    assert not out.exists()


def test_a_refusal_by_the_first_ends_the_second(tiny, processes, tmp_path):
    """Only the first process looks at the folder."""
    (tmp_path / "sweep.json").write_text("{}")
    both = start_both(processes, *tiny, f"--out={tmp_path}")
    said = [process.communicate(timeout=LIMIT)[1] for process in both]
    assert [process.returncode for process in both] == [2, 2], said
    for err in said:
        assert "holds a sweep; give another --out" in err.splitlines()[-1]
