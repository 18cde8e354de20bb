"""The calibration benchmark: its statistics against closed forms, its files, what it refuses."""

import itertools
import json
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bench_flags import check_refusals

from experiments import bench_calibration
from experiments.bench import figures, judge
from noisefl import Experiment, calibrate, models, noise, parts, schemes
from noisefl.cohort import Cohort
from noisefl.data import Federation, Images
from noisefl.schemes.noised import Drawn

VOUCHED = calibrate.Predictive.guarantee


def row(over: bool, feasible: bool = True, ratio: float | None = 1.5) -> dict:
    return {"tries": 2, "samples": 100, "feasible": feasible, "over": over, "ratio": ratio}


def test_the_upper_bound_is_the_exact_binomial_one():
    none = figures.summary("predictive", VOUCHED, [row(False)] * 300)
    assert none["violation_rate"] == 0
    # Without a violation the chance of seeing none is (1 - p)^n = 5 %.
    assert none["violation_rate_upper95"] == pytest.approx(1 - 0.05 ** (1 / 300))
    every = figures.summary("predictive", VOUCHED, [row(True)] * 3)
    assert (every["violation_rate"], every["violation_rate_upper95"]) == (1, 1)


def test_only_rounds_that_call_themselves_feasible_count_for_the_guarantee():
    rows = [row(False), row(False), row(True, feasible=False), row(False, ratio=None)]
    found = figures.summary("bisection", VOUCHED, rows)
    assert (found["violations"], found["infeasible_rate"], found["calibrations"]) == (0, 0.25, 4)
    proxy = figures.summary("snr", "none", [row(True, feasible=False), row(False, False)])
    assert (proxy["violation_rate"], proxy["infeasible_rate"]) == (0.5, 1)  # it claims nothing
    never = figures.summary("fixed", VOUCHED, [row(True, feasible=False)] * 10)
    assert (never["claimed"], never["infeasible_rate"]) == (0, 1)
    assert (never["violation_rate"], never["violation_rate_upper95"]) == (None, None)
    rest = {"wall_share": 0.1, "run_owner_accuracy": [0.9], "run_seconds": 1}
    assert figures.line(never | rest)["over cap (95 % up to)"] == "–"


