"""The commands and examples of the README and the guide are what they say."""

import inspect
import re
import shlex
from pathlib import Path

import pytest
from flax import linen as nn

from experiments.sweep import options
from noisefl import attacks, calibrate, models, schemes
from noisefl.parts import implementations, name_of

ROOT = Path(__file__).parent.parent
README, GUIDE = ((ROOT / name).read_text() for name in ("README.md", "docs/guide.md"))


def blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


def test_ci_runs_the_test_command_and_the_marked_rest():
    command = next(block for block in blocks("bash") if "pytest" in block).strip()
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert command in lines
    assert any(line.endswith("-m slow") for line in lines)


COMMANDS = [
    line
    for line in (README + GUIDE).splitlines()
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
    """What is written when the site is built lies in docs/generated."""
    pages = [ROOT / "README.md", ROOT / "BUILD_NOTES.md", *(ROOT / "docs").glob("*.md")]
    missing = []
    for page in pages:
        links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
        targets = [link for link in links if "://" not in link]
        missing += [link for link in targets if not link.startswith("generated/")
                    and not (page.parent / link).exists()]  # fmt: skip
    assert missing == []


def test_the_readme_is_short():
    assert len(README.split()) < 900


@pytest.mark.slow
def test_the_examples_run(capsys):
    [call], [sweep] = blocks("python"), blocks("python", GUIDE)
    names: dict = {}
    exec(compile(call.replace("range(5)", "range(2)"), "README.md", "exec"), names)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"round {t}: held True, finite True" for t in (1, 2)]
    assert names["copy"].keys() == names["state"].base.keys()
    exec(compile(sweep.replace("rounds=3", "rounds=1"), "guide.md", "exec"), names)
    owners = names["result"].metrics["owner_accuracy"]
    assert owners.shape == (2, 1)
    assert owners[0] == owners[1] > 0  # the same seed, before the cap matters


def test_the_readme_names_what_there_is():
    """Of each kind whatever the package brings."""
    kinds = schemes.Scheme, attacks.Attack
    named = set(re.findall(r"`(\w+)`", README))
    wrappers = {cls for cls in implementations(schemes.Scheme) if issubclass(cls, schemes.Wrapper)}
    controls = {attacks.OwnModel, attacks.Scratch}
    found = {cls for kind in kinds for cls in implementations(kind)}
    found = {cls for cls in found - wrappers - controls if cls.__module__.startswith("noisefl.")}
    there = {cls.__name__ for cls in found}
    there |= {name for name, one in vars(models).items()
              if inspect.isclass(one) and issubclass(one, nn.Module)}  # fmt: skip
    assert there - named == set()


def test_every_calibrator_is_in_the_table():
    rows = [line for line in GUIDE.splitlines() if line.startswith("| `")]
    names = [name_of(cls) for cls in implementations(calibrate.Calibrator)
             if cls.__module__.startswith("noisefl.")]  # fmt: skip
    assert [name for name in names if not any(f"`{name}`" in row for row in rows)] == []
