"""The driver: flags, files, reruns, resumption, and one clear line on each bad input."""

import dataclasses
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from experiments import helppage, options, run
from experiments.progress import LINES_A_RUN, RunProgress
from experiments.summary import summarise
from noisefl.config import CHOICES, Config, Hyper

ROOT = Path(__file__).parents[1]
FIELDS = {
    *("run", "round", "owner_accuracy", "base_accuracy", "plus_accuracy", "minus_accuracy"),
    *("plus_validation_accuracy", "minus_validation_accuracy", "strength", "relative_strength"),
    *("calibration_tries", "calibration_samples", "feasible"),
    *("local_accuracy_mean", "local_accuracy_max", "seconds"),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> list[str]:
    """Flags of a run that takes milliseconds a round once compiled, which happens once."""
    folder = tmp_path_factory.mktemp("tiny")
    rng = np.random.default_rng(0)
    centres = rng.integers(0, 256, (10, 8, 8))

    def images(count):
        labels = rng.integers(0, 10, count)
        noisy = centres[labels] + rng.normal(0, 60, (count, 8, 8))
        return np.clip(noisy, 0, 255).astype(np.uint8), labels

    (train_x, train_y), (test_x, test_y) = images(500), images(200)
    np.savez(folder / "tiny.npz", x_train=train_x, y_train=train_y, x_test=test_x, y_test=test_y)
    return [
        *(f"--dataset={folder / 'tiny.npz'}", "--model=mlp", "--rounds=4", "--num_clients=10"),
        *("--client_fraction=0.4", "--validation_size=100", f"--compilation_cache={folder}"),
    ]


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory) -> Path:
    """The folder of one run, from beginning to end."""
    folder = tmp_path_factory.mktemp("finished")
    assert main(*tiny, f"--out={folder}") == 0
    return folder


def main(*args) -> int:
    return run.main(["run", *args])


