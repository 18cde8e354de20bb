"""The README's commands and its examples are what they say."""

import re
import shlex
from pathlib import Path

import pytest

from experiments.sweep import options
from noisefl import calibrate
from noisefl.parts import implementations, name_of

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_ci_runs_the_test_command_and_the_marked_rest():
    command = next(block for block in blocks("bash") if "pytest" in block).strip()
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert command in lines
    assert any(line.endswith("-m slow") for line in lines)


COMMANDS = [
    line
    for line in README.splitlines()
    if line.startswith("python -m experiments.run ") and "--preset=" not in line
]


@pytest.mark.parametrize("line", COMMANDS)
def test_command_lines_parse(line, capsys):
    parsed = options.parse(shlex.split(line.split("#")[0])[2:])
    assert (parsed is None) == ("--helpshort" in line)
    if "--grid" in line:
        assert parsed is not None
        assert [axis.flag for axis in parsed.axes] == ["cap", "calibrator", "seed"]


def test_linked_files_exist():
    targets = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert targets
    assert [link for link in targets if not (ROOT / link).exists()] == []


@pytest.mark.slow
def test_the_examples_run(capsys):
    call, sweep = blocks("python")
    names: dict = {}
    exec(compile(call.replace("range(5)", "range(2)"), "README.md", "exec"), names)
    first, second, row, last = capsys.readouterr().out.splitlines()
    assert first == "round 1: r 0.00, held True"  # the warm-up
    assert re.fullmatch(r"round 2: r \d+\.\d\d, held True", second)
    assert "'round': 1" in row
    assert "'round': 2" in last
    assert names["copy"].keys() == names["state"].base.keys()
    exec(compile(sweep.replace("rounds=3", "rounds=1"), "README.md", "exec"), names)
    owners = names["result"].metrics["owner_accuracy"]
    assert owners.shape == (2, 1)
    assert owners[0] == owners[1] > 0  # the same seed, before the cap matters


def test_every_calibrator_is_in_the_table():
    rows = [line for line in README.splitlines() if line.startswith("| `")]
    names = [name_of(cls) for cls in implementations(calibrate.Calibrator)
             if cls.__module__.startswith("noisefl.")]  # fmt: skip
    assert [name for name in names if not any(f"`{name}`" in row for row in rows)] == []
