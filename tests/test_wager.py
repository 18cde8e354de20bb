"""`wager` against plain NumPy in float64, exact expectations, and error rates.

All answers are computed here from the docstring: a gambler against "accuracy ≥ aim" stakes λ, a
fraction of 1 / (1 − aim), and has Π (1 + λ (aim − x)) after blocks x; against "accuracy ≤ aim" it
is 1 / aim and x − aim.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from noisefl.calibrate import wager
from noisefl.calibrate.wager import BOLDNESS, FUTILE, WEIGHTS

UNLIKELY = 1e-6  # chance of a correct library to fail one binomial bound below
AIMS = [5e-4, 0.04, 0.3, 0.6, 0.95, 0.9995]


def share_of_attempt(attempt: int) -> float:
    return 0.75 if attempt == 1 else 0.25 / (attempt * (attempt - 1))


def stakes(shares, aim: float, over: bool = False) -> np.ndarray:
    """log(1 + λ · gain), float64 [..., 4], one for each λ."""
    gain = np.asarray(shares, float) - aim if over else aim - np.asarray(shares, float)
    most = 1 / aim if over else 1 / (1 - aim)
    return np.log1p(np.multiply.outer(gain * most, BOLDNESS))


def pooled(logs: np.ndarray) -> np.ndarray:
    """log of the averaged capital, from the log capital of each λ [..., 4]."""
    top = logs.max(axis=-1)
    return top + np.log(np.exp(logs - top[..., None]) @ np.asarray(WEIGHTS))


def capital(shares, aim: float, over: bool = False) -> np.ndarray:
    """log of the averaged capital after each block, float64 [k]."""
    return pooled(np.cumsum(stakes(shares, aim, over), axis=0))


def unequal(rng, weights: np.ndarray, mean: float) -> np.ndarray:
    """Accuracies of strata, as far apart as a random direction allows, of that weighted mean."""
    way = rng.normal(size=len(weights))
    way -= weights @ way
    room = np.where(way > 0, (1 - mean) / way, -mean / way)
    return np.clip(mean + room.min() * way, 0, 1)


@jax.jit
@jax.vmap
def in_chunks(chunks, aim, error):
    """settle() over chunks [c, k], and the outcome after each: [c]."""

    def step(before, shares):
        return wager.settle(before, shares, aim, error)

    return jax.lax.scan(step, wager.start(), chunks)


@pytest.mark.parametrize(("chunks", "size"), [(1, 40), (8, 5), (40, 1)])
def test_capital_and_outcome_are_those_of_a_loop(chunks, size):
    """A bound crossed at any block counts, even where the capital is lower at the chunk's end."""
    rng, count = np.random.default_rng(size), 400
    aims = rng.uniform(0.03, 0.97, count).astype(np.float32)
    errors = rng.choice([0.3, 0.05, 0.0075, 1e-4], count).astype(np.float32)
    middle = np.clip(aims + rng.normal(0, 0.2, count), 0, 1)[:, None]
    shares = np.clip(rng.normal(middle, 0.2, (count, chunks * size)), 0, 1).astype(np.float32)
    found, seen = in_chunks(shares.reshape(count, chunks, size), aims, errors)
    kinds = set()  # (over, crossed in a chunk, still beyond the bound at its end)
    for i in range(count):
        for over, bound in ((False, errors[i]), (True, FUTILE)):
            logs = np.cumsum(stakes(shares[i], aims[i], over), axis=0)
            ours = (found.over if over else found.under)[i]
            np.testing.assert_allclose(ours, logs[-1], rtol=1e-4, atol=1e-3)
            reached = pooled(logs) + math.log(bound)
            if np.abs(reached).min() < 1e-3:  # float32 may fall on the other side
                continue
            beyond = reached.reshape(chunks, size) >= 0
            expected = np.any(beyond, axis=1)
            np.testing.assert_array_equal((seen.over if over else seen.under)[i], expected)
            kinds |= {(over, expected[c], beyond[c, -1]) for c in range(chunks)}
    inside = {(False, True, False), (True, True, False)} if size > 1 else set()
    assert kinds == {*inside, *itertools.product((False, True), [False], [False])} | {
        (False, True, True),
        (True, True, True),
    }


