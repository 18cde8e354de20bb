"""Flags and folders that a sweep refuses: in one line, and before anything is written."""

import json
import os
from pathlib import Path

import jax
import pytest
import small_sweeps

from experiments import sweep, sweep_flags
from experiments.sweep_store import SweepFolder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> list[str]:
    jax.devices()  # before `main` can split the CPU for the other tests of this process
    return small_sweeps.flags(small_sweeps.shared(tmp_path_factory))


def refused(capsys, *args: str) -> str:
    """The line with which this command line is refused."""
    assert sweep.main(["sweep", *args]) == 2
    printed, err = capsys.readouterr()
    assert printed == ""
    (line,) = err.splitlines()
    assert line.startswith("experiments.sweep: ")
    return line


@pytest.mark.parametrize(
    ("args", "wanted"),
    [
        (["--grid=kap=0.3,0.5"], ["grid='kap=0.3,0.5'", "did you mean cap?"]),
        (["--grid=cap=0.3,oops"], ["grid='cap=0.3,oops'", "'oops' must be a finite number"]),
        (["--grid=cap=0.3,2"], ["cap=2.0", "in (0, 1)"]),
        (["--grid=calibrator=fixed,aditive"], ["'aditive'", "did you mean additive?"]),
        (["--grid=partition=iid,shardz"], ["'shardz'", "did you mean shards?"]),
        (["--grid=model=mlp,lenet"], ["'lenet'", "did you mean lenet5?"]),
        (["--grid=seed"], ["grid='seed'", "seed=0:10"]),
        (["--grid=rounds=3,4"], ["--rounds is one for the whole sweep"]),
        (["--grid=cap=0.3", "--grid=cap=0.4"], ["grid='cap=0.4'", "has an axis already"]),
        (["--grd=cap=0.3"], ["'grd'", "Did you mean: grid"]),
        (["--cpu_devicez=1"], ["'cpu_devicez'", "Did you mean: cpu_devices"]),
        (["--lerning_rate=1"], ["'lerning_rate'", "Did you mean: learning_rate"]),
        (["--flagfile=mcmahon"], ["did you mean mcmahan?"]),
        (["--lanes_at_once=0"], ["lanes_at_once='0'", "from 1 to ", "or auto"]),
        (["--lanes_at_once=all"], ["lanes_at_once='all'", "from 1 to ", "or auto"]),
        (["--cpu_devices=-1"], ["cpu_devices='-1'", "from 1 to ", "or auto"]),
        (["--client_devices=0"], ["client_devices=0", "number of devices"]),
        (["--client_devices=two"], ["client_devices='two'", "whole number"]),
        (["--cpu_devices=99999999999"], ["cpu_devices='99999999999'", "1 to 1024"]),
        (["--num_processes=1.5"], ["num_processes='1.5'", "whole number"]),
        (["--num_processes=2"], ["num_processes=2: needs --distributed"]),
        (["--process_id=0"], ["process_id=0: needs --distributed"]),
        (["--coordinator=here:1"], ["coordinator='here:1': needs --distributed"]),
        (["--rounds=9999999999"], ["rounds=9999999999", "less than 2147483648"]),
        (["--grid=server_clients=m,m/2,1"], ["is the same run as server_clients="]),
        (["results"], ["'results'", "flags begin with --"]),
        # What only the data tell; values beyond the first of a grid as well.
        (["--grid=model=mlp,lenet5"], ["model='lenet5'", "(8, 8, 1)"]),
        (["--grid=noise_layers=last,conv9"], ["noise_layers='conv9'", "dense1"]),
        (["--grid=validation_size=60,260"], ["validation_size=260", "1 to 259"]),
        (["--grid=shards_per_client=2,99", "--partition=shards"], ["shards_per_client=99"]),
        (["--grid=dirichlet_alpha=1,0", "--partition=dirichlet"], ["dirichlet_alpha=0.0"]),
        (["--grid=num_clients=6,201"], ["num_clients=201"]),
        (["--grid=seed=0,1", "--dataset=mnits"], ["dataset='mnits'", "did you mean mnist"]),
        (["--dataset=/nowhere/at/all.npz"], ["dataset='/nowhere/at/all.npz'", "no such file"]),
    ],
)
@pytest.mark.parametrize("dry", [[], ["--dry_run"]], ids=["", "dry"])
def test_bad_input_is_refused_before_anything_is_written(tiny, tmp_path, capsys, args, wanted, dry):
    out = tmp_path / "sweep"
    line = refused(capsys, *tiny, *args, *dry, f"--out={out}")
    for words in wanted:
        assert words in line
    assert not out.exists()


