"""The driver with a grid: its files, growth, and where it left off: full disks, other devices.

In this process and with programs that are compiled once; tests/test_kills.py has real ends.
"""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
import small_runs
from small_runs import GRID, assert_complete, contents, found, main, one_line, rows, said, times

from experiments import run
from experiments.sweep import execute
from experiments.sweep.prepare import Lanes
from experiments.sweep.store import Store
from noisefl import record
from noisefl.record import Checkpoints
from noisefl.sweep import TooLarge


@pytest.fixture(autouse=True)
def calls(monkeypatch) -> list[Any]:
    """Of the program, each of one chunk."""
    return small_runs.remember_programs(monkeypatch)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> list[str]:
    return small_runs.flags(tmp_path_factory)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """Not to be changed."""
    return small_runs.finished(tmp_path_factory)


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def assert_same(out: Path, finished: Path) -> None:
    assert_complete(out)
    assert contents(out) == contents(finished)


# A whole sweep


def test_the_folder_says_what_it_holds(finished):
    assert_complete(finished)
    planned = json.loads((finished / "sweep.json").read_text())
    assert planned["grid"] == {"seed": [0, 1], "cap": [0.3, 0.5]}
    assert planned["options"]["num_clients"] == 6
    assert not {"seed", "cap"} & set(planned["options"])
    assert len(planned["runs"]) == 6
    for path, entry in planned["runs"].items():
        folder = finished / path
        config = json.loads((folder / "config.json").read_text())
        summary = json.loads((folder / "summary.json").read_text())
        assert config["run"] == entry["run"]
        assert config["options"].items() >= entry["grid"].items()
        assert config["options"]["seed"] == entry["seed"]
        assert config["strategy"]["target"] == "cpu"
        assert (summary["cap"], summary["rounds"]) == (entry["cap"], 4)
        assert not any(name.startswith(("baseline", "gap")) for name in summary)
        assert [(row["run"], row["round"]) for row in rows(folder)] == [
            (entry["run"], t) for t in (1, 2, 3, 4)
        ]
        if entry["run"] == "noise":
            assert any(row["strength"] > 0 for row in rows(folder)) or entry["cap"] > 0.3
            reference = planned["runs"][entry["baseline"]]
            assert (reference["run"], reference["baseline"]) == ("fedavg", None)
            assert reference["grid"] == {"seed": entry["seed"]}
        else:
            assert entry["cap"] is None
    timings = [json.loads(file.read_text()) for file in finished.glob("runs/*/*/timing.json")]
    assert all(timing["seconds"] > 0 for timing in timings)
    assert len({timing["batch"] for timing in timings}) == 3


def test_every_run_is_what_a_single_run_makes(tiny, finished, tmp_path):
    assert main(*tiny, "--seed=1", "--cap=0.5", f"--out={tmp_path}") == 0
    single = json.loads((tmp_path / "summary.json").read_text())
    ((config, noise, summary),) = found(finished, seed=1, cap=0.5)
    assert noise == rows(tmp_path)[4:]
    assert summary.items() <= single.items()
    assert summary["owner_accuracy_final"] == noise[-1]["owner_accuracy"]
    theirs = json.loads((tmp_path / "config.json").read_text())
    assert {name: theirs[name] for name in config} == config
    ((_, fedavg, beside),) = found(finished, seed=1, run="fedavg")
    assert fedavg == rows(tmp_path)[:4]
    assert beside["owner_accuracy_final"] == single["baseline_accuracy_final"]
    ((_, other, _),) = found(finished, seed=0, cap=0.5)
    assert other != noise


def test_a_second_start_does_nothing_again(tiny, finished, monkeypatch, capsys):
    before = times(finished)
    monkeypatch.setattr(run, "prepare", lambda *_: pytest.fail("loaded the data"))
    assert main(*tiny, *GRID, f"--out={finished}") == 0
    assert times(finished) == before
    assert f"{finished} holds 6 runs" in capsys.readouterr().out


