"""What a person sees while runs go on."""

import io

import numpy as np
import pytest
from rich.console import Console

from experiments.sweep import progress
from experiments.sweep.progress import Progress, values

KINDS = ("fedavg", "noise")


def columns(rounds: int, lanes: int = 2, **changes) -> dict:
    """[L, t]: FedAvg in lane 0, others protected from round 2 on."""
    found = {
        "round": np.tile(np.arange(1, rounds + 1), (lanes, 1)),
        "owner_accuracy": np.full((lanes, rounds), 0.9),
        "shared_accuracy": np.full((lanes, rounds), 0.5),
        "strength": np.full((lanes, rounds), 0.25),
        "protected": (np.arange(rounds) > 0) & (np.arange(lanes) > 0)[:, None],
        **{name: np.ones((lanes, rounds), bool) for name in ("finite", "feasible", "shipped")},
    }
    for name, (place, value) in changes.items():
        found[name][place] = value
    return found


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, "owner 0.900, FedAvg 0.900, highest copy 0.500, σ 0.25"),
        ({"owner_accuracy": ((1, 2), 0.8)}, "owner 0.800, FedAvg 0.900, highest copy"),
        ({"owner_accuracy": ((0, 2), 0.8)}, "owner 0.900, FedAvg 0.800, highest copy"),
        ({"shared_accuracy": ((1, 1), 0.7)}, "highest copy 0.700"),
        ({"shared_accuracy": ((1, 0), 0.7)}, "highest copy 0.500"),  # in warm-up
        ({"feasible": ((1, 1), False)}, "σ 0.25, 1 rounds infeasible"),
        ({"finite": ((1, 2), False)}, ": FedAvg 0.900, highest copy 0.500, σ 0.25, 1 runs broke"),
        ({"strength": ((1, 2), 0.5)}, "σ 0.5"),
    ],
)
def test_a_line_has_the_figures_that_matter(changes, line):
    text = values(3, 9, KINDS, columns(3, **changes))
    assert text.startswith("round 3/9: ")
    assert line in text
    assert len(text) < 100


def test_of_many_runs_there_are_spans():
    found = columns(3, 4, owner_accuracy=((2, 2), 0.8))
    assert values(3, 9, ("fedavg", *("noise",) * 3), found) == (
        "round 3/9: owner 0.800 to 0.900, FedAvg 0.900, highest copy 0.500"
    )
    assert " to " not in values(3, 9, KINDS, found)  # a lane that only fills up is none


def test_a_lane_that_broke_stays_where_it_was():
    found = columns(3, finite=((1, 1), False), owner_accuracy=((1, 1), 0.2))
    found["round"][1, 2] = 0  # and the row of a round that was not is anything
    found["feasible"][1, 2] = False
    text = values(3, 9, KINDS, found)
    assert text == "round 3/9: FedAvg 0.900, σ 0.25, 1 runs broke down"


def shown(terminal: bool, rounds: int, runs: int = 2, quiet: bool = False) -> str:
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=120, quiet=quiet)
    with Progress(runs, 1, rounds, quiet, console) as bars:
        bars.group(1, "lenet5, [/mnist]", runs, 0)  # no mark-up of rich's
        bars.batch(2, 0)
        for t in range(1, rounds + 1):
            bars.rounds(t, KINDS, columns(t))
        bars.finished(2)
    return file.getvalue()


def test_a_terminal_sees_a_bar_with_values():
    text = shown(terminal=True, rounds=3)
    for part in ("6/6", "rounds in all", "left", "owner 0.900", "σ 0.25"):
        assert part in text
    assert "side by side" not in text
    assert "2 side by side" in shown(terminal=True, rounds=3, runs=4)


def test_a_terminal_that_cannot_move_its_cursor_gets_lines(monkeypatch):
    """Rich would show nothing there before the end."""
    monkeypatch.setenv("TERM", "dumb")
    lines = shown(terminal=True, rounds=3).splitlines()
    assert "lenet5, [/mnist]; compiling" in lines[0]
    assert "round 3/3: owner 0.900" in lines[-1]


def test_a_file_gets_a_line_now_and_then_and_the_last(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now.append(now[-1] + 1) or now[-1])
    for runs, least in ((2, 15), (4, 4)):
        lines = shown(terminal=False, rounds=100, runs=runs).splitlines()
        assert least <= len(lines) <= 2 * least
        assert "lenet5, [/mnist]; compiling" in lines[0]
        assert "round 100/100: owner 0.900" in lines[-1]
    assert shown(terminal=False, rounds=3, quiet=True) == ""
