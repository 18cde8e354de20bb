"""The driver of sweeps in this process: its files, reruns, growth, broken runs.

One program of three lanes is compiled, once a session; most sweeps are of it.
"""

import csv
import json
import shutil
from pathlib import Path

import jax
import pytest
import small_sweeps
from small_sweeps import SHORT, assert_complete, contents, found

from experiments import report, run, sweep, sweep_group
from noisefl.sweep import TooLarge


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> list[str]:
    jax.devices()  # before `main` can split the CPU for the other tests of this process
    return small_sweeps.flags(small_sweeps.shared(tmp_path_factory))


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory) -> Path:
    return small_sweeps.finished(tmp_path_factory, main)


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def main(*args: str) -> int:
    return sweep.main(["sweep", *args])


def one_line(capsys) -> str:
    printed, err = capsys.readouterr()
    assert printed == ""
    (line,) = err.splitlines()
    assert line.startswith("experiments.sweep: ")
    return line


# A whole sweep


def test_every_run_is_what_the_driver_of_single_runs_makes(tiny, finished, tmp_path):
    """The run of the narrower table, padded in the sweep: the same rows but for the seconds."""
    for cap in (0.3, 0.5):
        out = tmp_path / str(cap)
        args = (*tiny, "--partition=lognormal", "--seed=1", f"--cap={cap}", f"--out={out}")
        assert run.main(["run", *args]) == 0
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        for row in rows:
            del row["seconds"]
        whole = json.loads((out / "summary.json").read_text())
        config = json.loads((out / "config.json").read_text())
        ((ours, noise, summary),) = found(finished, seed=1, cap=cap)
        assert noise == [row for row in rows if row["run"] == "noise"]
        assert summary["owner_accuracy"] == whole["owner_accuracy_final"]
        assert summary["max_shared_accuracy"] == whole["shared_accuracy_max_test"]
        same = ("protected_rounds", "infeasible_rounds", "calibration_samples", "cap", "rounds")
        assert [summary[name] for name in same] == [whole[name] for name in same]
        assert summary["failed"] is None
        driver = {"out", "resume", "checkpoint_every", "compilation_cache"}
        flags = {k: v for k, v in config["options"].items() if k not in driver}
        assert (ours["options"], ours["run"]) == (flags, "noise")
        assert ours["versions"] == config["versions"]
        ((_, fedavg, _),) = found(finished, seed=1, run="fedavg")
        assert fedavg == [row for row in rows if row["run"] == "fedavg"]


def test_the_folder_says_what_it_holds(finished):
    assert_complete(finished)
    planned = json.loads((finished / "sweep.json").read_text())
    assert planned["grid"] == {"seed": [0, 1], "cap": [0.3, 0.5]}
    assert len(planned["runs"]) == 6
    for config, rows, summary in found(finished):
        assert [row["round"] for row in rows] == [1, 2, 3, 4]
        assert {row["run"] for row in rows} == {config["run"]}
        assert summary["rounds"] == 4
        assert config["options"]["rounds_per_chunk"] == 1
        assert summary["cap"] == config["options"].get("cap")  # FedAvg has none
    for path, run_ in planned["runs"].items():
        config = json.loads((finished / path / "config.json").read_text())
        assert config["run"] == run_["run"]
        assert config["options"].items() >= run_["grid"].items()
        assert (run_["seed"], run_["cap"]) == (
            config["options"]["seed"],
            config["options"].get("cap"),
        )
        if run_["run"] == "noise":
            rows = (finished / path / "metrics.jsonl").read_text().splitlines()
            assert any(json.loads(row)["strength"] > 0 for row in rows)
            reference = planned["runs"][run_["baseline"]]
            assert (reference["run"], reference["baseline"]) == ("fedavg", None)
            assert reference["grid"] == {"seed": run_["seed"]}
    timings = [json.loads(file.read_text()) for file in finished.glob("runs/*/*/timing.json")]
    assert all(timing["seconds"] > 0 for timing in timings)
    assert len({timing["batch"] for timing in timings}) == 2