def test_broken_and_infeasible_runs_are_results(tiny, finished, tmp_path):
    """Beside others, which do not feel it."""
    worse = [flag.replace("0.3,0.5", "0.3,0.03") for flag in GRID]
    assert main(*tiny, *worse, "--grid=learning_rate=0.1,1e6", f"--out={tmp_path}") == 0
    assert_complete(tmp_path)
    assert len(found(tmp_path)) == 2 * 2 * 2 + 2 * 2
    for config, lines, summary in found(tmp_path, learning_rate=1e6):
        failed = summary["failed"]
        assert failed["round"] == len(lines) == lines[-1]["round"]
        assert f"run {config['run']}, round {failed['round']}: " in failed["cause"]
        assert "learning_rate too large" in failed["cause"]
        assert [row["finite"] for row in lines] == [True] * (len(lines) - 1) + [False]
        assert summary["owner_accuracy_final"] is None
    kept = contents(finished, "metrics.jsonl", "summary.json")
    ours = contents(tmp_path, "metrics.jsonl", "summary.json")
    # Caps of 0.3 and FedAvg at this learning rate are in both sweeps, under the same paths.
    both = set(kept) & set(ours)
    assert len(both) == 2 * (2 + 2)
    assert {name: ours[name] for name in both} == {name: kept[name] for name in both}
    for _, lines, summary in found(tmp_path, cap=0.03, learning_rate=0.1):
        assert summary["failed"] is None
        assert summary["infeasible_rounds"] == summary["protected_rounds"] == 3
        assert summary["shared_accuracy_max_test"] > 0.03
        assert [row["feasible"] for row in lines] == [True, False, False, False]


def test_a_group_that_does_not_fit_is_left_out(tiny, finished, tmp_path, monkeypatch, capsys):
    """And those after it are not: here the first of two groups."""
    compile, args = Lanes.compile, (*tiny, *GRID, "--grid=batch_size=20,10", f"--out={tmp_path}")

    def too_large(self, on, *given):
        if self.experiment(self.group.runs[0]).local.batch_size == 20:
            raise TooLarge("lanes_at_once=1: a lane needs 4312.0 GB, a device has 25.3")
        return compile(self, on, *given)

    monkeypatch.setattr(Lanes, "compile", too_large)
    assert main(*args, "--dry_run") == 0
    assert capsys.readouterr().out.count("too large") == 1
    assert main(*args) == 2
    first, last = said(capsys.readouterr().err)
    assert "batch_size=20: lanes_at_once=1: a lane needs 4312.0 GB, a device has 25.3" in first
    assert first.endswith("its 6 runs are left out")
    assert last.endswith("6 of 12 runs are left out, as said above")
    assert contents(tmp_path) == contents(finished)


# Growth


def test_a_grown_grid_keeps_what_is_done(tiny, finished, copy, monkeypatch):
    before, asked = times(copy / "runs"), []
    run_batch = execute.run_batch
    monkeypatch.setattr(
        execute, "run_batch", lambda *given: asked.append(given[2].runs) or run_batch(*given)
    )
    grown = [flag.replace("0.3,0.5", "0.4,0.5,0.3") for flag in GRID]
    assert main(*tiny, *grown, "--dry_run", f"--out={copy}") == 0
    assert main(*tiny, *grown, f"--out={copy}") == 0
    assert_complete(copy)
    files = [file for file in before if file.is_file()]
    assert {file: file.stat().st_mtime_ns for file in files} == {f: before[f] for f in files}
    assert len(found(copy, cap=0.4)) == 2
    assert len(contents(copy)) == len(contents(finished)) + 6
    assert [[one.grid["cap"] for one in some] for some in asked] == [[0.4, 0.4]]
    planned = json.loads((copy / "sweep.json").read_text())["runs"].values()
    for entry in planned:  # the FedAvg runs that were there serve them too
        if entry["cap"] == 0.4:
            assert (finished / entry["baseline"] / "summary.json").exists()


def test_grown_by_an_axis_and_by_fedavg_it_is_as_if_begun_so(tiny, finished, tmp_path):
    seeds, _, *others = GRID
    begun = (*tiny, *others, seeds, "--cap=0.5", "--nobaseline", f"--out={tmp_path}")
    assert main(*begun) == 0
    assert len(contents(tmp_path, "summary.json")) == 2
    assert main(*tiny, *GRID, f"--out={tmp_path}") == 0
    assert_same(tmp_path, finished)


