"""What a run came to, from its rows."""

import io

import pytest
from rich.console import Console

from experiments.sweep.summary import summarise, table


def row(kind: str, t: int, **values) -> dict:
    found = {
        **{"run": kind, "round": t, "protected": kind == "noise" and t > 1, "finite": True},
        **{"owner_accuracy": 0.9, "shared_accuracy": 0.5, "shared_validation_accuracy": 0.5},
        **{"strength": 0.1, "calibration_samples": 600, "training_samples": 200},
        **{"feasible": True, "shipped": True, "local_accuracy_mean": 0.8},
    }
    return {**found, **values}


def both() -> list[dict]:
    return [
        row("fedavg", 1, owner_accuracy=0.7, calibration_samples=0),
        row("fedavg", 2, owner_accuracy=0.98, calibration_samples=0),
        row("fedavg", 3, owner_accuracy=0.97, calibration_samples=0),
        row("noise", 1, shared_accuracy=0.9, calibration_samples=0),  # warm-up
        row("noise", 2, shared_accuracy=0.6, shared_validation_accuracy=0.6),  # at the cap
        row("noise", 3, shared_accuracy=0.61, shared_validation_accuracy=0.55),
        row("noise", 4, shared_accuracy=0.8, feasible=False),
        row("noise", 5, shared_accuracy=0.9, feasible=False, shipped=False),
        row("noise", 6, owner_accuracy=0.95, shared_accuracy=None, local_accuracy_mean=None),
    ]


def test_only_protected_and_shipped_rounds_count():
    assert summarise(both(), 0.6, 10, 6) == {
        **{"rounds": 6, "cap": 0.6, "failed": None, "baseline_failed": None},
        **{"owner_accuracy_final": 0.95, "owner_accuracy_best": 0.95},
        **{"baseline_accuracy_final": 0.97, "baseline_accuracy_best": 0.98},
        **{"gap_final": 0.02, "gap_best": 0.03},
        **{"shared_accuracy_max_test": 0.8, "rounds_over_cap_test": 2},
        **{"shared_accuracy_max_validation": 0.6, "rounds_over_cap_validation": 0},
        **{"protected_rounds": 5, "infeasible_rounds": 2, "skipped_rounds": 1},
        **{"collapsed": False, "local_accuracy_mean": 0.8},
        **{"calibration_samples": 3000, "training_samples": 1200, "calibration_ratio": 2.5},
    }


def test_alone_there_are_no_names_of_a_baseline():
    noise = summarise(both()[3:], 0.6, 10, 6)
    fedavg = summarise(both()[:3], None, 10, 3)
    beside = {"baseline_failed", *(f"{a}_{b}" for a in ("baseline_accuracy", "gap")
                                   for b in ("final", "best"))}  # fmt: skip
    assert noise == {k: v for k, v in summarise(both(), 0.6, 10, 6).items() if k not in beside}
    assert set(fedavg) == set(noise)
    assert (fedavg["owner_accuracy_final"], fedavg["cap"]) == (0.97, None)
    assert (fedavg["protected_rounds"], fedavg["shared_accuracy_max_test"]) == (0, None)


def test_without_a_cap_no_round_is_over_it():
    found = summarise([row("noise", 1), row("noise", 2, shared_accuracy=1.0)], None, 10, 2)
    assert (found["shared_accuracy_max_test"], found["rounds_over_cap_test"]) == (1.0, 0)


def test_a_run_that_broke_down_has_no_last_accuracy():
    broken = [row("noise", 1), row("noise", 2, finite=False, owner_accuracy=0.1, strength=None)]
    found = summarise([row("fedavg", 1), *broken], 0.6, 10, 9)
    assert (found["owner_accuracy_final"], found["gap_final"]) == (None, None)
    assert (found["baseline_accuracy_final"], found["baseline_failed"]) == (0.9, None)
    assert found["rounds"] == 9
    assert found["failed"]["round"] == 2
    assert found["failed"]["cause"].startswith("run noise, round 2: the model is NaN or infinite")
    fine = summarise([row("fedavg", 1, finite=False), row("noise", 1)], 0.6, 10, 9)
    assert (fine["owner_accuracy_final"], fine["failed"], fine["gap_final"]) == (0.9, None, None)
    assert fine["baseline_failed"]["cause"].startswith("run fedavg, round 1: ")


def test_the_cause_is_the_strongest_recent_noise():
    """A collapsed base needs no noise: the round that broke it was before."""
    found = [
        row("noise", t, strength=strength, finite=t < 5)
        for t, strength in enumerate([0.0, 9.0, 2.7, 0.1, 0.0], 1)
    ]
    assert "noise of strength 2.7 in round 3 " in summarise(found, 0.6, 10, 5)["failed"]["cause"]
    found = [row("noise", 1, finite=False)]
    assert "noise of" not in summarise(found, 0.6, 10, 5)["failed"]["cause"]


@pytest.mark.parametrize(
    ("owner", "collapsed"),
    [([0.1, 0.9, 0.12], True), ([0.1, 0.5, 0.1], False), ([0.1, 0.9, 0.2], False)],
)
def test_a_collapse_is_told(owner, collapsed):
    noise = [row("noise", t, owner_accuracy=g) for t, g in enumerate(owner, 1)]
    assert summarise(noise, 0.6, 10, 3)["collapsed"] == collapsed


def shown(rows: list[dict], cap: float | None) -> str:
    file = io.StringIO()
    summary = summarise(rows, cap, 10, 6)
    Console(file=file, width=100).print(table(summary, 3, "results/here"))
    return file.getvalue()


def test_the_table_has_the_owner_beside_the_cap():
    text = shown(both(), 0.6)
    for words in ("results/here: 6 rounds, one seed (3)", "One seed is one draw"):
        assert words in text
    lines = {line.split("│")[1].strip(): line for line in text.splitlines() if "│" in line}
    assert "95.00 %" in lines["owner accuracy"]
    assert "97.00 %" in lines["FedAvg accuracy"]
    assert "2.00" in lines["gap, points"]
    assert lines["rounds over the cap of 60.00 %"].split("│")[2:4] == ["       2 ", "          0 "]
    assert "80.00 %" in lines["highest shared accuracy"]


def test_the_table_leaves_out_what_there_is_not():
    text = shown(both()[3:], None)
    assert "FedAvg" not in text
    assert "over the cap" not in text
    assert "owner accuracy" in text