def test_a_second_start_does_nothing_again(tiny, finished, monkeypatch, capsys):
    before = {file: file.stat().st_mtime_ns for file in finished.glob("runs/**/*")}
    monkeypatch.setattr(sweep_group.Lanes, "compile", lambda *_: pytest.fail("compiled"))
    assert main(*tiny, *SHORT, f"--out={finished}") == 0
    assert {file: file.stat().st_mtime_ns for file in finished.glob("runs/**/*")} == before
    printed, err = capsys.readouterr()
    assert "6 of 6 runs are done already" in err
    assert f"{finished} holds 6 runs" in printed


def test_a_grown_grid_keeps_what_is_done(tiny, finished, copy, monkeypatch):
    before = {file: file.stat().st_mtime_ns for file in copy.glob("runs/*/*/*")}
    asked = []
    inputs = sweep_group.Lanes.inputs
    monkeypatch.setattr(
        sweep_group.Lanes, "inputs", lambda *args: asked.append(args[2]) or inputs(*args)
    )
    grown = [flag.replace("0.3,0.5", "0.4,0.5,0.3") for flag in SHORT]
    assert main(*tiny, *grown, f"--out={copy}") == 0
    assert_complete(copy)
    assert {file: file.stat().st_mtime_ns for file in before} == before
    new = found(copy, cap=0.4)
    assert len(new) == 2
    assert len(contents(copy)) == len(contents(finished)) + 6
    assert [sorted(run.grid["cap"] for run in some) for some in asked[1:]] == [[0.4, 0.4]]
    planned = json.loads((copy / "sweep.json").read_text())["runs"].values()
    for run_ in planned:  # the FedAvg runs that were there serve them too
        if run_["cap"] == 0.4:
            assert (finished / run_["baseline"] / "summary.json").exists()


def test_grown_by_an_axis_and_by_fedavg_it_is_as_if_begun_so(tiny, finished, tmp_path):
    out = tmp_path / "sweep"
    seeds, _, *others = SHORT
    begun = (*tiny, *others, seeds, "--cap=0.5", "--nobaseline", f"--out={out}")
    assert main(*begun) == 0
    assert len(contents(out, "summary.json")) == 2
    assert main(*tiny, *SHORT, f"--out={out}") == 0
    assert contents(out) == contents(finished)
    assert report.main(["report", str(out)]) == 0
    with open(out / "report.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["cap"], row["seeds"], row["baseline_gap_seeds"]) for row in rows] == [
        ("0.3", "2", "2"),
        ("0.5", "2", "2"),
    ]


@pytest.mark.parametrize("name", ["config.json", "summary.json"])
def test_a_run_that_lacks_a_file_is_done_again(tiny, finished, copy, name):
    victim = sorted(copy.glob("runs/*/*"))[0]
    (victim / name).unlink()
    assert main(*tiny, *SHORT, f"--out={copy}") == 0
    assert_complete(copy)
    assert contents(copy) == contents(finished)


def test_a_group_that_does_not_fit_is_left_out(tiny, finished, tmp_path, monkeypatch, capsys):
    """And those after it are not: here the first of two groups."""
    compile, out = sweep_group.Lanes.compile, tmp_path / "sweep"

    def too_large(self, on, *args):
        if self.config.batch_size == 20:
            raise TooLarge("lanes_at_once=1: a lane needs 4312.0 GB, a device has 25.3")
        return compile(self, on, *args)

    monkeypatch.setattr(sweep_group.Lanes, "compile", too_large)
    args = (*tiny, *SHORT, "--grid=batch_size=20,10", f"--out={out}")
    assert main(*args, "--dry_run") == 0
    assert capsys.readouterr().out.count("too large") == 1
    assert main(*args) == 2
    said = [x for x in capsys.readouterr().err.splitlines() if x.startswith("experiments.sweep: ")]
    group = f"mlp, {small_sweeps_dataset(tiny)}, geometric, batch_size=20"
    assert said == [
        f"experiments.sweep: {group}: lanes_at_once=1: a lane needs 4312.0 GB, a device has 25.3; "
        "its 6 runs are left out",
        "experiments.sweep: 6 of 12 runs are left out, as said above",
    ]
    assert contents(out) == contents(finished)


