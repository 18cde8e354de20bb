"""One sweep by two processes on two devices each, over loopback, against one on one device."""

import json
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import small_sweeps
from small_sweeps import LIMIT, RATES, SEEDS, Processes, assert_complete, found, wait

BOUND = 60  # seconds in which a process notices that another one is gone


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    return small_sweeps.uninterrupted(tmp_path_factory)


@pytest.fixture(scope="module")
def args(tmp_path_factory) -> list[str]:
    """Eight of the runs of that sweep."""
    flags = small_sweeps.flags(small_sweeps.shared(tmp_path_factory))
    return [*flags, *small_sweeps.LONG, "--calibrator=geometric", RATES, SEEDS]


@pytest.fixture
def processes():
    with Processes() as started:
        yield started


def start_both(
    processes: Processes, *args: str, second: Sequence[str] = ()
) -> list[subprocess.Popen[str]]:
    """`second`: more flags of the second one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"--coordinator=127.0.0.1:{free.getsockname()[1]}"
    common = ("--distributed", place, "--num_processes=2", "--cpu_devices=2")
    more = [(), second]
    return [processes.start(*args, *common, f"--process_id={i}", *more[i]) for i in (0, 1)]


def run_both(processes: Processes, *args: str) -> None:
    """To their end, at which the first alone says what there is."""
    both = start_both(processes, *args)
    said = [process.communicate(timeout=LIMIT) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    holds = [[line for line in out.splitlines() if "holds 8 runs" in line] for out, _ in said]
    assert [len(lines) for lines in holds] == [1, 0]


def assert_same_runs(out: Path, uninterrupted: Path, exact: bool) -> None:
    """Every number of every round but one ratio of sums, which XLA fuses otherwise for more than
    one device and which nothing depends on.

    Not exact: but for two images of an accuracy; and runs at a learning rate of 10, in which no
    difference stays small, need only be there.
    """
    assert_complete(out)
    ours, theirs = found(out), found(uninterrupted)
    wanted = {_path(config): (rows, summary) for config, rows, summary in theirs}
    assert len(ours) == 8
    for config, rows, summary in ours:
        their_rows, their_summary = wanted[_path(config)]
        if not exact and config["options"]["learning_rate"] == 10:
            continue
        if exact:
            assert summary == their_summary
        for row, their_row in zip(rows, their_rows, strict=True):
            ratio, their_ratio = (some.pop("relative_strength") for some in (row, their_row))
            assert row == (their_row if exact else {k: _near(v) for k, v in their_row.items()})
            if row["finite"] and exact:
                assert ratio == pytest.approx(their_ratio, rel=1e-6, abs=0)


def _near(value: Any) -> Any:
    return pytest.approx(value, rel=0, abs=0.035) if isinstance(value, float) else value


def _path(config: dict) -> str:
    """What tells a run from all others."""
    return json.dumps([config["run"], config["options"]], sort_keys=True)


@pytest.mark.parametrize(
    ("victim", "seen", "more"),
    [
        (0, "batches/*/state/[2-9]", []),
        (1, "runs/*/seed=*", ["--client_devices=4"]),
    ],
    ids=["lanes", "clients"],
)
def test_one_is_killed_and_both_go_on(args, uninterrupted, processes, tmp_path, victim, seen, more):
    """Once with a lane on each device; once with three clients on four, so that each lane spans
    both processes and the first writes them all."""
    out = tmp_path / "sweep"
    command = (*args, *more, f"--out={out}")
    both = start_both(processes, *command)
    assert wait(lambda: any(out.glob(seen)), both[0])
    both[victim].send_signal(signal.SIGKILL)
    killed, other = time.monotonic(), both[1 - victim]
    _, err = other.communicate(timeout=BOUND)
    assert time.monotonic() - killed < BOUND
    assert both[victim].wait(timeout=BOUND) == -signal.SIGKILL
    assert other.returncode != 0
    assert "another process of the sweep is gone" in err or "Terminating process" in err
    assert len(list(out.glob("runs/*/seed=*"))) < 8  # in the middle
    run_both(processes, *command)
    assert_same_runs(out, uninterrupted, exact=not more)


@pytest.mark.parametrize(
    ("second", "line"),
    [
        ("--checkpoint_every=3", "given the same flags and code: checkpoint_every"),
        ("--dataset=/nowhere.npz", "dataset='/nowhere.npz': no such file"),
    ],
)
def test_processes_of_different_flags_are_refused(args, processes, tmp_path, second, line):
    """They would wait for each other without end."""
    out = tmp_path / "sweep"
    both = start_both(processes, *args, f"--out={out}", second=[second])
    said = [process.communicate(timeout=LIMIT)[1] for process in both]
    assert [process.returncode for process in both] == [2, 2], said
    for err in said:
        assert line in err.splitlines()[-1]
    assert not out.exists()


def test_a_refusal_by_the_first_ends_the_second(args, uninterrupted, processes, tmp_path):
    """Only the first process looks at the folder."""
    (tmp_path / "config.json").write_text("{}")
    both = start_both(processes, *args, f"--out={tmp_path}")
    said = [process.communicate(timeout=LIMIT)[1] for process in both]
    assert both[0].returncode == 2
    assert "holds other files of ours" in said[0].splitlines()[-1]
    assert both[1].returncode == 2
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]
