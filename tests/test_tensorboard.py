"""Event files of a folder, read back record by record."""

import math
import struct
import sys
from pathlib import Path

import pytest
from sweep_folder import BROKEN, FakeSweep, fedavg_row, noise_row, single_run, summary
from tensorboardX.proto import event_pb2

from experiments.report import __main__ as report


def values_of(folder: Path) -> tuple[dict[tuple[str, int], float], str]:
    """The scalars of one run by name and step, and its text of options."""
    (file,) = folder.iterdir()
    content = file.read_bytes()
    scalars: dict[tuple[str, int], float] = {}
    text = ""
    while content:  # a length, its checksum, the record, its checksum; and so on
        (length,) = struct.unpack("<Q", content[:8])
        event = event_pb2.Event.FromString(content[12 : 12 + length])  # pyright: ignore
        content = content[16 + length :]
        for value in event.summary.value:
            if value.HasField("simple_value"):
                scalars[value.tag, event.step] = value.simple_value
            else:
                assert "hparams" in value.tag
                text = value.tensor.string_val[0].decode()
    return scalars, text


@pytest.fixture
def folder(tmp_path) -> Path:
    sweep = FakeSweep(tmp_path / "sweep", {"cap": [0.5], "noise_layers": ["conv.*/kernel"]})
    rows = [fedavg_row(1, 0.85), fedavg_row(2, 0.9)]
    base = sweep.run("f00", 0, {}, summary(0.9), rows)
    values = {"cap": 0.5, "noise_layers": "conv.*/kernel"}
    rows = [noise_row(1, 0.8, 0.3, 0.2), noise_row(2, None, 0.4, 0.2, feasible=False)]
    sweep.run("3f2a", 0, values, summary(None, failed=BROKEN), rows, base, 0.5)
    sweep.plan("3f2a", 1, values, base, 0.5)
    return tmp_path / "sweep"


def test_each_run_has_its_rounds_and_options(folder, tmp_path, capsys):
    events = tmp_path / "events"
    (events / "fedavg,f00" / "seed=0").mkdir(parents=True)
    (events / "fedavg,f00" / "seed=0" / "events.out.tfevents.1.here").touch()  # an older report's
    assert report.main(["report", str(folder), f"--tensorboard={events}"]) == 0
    assert f"event files of 2 runs in {events}" in capsys.readouterr().out
    found = {str(file.parent.relative_to(events)) for file in events.rglob("events.*")}
    assert found == {"fedavg,f00/seed=0", "noise,cap=0.5,noise_layers=conv.__kernel,3f2a/seed=0"}

    scalars, text = values_of(events / "fedavg,f00" / "seed=0")
    assert scalars["owner_accuracy", 1] == pytest.approx(0.85)
    assert scalars["owner_accuracy", 2] == pytest.approx(0.9)
    assert "| partition | `iid` |" in text

    scalars, text = values_of(events / "noise,cap=0.5,noise_layers=conv.__kernel,3f2a" / "seed=0")
    assert scalars["plus_accuracy", 2] == pytest.approx(0.4)
    assert (scalars["feasible", 1], scalars["feasible", 2]) == (1, 0)
    assert ("owner_accuracy", 2) not in scalars  # null
    assert not any(name in ("run", "round") for name, _ in scalars)
    assert all(math.isfinite(value) for value in scalars.values())
    assert "| cap | `0.5` |" in text


def test_the_two_runs_of_one_folder_are_told_apart(tmp_path):
    rows = [fedavg_row(1, 0.9), noise_row(1, 0.8, 0.3, 0.2)]
    found = summary(0.8, baseline_accuracy_final=0.9, baseline_failed=None)
    folder = single_run(tmp_path / "run", rows, found)
    events = tmp_path / "events"
    assert report.main(["report", str(folder), f"--tensorboard={events}"]) == 0
    for kind, owner in (("fedavg", 0.9), ("noise", 0.8)):
        scalars, _ = values_of(events / kind / "seed=3")
        assert scalars["owner_accuracy", 1] == pytest.approx(owner)


def test_without_tensorboardx_one_line_says_what_to_install(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)  # as if it were not installed
    events = tmp_path / "events"
    assert report.main(["report", str(folder), f"--tensorboard={events}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"tensorboard='{events}'" in line
    assert "noisefl[tensorboard]" in line
    assert not (folder / "report.csv").exists()  # refused before the work
    assert report.main(["report", str(folder)]) == 0  # and not needed without the flag