def small_sweeps_dataset(flags: list[str]) -> str:
    return next(flag for flag in flags if flag.startswith("--dataset=")).removeprefix("--dataset=")


def test_a_single_run_does_not_go_among_a_sweep(tiny, copy, capsys):
    before = sorted(copy.rglob("*"))
    assert run.main(["run", *tiny, f"--out={copy}"]) == 2
    assert f"out='{copy}': holds a sweep; give another --out" in capsys.readouterr().err
    assert sorted(copy.rglob("*")) == before


def test_a_smaller_grid_is_refused(tiny, copy, capsys):
    before = {file: file.stat().st_mtime_ns for file in copy.glob("**/*")}
    fewer = [flag.replace("0.3,0.5", "0.3") for flag in SHORT]
    assert main(*tiny, *fewer, f"--out={copy}") == 2
    line = one_line(capsys)
    assert f"out='{copy}'" in line
    assert "2 runs that this one has not" in line
    assert main(*tiny, *SHORT, "--rounds=5", f"--out={copy}") == 2  # other runs altogether
    assert "6 runs that this one has not" in one_line(capsys)
    assert {file: file.stat().st_mtime_ns for file in copy.glob("**/*")} == before
    assert main(*tiny, *SHORT, f"--out={copy}") == 0


def test_broken_and_infeasible_runs_are_results(tiny, finished, tmp_path):
    """Beside others, which do not feel it."""
    out = tmp_path / "sweep"
    worse = [flag.replace("0.3,0.5", "0.3,0.03") for flag in SHORT]
    assert main(*tiny, *worse, "--grid=learning_rate=0.1,1e6", f"--out={out}") == 0
    assert_complete(out)
    assert len(found(out)) == 2 * 2 * 2 + 2 * 2
    for config, rows, summary in found(out, learning_rate=1e6):
        failed = summary["failed"]
        assert failed["round"] == len(rows) == rows[-1]["round"]
        assert f"run {config['run']}, round {failed['round']}: " in failed["cause"]
        assert "learning_rate too large" in failed["cause"]
        assert [row["finite"] for row in rows] == [True] * (len(rows) - 1) + [False]
        assert summary["owner_accuracy"] is None
    kept = contents(finished, "metrics.jsonl", "summary.json")
    ours = contents(out, "metrics.jsonl", "summary.json")
    # Caps of 0.3 and FedAvg at this learning rate are in both sweeps, under the same paths.
    both = set(kept) & set(ours)
    assert len(both) == 2 * (2 + 2)
    assert {name: ours[name] for name in both} == {name: kept[name] for name in both}
    for _, rows, summary in found(out, cap=0.03, learning_rate=0.1):
        assert summary["failed"] is None
        assert summary["infeasible_rounds"] == summary["protected_rounds"] == 3
        assert summary["max_shared_accuracy"] > 0.03
        assert [row["feasible"] for row in rows] == [True, False, False, False]


def test_a_dry_run_estimates_and_writes_nothing(tiny, tmp_path, capsys):
    out = tmp_path / "sweep"
    assert main(*tiny, *SHORT, "--dry_run", f"--out={out}") == 0
    printed = capsys.readouterr().out
    assert "6 runs of 4 rounds" in printed
    assert "1 compilations" in printed
    assert "nothing was written" in printed
    (row,) = [line for line in printed.splitlines() if "mlp" in line]
    assert [cell.strip() for cell in row.split("│")][2:5] == ["6 (2 FedAvg)", "3", "2"]
    assert not out.exists()


def test_a_dry_run_says_what_is_done(tiny, copy, capsys):
    before = {file: file.stat().st_mtime_ns for file in copy.glob("**/*")}
    assert main(*tiny, *SHORT, "--dry_run", f"--out={copy}") == 0
    assert "6 of the runs are done already; nothing was written" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in copy.glob("**/*")} == before
