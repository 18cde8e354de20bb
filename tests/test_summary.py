"""What a run came to, from its rows."""

import io
from typing import Any, NamedTuple

import numpy as np
import pytest
from rich.console import Console

from experiments.sweep.execute import stolen_of
from experiments.sweep.summary import summarise, table, thieves


def row(kind: str, t: int, **values) -> dict:
    found = {
        **{"run": kind, "round": t, "protected": kind == "noise" and t > 1, "finite": True},
        **{"owner_accuracy": 0.9, "shared_accuracy": 0.5, "shared_validation_accuracy": 0.5},
        **{"strength": 0.1, "calibration_samples": 600, "training_samples": 200},
        **{"feasible": True, "shipped": True, "local_accuracy_mean": 0.8, "copy_bytes": 4000},
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
        **{"collapsed": False, "local_accuracy_mean": 0.8, "copy_bytes": 4000},
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
    assert "80.00 %" in lines["best copy that was handed out"]


def test_the_table_leaves_out_what_there_is_not():
    text = shown(both()[3:], None)
    assert "FedAvg" not in text
    assert "over the cap" not in text
    assert "owner accuracy" in text


# Thieves.


def stolen(thief: str, view: str, accuracy: float | None, best: float | None = None, **others: Any):
    """A row of thieves.jsonl, of a protected run unless said otherwise."""
    members = {"V1": 1, "V2": 1}.get(view, 2)
    found = {"run": "noise", "thief": thief, "view": view, "members": members, "which": 0}
    return {**found, "accuracy": accuracy, "accuracy_best": best or accuracy, **others}


SIDE = [
    *(stolen("scratch", "V1", x, run="fedavg", which=n) for n, x in enumerate((0.3, 0.4))),
    stolen("scratch", "V3", 0.5, run="fedavg"),
    stolen("server_alone", "V0", 0.8, run="fedavg", members=0),
    *(stolen("bare_copy", "V1", 0.97, run="fedavg", which=n) for n in range(4)),
]
OWN = [
    stolen("owner", "V0", 0.99, members=0),
    *(stolen("bare_copy", "V1", x, which=n) for n, x in enumerate((0.5, 0.52))),
    *(stolen("fine_tune", "V1", x, 0.95, which=n) for n, x in enumerate((0.6, 0.8))),
    *(stolen("ridge", "V1", x, 0.9, which=n) for n, x in enumerate((0.85, 0.1))),
    stolen("average", "V2", 0.98),  # of several rounds: neither one copy nor one round
    stolen("average", "V3", 0.75, 0.96),
    stolen("average", "V3", 0.65, members=5),
    stolen("knock_off", "V5", 0.98),
]


def test_the_best_thieves_are_those_of_one_copy_and_of_one_round():
    """By the mean over single thieves; a coalition may do what one of its members does."""
    wanted = {
        "one_copy": {"thief": "fine_tune", "accuracy": 0.7, "accuracy_best": 0.95},
        "coalitions": [
            {"members": 2, "thief": "average", "accuracy": 0.75, "accuracy_best": 0.96},
            {"members": 5, "thief": "fine_tune", "accuracy": 0.7, "accuracy_best": 0.95},
        ],
        "scratch": {"1": 0.35, "2": 0.5},
        "server_alone": 0.8,
    }
    assert thieves([*SIDE, *OWN]) == wanted
    # Controls of the run itself are tried again, if --controls=always: FedAvg's stand for both.
    own = [stolen("scratch", "V1", 0.1), stolen("server_alone", "V0", 0.1, members=0)]
    assert thieves([*SIDE, *OWN, *own]) == wanted
    found = summarise(both(), 0.6, 10, 6, [*SIDE, *OWN])
    assert found["thieves"] == wanted
    assert "thieves" not in summarise(both(), 0.6, 10, 6)
    # Beside no FedAvg nothing is known without a copy, and of FedAvg alone the bare copy is best.
    alone = thieves(OWN)
    assert (alone["scratch"], alone["server_alone"]) == ({}, None)
    assert alone["one_copy"] == wanted["one_copy"]
    assert thieves(SIDE)["one_copy"] == {
        "thief": "bare_copy", "accuracy": 0.97, "accuracy_best": 0.97,
    }  # fmt: skip


def test_a_thief_whose_model_broke_is_not_the_best():
    broken = [stolen("fine_tune", "V1", None), stolen("bare_copy", "V1", 0.4)]
    assert thieves(broken)["one_copy"]["thief"] == "bare_copy"
    nobody = thieves([stolen("fine_tune", "V1", None)])["one_copy"]
    assert nobody == {"thief": None, "accuracy": None, "accuracy_best": None}


def test_scratch_that_broke_is_left_out_of_its_mean():
    found = thieves([stolen("scratch", "V1", None, run="fedavg"), *SIDE, *OWN])
    assert found["scratch"] == {"1": 0.35, "2": 0.5}
    only = thieves([stolen("scratch", "V1", None, run="fedavg"), *OWN])
    assert only["scratch"].get("1") is None


def test_the_table_says_what_thieves_come_to():
    summary = summarise(both(), 0.6, 10, 6, [*SIDE, *OWN])
    console = Console(file=io.StringIO(), width=120)
    console.print(table(summary, 3, "out"))
    text = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    lines = [" ".join(part.split()) for part in text.splitlines()]
    for wanted in (
        "best thief with one copy (fine tune) │ 70.00 % │ 95.00 %",
        "best of 2 colluding clients (average) │ 75.00 % │ 96.00 %",
        "best of 5 colluding clients (fine tune) │ 70.00 % │ 95.00 %",
        "without a copy, one client's images │ 35.00 %",
        "without a copy, the images of 2 clients │ 50.00 %",
        "the server alone, its own images │ 80.00 %",
    ):
        assert any(wanted in one for one in lines), wanted
    shares = [line.split("│")[2].strip() for line in lines if "share of the model" in line]
    assert shares == ["0.58", "0.56", "–"]  # of 0.95; of five clients nobody knows scratch
    above = [*SIDE, *OWN, stolen("scratch", "V1", 2.6, run="fedavg", which=2)]  # the mean is 1.1
    console.print(table(summarise(both(), 0.6, 10, 6, above), 3, "out"))
    assert "share of the model, λ │ nothing to steal" in " ".join(console.file.getvalue().split())  # pyright: ignore


class Row(NamedTuple):
    """Of what a figure is."""

    thief: str
    members: int


def test_what_measures_said_is_a_row_each_of_json_values():
    """Floats as the shortest decimals of their float32; what was not tried is not there."""
    numbers = np.array([0.6, np.nan], np.float32)
    said = {
        Row("average", 2): {"accuracy": numbers, "round": np.array([7, 9], np.int32),
                            "tried": np.array([True, True])},
        Row("scratch", 1): {"accuracy": numbers, "round": np.array([7, 9], np.int32),
                            "tried": np.array([False, True])},
        Row("mine", 1): {"accuracy": numbers},
    }  # fmt: skip

    class Run:
        kind = "noise"

    first, second = (stolen_of(Run, said, lane) for lane in (0, 1))  # pyright: ignore
    average = {"run": "noise", "thief": "average", "members": 2}
    mine = {"run": "noise", "thief": "mine", "members": 1}
    assert first == [{**average, "accuracy": 0.6, "round": 7}, {**mine, "accuracy": 0.6}]
    assert second == [
        {**average, "accuracy": None, "round": 9},
        {"run": "noise", "thief": "scratch", "members": 1, "accuracy": None, "round": 9},
        {**mine, "accuracy": None},
    ]
    assert {type(row["round"]) for row in first[:1]} == {int}
