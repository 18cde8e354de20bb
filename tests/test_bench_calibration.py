"""The calibration benchmark: its statistics against closed forms, its files, what it refuses."""

import json
import subprocess
import sys

import numpy as np
import pytest

from experiments import calibration_figures

KEYS = {
    *("calibrator", "guarantee", "calibrations", "tries_mean", "images_per_round", "wall_share"),
    *("strength_ratio_median", "violation_rate", "violation_rate_upper95", "infeasible_rate"),
    *("run_owner_accuracy", "run_seconds", "owner_minus_source"),
}


def bench(*flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "experiments.bench_calibration", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def row(over: bool, feasible: bool = True, ratio: float | None = 1.5) -> dict:
    return {"tries": 2, "samples": 100, "feasible": feasible, "over": over, "ratio": ratio}


def test_the_upper_bound_is_the_exact_binomial_one():
    none = calibration_figures.summary("predictive", [row(False)] * 300)
    assert none["violation_rate"] == 0
    # Without a violation the chance of seeing none is (1 - p)^n = 5 %.
    assert none["violation_rate_upper95"] == pytest.approx(1 - 0.05 ** (1 / 300))
    every = calibration_figures.summary("predictive", [row(True)] * 3)
    assert (every["violation_rate"], every["violation_rate_upper95"]) == (1, 1)


def test_only_rounds_that_call_themselves_feasible_count_for_the_guarantee():
    rows = [row(False), row(False), row(True, feasible=False), row(False, ratio=None)]
    found = calibration_figures.summary("bisection", rows)
    assert (found["violations"], found["infeasible_rate"], found["calibrations"]) == (0, 0.25, 4)
    proxy = calibration_figures.summary("snr", [row(True, feasible=False), row(False, False)])
    assert (proxy["violation_rate"], proxy["infeasible_rate"]) == (0.5, 1)  # it claims nothing


def test_the_strength_ratio_is_to_the_weakest_that_holds():
    ratios = calibration_figures.RATIOS
    falls = np.where(ratios >= ratios[20], 0.6, 0.7)
    assert calibration_figures.strength_ratio(falls, 0.9) == pytest.approx(1 / ratios[20])
    assert calibration_figures.strength_ratio(falls, 0.6) is None  # needed no noise
    assert calibration_figures.strength_ratio(np.full(48, 0.7), 0.9) is None


def test_it_writes_what_it_measured(tmp_path):
    file, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    done = bench(
        *("--quick", "--model=mlp", "--calibrators=additive,predictive", "--repeats=1"),
        *("--rounds=2", f"--json={file}", f"--picture={picture}"),
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(file.read_text())
    assert [result["calibrator"] for result in results] == ["additive", "predictive"]
    assert all(set(result) >= KEYS for result in results)
    assert results[0]["owner_minus_source"] == 0
    assert results[1]["images_per_round"] < results[0]["images_per_round"]
    assert "owner" in done.stdout
    assert picture.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--calibrators=predictiv", "calibrators='predictiv': must be one of"),
        ("--noise_layers=conv9", "noise_layers='conv9': must be first, last, all, or"),
        ("--json=/no/such/folder/b.json", "/no/such/folder/b.json"),
        ("extra", "unexpected argument 'extra'"),
        ("--rounds=1", "rounds=1: must be 0 or at least 2"),
    ],
)
def test_bad_input_is_one_line(flag, says):
    done = bench(flag)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if "xla_bridge" not in line]
    assert len(lines) == 1, done.stderr
    assert says in lines[0]
