"""The README's commands and its example are what they say."""

import re
from pathlib import Path

import pytest

from experiments import options, sweep_flags
from noisefl.calibrate import GUARANTEES
from noisefl.config import CHOICES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_ci_runs_the_test_command():
    command = next(block for block in blocks("bash") if "pytest" in block).strip()
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()


@pytest.mark.parametrize(
    "line", [line for line in README.splitlines() if line.startswith("python -m experiments.run ")]
)
def test_command_lines_parse(line, capsys):
    parsed = options.parse(line.split("#")[0].split()[2:])
    assert (parsed is None) == ("--helpshort" in line)


@pytest.mark.parametrize(
    "line",
    [line for line in README.splitlines() if line.startswith("python -m experiments.sweep ")],
)
def test_sweeps_parse(line):
    found = sweep_flags.parse(line.split()[2:])
    assert found is not None
    assert [axis.flag for axis in found.axes] == ["cap", "calibrator", "seed"]


def test_linked_files_exist():
    targets = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert targets
    assert [link for link in targets if not (ROOT / link).exists()] == []


def test_the_examples_run(capsys):
    call, calibrator, sweep = blocks("python")
    names: dict = {}
    exec(compile(call.replace("range(1, 6)", "range(1, 3)"), "README.md", "exec"), names)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("round 1: owner 0.")
    assert second.startswith("round 2: owner 0.")
    assert "r 0.00, held True" in first  # the warm-up
    assert "r 2." in second

    exec(compile(calibrator, "README.md", "exec"), names)
    word, strength, tries, feasible = capsys.readouterr().out.split()
    assert word == "mine"
    assert float(strength) == 2.0 * 2 ** (int(tries) - 1)  # doubled from Hyper.strength
    found = names["info"].calibration
    aim = float(names["hyper"].cap - names["hyper"].cap_margin)
    highest = max(float(found.plus_accuracy), float(found.minus_accuracy))
    assert feasible == str(highest <= aim)
    lines = calibrator.split("def doubling")[1].split("init, step")[0].splitlines()
    assert len([line for line in lines if line.strip()]) <= 27  # a few are closing brackets

    exec(compile(sweep.replace("rounds=3", "rounds=1"), "README.md", "exec"), names)
    assert names["result"].metrics.owner_accuracy.shape == (2, 1)
    lanes = names["result"].metrics.owner_accuracy
    assert lanes[0] == lanes[1] > 0  # the same seed, before the cap matters


def test_every_calibrator_is_in_the_table():
    rows = [line for line in README.splitlines() if line.startswith("| `")]
    assert [name for name in CHOICES["calibrator"] if not any(f"`{name}`" in r for r in rows)] == []
    assert set(GUARANTEES) == set(CHOICES["calibrator"])
