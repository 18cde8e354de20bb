"""The help page: every flag with unit, range, choices and the value that would run."""

import os
import subprocess
import sys

import pytest

from experiments.sweep import options
from experiments.sweep.options import catalogue, preset_of

KNOWN = catalogue(preset_of("quickstart"))


@pytest.fixture(scope="module")
def page() -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("builtins.print", printed.append)
        for name in options.HELP:
            assert options.parse(["run", f"--{name}", "--flagfile=literal"]) is None
    assert len(set(printed)) == 1
    return printed[0].splitlines()


def test_help_is_a_page_with_every_flag(page):
    # In a process of its own: the choices here are those of other tests' parts as well.
    command = [sys.executable, "-m", "experiments.run", "--help"]
    wide = {**os.environ, "COLUMNS": "100"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=wide)
    assert (done.returncode, done.stderr) == (0, "")
    assert 100 < len(done.stdout.splitlines()) <= 200
    assert max(map(len, page)) <= 100
    for name in KNOWN:
        assert any(line.startswith((f"  --{name}=", f"  --[no]{name} ")) for line in page), name


@pytest.mark.parametrize("columns", [20, 80, 200])
def test_help_is_as_wide_as_the_terminal_and_shows_what_would_run(monkeypatch, capsys, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert options.parse(["run", "--help", "--flagfile=own_classes", "--cap=0.4"]) is None
    lines = capsys.readouterr().out.splitlines()
    # A flag's own name and value are never broken.
    widest = max(len(line) for line in lines if not line.startswith("  --"))
    assert min(max(columns, 60), 100) - 10 < widest <= min(max(columns, 60), 100)
    said = " ".join(" ".join(lines).split())
    for wanted in (
        "Values are those of own_classes.",
        "--cap=0.4 ",
        "--scheme=warmup+own_classes ",
    ):
        assert wanted in said


@pytest.mark.parametrize(
    "wanted",
    [
        "  --cap=0.6 largest accuracy a shared copy may have [share of 1]; > 0, < 1",
        "  --calibrator=additive rule that sets the strength; additive | bisection",  # of literal
        "  --strength=0.0 ",  # its own
        "  --strength_factor=1.25 multiplied a try; > 1 (of geometric, parallel)",
        ", skip_infeasible+ | until_cap+ | warmup+",  # around bare, pair, …
        "  --momentum=none of local SGD; ≥ 0, < 1, none: plain SGD",
        "  --[no]baseline also run FedAvg, once for all runs that need the same (default on)",
        "  --rounds=30 rounds of each run [rounds]; ≥ 1",
        "scheme: what clients get instead of W, and how it is read back",
        "data: How training images are dealt out",
    ],
)
def test_help_has_units_ranges_choices_and_the_defaults_of_the_preset(page, wanted):
    assert " ".join(wanted.split()) in " ".join(" ".join(page).split())
