"""What each calibrator finds where the accuracy is a known function of the strength.

Expected answers are computed here in plain Python and NumPy, from the documentation alone.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_calibrate import BASE, hyper, loops_and_fixed, run

from noisefl import calibrate
from noisefl.calibrate import Calibrator, Probe, Reading

TOLERANCE = 1.05


def threshold_probe(holds_at, seen: list | None = None) -> Probe:
    """Accuracies 0.5 where `holds_at(strength, z)`, and 0.7 for the minus copy elsewhere."""

    def accuracy(draw, strength):
        if seen is not None:
            note = seen.append
            jax.debug.callback(lambda z, s: note((float(z), float(s))), draw, strength)
        minus = jnp.where(holds_at(strength, draw), 0.5, 0.7).astype(jnp.float32)
        return Reading(jnp.float32(0.5), minus, jnp.int32(2), jnp.int32(200))

    def logits(draw, strengths, images):
        raise AssertionError("judged on whole splits alone")

    return Probe(jax.random.normal, accuracy, logits, jnp.zeros(100, jnp.int32))


@functools.cache
def watched(calibrator: Calibrator, holds_at):
    seen: list = []

    def one(key, hyper, carry):
        probe = threshold_probe(holds_at, seen)
        return calibrator.calibrate(key, BASE, probe, hyper, carry)

    return jax.jit(one), seen


def watch(calibrator, holds_at, carry=math.nan, seed=0, **fields):
    """(result, [(draw, strength)] in order) of one compiled run."""
    compiled, seen = watched(calibrator, holds_at)
    seen.clear()
    numbers = hyper(**{"strength": 0.01, "max_tries": 99, **fields})
    result, after = compiled(jax.random.key(seed), numbers, jnp.float32(carry))
    jax.effects_barrier()
    return jax.device_get(result), float(after), list(seen)


BISECTION, PARALLEL = calibrate.bisection(TOLERANCE), calibrate.parallel(draws=2, strengths=4)


def bisected(good, start: float, floor: float, top: float) -> list[float]:
    """The strengths a bisection tries: a bracket by doubling or halving, then halves on log σ."""
    tried, low, high = [start], None, None
    if good(start):
        high = start
        while low is None and high > floor:
            tried.append(max(high / 2, floor))
            low, high = (low, tried[-1]) if good(tried[-1]) else (tried[-1], high)
    else:
        low = start
        while high is None and low < top:
            tried.append(min(low * 2, top))
            low, high = (low, tried[-1]) if good(tried[-1]) else (tried[-1], high)
    while low is not None and high is not None and high / low > TOLERANCE:
        tried.append(math.sqrt(low * high))
        low, high = (low, tried[-1]) if good(tried[-1]) else (tried[-1], high)
    return tried


def above_one(strength, z):
    return strength >= 1.0


def in_stripes(strength, z):
    return jnp.sin(9 * jnp.log(strength)) > 0.3


@pytest.mark.parametrize("holds_at", [above_one, in_stripes])
@pytest.mark.parametrize("carry", [math.nan, 0.003, 0.4, 1.0, 1.31, 77.0])
@pytest.mark.parametrize("bounds", [(0.01, 6.0), (0.6, 0.9), (1.7, 6.0)], ids=str)
def test_bisection_tries_what_its_docstring_says(holds_at, carry, bounds):
    floor, top = bounds
    fields = {"strength": floor, "strength_max": top}
    result, after, seen = watch(BISECTION, holds_at, carry, **fields)
    start = floor if math.isnan(carry) else min(max(carry, floor), top)
    expected = bisected(lambda s: bool(holds_at(s, 0)), start, floor, top)
    np.testing.assert_allclose([s for _, s in seen], expected, rtol=1e-5)
    assert len({z for z, _ in seen}) == 1
    assert result.tries == len(expected)
    good = [s for s in expected if holds_at(s, 0)]
    assert bool(result.feasible) == bool(good)
    # The weakest that held; else the last, and the carry is left as it was.
    assert result.strength == pytest.approx(min(good, default=expected[-1]), rel=1e-5)
    assert result.minus_accuracy == np.float32(0.5 if good else 0.7)
    np.testing.assert_equal(after, float(result.strength) if good else float(np.float32(carry)))


@pytest.mark.parametrize("tries", [1, 2, 3, 6, 9])
def test_bisection_out_of_tries(tries):
    """The weakest that held so far ships; before one has, the last try, infeasible."""
    result, _, seen = watch(BISECTION, above_one, 0.3, max_tries=tries)
    strengths = bisected(lambda s: s >= 1, 0.3, 0.01, 6.0)[:tries]
    np.testing.assert_allclose([s for _, s in seen], strengths, rtol=1e-5)
    good = [s for s in strengths if s >= 1]
    assert bool(result.feasible) == bool(good) == (tries >= 3)
    assert result.strength == pytest.approx(min(good, default=strengths[-1]), rel=1e-5)


def test_bisection_is_within_tolerance_of_any_threshold():
    """Whatever the carry, a monotone accuracy ends at most 5% above the exact threshold."""
    floor, top = 0.02, 6.0
    thresholds = np.geomspace(0.005, 8.0, 157)
    carries = np.array([np.nan, 0.0, 1e-6, 0.05, 1.7, 1e4, np.inf])
    wanted, carry = (jnp.asarray(x.ravel(), jnp.float32) for x in np.meshgrid(thresholds, carries))
    near = jnp.stack([wanted, wanted * 0.999, wanted * 1.001])  # and the carry that is right
    wanted = jnp.concatenate([wanted, *[wanted[: len(thresholds)]] * 3])
    carry = jnp.concatenate([carry, *near[:, : len(thresholds)]])

    def one(threshold, carry):
        probe = threshold_probe(lambda s, z: s >= threshold)
        numbers = hyper(strength=floor, strength_max=top, max_tries=60)
        return BISECTION.calibrate(jax.random.key(0), BASE, probe, numbers, carry)

    result, after = jax.device_get(jax.jit(jax.vmap(one))(wanted, carry))
    wanted, carry = np.asarray(wanted), np.asarray(carry)
    reachable = wanted <= np.float32(top)
    assert np.array_equal(result.feasible, reachable)
    least = np.maximum(wanted, np.float32(floor))[reachable]
    ratio = result.strength[reachable] / least
    assert ratio.min() >= 1
    assert ratio.max() <= TOLERANCE * (1 + 1e-5)
    assert np.all(result.strength[~reachable] == np.float32(top))
    np.testing.assert_array_equal(after, np.where(reachable, result.strength, carry))
    assert result.tries.max() < 30


def by_the_draw(strength, z):
    return strength >= 1 + z * z


def never(strength, z):
    return strength < 0


@pytest.mark.parametrize("holds_at", [above_one, by_the_draw, in_stripes, never])
@pytest.mark.parametrize("carry", [math.nan, 0.02, 1.5, 77.0])
@pytest.mark.parametrize("most", [47, 48])
def test_parallel_ships_the_weakest_of_a_batch_that_holds(holds_at, carry, most):
    """Two draws by four strengths a batch; a batch without one that holds is followed by more."""
    for seed in range(4):
        fields = {"strength_factor": 1.5, "max_tries": most}
        result, after, seen = watch(PARALLEL, holds_at, carry, seed, **fields)
        start = 0.01 if math.isnan(carry) else min(max(carry, 0.01), 6.0)
        start = max(start / 1.5**2, 0.01)
        batches, good, ladder = 0, [], [start]
        while not good and (batches == 0 or 8 * (batches + 1) <= most):
            ladder = [min(start * 1.5**j, 6.0) for j in range(4)]
            batch, seen = seen[:8], seen[8:]
            draws = sorted({z for z, _ in batch})
            assert len(draws) == 2
            asked = [sorted(s for y, s in batch if y == z) for z in draws]
            np.testing.assert_allclose(asked, [ladder] * 2, rtol=1e-5)
            good = sorted((s, z) for z, s in batch if holds_at(s, z))
            batches, start = batches + 1, min(ladder[-1] * 1.5, 6.0)
        assert not seen
        found = bool(good)
        assert (bool(result.feasible), int(result.tries)) == (found, 8 * batches)
        # Where two draws hold at the same strength either may ship; none at all, the strongest.
        assert result.strength == pytest.approx(good[0][0] if found else ladder[-1], rel=1e-5)
        assert not found or (float(result.strength), float(result.draw)) in good
        assert (result.evaluations, result.samples) == (16 * batches, 1600 * batches)
        np.testing.assert_equal(after, float(result.strength) if found else np.float32(carry))


def linear_probe(size: int, classes: int, direction=1.0, offset=None):
    """Logits exactly linear in the signed strength."""
    rng = np.random.default_rng(9)
    clean = rng.normal(size=(size, classes)) + (0 if offset is None else offset)
    noise = direction * rng.normal(size=(size, classes))
    labels = clean.argmax(axis=1)

    def accuracy(draw, strength):
        raise AssertionError("never a whole split")

    def logits(draw, strengths, images):
        tables = (jnp.asarray(x, jnp.float32)[images] for x in (clean, noise))
        base, along = tables
        return base + strengths[:, None, None] * along

    probe = Probe(jax.random.normal, accuracy, logits, jnp.asarray(labels, jnp.int32))
    return probe, clean, noise, labels


@pytest.mark.parametrize("ratio", [0.05, 0.7, 2.0])
@pytest.mark.parametrize("direction", [0.3, 4.0])
def test_snr_reaches_the_ratio_on_linear_logits(ratio, direction):
    """RMS of the noise on the logits over the spread of the clean ones about their class means."""
    probe, clean, noise, _ = linear_probe(50, 4, direction=direction, offset=np.arange(4.0))
    numbers = hyper(strength=ratio, strength_max=50.0)
    result, _ = calibrate.snr().calibrate(jax.random.key(0), BASE, probe, numbers, ())
    centred = clean - clean.mean(axis=1, keepdims=True)
    reached = float(result.strength) * np.sqrt(np.mean(noise**2)) / np.std(centred)
    assert reached == pytest.approx(ratio, rel=1e-4)
    assert (result.tries, result.evaluations, result.samples) == (1, 3, 150)
    assert not result.feasible


def test_snr_measures_both_copies_on_random_images():
    """The minus copy moves three times as fast; 64 of 300 images are asked for, any of them."""
    table, asked = np.random.default_rng(2).normal(size=(2, 300, 4)), []

    def logits(draw, strengths, images):
        asked.append(np.asarray(images))
        clean, noise = (jnp.asarray(x, jnp.float32)[images] for x in table)
        pace = jnp.where(strengths < 0, 3, 1) * strengths
        return clean + pace[:, None, None] * noise

    def accuracy(draw, strength):
        raise AssertionError("never a whole split")

    probe = Probe(jax.random.normal, accuracy, logits, jnp.zeros(300, jnp.int32))
    numbers = hyper(strength=0.7, strength_max=50.0)
    for seed in (0, 1):
        result, _ = calibrate.snr().calibrate(jax.random.key(seed), BASE, probe, numbers, ())
        images = asked[-1]
        assert len(set(images.tolist())) == len(images) == 64
        clean, noise = table[:, images]
        spread = np.std(clean - clean.mean(axis=1, keepdims=True))
        moved = np.sqrt((1 + 9) / 2 * np.mean(noise**2))
        assert result.strength == pytest.approx(0.7 * spread / moved, rel=1e-4)
    assert max(asked[0]) > 200
    assert set(asked[0].tolist()) != set(asked[1].tolist())


@pytest.mark.parametrize(
    ("direction", "expected"), [(1e6, 0.003), (1e-6, 7.0), (0.0, 0.3), (np.nan, 0.3)]
)
def test_snr_keeps_within_bounds(direction, expected):
    """σ0/100 … σ_max; without noise or with dead logits σ0."""
    probe, *_ = linear_probe(50, 4, direction=direction)
    numbers = hyper(strength=0.3, strength_max=7.0)
    result, _ = calibrate.snr().calibrate(jax.random.key(0), BASE, probe, numbers, ())
    assert result.strength == pytest.approx(expected)


@pytest.mark.parametrize("strength", [0.0, 0.25, 6.0])
def test_unverified_looks_at_nothing(strength):
    def asked(*_):
        raise AssertionError("looked")

    probe = Probe(jax.random.normal, asked, asked, jnp.zeros(9, jnp.int32))
    one = calibrate.unverified()
    result, _ = one.calibrate(jax.random.key(0), BASE, probe, hyper(strength=strength), one.init())
    assert (result.strength, result.tries) == (strength, 1)
    assert (result.evaluations, result.samples, result.feasible) == (0, 0, False)


@loops_and_fixed
def test_exactly_at_the_cap_is_feasible(names):
    """An accuracy of 0.8 holds a cap of 0.8, and not the next float32 below it."""
    start = {"strength": 1e-9, "max_tries": 1, "cap_margin": 0.0}
    high = np.float32(0.8)
    assert run(names, "flat above", cap=high, **start).feasible
    assert not run(names, "flat above", cap=np.nextafter(high, np.float32(0)), **start).feasible


@pytest.mark.parametrize("strength", [0.25, 2.0, 6.0])
@pytest.mark.parametrize("kind", ["falls", "flat above", "nan"])
def test_fixed_never_adapts(strength, kind):
    result = run(("fixed", "fresh"), kind, strength=strength)
    assert (result.tries, result.strength) == (1, strength)


def test_no_noise():
    result = calibrate.no_noise({"w": jax.ShapeDtypeStruct((1,), jnp.float32)})
    assert (result.strength, result.tries, result.evaluations, result.samples) == (0, 0, 0, 0)
    assert result.feasible
    assert np.isnan(result.plus_accuracy)
    assert np.isnan(result.minus_accuracy)
    assert result.draw["w"].tolist() == [0]
    like = run(("additive", "fresh"))  # the two branches of a cond must agree
    assert jax.tree.map(jnp.shape, result) == jax.tree.map(jnp.shape, like)
    assert jax.tree.map(jnp.result_type, result) == jax.tree.map(jnp.result_type, like)