def rows(folder: Path) -> list[dict]:
    """Rows without `seconds`, the only field that a rerun may change."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in found]


def texts(folder: Path) -> list[str]:
    """The same as JSON text, so that equality is bitwise."""
    return [json.dumps(row) for row in rows(folder)]


# A whole run


def test_writes_four_files(finished):
    config = json.loads((finished / "config.json").read_text())
    assert set(config["options"]) == set(options.defaults())
    assert config["options"]["num_clients"] == 10
    assert config["versions"]["jax"]
    assert {"python", "device", "git_revision"} <= set(config)
    assert (finished / "figure1.png").read_bytes()[:4] == b"\x89PNG"


def test_metrics_have_a_row_for_each_run_and_round(finished):
    found = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [(row["run"], row["round"]) for row in found] == [
        (name, t) for name in ("fedavg", "noise") for t in (1, 2, 3, 4)
    ]
    for row in found:
        assert set(row) >= FIELDS
        assert 0 <= row["owner_accuracy"] <= 1
        assert row["seconds"] > 0
        assert row["protected"] == (row["run"] == "noise" and row["round"] > 1)
    assert found[0]["owner_accuracy"] == found[4]["owner_accuracy"]  # warm-up is FedAvg
    assert any(row["strength"] > 0 for row in found[5:])
    assert all(row["calibration_samples"] == 0 for row in found[:5])


def test_summary_agrees_with_the_rows(finished):
    summary = json.loads((finished / "summary.json").read_text())
    noise = [row for row in rows(finished) if row["run"] == "noise"]
    assert summary["owner_accuracy_final"] == noise[-1]["owner_accuracy"]
    assert summary["calibration_samples"] == sum(row["calibration_samples"] for row in noise)
    assert summary["rounds"] == 4
    assert summary["compile_seconds"] > 0
    assert summary["driver_seconds"] > 0


def test_rerun_is_bitwise_the_same_and_another_seed_is_not(tiny, finished, tmp_path):
    assert main(*tiny, f"--out={tmp_path / 'again'}") == 0
    assert texts(tmp_path / "again") == texts(finished)
    assert main(*tiny, f"--out={tmp_path / 'other'}", "--seed=1") == 0
    assert texts(tmp_path / "other") != texts(finished)


def test_progress_is_on_stderr_and_the_table_on_stdout(tiny, tmp_path, capsys):
    assert main(*tiny, f"--out={tmp_path / 'run'}", "--rounds=2") == 0
    out, err = capsys.readouterr()
    assert [line.split()[:2] for line in err.splitlines()] == [
        *(["fedavg", "1/2"], ["fedavg", "2/2"], ["noise", "1/2"], ["noise", "2/2"]),
    ]
    for shown in ("owner accuracy", "FedAvg accuracy", "rounds over the cap", "one seed"):
        assert shown in out


# Interruption and resumption


def test_resume_of_a_complete_run_reprints_the_table(tiny, finished, capsys):
    before = {file.name: file.stat().st_mtime_ns for file in finished.iterdir()}
    assert main(*tiny, f"--out={finished}", "--resume") == 0
    assert "is complete" in capsys.readouterr().out
    assert {file.name: file.stat().st_mtime_ns for file in finished.iterdir()} == before


def test_more_rounds_on_resume_equal_a_longer_run(tiny, finished, tmp_path):
    out = f"--out={tmp_path / 'run'}"
    assert main(*tiny, out, "--rounds=2") == 0
    assert main(*tiny, out, "--resume") == 0
    assert texts(tmp_path / "run") == texts(finished)


def test_chunks_and_sparse_checkpoints_resume_alike(tiny, tmp_path):
    chunked = [*tiny, "--rounds_per_chunk=3", "--rounds=7"]
    assert main(*chunked, f"--out={tmp_path / 'whole'}") == 0
    out = f"--out={tmp_path / 'parts'}"
    assert main(*chunked, out, "--rounds=4", "--checkpoint_every=4") == 0
    assert main(*chunked, out, "--resume") == 0
    assert texts(tmp_path / "parts") == texts(tmp_path / "whole")


def test_resume_refuses_other_options(tiny, finished, capsys):
    assert main(*tiny, f"--out={finished}", "--resume", "--cap=0.5") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "cap=0.5" in line
    assert "0.6" in line


def start(*args, env=None) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.run", *args],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_rows(process: subprocess.Popen, folder: Path, count: int) -> None:
    end = time.monotonic() + 60
    metrics = folder / "metrics.jsonl"
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "no rows"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def long(tiny, tmp_path_factory) -> tuple[list[str], list[str]]:
    """Flags of a run of 48 chunks, and the rows it has if nothing interrupts it."""
    folder = tmp_path_factory.mktemp("long")
    args = [*tiny, "--rounds=24"]
    assert main(*args, f"--out={folder}") == 0
    return args, texts(folder)


@pytest.mark.parametrize(
    ("number", "at_row"), [(signal.SIGINT, 5), (signal.SIGTERM, 28), (signal.SIGKILL, 28)]
)
def test_killed_runs_resume_to_the_same_result(long, tmp_path, number, at_row):
    args, uninterrupted = long
    out = f"--out={tmp_path / 'run'}"
    process = start(*args, out)
    wait_for_rows(process, tmp_path / "run", at_row)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 130
        last = err.splitlines()[-1]
        assert "interrupted; go on with: python -m experiments.run" in last
        assert last.endswith("--resume")
        done = texts(tmp_path / "run")
        assert at_row <= len(done) < len(uninterrupted)
        assert done == uninterrupted[: len(done)]
    assert not (tmp_path / "run" / "summary.json").exists()
    assert main(*args, out, "--resume") == 0
    assert texts(tmp_path / "run") == uninterrupted


def test_signals_do_not_wait_for_a_long_call():
    script = (
        "import os, time\n"
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

    monkeypatch.setattr(run, "dataset_of", interrupted)
    assert main(*tiny, f"--out={tmp_path / 'run'}") == 130
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("--resume")


def test_signal_handlers_are_put_back(tiny, tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert main(*tiny, f"--out={tmp_path / 'run'}", "--rounds=1") == 0
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


# Bad input

NOT_DATA = "/nowhere/at/all.npz"


@pytest.mark.parametrize(
    ("args", "wanted"),
    [
        (["--dataset=mnits"], ["dataset='mnits'", "did you mean mnist"]),
        ([f"--dataset={NOT_DATA}"], [f"dataset='{NOT_DATA}'", "no such file"]),
        (["--flagfile=mcmahon"], ["literal, mcmahan, quickstart", "did you mean mcmahan?"]),
        (["--lerning_rate=1"], ["lerning_rate", "Did you mean: learning_rate"]),
        (["--rounds=many"], ["rounds='many'", "whole number"]),
        (["--keep_best=3"], ["keep_best='3'", "true or false"]),
        (["--cap"], ["--cap"]),
        (["results"], ["'results'"]),
        (["--partition=shard"], ["partition='shard'", "did you mean shards?"]),
        (["--model=lenet"], ["model='lenet'", "did you mean lenet5?"]),
        (["--calibrator=aditive"], ["calibrator='aditive'", "did you mean additive?"]),
        (["--server_clients=2k"], ["server_clients='2k'"]),
        (["--client_fraction=0.1"], ["client_fraction=0.1", "at least 2"]),
        (["--group_sizes=full", "--client_fraction=0.6"], ["group_sizes='full'", "12 distinct"]),
        (["--partition=shards", "--shards_per_client=41"], ["shards_per_client=41", "1 to 40"]),
        (["--partition=dirichlet", "--dirichlet_alpha=0"], ["dirichlet_alpha=0.0", "positive"]),
        (["--cap=0"], ["cap=0.0", "in (0, 1)"]),
        (["--cap=1"], ["cap=1.0", "in (0, 1)"]),
        (["--validation_size=500"], ["validation_size=500", "1 to 499"]),
        (["--noise_layers=conv9"], ["noise_layers='conv9'", "dense1"]),
        (["--model=lenet5"], ["model='lenet5'", "(8, 8, 1)"]),
        (["--rounds=0"], ["rounds=0", "at least 1"]),
        (["--seed=-1"], ["seed=-1"]),
        (["--learning_rate=nan"], ["learning_rate=nan", "positive"]),
    ],
)
def test_bad_input_is_one_line_before_any_work(tiny, tmp_path, capsys, monkeypatch, args, wanted):
    monkeypatch.setattr(run, "train", lambda *_: pytest.fail("training began"))
    out = tmp_path / "run"
    assert main(*tiny, f"--out={out}", *args) == 2
    printed, err = capsys.readouterr()
    assert printed == ""
    (line,) = err.splitlines()
    assert line.startswith("experiments.run: ")
    for words in wanted:
        assert words in line
    assert not (out / "config.json").exists()  # the folder stays free


def test_bad_folders_are_one_line(tiny, finished, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for out, wanted in ((finished, "--resume"), (tmp_path / "file" / "run", "not writable")):
        assert main(*tiny, f"--out={out}") == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert wanted in line
        assert str(out) in line


def test_bad_input_in_a_process_of_its_own(tmp_path):
    begin = time.monotonic()
    process = start(f"--out={tmp_path}", "--cap=2")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert err == "experiments.run: cap=2.0: must be in (0, 1)\n"
    assert time.monotonic() - begin < 30


def test_a_data_set_out_of_reach_is_one_line_in_time(tiny, tmp_path):
    closed = "http://127.0.0.1:9"  # a proxy that nobody answers at: no network
    begin = time.monotonic()
    process = start(
        *(*tiny, "--dataset=fashion_mnist", f"--data_dir={tmp_path}", f"--out={tmp_path / 'run'}"),
        env={**os.environ, "https_proxy": closed, "http_proxy": closed, "no_proxy": ""},
    )
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert time.monotonic() - begin < 25  # 15 s, and the imports of a busy machine
    (line,) = err.splitlines()
    assert "fashion_mnist" in line
    assert "--data_dir" in line


@pytest.mark.parametrize(
    ("args", "where", "cause", "kept"),
    [
        (["--learning_rate=1e30"], "run fedavg, round 1", "--learning_rate too large", 1),
        (
            ["--calibrator=fixed", "--strength=1e30", "--strength_max=1e31"],
            "run noise, round 2",
            "noise of strength 1e+30 in round 2",
            6,
        ),
    ],
)
def test_nan_names_the_round_and_the_cause(tiny, tmp_path, capsys, args, where, cause, kept):
    assert main(*tiny, f"--out={tmp_path / 'run'}", *args) == 3
    last = capsys.readouterr().err.splitlines()[-1]
    assert where in last
    assert cause in last
    found = rows(tmp_path / "run")
    assert len(found) == kept
    assert [row["finite"] for row in found] == [True] * (kept - 1) + [False]
    assert not (tmp_path / "run" / "summary.json").exists()
    assert (tmp_path / "run" / "figure1.png").stat().st_size > 10_000


def test_the_cause_is_the_strongest_recent_noise():
    """A collapsed base needs no noise: the round that broke it was before."""
    found = [
        {"run": "noise", "round": t, "protected": t > 1, "strength": strength}
        for t, strength in enumerate([0.0, 9.0, 2.7, 0.1, 0.0], 1)
    ]
    assert "run noise, round 5: " in run.cause(found)
    assert "noise of strength 2.7 in round 3 " in run.cause(found)
    assert "noise of" not in run.cause(found[:1])


# Flags


def another(name: str, default) -> object:
    """A valid value that is not the default."""
    special = {"noise_layers": "last", "server_clients": 3, "strength_factor": 2.0}
    special |= {"clients_at_once": 3, "eval_batch": 7}
    if name in special:
        return special[name]
    if name in CHOICES:
        return CHOICES[name][1]
    if isinstance(default, bool):
        return not default
    if isinstance(default, int):
        return default + 1
    return default / 2 or 0.25


@pytest.mark.parametrize("field", dataclasses.fields(Config), ids=lambda field: field.name)
def test_every_field_of_config_has_a_flag(field):
    if field.name == "image_shape":
        return  # of the data set
    value = another(field.name, field.default)
    flag = f"--{field.name}={value}"
    if field.name in ("momentum", "clipping"):  # numbers above 0 turn them on
        flag = {"momentum": "--momentum=0.5", "clipping": "--clip_norm=2"}[field.name]
    parsed = options.parse(["run", flag, "--strength=0.01"])
    assert parsed is not None
    assert getattr(parsed.config, field.name) == value


@pytest.mark.parametrize("field", dataclasses.fields(Hyper), ids=lambda field: field.name)
def test_every_field_of_hyper_has_a_flag(field):
    value = another(field.name, field.default)
    parsed = options.parse(["run", f"--{field.name}={value}"])
    assert parsed is not None
    assert math.isclose(getattr(parsed.hyper, field.name), float(str(value)), rel_tol=1e-6)


def test_zero_turns_momentum_and_clipping_off():
    parsed = options.parse(["run", "--momentum=0", "--clip_norm=0"])
    assert parsed is not None
    assert not parsed.config.momentum
    assert not parsed.config.clipping


@pytest.mark.parametrize(
    ("text", "count"), [("0", 0), ("7", 7), ("m", 9), ("m/2", 4), ("4m", 36), ("3m/2", 13)]
)
def test_server_clients_may_be_given_in_m(text, count):
    parsed = options.parse(["run", f"--server_clients={text}", "--client_fraction=0.09"])
    assert parsed is not None
    assert parsed.config.num_server_clients == count


def test_presets_parse_and_are_what_they_say(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # found from anywhere
    assert {"quickstart", "literal", "mcmahan"} <= set(options.preset_names())
    parsed = {name: options.parse(["run", f"--flagfile={name}"]) for name in options.preset_names()}
    for name, preset in parsed.items():
        assert preset is not None
        assert preset.driver.out == str(Path("results") / name)
        text = (options.PRESETS / f"{name}.flags").read_text()
        assert text.startswith("#")  # says why
    literal = options.parse(["run", "--flagfile=literal.flags"])
    built_in = options.from_flags({**options.defaults(), "out": "", "rounds": 1})
    assert literal is not None
    assert literal.config == built_in.config
    assert all(
        getattr(literal.hyper, field.name) == getattr(built_in.hyper, field.name)
        for field in dataclasses.fields(Hyper)
    )
    mcmahan = parsed["mcmahan"]
    assert mcmahan is not None
    config = mcmahan.config
    assert (mcmahan.driver.model, mcmahan.driver.rounds) == ("mcmahan", 100)
    assert (config.num_clients, config.client_fraction) == (100, 0.1)
    assert (config.local_epochs, config.batch_size) == (5, 10)
    default = options.parse(["run"])
    assert default is not None
    assert parsed["quickstart"] is not None
    assert default.flags == parsed["quickstart"].flags
    assert default.driver.model == "lenet5"


def test_flags_override_a_preset_wherever_they_stand(tmp_path):
    own = tmp_path / "own.flags"
    own.write_text("# mine\n\n--rounds=7\n--noise_layers='conv.* '\n")
    for args in (["--rounds=3", f"--flagfile={own}"], ["--flagfile", str(own), "--rounds=3"]):
        parsed = options.parse(["run", *args])
        assert parsed is not None
        assert parsed.driver.rounds == 3
        assert parsed.config.noise_layers == "conv.* "
        assert parsed.driver.out == str(Path("results") / "own")


def test_help_is_a_page_with_every_flag(capsys):
    assert main("--helpshort") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 100
    assert max(map(len, lines)) <= 100
    for name in options.defaults():
        assert any(line.startswith((f"  --{name}=", f"  --[no]{name} ")) for line in lines), name
    assert set(helppage.HELP) == set(options.defaults())
    assert sum("[" in line for line in lines) > 20  # units


# Summary and progress


def made_up(run_name: str, t: int, **values) -> dict:
    row = {
        **{"run": run_name, "round": t, "protected": run_name == "noise" and t > 1},
        **{"owner_accuracy": 0.9, "base_accuracy": 0.9, "plus_accuracy": 0.5},
        **{"minus_accuracy": 0.4, "plus_validation_accuracy": 0.5},
        **{"minus_validation_accuracy": 0.4, "strength": 0.1, "calibration_tries": 3},
        **{"calibration_samples": 600, "training_samples": 200, "feasible": True},
        **{"shipped": True, "local_accuracy_mean": 0.8, "seconds": 0.5},
    }
    return {**row, **values}


def test_summary_counts_only_protected_and_shipped_rounds():
    found = summarise(
        [
            made_up("fedavg", 1, owner_accuracy=0.7),
            made_up("fedavg", 2, owner_accuracy=0.98),
            made_up("fedavg", 3, owner_accuracy=0.97),
            made_up("noise", 1, plus_accuracy=0.9, calibration_samples=0),  # warm-up
            made_up("noise", 2, plus_accuracy=0.6, minus_validation_accuracy=0.6),  # at the cap
            made_up("noise", 3, minus_accuracy=0.61, plus_validation_accuracy=0.55),
            made_up("noise", 4, plus_accuracy=0.8, feasible=False),
            made_up("noise", 5, plus_accuracy=0.9, feasible=False, shipped=False),
            made_up("noise", 6, owner_accuracy=0.95),
        ],
        cap=0.6,
        num_classes=10,
        timing={"compile_seconds": 1.5},
    )
    assert found["baseline_accuracy_final"] == 0.97
    assert found["baseline_accuracy_best"] == 0.98
    assert found["owner_accuracy_best"] == found["owner_accuracy_final"] == 0.95
    assert (found["gap_final"], found["gap_best"]) == (0.02, 0.03)
    assert (found["shared_accuracy_max_test"], found["rounds_over_cap_test"]) == (0.8, 2)
    assert (found["shared_accuracy_max_validation"], found["rounds_over_cap_validation"]) == (
        0.6,
        0,
    )
    assert (found["protected_rounds"], found["infeasible_rounds"]) == (5, 2)
    assert found["skipped_rounds"] == 1
    assert found["calibration_samples"] == 3000
    assert found["calibration_ratio"] == 2.5
    assert not found["collapsed"]


@pytest.mark.parametrize(
    ("owner", "collapsed"),
    [([0.1, 0.9, 0.12], True), ([0.1, 0.5, 0.1], False), ([0.1, 0.9, 0.2], False)],
)
def test_summary_tells_a_collapse(owner, collapsed):
    noise = [made_up("noise", t, owner_accuracy=g) for t, g in enumerate(owner, 1)]
    found = summarise([made_up("fedavg", 1), *noise], 0.6, 10, {})
    assert found["collapsed"] == collapsed


def test_summary_without_a_protected_round():
    found = summarise([made_up("fedavg", 1), made_up("noise", 1)], 0.6, 10, {})
    assert found["shared_accuracy_max_test"] is None
    assert found["local_accuracy_mean"] is None


def shown(terminal: bool, rounds: int) -> str:
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=100, highlight=False)
    with RunProgress(rounds, 1, console) as progress:
        for t in range(1, rounds + 1):
            progress.update([made_up("noise", t, minus_accuracy=None)])
    return file.getvalue()


def test_a_terminal_sees_a_bar_with_values():
    text = shown(terminal=True, rounds=3)
    for part in ("3/3 rounds", "left", "owner 0.900", "minus –", "σ 0.1", "tries 3"):
        assert part in text


def test_a_file_gets_some_lines_with_the_last_round():
    lines = shown(terminal=False, rounds=1000).splitlines()
    assert LINES_A_RUN <= len(lines) <= LINES_A_RUN + 2
    assert lines[-1].startswith("noise 1000/1000 owner 0.900 base 0.900 plus 0.500")
    assert len(lines[-1]) < 80
