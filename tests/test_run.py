"""The driver of FedAvg and one scheme: its files, growth, breakdowns, one clear line on bad input.

One program of two lanes is compiled, once a process; sweeps (test_sweep_resume.py) are of it too.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import small_runs
from small_runs import ROOT, contents, main, one_line, rows, said, times

from experiments import run
from experiments.sweep import execute, prepare
from noisefl.sweep import TooLarge

FIELDS = {
    *("run", "round", "protected", "owner_accuracy", "base_accuracy", "plus_accuracy", "finite"),
    *("minus_accuracy", "shared_accuracy", "owner_validation_accuracy", "shipped", "feasible"),
    *("plus_validation_accuracy", "minus_validation_accuracy", "shared_validation_accuracy"),
    *("strength", "relative_strength", "calibration_tries", "calibration_evaluations"),
    *(
        "calibration_samples",
        "training_samples",
        "copy_bytes",
        "local_accuracy_mean",
        "local_accuracy_max",
    ),
}


@pytest.fixture(autouse=True)
def calls(monkeypatch) -> list:
    """Of the program, each of one chunk."""
    return small_runs.remember_programs(monkeypatch)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> list[str]:
    return small_runs.flags(tmp_path_factory)


@pytest.fixture(scope="module")
def single(tiny, tmp_path_factory) -> Path:
    """The folder of one run, from beginning to end; not to be changed."""
    folder = tmp_path_factory.mktemp("single")
    with pytest.MonkeyPatch.context() as patch:
        small_runs.remember_programs(patch)
        assert main(*tiny, f"--out={folder}") == 0
    return folder


@pytest.fixture
def copy(single, tmp_path) -> Path:
    return Path(shutil.copytree(single, tmp_path / "copy"))


def test_a_run_leaves_its_options_rows_summary_and_picture(single):
    names = {"config.json", "metrics.jsonl", "summary.json", "figure1.png", "timing.json"}
    assert {file.name for file in single.iterdir()} == {*names, "checkpoints"}
    config = json.loads((single / "config.json").read_text())
    assert config["options"]["num_clients"] == 6
    assert config["options"]["rounds_per_chunk"] == 1
    assert config["strategy"]["target"] == "cpu"  # what was automatic is chosen
    assert config["strategy"]["clients_at_once"] == 1
    assert config["versions"]["jax"]
    assert {"python", "device", "git_revision"} <= set(config)
    assert (single / "figure1.png").read_bytes()[:4] == b"\x89PNG"
    timing = json.loads((single / "timing.json").read_text())
    assert timing["seconds"] > timing["program_seconds"] > 0


def test_rows_are_of_fedavg_first_and_equal_in_warm_up(single):
    found = rows(single)
    both = [(name, t) for name in ("fedavg", "noise") for t in (1, 2, 3, 4)]
    assert [(row["run"], row["round"]) for row in found] == both
    for row in found:
        assert set(row) == FIELDS
        assert 0 <= row["owner_accuracy"] <= 1
        assert row["protected"] == (row["run"] == "noise" and row["round"] > 1)
    assert {**found[0], "run": "noise"} == found[4]  # warm-up is FedAvg
    assert any(row["strength"] > 0 for row in found[5:])
    assert all(row["calibration_samples"] == 0 for row in found[:5])
    summary = json.loads((single / "summary.json").read_text())
    assert summary["owner_accuracy_final"] == found[7]["owner_accuracy"]
    assert summary["baseline_accuracy_final"] == found[3]["owner_accuracy"]
    assert (summary["rounds"], summary["failed"], summary["cap"]) == (4, None, 0.4)


def test_a_rerun_is_bitwise_the_same(tiny, single, tmp_path, capsys):
    assert main(*tiny, f"--out={tmp_path / 'again'}") == 0
    assert contents(tmp_path / "again") == contents(single)
    out, err = capsys.readouterr()
    assert "round 4/4: owner " in err.splitlines()[-1]
    for shown in ("owner accuracy", "FedAvg accuracy", "rounds over the cap", "one seed"):
        assert shown in out


def test_a_complete_run_prints_its_table_again_and_does_nothing(tiny, single, monkeypatch, capsys):
    before = times(single)
    monkeypatch.setattr(run, "prepare", lambda *_: pytest.fail("loaded the data"))
    assert main(*tiny, f"--out={single}") == 0
    assert "owner accuracy" in capsys.readouterr().out
    assert times(single) == before


@pytest.mark.parametrize("text", ['{"rounds": 4}', '{"rounds": 4, "failed": 3}'])
def test_a_damaged_summary_of_a_complete_run_is_one_line(tiny, copy, capsys, text):
    (copy / "summary.json").write_text(text)
    assert main(*tiny, f"--out={copy}") == 2
    assert "its summary.json is damaged" in one_line(capsys)


def test_more_rounds_equal_a_longer_run(tiny, single, tmp_path, calls):
    """Whatever else is asked now, a chunk is what it was."""
    out = tmp_path / "run"
    assert main(*tiny, f"--out={out}", "--rounds=2") == 0
    assert len(rows(out)) == 4
    calls.clear()
    assert main(*tiny, f"--out={out}", "--checkpoint_every=9", "--rounds_per_chunk=2") == 0
    assert len(calls) == 2
    assert contents(out) == contents(single)


def test_a_run_that_ended_inside_a_chunk_goes_on_from_there(tiny, tmp_path):
    args = (*tiny, f"--out={tmp_path}", "--rounds_per_chunk=3")
    assert main(*args, "--rounds=2") == 0
    assert main(*args) == 0
    assert [row["round"] for row in rows(tmp_path)] == [1, 2, 3, 4] * 2


@pytest.mark.parametrize("lost", ["summary.json", "metrics.jsonl", "figure1.png"])
def test_what_is_lost_is_written_again_from_the_checkpoint(tiny, single, copy, calls, lost):
    if lost == "figure1.png":  # as a kill leaves it, before the summary is written
        (copy / "summary.json").unlink()
    (copy / lost).unlink()
    assert main(*tiny, f"--out={copy}") == 0
    assert calls == []
    assert contents(copy) == contents(single)
    assert (copy / "figure1.png").exists()


@pytest.mark.slow  # another program
def test_one_after_the_other_they_share_the_folder(tiny, single, tmp_path, monkeypatch):
    """Two batches of one lane, stopped between them."""
    args = (*tiny, f"--out={tmp_path}", "--lanes_at_once=1")
    run_batch, ended = execute.run_batch, []

    def first_alone(sweep, lanes, batch, *given):
        if ended:
            raise KeyboardInterrupt
        ended.extend(batch.runs)
        run_batch(sweep, lanes, batch, *given)

    with monkeypatch.context() as patch:
        patch.setattr(execute, "run_batch", first_alone)
        assert main(*args) == 130
    assert [row["run"] for row in rows(tmp_path)] == ["fedavg"] * 4
    assert main(*args) == 0
    assert [row["round"] for row in rows(tmp_path)] == [1, 2, 3, 4] * 2
    assert len(rows(tmp_path)) == len(rows(single))


@pytest.mark.parametrize(
    ("args", "wanted"),
    [
        (["--cap=0.5"], ["cap=0.5: ", " has 0.4, and may not change it"]),
        (["--rounds=3"], ["rounds=3: ", " has 4; it may only grow"]),
        (["--nobaseline"], ["baseline=False: ", " has fedavg and noise"]),
        (["--cap=0.5", "--seed=2", "--rounds=9"], ["cap=0.5: "]),
        (["--grid=seed=0:2"], ["out='", "holds a single run; give another --out"]),
    ],
)
def test_other_options_are_refused(tiny, single, capsys, args, wanted):
    before = times(single)
    assert main(*tiny, f"--out={single}", *args) == 2
    line = one_line(capsys)
    assert all(words in line for words in wanted)
    assert times(single) == before


def test_other_versions_are_warned_of_and_recorded(tiny, copy, monkeypatch, capsys):
    real = run.provenance
    monkeypatch.setattr(run, "provenance", lambda on: {**real(on), "git_revision": "newer"})
    (copy / "summary.json").unlink()
    assert main(*tiny, f"--out={copy}") == 0
    (warning,) = said(capsys.readouterr().err)
    assert "git_revision is 'newer', and was " in warning
    config = json.loads((copy / "config.json").read_text())
    assert config["git_revision"] != "newer"
    assert config["resumed"] == [{"git_revision": "newer"}]


def test_a_damaged_checkpoint_is_one_line_and_nothing_is_removed(tiny, copy, capsys):
    (copy / "summary.json").unlink()
    for file in copy.glob("checkpoints/*/4/**/*"):
        if file.is_file():
            file.write_bytes(b"nothing of ours")
    assert main(*tiny, f"--out={copy}") == 2
    (line,) = said(capsys.readouterr().err)
    assert "cannot go on" in line
    assert "state of round 4 is damaged" in line
    assert list(copy.glob("checkpoints/*/2"))


# Breakdowns


@pytest.mark.parametrize(
    ("args", "where", "cause", "kept"),
    [
        (["--learning_rate=1e30"], "run noise, round 1", "--learning_rate too large", [1, 1]),
        (
            ["--strength=1e38", "--strength_max=2e38"],
            "run noise, round 3",
            "noise of strength 1e+38 in round 3",
            [4, 3],
        ),
    ],
)
def test_nan_names_the_round_and_the_cause(tiny, tmp_path, capsys, args, where, cause, kept):
    """The other of the two is finished; a second start says the same."""
    for _ in range(2):
        assert main(*tiny, f"--out={tmp_path}", *args) == 3
        (line,) = said(capsys.readouterr().err)
        assert where in line
        assert cause in line
    found = rows(tmp_path)
    assert [sum(row["run"] == kind for row in found) for kind in ("fedavg", "noise")] == kept
    assert [row["finite"] for row in found[kept[0] :]] == [True] * (kept[1] - 1) + [False]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["failed"]["round"] == kept[1]
    assert (summary["baseline_failed"] is None) == (kept[0] == 4)
    assert (summary["owner_accuracy_final"], summary["gap_final"]) == (None, None)
    assert (tmp_path / "figure1.png").stat().st_size > 10_000


def test_what_does_not_fit_in_memory_is_a_line(tiny, tmp_path, monkeypatch, capsys):
    def too_large(*_):
        raise TooLarge("lanes_at_once=1: a lane needs 4312.0 GB, a device has 25.3")

    monkeypatch.setattr(execute.Lanes, "compile", too_large)
    assert main(*tiny, f"--out={tmp_path}") == 2
    first, last = said(capsys.readouterr().err)
    assert "a lane needs 4312.0 GB, a device has 25.3; its 2 runs are left out" in first
    assert last.endswith("2 of 2 runs are left out, as said above")


# Interruptions (tests/test_kills.py has real ones)


def test_signals_do_not_wait_for_a_long_call():
    script = (
        "import time\n"
        "from experiments.interrupt import exit_at_once\n"
        "with exit_at_once(lambda: print('bye', flush=True)):\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60)\n"  # is taken up again after a signal, like a call of the device
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=10)[0] == "bye\n"
    assert process.returncode == 130


def test_interrupted_while_loading_is_one_line_too(tiny, tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "prepare", interrupted)
    out = f"--out={tmp_path / 'a run'}"
    assert main(*tiny, out) == 130
    line = one_line(capsys)
    assert "interrupted; go on with: python -m experiments.run --dataset=" in line
    assert line.endswith(f"'{out}'")


def test_signal_handlers_are_put_back(tiny, tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert main(*tiny, f"--out={tmp_path}", "--rounds=1") == 0
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


# Bad input


@pytest.mark.parametrize(
    ("args", "wanted"),
    [
        (["--dataset=mnits"], ["dataset='mnits'", "did you mean mnist"]),
        (["--dataset=/nowhere/at/all.npz"], ["dataset='/nowhere/at/all.npz'", "no such file"]),
        (["--data_dir=/nowhere"], ["data_dir='/nowhere'", "is a path already"]),
        (["--lerning_rate=1"], ["--lerning_rate", "did you mean --learning_rate"]),
        (["--cap=1"], ["cap", "less than 1"]),
        (["--model=lenet5"], ["model='lenet5'", "(8, 8, 1)"]),
        (["--model=lenet5", "--grid=model=mlp,lenet5"], ["model='lenet5'", "(8, 8, 1)"]),
        (["--noise_layers=conv9"], ["noise_layers='conv9'", "dense1"]),
        (["--grid=noise_layers=last,conv9"], ["noise_layers='conv9'", "dense1"]),
        (["--validation_size=260"], ["validation_size=260", "1 to 259"]),
        (["--grid=validation_size=60,260"], ["validation_size=260", "1 to 259"]),
        (["--partition=shards", "--shards_per_client=99"], ["shards_per_client=99"]),
        (["--grid=num_clients=6,201"], ["num_clients=201"]),
        (["--clients_per_round=7"], ["clients_per_round=7", "6"]),
        (["--clients_per_round=1"], ["clients_per_round=1", "2"]),
        (["--client_devices=3"], ["client_devices=3", "number of devices, 1"]),
        (["--distributed", "--coordinator=127.0.0.1:9", "--num_processes=2", "--process_id=1"],
         ["distributed=True", "did not meet"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dry", [[], ["--dry_run"]], ids=["", "dry"])
def test_bad_input_is_one_line_before_anything_is_written(
    tiny, tmp_path, capsys, args, wanted, dry
):
    out = tmp_path / "run"
    assert main(*tiny, *args, *dry, f"--out={out}") == 2
    line = one_line(capsys)
    assert all(words in line for words in wanted), line
    assert not out.exists()


@pytest.mark.parametrize("grid", [[], ["--grid=seed=0:2"]], ids=["single", "grid"])
def test_a_folder_that_cannot_be_written_is_refused(tiny, tmp_path, capsys, monkeypatch, grid):
    """Root may write everywhere: the folder is opened as nobody."""
    (tmp_path / "file").write_text("")
    assert main(*tiny, *grid, f"--out={tmp_path / 'file' / 'run'}") == 2
    assert "is not writable" in one_line(capsys)
    folder = tmp_path / "mine"
    folder.mkdir(0o555)
    tmp_path.chmod(0o755)
    opened, user = run.Store, os.geteuid()

    def as_nobody(*given):
        os.seteuid(user or 65534)
        try:
            return opened(*given)
        finally:
            os.seteuid(user)

    monkeypatch.setattr(run, "Store", as_nobody)
    assert main(*tiny, *grid, f"--out={folder}") == 2
    assert f"out='{folder}': is not writable" in one_line(capsys)
    assert not list(folder.iterdir())


@pytest.mark.parametrize("grid", [[], ["--grid=seed=0:2"]], ids=["single", "grid"])
def test_a_dry_run_estimates_and_writes_nothing(tiny, tmp_path, capsys, grid):
    out = tmp_path / "run"
    assert main(*tiny, *grid, "--lanes_at_once=2", "--dry_run", f"--out={out}") == 0
    printed = capsys.readouterr().out
    runs, fedavg, batches = ("4", "2", "2") if grid else ("2", "1", "1")
    assert f"{runs} runs of 4 rounds" in printed
    assert "1 compilations" in printed
    assert "nothing was written" in printed
    assert re.search(r"^group 1: mlp, ", printed, re.MULTILINE)
    (row,) = [line for line in printed.splitlines() if line.startswith("│")]
    cells = [cell.strip() for cell in row.split("│")][2:5]
    assert cells == [f"{runs} ({fedavg} FedAvg)", "2", batches]
    assert not out.exists()


@pytest.mark.slow  # three programs
@pytest.mark.skipif(sys.platform != "linux", reason="reads the process's memory maps")
def test_programs_of_ended_groups_leave_the_memory(tiny, tmp_path, monkeypatch):
    """JAX kept thousands of maps of each, and Linux ends a process with 65,530."""
    monkeypatch.undo()  # the programs are not to be remembered
    monkeypatch.setattr(prepare, "MOST_MAPS", 0)
    maps, ended = [], run.run_group

    def counted(*given):
        left_out = ended(*given)
        maps.append(len(Path("/proc/self/maps").read_text().splitlines()))
        return left_out

    monkeypatch.setattr(run, "run_group", counted)
    three = "--grid=batch_size=5,10,20"
    assert main(*tiny, three, "--rounds=1", "--compilation_cache=off", f"--out={tmp_path}") == 0
    first, second, third = maps
    assert third - second < 20
    assert second - first < 20


@pytest.mark.skipif(sys.platform != "linux", reason="reads the process's memory maps")
def test_programs_are_kept_while_there_is_room(monkeypatch):
    """Each group would compile the program of thieves anew."""
    forgotten = []
    monkeypatch.setattr(jax, "clear_caches", lambda: forgotten.append(True))
    maps = len(Path("/proc/self/maps").read_text().splitlines())
    for most, wanted in ((2 * maps, []), (maps // 2, [True])):
        monkeypatch.setattr(prepare, "MOST_MAPS", most)
        prepare.forget()
        assert forgotten == wanted
