"""What each rule that looks at whole splits finds, against Python loops written from its docstring.

And the proxies that vouch for nothing, against NumPy. `test_sequential` has the tested rules.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_calibrate import CASES, CURVES, N, all_cases, fake, keys_of, with_numbers

from noisefl import calibrate, keys
from noisefl.calibrate import Bill, Probe, Questions

NEAR = 1e-5  # of an accuracy to the aim: float32 may fall on either side


class Judge:
    """Of one case and round: its numbers and draws, whether copies hold, and what was asked."""

    def __init__(self, name: str, lane: int, t: int):
        (kind, numbers), self.key = CASES[lane], keys_of(len(CASES))[lane, t]
        self.rule, self.curve = with_numbers(name, **numbers), CURVES[kind]
        self.aim, self.near, self.tried = float(self.rule.aim), math.inf, []

    def __getattr__(self, number: str) -> float:
        return float(getattr(self.rule, number))

    def holds(self, strength: float, draw: float) -> bool:
        at = np.float32(strength), np.float32(draw)
        accuracy = [float(self.curve(*at, v, 2)) for v in (0, 1)]
        self.tried.append((strength, draw))
        self.near = min([self.near, *(abs(a - self.aim) for a in accuracy if not math.isnan(a))])
        return all(a <= self.aim for a in accuracy)  # NaN does not hold

    def draw(self, *streams: Any) -> float:
        of = functools.reduce(lambda key, stream: keys.stream(key, *stream), streams, self.key)
        return float(jax.random.normal(of))


Found = tuple[bool, float, float]  # feasible, strength, draw; of draws that are as good, any


def looped(judge: Judge, carry: float, raised: Any, rescale: bool, bare: bool) -> Found:
    """ALGORITHM.md's loop."""
    if bare and judge.holds(0.0, 0.0):
        return True, 0.0, judge.draw(("try", 0))
    j = 0
    while True:
        strength = min(raised(judge, j), judge.strength_max)
        draw = judge.draw(("try", 0 if rescale else j))
        if judge.holds(strength, draw):
            return True, strength, draw
        hopeless = rescale and strength >= judge.strength_max
        if hopeless or len(judge.tried) >= judge.max_tries:
            return False, strength, draw
        j += 1


def bisected(judge: Judge, carry: float) -> Found:
    """A bracket by doubling or halving, then its middles on log σ; the weakest that held ships."""
    draw, low, high = judge.draw(("draw",)), 0.0, math.inf
    if judge.holds(0.0, draw):
        return True, 0.0, draw
    at = judge.strength if math.isnan(carry) else min(carry, judge.strength_max)
    while True:
        low, high = (low, min(high, at)) if judge.holds(at, draw) else (max(low, at), high)
        done = low >= judge.strength_max if high == math.inf else high <= low * judge.tolerance
        if done or len(judge.tried) >= judge.max_tries:
            return high < math.inf, high if high < math.inf else at, draw
        if high == math.inf:
            at = min(2 * low, judge.strength_max)
        else:
            at = math.sqrt(low * high) if low else high / 2


def batched(judge: Judge, carry: float) -> Found:
    """Draws by strengths a batch; a batch without one that holds is followed by more."""
    start = judge.strength if math.isnan(carry) else min(carry, judge.strength_max)
    start, batch = start / judge.strength_factor**2, 0
    if judge.holds(0.0, 0.0):
        return True, 0.0, judge.draw(("batch", 0), ("draw", 0))
    while True:
        ladder = [min(start * judge.strength_factor**j, judge.strength_max) for j in range(4)]
        draws = [judge.draw(("batch", batch), ("draw", d)) for d in (0, 1)]
        good = [(s, z) for s in ladder for z in draws if judge.holds(s, z)]
        batch, start = batch + 1, ladder[-1] * judge.strength_factor
        if good or 1 + 8 * (batch + 1) > judge.max_tries:
            return bool(good), *(good[0] if good else (ladder[-1], draws[0]))