def test_processes_that_cannot_meet_are_refused(tiny, tmp_path, capsys):
    """This one has used its devices already, and so cannot join any other."""
    coordinator = ("--coordinator=127.0.0.1:9", "--num_processes=2", "--process_id=1")
    line = refused(capsys, *tiny, "--distributed", *coordinator, f"--out={tmp_path / 'sweep'}")
    assert "distributed=True: the processes did not meet" in line
    assert not (tmp_path / "sweep").exists()


def test_a_folder_that_cannot_be_written_is_refused(tiny, tmp_path, capsys, monkeypatch):
    """Root may write everywhere: the folder is opened as nobody."""
    (tmp_path / "file").write_text("")
    line = refused(capsys, *tiny, f"--out={tmp_path / 'file' / 'sweep'}")
    assert "is not writable" in line
    folder = tmp_path / "mine"
    folder.mkdir(0o555)
    opened, user = sweep.open_folder, os.geteuid()

    def as_nobody(options):
        os.seteuid(user or 65534)
        try:
            return opened(options)
        finally:
            os.seteuid(user)

    monkeypatch.setattr(sweep, "open_folder", as_nobody)
    line = refused(capsys, *tiny, f"--out={folder}")
    assert f"out='{folder}': is not writable (Permission denied)" in line
    assert not list(folder.iterdir())


def test_a_folder_in_use_is_refused(tiny, tmp_path, capsys):
    with SweepFolder(tmp_path):
        line = refused(capsys, *tiny, f"--out={tmp_path}")
    assert f"out='{tmp_path}': another process is writing there" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", "{}", "holds other files of ours, but no sweep.json"),
        ("metrics.jsonl", "", "holds other files of ours, but no sweep.json"),
        ("sweep.json", "{}", "its sweep.json is not one of ours"),
        ("sweep.json", '{"runs": ["one"]}', "its sweep.json is not one of ours"),
        ("sweep.json", "half", "its sweep.json is not one of ours"),
        ("sweep.json", json.dumps({"runs": {"runs/0/seed=0": {}}}), "may only grow"),
    ],
)
@pytest.mark.parametrize("dry", [[], ["--dry_run"]], ids=["", "dry"])
def test_the_folder_of_something_else_is_refused(tiny, tmp_path, capsys, name, text, message, dry):
    (tmp_path / name).write_text(text)
    assert message in refused(capsys, *tiny, *dry, f"--out={tmp_path}")
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == text


def test_help_is_a_page_with_every_flag(capsys):
    assert sweep.main(["sweep", "--helpshort"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 100
    for name in ("grid", "baseline", "dry_run", *sweep_flags.HELP):
        assert any(line.startswith(f"  --{name} ") for line in lines), name


def test_fedavg_is_run_unless_it_is_not_wanted():
    for args, wanted in (([], True), (["--nobaseline"], False), (["--baseline"], True)):
        parsed = sweep_flags.parse(["sweep", *args])
        assert parsed is not None
        assert parsed.baseline is wanted


def test_the_folder_is_named_after_the_preset():
    parsed = sweep_flags.parse(["sweep", "--flagfile=mcmahan", "--grid=cap=0.3"])
    assert parsed is not None
    assert parsed.out == str(Path("results") / "mcmahan-sweep")