@pytest.mark.parametrize("aim", AIMS)
def test_the_capital_is_a_supermartingale(aim):
    """Summed over all outcomes of three blocks of strata of unequal weights and accuracies."""
    rng, aim = np.random.default_rng(1), float(np.float32(aim))
    bits = np.array(list(itertools.product((0, 1), repeat=3)))
    plays = np.array(list(itertools.product(range(8), repeat=3)))
    for _ in range(4):
        weights = rng.dirichlet([1.0] * 3)
        shares = (bits.astype(np.float32) @ weights.astype(np.float32))[plays]
        every = np.full(len(plays), aim), np.full(len(plays), 0.05)
        found, _ = in_chunks(shares[:, None], *every)
        assert np.isfinite(np.asarray(found)).all()
        for mean in (aim, aim + 0.2 * (1 - aim), aim + 0.9 * (1 - aim), 1.0, 0.8 * aim):
            p = unequal(rng, weights, mean)
            chance = np.prod(np.where(bits, p, 1 - p), axis=1)[plays].prod(axis=1)
            under, over = (chance @ np.exp(np.asarray(w, float)) for w in found)
            if mean >= aim:
                assert under.max() <= 1 + 1e-3
            if mean <= aim:
                assert over.max() <= 1 + 1e-3
            if mean == aim:  # then a martingale
                np.testing.assert_allclose([under, over], 1, atol=1e-3)


@pytest.mark.parametrize("error", [0.0075, 0.05, 0.3])
@pytest.mark.parametrize(("right", "size"), [(60, 100), (15, 100), (9, 10), (3, 4), (135, 150)])
def test_exact_error_rates_without_replacement(right, size, error):
    """A split whose accuracy is exactly the aim, all of it read: no theorem, but no more errors.

    So it is where strata hold several classes, of which a split has fixed numbers.
    """
    win, lose = stakes(0, right / size), stakes(1, right / size)
    alive, under = np.array([1.0]), 0.0  # alive[r]: not yet under, with r right
    for read in range(1, size + 1):
        seen = np.arange(read)
        one = np.clip((right - seen) / (size - read + 1), 0, 1)
        alive = np.append(alive * (1 - one), 0) + np.append(0, alive * one)
        seen = np.arange(read + 1)
        yes = pooled(np.multiply.outer(read - seen, win) + np.multiply.outer(seen, lose))
        under += alive[yes >= -math.log(error)].sum()
        alive = np.where(yes >= -math.log(error), 0, alive)
    assert 0 <= under <= error


def simulated(weights, accuracies, aim: float, error: float, count: int):
    """(under, over) bool [count, 30] after each four of 120 blocks, by the library."""
    rng = np.random.default_rng(7)
    bits = rng.random((count, 30, 4, len(weights)), np.float32) < accuracies
    shares = (bits @ np.asarray(weights)).astype(np.float32)
    _, seen = in_chunks(shares, np.full(count, aim), np.full(count, error))
    return jax.tree.map(np.asarray, (seen.under, seen.over))


@pytest.mark.parametrize("error", [0.01, 0.2])
@pytest.mark.parametrize("aim", [0.3, 0.6, 0.9])
def test_error_rates_where_classes_differ(aim, error):
    """Ten strata of unequal weights, some nearly always right and others nearly never."""
    rng, count, worst = np.random.default_rng(int(100 * aim)), 4000, 0
    for concentration in (0.5, 20.0):
        weights = rng.dirichlet(10 * [concentration])
        p = unequal(rng, weights, aim)
        assert np.ptp(p) > 0.5 * min(aim, 1 - aim)
        assert weights @ p == pytest.approx(aim)
        under, over = (side.any(axis=1).sum() for side in simulated(weights, p, aim, error, count))
        assert under <= stats.binom.ppf(1 - UNLIKELY, count, error)
        assert over <= stats.binom.ppf(1 - UNLIKELY, count, FUTILE)
        worst = max(worst, under)
    assert worst > count * error / 4