def added(judge: Judge, j: int) -> float:
    return judge.strength + j * judge.strength_step


def multiplied(judge: Judge, j: int) -> float:
    return judge.strength * judge.strength_factor**j


LOOPS: dict[str, Any] = {
    "additive-fresh": functools.partial(looped, raised=added, rescale=False, bare=False),
    "additive-rescale": functools.partial(looped, raised=added, rescale=True, bare=False),
    "geometric-fresh": functools.partial(looped, raised=multiplied, rescale=False, bare=True),
    "geometric-rescale": functools.partial(looped, raised=multiplied, rescale=True, bare=True),
    "bisection": bisected,
    "parallel": batched,
}


@pytest.mark.parametrize("name", LOOPS)
def test_a_rule_finds_what_a_python_loop_finds(name):
    decision, _, bill, after = all_cases(name, 2)
    ends, compared = set(), 0
    for lane, t in np.ndindex(len(CASES), 2):
        carry = float(after[lane, 0]) if t and name in ("bisection", "parallel") else math.nan
        judge = Judge(name, lane, t)
        feasible, strength, draw = LOOPS[name](judge, carry)
        if judge.near < NEAR:
            continue
        assert decision.feasible[lane, t] == feasible, CASES[lane]
        assert decision.strength[lane, t] == pytest.approx(strength, rel=1e-5), CASES[lane]
        shipped = float(decision.draw[lane, t])
        assert shipped == pytest.approx(draw) or (
            # Of two draws that hold, or do not, at one strength either may ship.
            name == "parallel" and shipped in [pytest.approx(z) for _, z in judge.tried[1:]]
        )
        tries = len(judge.tried)
        models = 2 * tries - (not name.startswith("additive"))
        assert [leaf[lane, t] for leaf in jax.tree.leaves(bill)] == [tries, models, models * N]
        top = strength >= judge.strength_max
        ends.add((feasible, tries >= judge.max_tries - 7 * (name == "parallel"), top))
        compared += 1
    assert compared > 1.8 * len(CASES)
    assert ends > {(True, False, False), (False, True, False)} or name == "bisection"
    # Fresh draws go on at σ_max until tries end, and may find one that holds; else one is enough.
    assert ((False, False, True) in ends) == (name.endswith("rescale") or name == "bisection")
    assert ((True, False, True) in ends) or not name.endswith("fresh")


def test_bisection_is_within_tolerance_of_any_threshold():
    """Whatever the carry, a monotone accuracy ends at most 5 % above the exact threshold."""
    thresholds = np.geomspace(0.003, 9, 97).astype(np.float32)
    carries = np.float32([np.nan, 0, 1e-6, 0.05, 1.7, 1e4, np.inf])  # pyright: ignore
    threshold, carry = (axis.ravel() for axis in np.meshgrid(thresholds, carries))
    carry = np.concatenate([carry, thresholds, thresholds * np.float32(0.999)])  # that is right
    threshold = np.concatenate([threshold, thresholds, thresholds])

    def one(threshold, carry):
        rule = calibrate.Bisection(strength=0.3, strength_max=6.0)
        probe = fake(lambda s, z, v: jnp.where(s >= threshold, 0.5, 0.7))
        decision, _, probe, _ = rule.calibrate(jax.random.key(0), probe, carry)
        return decision, probe.bill.tries

    decision, tries = jax.jit(jax.vmap(one))(threshold, carry)
    np.testing.assert_array_equal(decision.feasible, threshold <= 6)
    ratio = (decision.strength / threshold)[threshold <= 6]
    assert 1 <= ratio.min() <= ratio.max() <= 1.05 * (1 + 1e-5)
    assert tries.max() < 40


