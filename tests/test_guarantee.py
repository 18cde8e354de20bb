"""The guarantee of `sequential` and `predictive`: how often a pair ships wrongly as feasible.

Populations are infinite: image i has a threshold u_i ~ U(0, 1), fresh in each repetition, and a
copy of true accuracy p is right on it iff u_i < p. A round fails if it ships as feasible a pair of
which one true accuracy exceeds the aim. The guarantee allows a share δ of failures, for each base.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from test_calibrate import BASE, hyper
from test_verdict import likelihood_ratio

from noisefl import calibrate
from noisefl.calibrate import Probe, Reading

AIM, REPEATS, SIZE = 0.6, 2000, 600
UNLIKELY = 1e-6  # chance of a calibrator exactly at its error rate to fail one test below
CURVES = {  # log strength → true accuracies of plus and minus
    "a hair above at any strength": lambda x: (AIM + 1e-4 + 0 * x, 0.3 + 0 * x),
    "the other copy a hair above": lambda x: (0.3 + 0 * x, AIM + 1e-4 + 0 * x),
    "two points above": lambda x: (AIM + 0.02 + 0 * x, AIM + 0.02 + 0 * x),
    "crosses": lambda x: (AIM - 0.25 * jnp.tanh(x), AIM - 0.02 - 0.25 * jnp.tanh(x)),
    "only the first is bad": lambda x: (jnp.where(x < -0.6, AIM + 1e-4, 0.5), 0.4 + 0 * x),
}
CALIBRATORS = {
    "sequential": calibrate.sequential(chunk=30, limit=SIZE),
    # No gap: half of what it foretells is above the aim, and only the verification knows.
    "predictive": calibrate.predictive(scouts=100, gap=0.0, chunk=25, limit=SIZE, step=1.03),
    "bisection": calibrate.bisection(),
}


def population(curve, thresholds) -> Probe:
    """`curve` indexes CURVES. Logits are smooth in the strength, as those of a network."""

    def share(strength):
        shares = jax.lax.switch(curve, list(CURVES.values()), jnp.log(jnp.abs(strength) + 1e-6))
        return [jnp.asarray(p, jnp.float32) for p in shares]

    def accuracy(draw, strength):
        plus, minus = (jnp.mean(thresholds < p, dtype=jnp.float32) for p in share(strength))
        return Reading(plus, minus, jnp.int32(2), jnp.int32(2 * SIZE))

    def logits(draw, strengths, images):
        def copy(signed):
            plus, minus = share(signed)
            margin = jnp.where(signed < 0, minus, plus) - thresholds[images]
            return jnp.stack([0 * margin, margin], axis=1)

        return jnp.stack([copy(signed) for signed in strengths])

    return Probe(jax.random.normal, accuracy, logits, jnp.ones(SIZE, jnp.int32))


@functools.cache
def simulated(name: str):
    def one(key, curve, error_rate):
        ours, theirs, before = jax.random.split(key, 3)
        probe = population(curve, jax.random.uniform(theirs, (SIZE,)))
        numbers = hyper(
            cap=AIM + 0.05,
            cap_margin=0.05,
            strength=0.5,
            strength_factor=1.03,
            strength_max=4.0,
            max_tries=12,
            error_rate=error_rate,
        )
        # The round before says nothing of these images, and may have ended anywhere.
        carry = jnp.exp(jax.random.uniform(before, minval=-0.7, maxval=0.7))
        result, _ = CALIBRATORS[name].calibrate(ours, BASE, probe, numbers, carry)
        true = jax.lax.switch(curve, list(CURVES.values()), jnp.log(result.strength))
        bad = jnp.maximum(*[jnp.asarray(p, jnp.float32) for p in true]) > calibrate.aim(numbers)
        return result.feasible, result.feasible & bad

    def all_of(curve, error_rate):
        keys = jax.random.split(jax.random.key(17), REPEATS)
        shipped, failed = jax.vmap(one, (0, None, None))(keys, curve, error_rate)
        return jnp.sum(shipped), jnp.sum(failed)

    return jax.jit(all_of)


def failures(name: str, curve: str, error_rate: float) -> tuple[int, int]:
    """Of REPEATS rounds: (shipped as feasible, of which wrongly)."""
    shipped, failed = simulated(name)(list(CURVES).index(curve), jnp.float32(error_rate))
    return int(shipped), int(failed)


def allowed(error_rate: float) -> int:
    """Binomial(REPEATS, δ) exceeds this with chance at most UNLIKELY: 149 for 5%, 44 for 1%."""
    return int(stats.binom.ppf(1 - UNLIKELY, REPEATS, error_rate))


@pytest.mark.parametrize("error_rate", [0.05, 0.01])
@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("name", ["sequential", "predictive"])
def test_failures_are_as_rare_as_stated(name, curve, error_rate):
    _, failed = failures(name, curve, error_rate)
    assert failed <= allowed(error_rate)


@pytest.mark.parametrize("curve", ["crosses", "a hair above at any strength"])
def test_the_simulation_can_fail(curve):
    """`bisection` knows its N images alone, and ships pairs above the aim far more often."""
    _, failed = failures("bisection", curve, 0.05)
    assert failed > 3 * allowed(0.05)


def test_the_simulation_sees_a_larger_error_rate():
    """The bound of 5% is close enough to tell a test that spends 50%."""
    _, failed = failures("sequential", "a hair above at any strength", 0.5)
    assert failed > allowed(0.05)


def images_probe(right_at, size: int, calls: list | None = None, classes: int = 3) -> Probe:
    """`right_at(strengths [G], images [n])` → bool [G, n]; `calls` needs jit off."""

    def accuracy(draw, strength):
        raise AssertionError("never a whole split")

    def logits(draw, strengths, images):
        right = right_at(strengths[:, None], images[None])
        if calls is not None:
            arrays = (strengths, images, right, draw)
            calls.append(tuple(np.asarray(x) for x in arrays))
        return jax.nn.one_hot(jnp.where(right, 1, 2), classes)

    return Probe(jax.random.normal, accuracy, logits, jnp.ones(size, jnp.int32))


@pytest.mark.parametrize("carry", [math.nan, 1e-5, 0.9, 1e4])
@pytest.mark.parametrize("name", ["sequential", "predictive"])
def test_what_ships_as_feasible_was_accepted(name, carry):
    """Whatever the carry, both shipped copies were read to a likelihood ratio of 1/α_j."""
    size, bound = 400, jnp.asarray(np.random.default_rng(4).permutation(400) / 400, jnp.float32)

    def right_at(signed, images):
        return bound[images] < 0.8 - 0.3 * jnp.abs(signed) + jnp.where(signed < 0, 0.05, 0)

    calls: list = []
    calibrator = {
        "sequential": calibrate.sequential(chunk=20, limit=300),
        "predictive": calibrate.predictive(scouts=60, gap=0.02, chunk=20, limit=300, step=1.4),
    }[name]
    numbers = hyper(strength=0.1, strength_max=2.5, max_tries=9, error_rate=0.04)
    with jax.disable_jit():
        result, after = calibrator.calibrate(
            jax.random.key(1),
            BASE,
            images_probe(right_at, size, calls),
            numbers,
            jnp.float32(carry),
        )
    assert result.samples == sum(right.size for _, _, right, _ in calls)
    # Scouts are asked first: of the base, at strength 0, and of pairs of copies.
    secants = [call for call in calls if len(call[0]) > 1 or call[0][0] == 0]
    assert bool(secants) == (name == "predictive")
    assert result.feasible
    assert after == result.strength
    tries = int(result.tries)
    error = 0.04 * (0.75 if tries == 1 else 0.25 / (tries * (tries - 1)))
    copies = dict.fromkeys(float(s[0]) for s, *_ in calls[len(secants) :])
    assert result.evaluations == len(copies) + sum(len(call[0]) for call in secants)
    assert list(copies)[-2:] == [float(result.strength), -float(result.strength)]
    for signed in list(copies)[-2:]:
        mine = [call for call in calls[len(secants) :] if call[0][0] == signed]
        images = np.concatenate([images for _, images, *_ in mine])
        right = sum(int(right.sum()) for _, _, right, _ in mine)
        assert len(set(images.tolist())) == len(images)
        assert np.ptp(images) > len(images)  # in random order, not the first ones of the split
        assert not {*images.tolist()} & {i for call in secants for i in call[1].tolist()}
        assert likelihood_ratio(right, len(images) - right, 0.6) >= 0.999 / error


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("name", ["sequential", "predictive", "snr"])
def test_a_tiny_split_ends(name, size):
    """One image is the least that a split can hold. With jit off an endless loop can be cut."""
    calls: list = []

    def right_at(signed, images):
        assert len(calls) < 100, "does not end"
        return jnp.ones(jnp.broadcast_shapes(signed.shape, images.shape), bool)

    with jax.disable_jit():
        calibrator = calibrate.BY_NAME[name]()
        result, _ = calibrator.calibrate(
            jax.random.key(0),
            BASE,
            images_probe(right_at, size, calls),
            hyper(max_tries=3),
            calibrator.init(),
        )
    assert not result.feasible


@pytest.mark.parametrize(("carry", "start"), [(math.nan, 0.5), (0.6, 0.5), (1.0, 0.7), (99.0, 2.5)])
def test_sequential_climbs_its_ladder_again_with_fresh_draws(carry, start):
    """All images right: each attempt fails, up to σ_max and, with another draw, from the start."""
    calls: list = []
    probe = images_probe(lambda signed, images: signed + images > -9, 60, calls)
    numbers = hyper(strength=0.5, strength_factor=2.0, strength_max=2.5, max_tries=7)
    with jax.disable_jit():
        calibrator = calibrate.sequential(chunk=60)
        result, after = calibrator.calibrate(
            jax.random.key(3), BASE, probe, numbers, jnp.float32(carry)
        )
    lap = [s for s in (start, 2 * start, 4 * start) if s < 2.5] + [2.5]
    expected = (7 * lap)[:7]
    np.testing.assert_allclose([float(s[0]) for s, *_ in calls], expected, rtol=1e-6)
    draws = [float(draw) for *_, draw in calls]
    assert draws == [draws[j // len(lap) * len(lap)] for j in range(7)]
    assert len(set(draws)) == math.ceil(7 / len(lap))
    assert (bool(result.feasible), int(result.tries), float(result.draw)) == (False, 7, draws[-1])
    assert result.strength == pytest.approx(expected[-1])
    np.testing.assert_equal(float(after), float(np.float32(carry)))