def test_strata_save_images():
    """Five points below the aim, all is shown sooner where classes explain most of the answers."""
    shown = []
    for p in (0.55 + np.tile([0.42, -0.42], 5), np.full(10, 0.55)):
        under, over = simulated(np.full(10, 0.1), p, 0.6, 0.01, 1000)
        assert over.any(axis=1).mean() < 0.01
        shown.append(under[:, :20].any(axis=1).mean())  # of 80 blocks
    assert shown[0] > 0.85
    assert shown[1] < 0.6


@pytest.mark.parametrize("aim", [5e-4, 1e-6, 0.9995])
def test_an_aim_near_zero_or_one_accepts_weak_copies_alone(aim):
    """A rule's `check` allows any cap in (0, 1) and any margin below."""
    for share in (0.5, 0.9, 1.0):
        shares = np.full((1, 100, 4), share, np.float32)
        found, seen = in_chunks(shares, *np.array([[aim], [0.01]]))
        assert seen.under.any() == (share < aim)
        assert seen.over[0, 0] or share < aim or aim > 0.5
        assert not np.isnan(np.asarray(found)).any()


def test_stakes_are_worth_one_and_shares_of_error_sum_to_one():
    """Σ_{j=2}^{J} 1/(j(j − 1)) = 1 − 1/J, so that the shares of J attempts are 1 − 1/(4J)."""
    np.testing.assert_array_equal(np.asarray(wager.start()), np.zeros((2, len(WEIGHTS))))
    assert sum(WEIGHTS) == pytest.approx(1, abs=1e-12)
    assert min(WEIGHTS) > 0
    assert 0 < min(BOLDNESS) <= max(BOLDNESS) < 1
    number = np.arange(1, 5001)
    shares = np.asarray(jax.vmap(wager.share_of_error)(jnp.asarray(number)), np.float64)
    assert np.all(shares > 0)
    np.testing.assert_allclose(np.cumsum(shares), 1 - 0.25 / number, rtol=1e-6)
    np.testing.assert_allclose(shares[:9], [share_of_attempt(j) for j in range(1, 10)], rtol=1e-6)


@pytest.mark.parametrize("aim", [0.3, 0.6, 0.8])
@pytest.mark.parametrize("error", [0.0375, 0.0075])
def test_what_is_provable_is_proved_and_not_much_more_is(aim, error):
    """More than four copies in five; half as far below the aim, three in five at most."""
    rng = np.random.default_rng(0)
    for blocks, strata in ((15, 10), (30, 10), (60, 10), (140, 10), (90, 3)):
        given = jnp.float32(aim), jnp.float32(error), jnp.int32(blocks)
        found = float(wager.provable(*given, strata))
        share = []
        for accuracy in (found, (found + aim) / 2):
            shares = rng.binomial(strata, accuracy, (1000, blocks)) / strata
            logs = pooled(np.cumsum(stakes(shares, aim), axis=1))
            share.append(np.mean((logs >= -math.log(error)).any(axis=1)))
        if found == 0:  # copies that are never right just pass, or do not
            logs = pooled(np.cumsum(stakes(np.zeros(blocks), aim), axis=0))
            assert logs[-1] < -math.log(error) + 1
        else:
            assert share[0] > 0.82
            assert share[1] < 0.6


@pytest.mark.parametrize("aim", [1e-6, 5e-4, 0.9995, float(np.nextafter(np.float32(1), 0))])
@pytest.mark.parametrize("blocks", [0, 1, 150])
def test_what_is_provable_is_a_number_at_every_aim(aim, blocks):
    given = jnp.float32(aim), jnp.float32(1e-30), jnp.int32(blocks)
    assert 0 <= float(wager.provable(*given, 10)) <= np.float32(aim)
