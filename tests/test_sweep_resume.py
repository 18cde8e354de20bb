"""The driver of sweeps where it left off: full disks, half a line, batches of other devices.

In this process and with programs that are compiled once; tests/test_sweep_kills.py has real ends.
"""

import errno
import json
import os
from pathlib import Path
from typing import Any

import jax
import pytest
import small_sweeps
from small_sweeps import SHORT, assert_complete, contents

from experiments import sweep, sweep_group, sweep_store


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> list[str]:
    jax.devices()  # before `main` can split the CPU for the other tests of this process
    return small_sweeps.flags(small_sweeps.shared(tmp_path_factory))


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory) -> Path:
    return small_sweeps.finished(tmp_path_factory, main)


@pytest.fixture(scope="module")
def programs() -> dict[Any, Any]:
    return {}


@pytest.fixture
def calls(monkeypatch, programs) -> list[Any]:
    """Programs are compiled once for all starts of the driver; their calls, of one chunk each."""
    compile, called = sweep_group.Lanes.compile, []

    def remembered(self, on, *args):
        key = (self.config, self.columns, len(self.group.runs), *args)
        if key not in programs:
            programs[key] = compile(self, on, *args)
        width, program = programs[key]
        return width, program._replace(chunk=lambda *a: called.append(a) or program.chunk(*a))

    monkeypatch.setattr(sweep_group.Lanes, "compile", remembered)
    return called


def main(*args: str) -> int:
    return sweep.main(["sweep", *args])


def test_a_full_disk_is_one_line_and_loses_nothing(
    tiny, finished, tmp_path, calls, monkeypatch, capsys
):
    """Every start has room for five files more, until the sweep is done."""
    args = (*tiny, *SHORT, f"--out={tmp_path / 'sweep'}")
    fsync, left, starts = os.fsync, 0, 0

    def full(descriptor: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(sweep_store.os, "fsync", full)
    for room in [0, 1, 2, 3, 4] + [5] * 20:
        left, starts = room, starts + 1
        code = main(*args)
        if code == 0:
            break
        err = capsys.readouterr().err
        said = [line for line in err.splitlines() if line.startswith("experiments.sweep: ")]
        assert (code, said) == (2, ["experiments.sweep: [Errno 28] No space left on device"])
        assert err.splitlines()[-1] == said[0]
    assert 5 < starts < 20
    assert_complete(tmp_path / "sweep")
    assert contents(tmp_path / "sweep") == contents(finished)


def test_killed_before_a_finished_batch_is_removed(tiny, finished, tmp_path, calls, monkeypatch):
    """Nothing is left to do for its runs, and yet it must go."""
    args = (*tiny, *SHORT, f"--out={tmp_path / 'sweep'}")
    for most in (1, 2):  # the first batch, then the last
        dropped = []

        def drop(self, name, most=most, dropped=dropped):
            dropped.append(name)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(sweep_store.SweepFolder, "drop_batch", drop)
            patch.setattr(sweep_store.SweepFolder, "sweep_up", lambda self: None)
            assert main(*args) == 130
        assert len(dropped) == 1
    assert len(list((tmp_path / "sweep").glob("runs/*/*"))) == 6
    assert main(*args) == 0
    assert_complete(tmp_path / "sweep")
    assert contents(tmp_path / "sweep") == contents(finished)


def test_a_batch_of_other_devices_begins_anew(tiny, finished, tmp_path, calls, monkeypatch, capsys):
    out = tmp_path / "sweep"
    with monkeypatch.context() as patch:
        patch.setattr(sweep_store.SweepFolder, "write_run", _interrupted)
        assert main(*tiny, *SHORT, f"--out={out}") == 130
    (batch,) = out.glob("batches/*/batch.json")
    batch.write_text(json.dumps({**json.loads(batch.read_text()), "devices": 16}))
    capsys.readouterr()
    assert main(*tiny, *SHORT, f"--out={out}") == 0
    assert f"batch {batch.parent.name} was begun on other devices" in capsys.readouterr().err
    assert_complete(out)
    assert contents(out) == contents(finished)


def test_a_batch_of_another_width_goes_on_as_it_began(
    tiny, finished, tmp_path, calls, monkeypatch, capsys
):
    """Its three lanes, and its chunks of a round; the other three runs go by what is asked now."""
    args = (*tiny, *SHORT, f"--out={tmp_path / 'sweep'}")
    interrupted_in_round_4(args, monkeypatch)
    calls.clear()
    assert main(*args, "--lanes_at_once=6", "--rounds_per_chunk=3") == 0
    assert [len(call[0]) for call in calls] == [3] * 2 + [6] * 2
    assert "begin anew" not in capsys.readouterr().err
    assert_complete(tmp_path / "sweep")
    ours, theirs = contents(tmp_path / "sweep"), contents(finished)
    for name, content in ours.items():
        if name.endswith("config.json"):
            chunks = json.loads(content)["options"].pop("rounds_per_chunk")
            assert (chunks == 1) == (content == theirs[name])
        else:
            assert content == theirs[name]


def test_a_batch_that_goes_on_under_other_versions_says_so(
    tiny, finished, tmp_path, calls, monkeypatch, capsys
):
    args, real = (*tiny, *SHORT, f"--out={tmp_path / 'sweep'}"), sweep.provenance
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "provenance", lambda: {**real(), "git_revision": "older"})
        interrupted_in_round_4(args, monkeypatch)
    capsys.readouterr()
    assert main(*args) == 0
    warned = [x for x in capsys.readouterr().err.splitlines() if "git_revision is" in x]
    assert len(warned) == 1
    assert "and was 'older' when batch" in warned[0]
    configs = [
        json.loads(file.read_text()) for file in (tmp_path / "sweep").glob("runs/*/*/config.json")
    ]
    now = real()["git_revision"]
    assert sorted((c["git_revision"], str(c.get("resumed"))) for c in configs) == sorted(
        [("older", str([{"git_revision": now}]))] * 3 + [(str(now), "None")] * 3
    )


