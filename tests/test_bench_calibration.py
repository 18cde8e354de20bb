"""The calibration benchmark: its statistics against closed forms, its files, what it refuses."""

import itertools
import json
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import bench_calibration, calibration_figures, calibration_judge
from noisefl import Config, models, noise
from noisefl.data import FederatedData

KEYS = {
    *("calibrator", "guarantee", "calibrations", "tries_mean", "images_per_round", "wall_share"),
    *("strength_ratio_median", "violation_rate", "violation_rate_upper95", "infeasible_rate"),
    *("run_owner_accuracy", "run_seconds", "owner_minus_source", "wall_share_mean", "claimed"),
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
    never = calibration_figures.summary("fixed", [row(True, feasible=False)] * 10)
    assert (never["claimed"], never["infeasible_rate"]) == (0, 1)
    assert (never["violation_rate"], never["violation_rate_upper95"]) == (None, None)
    assert calibration_figures.violations(never) == "–"


def test_means_are_of_all_calibrations_and_the_ratio_is_a_median():
    rows: list[dict[str, Any]] = [row(False, ratio=ratio) for ratio in (1.0, 1.1, 2.0, None)]
    for place, (tries, samples) in enumerate([(1, 10), (2, 20), (9, 30), (4, 400)]):
        rows[place] |= {"tries": tries, "samples": samples}
    found = calibration_figures.summary("predictive", rows)
    assert (found["tries_mean"], found["images_per_round"]) == (4, 115)
    assert found["strength_ratio_median"] == 1.1


def test_what_is_measured_of_each_calibration(monkeypatch):
    """Of made-up calibrations: base b of repeat r reads 10 b + r images at strength b + r."""
    monkeypatch.setattr(bench_calibration, "lanes", lambda *_: {})
    monkeypatch.setattr(bench_calibration, "_QUICK", SimpleNamespace(value=False))
    clock = itertools.count()  # each calibration begins and ends: one tick
    monkeypatch.setattr(bench_calibration.time, "perf_counter", lambda: next(clock) ** 2)
    data: list[Any] = [object(), object()]
    bases = [bench_calibration.Base(b, data[b // 2], b % 2 == 0, 0.9) for b in range(4)]
    carries, judged = [], []

    def rule(key, base, data, carry):
        carries.append((base, carry))
        repeat = len(carries) // 5
        found = {"samples": 10 * base + repeat, "tries": base + 1, "feasible": base != 3}
        return SimpleNamespace(**found, draw=f"draw {base}", strength=base + repeat), carry + 1

    def pair(base, data, draw, strength):
        judged.append((base, data, draw, strength))
        return np.array([0.61 if base == 1 else 0.6, 0.5], np.float32)

    def around(*_):
        return np.where(calibration_figures.RATIOS < 0.8, 0.7, 0.6)

    compiled: Any = SimpleNamespace(init=lambda: 0, rule_compiled=rule)
    judge: Any = SimpleNamespace(pair=pair, around=around)
    found = bench_calibration.measure("predictive", compiled, bases, 2, 7.0, judge)
    # The carry goes along the bases of one run, and no further.
    assert carries == [(0, 0), (1, 1), (2, 0), (3, 1)] * 2
    assert judged == [(b, data[b // 2], f"draw {b}", b + r) for r in (0, 1) for b in range(4)]
    assert (found["calibrations"], found["claimed"], found["violations"]) == (8, 6, 2)
    assert found["infeasible_rate"] == 0.25
    assert (found["tries_mean"], found["images_per_round"]) == (2.5, 15.5)
    assert found["strength_ratio_median"] == pytest.approx(1 / 0.8, rel=0.03)
    seconds = [(2 * n + 1) ** 2 - (2 * n) ** 2 for n in range(8)]  # 1, 5, 9, …
    middle, mean = np.median(seconds), np.mean(seconds)
    assert (found["wall_seconds"], found["wall_seconds_mean"]) == (middle, mean)
    assert found["wall_share"] == pytest.approx(middle / (middle + 7))
    assert found["wall_share_mean"] == pytest.approx(mean / (mean + 7))
    assert found["validation_splits"] == 2


def test_the_judge_judges_the_copies():
    """By the model itself, on all test images: one copy is much better than the other."""
    model, rng = models.by_name("mlp", 10), np.random.default_rng(0)
    images = rng.integers(0, 256, (500, 28, 28, 1), np.uint8)
    options = Config(noise_layers="last", noise_scale="relative", calibrator="fixed")
    base = model.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))["params"]
    paths = noise.target(model, options)
    draw = noise.draw(jax.random.key(1), base, paths, "gaussian")

    def copy(strength: float):
        return noise.apply(base, noise.scaled(base, draw, jnp.float32(strength), "relative"), 1)

    def guess(params):
        return np.asarray(model.apply({"params": params}, images / np.float32(255))).argmax(axis=1)

    labels = np.where(rng.random(500) < 0.7, guess(copy(2.0)), guess(copy(-2.0)))
    some = jnp.asarray(images[:9]), jnp.asarray(labels[:9], jnp.int32)
    data = FederatedData(
        *some, jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32), *some,
        test_images=jnp.asarray(images), test_labels=jnp.asarray(labels, jnp.int32),
    )  # fmt: skip
    judge = calibration_judge.make_judge(model, options)
    wanted = [np.mean(guess(copy(sign * 2.0)) == labels) for sign in (1, -1)]
    assert wanted[0] > wanted[1] + 0.1
    np.testing.assert_allclose(judge.pair(base, data, draw, 2.0), wanted, atol=1e-6)
    around = np.asarray(judge.around(base, data, draw, 2.0))
    for place in (0, 20, 47):
        strength = 2.0 * calibration_figures.RATIOS[place]
        pair = [np.mean(guess(copy(sign * strength)) == labels) for sign in (1, -1)]
        assert around[place] == pytest.approx(max(pair), abs=1e-6)
    assert judge.owner(base, data) == pytest.approx(np.mean(guess(base) == labels), abs=1e-6)


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