@pytest.mark.parametrize("name", ["config.json", "summary.json"])
def test_a_run_that_lacks_a_file_is_done_again(tiny, finished, copy, name):
    victim = sorted(copy.glob("runs/*/*"))[0]
    (victim / name).unlink()
    assert main(*tiny, *GRID, f"--out={copy}") == 0
    assert_same(copy, finished)


@pytest.mark.parametrize(
    ("grid", "more", "wanted"),
    [
        ("0.3", [], "2 runs that this one has not; a sweep may only grow"),
        ("0.3,0.5", ["--rounds=5"], "rounds=5: the sweep in "),
        ("0.3,0.5", ["--max_tries=5"], "max_tries=5: the sweep in "),
    ],
)
def test_a_smaller_or_another_grid_is_refused(tiny, finished, capsys, grid, more, wanted):
    before = times(finished)
    fewer = [flag.replace("0.3,0.5", grid) for flag in GRID]
    for dry in ([], ["--dry_run"]):
        assert main(*tiny, *fewer, *more, *dry, f"--out={finished}") == 2
        assert wanted in one_line(capsys)
    assert times(finished) == before


# Where it left off


def interrupted_in_round_4(args: tuple[str, ...], monkeypatch) -> None:
    """Of the first batch; the checkpoint of round 2 is there."""
    save = Checkpoints.save

    def stop(self, number, *given):
        if number == 4:
            raise KeyboardInterrupt
        save(self, number, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", stop)
        assert main(*args) == 130


def test_it_goes_on_from_the_checkpoint(tiny, finished, tmp_path, monkeypatch, calls):
    args = (*tiny, *GRID, f"--out={tmp_path}")
    interrupted_in_round_4(args, monkeypatch)
    calls.clear()
    assert main(*args) == 0
    assert len(calls) == 2 + 4 + 4
    assert_same(tmp_path, finished)


def test_a_full_disk_is_one_line_and_loses_nothing(tiny, finished, tmp_path, monkeypatch, capsys):
    """Every start has room for five files more, until the sweep is done."""
    fsync, left, starts = os.fsync, 0, 0

    def full(descriptor: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(record.os, "fsync", full)
    for room in [0, 1, 2, 3, 4] + [7] * 20:
        left, starts = room, starts + 1
        code = main(*tiny, *GRID, f"--out={tmp_path}")
        if code == 0:
            break
        err = capsys.readouterr().err
        assert code == 2
        (line,) = said(err)
        assert line.startswith(f"experiments.run: {tmp_path}/")
        assert line.endswith(": cannot be written (No space left on device)")
        assert err.splitlines()[-1] == line
    assert 5 < starts < 20
    assert_same(tmp_path, finished)


def test_killed_before_a_finished_batch_is_removed(tiny, finished, tmp_path, monkeypatch):
    """Nothing is left to do for its runs, and yet it must go."""
    args, dropped = (*tiny, *GRID, f"--out={tmp_path}"), []

    def drop(self, name):
        dropped.append(name)
        raise KeyboardInterrupt

    for _ in range(3):
        with monkeypatch.context() as patch:
            patch.setattr(Store, "drop", drop)
            patch.setattr(Store, "tidy", lambda *_: None)
            assert main(*args) == 130
    assert len(set(dropped)) == 3
    assert len(list(tmp_path.glob("batches/*/batch.json"))) == 3
    shutil.rmtree(sorted(tmp_path.glob("runs/*/*"))[0])
    assert main(*args) == 0
    assert_same(tmp_path, finished)


@pytest.mark.parametrize("written", [0, 1])
def test_progress_counts_every_run_once(tiny, tmp_path, monkeypatch, written):
    """Killed when some runs of a batch were written, the rest are what is left to do."""
    args, finish, shown = (*tiny, *GRID, f"--out={tmp_path}"), Store.finish, []
    made, left = run.Progress, [None] * written

    def remembered(*given):
        shown.append(made(*given))
        return shown[-1]

    def stop(*given):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        finish(*given)

    monkeypatch.setattr(run, "Progress", remembered)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "finish", stop)
        assert main(*args) == 130
    assert main(*args) == 0
    everything, group, _ = shown[-1].tasks
    assert (everything.completed, everything.total) == (6 * 4, 6 * 4)
    assert (group.completed, group.total, group.description) == (6, 6, "group 1/1")


def test_a_batch_of_another_width_and_chunk_goes_on_as_it_began(
    tiny, finished, tmp_path, calls, monkeypatch, capsys
):
    """The other four runs go by what is asked now. One program stands in for all."""
    args, compile = (*tiny, *GRID, f"--out={tmp_path}"), Lanes.compile
    interrupted_in_round_4(args, monkeypatch)
    calls.clear()
    asked = []

    def of_two_lanes(self, on, width, rounds):
        asked.append((width, rounds))
        compiled = compile(self, on, 2, 1)

        def chunk(seeds, states, *given):
            found = []
            for _ in range(rounds):
                states, numbers = compiled.program.chunk(seeds, states, *given)
                found.append(numbers)
            return states, {name: jnp.hstack([one[name] for one in found]) for name in found[0]}

        return compiled._replace(program=compiled.program._replace(chunk=chunk))

    monkeypatch.setattr(Lanes, "compile", of_two_lanes)
    assert main(*args, "--lanes_at_once=1", "--rounds_per_chunk=4") == 0
    assert asked == [(2, 1), (1, 4)]
    assert "begin anew" not in capsys.readouterr().err
    assert_complete(tmp_path)
    chunks = [config["options"]["rounds_per_chunk"] for config, *_ in found(tmp_path)]
    assert sorted(chunks) == [1, 1, 4, 4, 4, 4]
    assert contents(tmp_path, "metrics.jsonl") == contents(finished, "metrics.jsonl")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"lanes": 3}, "was begun with more memory"),
        ({"damaged": True}, "cannot go on (out="),
    ],
)
def test_a_batch_that_cannot_go_on_begins_anew(
    tiny, finished, tmp_path, monkeypatch, capsys, change, why
):
    args, compile = (*tiny, *GRID, f"--out={tmp_path}"), Lanes.compile
    interrupted_in_round_4(args, monkeypatch)
    (batch,) = tmp_path.glob("batches/*/batch.json")
    batch.write_text(json.dumps({**json.loads(batch.read_text()), **change}))
    if "damaged" in change:
        for file in batch.parent.glob("2/**/*"):
            if file.is_file():
                file.write_bytes(b"")
    monkeypatch.setattr(Lanes, "compile", lambda self, on, *_: compile(self, on, 2, 1))
    capsys.readouterr()
    assert main(*args) == 0
    (line,) = said(capsys.readouterr().err)
    assert f"batch {batch.parent.name} {why}" in line
    assert line.endswith("its runs begin anew")
    assert_same(tmp_path, finished)