def test_a_batch_that_holds_runs_of_two_groups_now_begins_anew(
    tiny, tmp_path, calls, monkeypatch, capsys
):
    """FedAvg goes with the first group that it fits, here another one than before."""
    out = tmp_path / "sweep"
    args = (*tiny, "--grid=seed=0:2", f"--out={out}")
    interrupted_in_round_4(args, monkeypatch)
    capsys.readouterr()
    assert main(*args, "--grid=calibrator=fixed,geometric") == 0
    assert "was begun for another grid; its runs begin anew" in capsys.readouterr().err
    assert_complete(out)


def interrupted_in_round_4(args: tuple[str, ...], monkeypatch) -> None:
    """Of the first batch; the checkpoint of round 2 is there."""
    save = sweep_store.BatchFolder.save

    def stop(self, states, number):
        if number == 4:
            raise KeyboardInterrupt
        save(self, states, number)

    with monkeypatch.context() as patch:
        patch.setattr(sweep_store.BatchFolder, "save", stop)
        assert main(*args) == 130


@pytest.mark.parametrize("written", [0, 2])
def test_progress_counts_every_run_once(tiny, tmp_path, calls, monkeypatch, written):
    """Killed when some runs of a batch were written, the rest are what is left to do."""
    args, write, shown = (*tiny, *SHORT, f"--out={tmp_path / 'sweep'}"), sweep_store.SweepFolder, []
    made = sweep.SweepProgress

    def remembered(*args):
        shown.append(made(*args))
        return shown[-1]

    monkeypatch.setattr(sweep, "SweepProgress", remembered)
    write_run, left = write.write_run, [None] * written

    def stop(*args):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        write_run(*args)

    with monkeypatch.context() as patch:
        patch.setattr(write, "write_run", stop)
        assert main(*args) == 130
    assert main(*args) == 0
    everything, group, _ = shown[-1].tasks
    assert (everything.completed, everything.total) == (6 * 4, 6 * 4)
    assert (group.completed, group.total, group.description) == (6, 6, "group 1/1")


def _interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("rows", [7, 12], ids=["the first", "the last"])
def test_half_a_line_after_the_checkpoint(tiny, finished, tmp_path, calls, monkeypatch, rows):
    """Rounds 3 and 4 of three lanes have rows, some of them, but no checkpoint."""
    args = (*tiny, *SHORT, f"--out={tmp_path / 'sweep'}")
    interrupted_in_round_4(args, monkeypatch)
    (file,) = (tmp_path / "sweep").glob("batches/*/metrics-0.jsonl")
    lines = [line for line in file.read_bytes().splitlines() if line]
    assert [json.loads(line)["round"] for line in lines] == [1] * 3 + [2] * 3 + [3] * 3 + [4] * 3
    file.write_bytes(b"\n".join([*lines[: rows - 1], lines[rows - 1][:99]]))
    calls.clear()
    assert main(*args) == 0
    assert len(calls) == 2 + 4  # the rest of this batch, and the other one
    assert_complete(tmp_path / "sweep")
    assert contents(tmp_path / "sweep") == contents(finished)