def test_what_is_measured_of_each_calibration(monkeypatch):
    """Of made-up calibrations: base b of repeat r reads 10 b + r images at strength b + r."""
    monkeypatch.setattr(bench_calibration, "_QUICK", SimpleNamespace(value=True))
    clock = itertools.count()  # each calibration begins and ends: one tick
    monkeypatch.setattr(bench_calibration.time, "perf_counter", lambda: next(clock) ** 2)
    data: list[Any] = [object(), object()]
    bases = [bench_calibration.Base(b, data[b // 2], b % 2 == 0, 0.9) for b in range(4)]
    carries, judged = [], []

    def calibration(key, base, data, carry):
        carries.append((base, carry))
        repeat = len(carries) // 5
        secret = SimpleNamespace(draw=f"draw {base}", strength=base + repeat)
        bill = SimpleNamespace(samples=10 * base + repeat, tries=base + 1)
        return secret, base != 3, bill, carry + 1

    def copies(base, data, draw, strength):
        judged.append((base, data, draw, strength))
        return np.array([0.61 if base == 1 else 0.6, 0.5], np.float32)

    def around(*_):
        return np.where(figures.RATIOS < 0.8, 0.7, 0.6)

    scheme = SimpleNamespace(init=lambda *_: 0, calibrator=SimpleNamespace(guarantee=VOUCHED))
    compiled: Any = SimpleNamespace(scheme=scheme, calibration=calibration)
    fake: Any = SimpleNamespace(copies=copies, around=around)
    found = bench_calibration.measure("predictive", compiled, bases, 2, 7.0, fake)
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
    images = rng.integers(0, 256, (500, 6, 6, 1), np.uint8)
    pair = schemes.Noised(on=noise.layers("last", relative=True))
    experiment = Experiment(model, scheme=pair).resolved()
    base = model.init(jax.random.key(0), jnp.zeros((1, 6, 6, 1)))["params"]
    unit = pair.on.draw(jax.random.key(1), base, pair.touched(experiment.functions, (6, 6, 1)))
    draw = Drawn((unit,), {})

    def guess(params):
        return np.asarray(model.apply({"params": params}, images / np.float32(255))).argmax(axis=1)

    def copy(strength: float):
        return noise.apply(base, pair.on.scaled(base, draw.common[0], jnp.float32(strength)), 1)

    labels = np.where(rng.random(500) < 0.7, guess(copy(2.0)), guess(copy(-2.0)))
    some = jnp.asarray(images[:9]), jnp.asarray(labels[:9], jnp.int32)
    test = jnp.asarray(images), jnp.asarray(labels, jnp.int32)
    data = Federation(
        Images(*some, *test), jnp.zeros((10, 1), jnp.int32), jnp.ones(10, jnp.int32), *some
    )
    made = judge.make_judge(experiment, pair)
    wanted = [np.mean(guess(copy(sign * 2.0)) == labels) for sign in (1, -1)]
    assert wanted[0] > wanted[1] + 0.1
    np.testing.assert_allclose(made.copies(base, data, draw, 2.0), wanted, atol=1e-6)
    around = np.asarray(made.around(base, data, draw, 2.0))
    for place in (0, 20, 47):
        strength = 2.0 * figures.RATIOS[place]
        both = [np.mean(guess(copy(sign * strength)) == labels) for sign in (1, -1)]
        assert around[place] == pytest.approx(max(both), abs=1e-6)
    assert made.owner(base, data) == pytest.approx(np.mean(guess(base) == labels), abs=1e-6)


def test_the_strength_ratio_is_to_the_weakest_that_holds():
    ratios = figures.RATIOS
    falls = np.where(ratios >= ratios[20], 0.6, 0.7)
    assert figures.strength_ratio(falls, 0.9) == pytest.approx(1 / ratios[20])
    assert figures.strength_ratio(falls, 0.6) is None  # needed no noise
    assert figures.strength_ratio(np.full(48, 0.7), 0.9) is None


OWN = """
from noisefl import calibrate
from noisefl.parts import part

@part
class Bold(calibrate.Fixed):
    pass
"""


@pytest.mark.slow
def test_it_writes_what_it_measured_of_your_own_rule_too(tmp_path):
    file, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    (tmp_path / "my_rules.py").write_text(OWN)
    flags = f"--quick --model=mlp --repeats=1 --rounds=2 --json={file} --picture={picture}"
    own = "--calibrators=additive,bold,predictive --modules=my_rules"
    done = subprocess.run(
        [sys.executable, "-m", "experiments.bench_calibration", *flags.split(), *own.split()],
        capture_output=True, text=True, timeout=300, env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = json.loads(file.read_text())
    assert [result["calibrator"] for result in results] == ["additive", "bold", "predictive"]
    assert results[0]["owner_minus_source"] == 0
    assert results[2]["images_per_round"] < results[0]["images_per_round"]
    assert "owner" in done.stdout
    assert picture.stat().st_size > 10_000


def test_all_rules_are_measured_with_the_same_cap_and_bound(monkeypatch):
    monkeypatch.setattr(bench_calibration, "_DRIVER", SimpleNamespace(value=""))
    monkeypatch.setattr(bench_calibration, "_LAYERS", SimpleNamespace(value="last"))
    for cls in parts.implementations(calibrate.Calibrator):
        rule = bench_calibration.scheme_of(cls).calibrator
        assert rule.cap == np.float32(0.6)
        assert getattr(rule, "strength_max", 50) == 50


def test_another_scheme_keeps_its_own_settings_of_the_rule(monkeypatch):
    flags = "--preset=two_way --coalition=5 --draws=1 --cap=0.3"
    monkeypatch.setattr(bench_calibration, "_DRIVER", SimpleNamespace(value=flags))
    scheme: Any = bench_calibration.scheme_of(calibrate.Predictive)
    assert (scheme.own, scheme.coalition, scheme.calibrator.draws) == ("sticky", 5, 1)
    assert scheme.calibrator.cap == np.float32(0.6)
    other = bench_calibration.scheme_of(calibrate.Bisection).calibrator
    assert isinstance(other, calibrate.Bisection)
    assert other.cap == np.float32(0.6)


def test_what_a_coalition_is_left_with_is_judged_as_well():
    """Last of all, by its own draw: without own noise in it, of the variance that is left."""
    cohort = Cohort(clients_per_round=4)
    experiment = Experiment(models.by_name("mlp", 10), cohort=cohort).resolved()
    scheme = schemes.own_noise("fresh", 0.5, on=noise.layers("last"), coalition=2)
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.integers(0, 256, (300, 6, 6, 1), np.uint8))
    base = experiment.functions.init(jax.random.key(0), (6, 6, 1))
    labels = jnp.argmax(experiment.functions.apply(base, images / 255), axis=1).astype(jnp.int32)
    some = images[:9], labels[:9]
    data = Federation(
        Images(*some, images, labels), jnp.zeros((8, 1), jnp.int32), jnp.ones(8, jnp.int32), *some
    )
    judged = experiment.judge(data)
    draw = scheme.draw(jax.random.key(1), base, judged)
    keys = scheme.on.keys(jax.random.key(2), scheme.touched(judged.model, (6, 6, 1)))
    draw = draw._replace(own=keys, clients=jnp.arange(4), groups=jnp.zeros(4, jnp.int32))
    made = judge.make_judge(experiment, scheme)
    found = made.copies(base, data, draw, 0.5)
    assert found.shape == (5,)
    last = scheme.variant(base, draw, jnp.float32(0.5), jnp.int32(4))
    right = jnp.argmax(experiment.functions.apply(last, images / 255), axis=1) == labels
    assert found[4] == pytest.approx(float(jnp.mean(right)))
    assert found[4] > jnp.max(found[:4])


def test_bad_input_is_one_line():
    says = {
        "--driver=--scheme=statistics": "must be flags of a scheme that is calibrated",
        "--driver=--capp=1": "capp",
        "--driver=--grid=seed=0:2": "must be flags of one run, without --grid",
        "--calibrators=predictiv": "calibrators='predictiv': must be one of additive",
        "--modules=no.such": "No module named 'no'",
        "--noise_layers=conv9": "noise_layers='conv9': must be first, last, all, or",
        "--rounds=1": "rounds=1: must be 0 or at least 2",
    }
    check_refusals("experiments.bench_calibration", says)