def test_a_batch_that_goes_on_under_other_versions_says_so(tiny, tmp_path, monkeypatch, capsys):
    args, real = (*tiny, *GRID, f"--out={tmp_path}"), run.provenance
    with monkeypatch.context() as patch:
        patch.setattr(run, "provenance", lambda on: {**real(on), "device": "older"})
        interrupted_in_round_4(args, monkeypatch)
    capsys.readouterr()
    assert main(*args) == 0
    (warned,) = said(capsys.readouterr().err)
    assert "device is " in warned
    assert "and was 'older' when batch" in warned
    configs = [config for config, *_ in found(tmp_path)]
    now = [config["device"] for config in configs if "resumed" not in config]
    assert len(now) == 4
    resumed = [config for config in configs if "resumed" in config]
    assert [config["device"] for config in resumed] == ["older"] * 2
    assert [config["resumed"] for config in resumed] == [[{"device": now[0]}]] * 2


def test_a_batch_that_holds_runs_of_two_groups_now_begins_anew(tiny, tmp_path, monkeypatch, capsys):
    """FedAvg goes with the first group that it fits, here another one than before."""
    out = f"--out={tmp_path}"
    interrupted_in_round_4((*tiny, "--grid=seed=1", out), monkeypatch)
    capsys.readouterr()
    monkeypatch.setattr(Lanes, "compile", interrupted)
    grown = (*tiny, "--grid=seed=1", "--grid=cancellation=subtract,pair", out)
    assert main(*grown) == 130
    dropped, _ = said(capsys.readouterr().err)
    assert "was begun for another grid; its runs begin anew" in dropped
    assert not list(tmp_path.glob("batches/*"))


def interrupted(*_: Any) -> None:
    raise KeyboardInterrupt
