"""The README's commands and its example are what they say."""

import re
from pathlib import Path

import pytest

from experiments import options

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


def test_linked_files_exist():
    targets = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert targets
    assert [link for link in targets if not (ROOT / link).exists()] == []


def test_the_library_call_runs(capsys):
    (example,) = blocks("python")
    exec(compile(example.replace("range(1, 6)", "range(1, 3)"), "README.md", "exec"), {})
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["1", "2"]