@pytest.mark.parametrize("name", ["additive-fresh", "fixed"])
def test_strength_zero_asks_whether_the_base_needs_noise(name):
    """Of all copies, as the source does: V models."""
    for bare, holds in ((0.7, True), (0.71, False)):
        probe = fake(lambda s, z, v, bare=bare: bare + 0 * s)
        rule = with_numbers(name, strength=0.0, max_tries=1)
        decision, _, probe, _ = rule.calibrate(jax.random.key(0), probe, rule.init())
        assert (decision.strength, decision.feasible) == (0, holds)
        assert jax.tree.leaves(probe.bill) == [1, 2, 2 * N]


@pytest.mark.parametrize("strength", [0.25, 600.0])
def test_fixed_and_unverified_never_adapt(strength):
    """The one looks once; the other not at all."""
    calls: list = []
    probe = fake(lambda s, z, v: 0.9 / (1 + s * s), calls=calls)
    for rule, looks in (
        (calibrate.Unverified(strength=strength), 0),
        (calibrate.Fixed(strength=strength), 1),
    ):
        decision, evidence, after, _ = rule.calibrate(jax.random.key(0), probe, ())
        jax.effects_barrier()
        assert len(calls) == after.bill.tries == looks
        assert (decision.strength, decision.feasible) == (strength, looks and strength > 1)
    assert evidence.accuracy == pytest.approx(0.9 / (1 + strength**2))


def linear(pace: float, calls: list) -> Any:
    """A probe of 300 images whose copies move along a line, the second three times as fast the
    other way; its tables, and the images of every call."""
    clean, noise = np.random.default_rng(9).normal(size=(2, 300, 4)) + np.arange(4.0)

    def logits(draw: Any, s: Any, v: Any, images: Any, kept: Any) -> jax.Array:
        calls.append(np.asarray(images))
        moved = jnp.where(v == 1, -3, 1) * pace * s * jnp.asarray(noise, jnp.float32)
        return (jnp.asarray(clean, jnp.float32) + moved)[images]

    def asked(*_: Any) -> Any:
        raise AssertionError("never a whole split")

    questions = Questions(
        2, "smooth", jnp.zeros(300, jnp.int32), jax.random.normal, asked, asked, logits,
        lambda images, kept: jnp.asarray(clean, jnp.float32)[images],
    )  # fmt: skip
    return Probe(Bill.empty(), questions), clean, noise


@pytest.mark.parametrize("ratio", [0.05, 2.0])
@pytest.mark.parametrize("strength", [0.02, 1.0])
def test_snr_reaches_the_ratio_on_linear_logits(ratio, strength):
    """RMS of the noise of all copies over the spread of the clean logits about their image's mean,
    on 64 images, any of them; wherever the noise is measured."""
    calls: list = []
    for key, pace in ((0, 0.3), (1, 4.0)):
        probe, clean, noise = linear(pace, calls)
        rule = calibrate.SNR(signal_ratio=ratio, strength=strength)
        decision, _, probe, _ = rule.calibrate(jax.random.key(key), probe, ())
        images = calls[-1]
        assert len(set(images.tolist())) == len(images) == 64
        spread = np.std(clean[images] - clean[images].mean(axis=1, keepdims=True))
        moved = pace * np.sqrt((1 + 9) / 2 * np.mean(noise[images] ** 2))
        assert decision.strength == pytest.approx(ratio * spread / moved, rel=1e-3)
        assert jax.tree.leaves(probe.bill) == [0, 3, 3 * 64]
        assert not decision.feasible
    assert {*calls[0].tolist()} != {*calls[-1].tolist()}
    assert max(calls[0]) > 200


@pytest.mark.parametrize(("pace", "expected"), [(1e-6, 7.0), (0.0, 0.3), (np.nan, 0.3)])
def test_snr_keeps_within_bounds(pace, expected):
    """At most σ_max; without noise or with dead logits σ0."""
    rule = calibrate.SNR(strength=0.3, strength_max=7.0)
    decision, *_ = rule.calibrate(jax.random.key(0), linear(pace, [])[0], ())
    assert decision.strength == pytest.approx(expected)
