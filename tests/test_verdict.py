"""`verdict` against an independent NumPy reading of its definition, and its error rates exactly.

Correctness bits stand for images: the probe looks up, per copy, whether an image is right.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from noisefl.calibrate import Probe, Reading, verdict
from noisefl.calibrate.verdict import FUTILE, GAPS, WEIGHTS, _evidence, share_of_error

UNLIKELY = 1e-6  # chance of a correct library to fail one binomial bound below


def likelihood_ratio(right, wrong, aim: float, sign: int = -1) -> np.ndarray:
    """The averaged likelihood ratio of accuracies aim + sign · gap against the aim, in float64."""
    right, wrong = np.asarray(right, float), np.asarray(wrong, float)
    total = np.zeros(np.broadcast(right, wrong).shape)
    for gap, weight in zip(GAPS, WEIGHTS, strict=True):
        other = np.clip(aim + sign * gap, 1e-3, 1 - 1e-3)
        total += weight * (other / aim) ** right * ((1 - other) / (1 - aim)) ** wrong
    return total


def judged(bits: np.ndarray, aim: float, error: float, chunk: int) -> tuple[bool, int, float]:
    """One copy in NumPy: (shown to be under, images read, least relative distance to a bound)."""
    near = math.inf
    for read in range(chunk, len(bits) + 1, chunk):
        right = int(bits[:read].sum())
        under = float(likelihood_ratio(right, read - right, aim)) * error
        over = float(likelihood_ratio(right, read - right, aim, +1)) * FUTILE
        near = min(near, abs(math.log(under)), abs(math.log(over)))
        if under >= 1 or over >= 1:
            return under >= 1, read, near
    return False, len(bits) // chunk * chunk, near


def table_probe(bits: jax.Array, dead: jax.Array | None = None) -> Probe:
    """bits: bool [2, N], whether plus and minus are right; dead: bool [2, N], a NaN logit."""
    labels = jnp.arange(bits.shape[1]) % 3

    def logits(draw, strengths, images):
        copy = (strengths < 0).astype(jnp.int32)
        right = bits[copy][:, images]
        told = jnp.where(right, labels[images], (labels[images] + 1) % 3)
        # One NaN beside a label that still looks right, as well as on it.
        nan = jnp.zeros_like(right) if dead is None else dead[copy][:, images]
        first = jnp.arange(3) == 0
        return jnp.where(nan[..., None] & first, jnp.nan, jax.nn.one_hot(told, 3))

    def accuracy(draw, strength):
        raise AssertionError("a verdict never asks for a whole split")

    def draw(key) -> Reading:
        raise AssertionError("a verdict draws nothing")

    return Probe(draw, accuracy, logits, labels)


@functools.cache
def verdicts(chunk: int):
    def one(bits, order, aim, error, dead):
        probe = table_probe(bits, dead)
        return verdict(probe, None, jnp.float32(0.5), order, aim, error, chunk)

    return jax.jit(jax.vmap(one))


def ask(bits, order, aim, error, chunk, dead=None):
    """Verdicts of bits bool [R, 2, N] read in orders int [R, n]; aims and errors [R] or numbers."""
    count = len(bits)
    full = [jnp.broadcast_to(jnp.asarray(x, jnp.float32), (count,)) for x in (aim, error)]
    dead = np.zeros_like(bits) if dead is None else dead
    out = verdicts(chunk)(jnp.asarray(bits), jnp.asarray(order, jnp.int32), *full, dead)
    return jax.tree.map(np.asarray, out)


def random_bits(rng, shares, size: int) -> np.ndarray:
    """bool [R, 2, size] with accuracies shares [R, 2]."""
    return rng.random((*np.shape(shares), size)) < np.asarray(shares)[..., None]


def orders(rng, count: int, size: int, read: int) -> np.ndarray:
    return np.stack([rng.permutation(size)[:read] for _ in range(count)])


@pytest.mark.parametrize(("size", "read", "chunk"), [(400, 370, 25), (300, 300, 50), (90, 90, 7)])
def test_verdict_is_the_mixture_test(size, read, chunk):
    """Same decision, same images read, on any accuracy; images that fill no chunk are not read."""
    rng, count = np.random.default_rng(size), 400
    aims = rng.uniform(0.1, 0.95, count).astype(np.float32)
    errors = rng.choice([0.2, 0.05, 0.0075, 1e-4], count).astype(np.float32)
    # Half close to the aim, where decisions are late, half anywhere.
    close = aims[:, None] - rng.uniform(-0.1, 0.25, (count, 2))
    shares = np.where(rng.random((count, 1)) < 0.5, close, rng.random((count, 2)))
    bits, order = random_bits(rng, shares, size), orders(rng, count, size, read)
    found = ask(bits, order, aims, errors, chunk)

    outcomes = set()
    for i in range(count):
        aim, error = float(aims[i]), float(errors[i])
        under, samples, near = judged(bits[i, 0][order[i]], aim, error, chunk)
        looked = 1 + under
        if under:  # the second copy is read only then
            under, more, also_near = judged(bits[i, 1][order[i]], aim, error, chunk)
            samples, near = samples + more, min(near, also_near)
        if near < 1e-3:  # float32 may fall on the other side
            continue
        assert (found.holds[i], found.samples[i], found.evaluations[i]) == (under, samples, looked)
        outcomes.add((under, looked, samples < looked * (read // chunk * chunk)))
    # Both answers, by either copy, early and undecided to the end.
    late = {(False, 1, False), (False, 1, True), (False, 2, False), (False, 2, True)}
    assert outcomes >= {*late, (True, 2, True)}


@pytest.mark.parametrize("chunk", [1, 20, 1000])
def test_looks_are_at_chunk_ends(chunk):
    """Even where all images are wrong from the first, only whole chunks are read."""
    bits = np.zeros((1, 2, 200), bool)
    found = ask(bits, np.arange(200)[None], 0.6, 0.01, chunk)
    once = min(chunk, 200)
    needed = next(n for n in range(1, 200) if likelihood_ratio(0, n, 0.6) >= 100)
    assert found.holds[0]
    assert found.samples[0] == 2 * once * -(-needed // once)


@pytest.mark.parametrize("copy", [0, 1])
@pytest.mark.parametrize("at", [0, 19, 20, 39])
def test_a_nan_logit_never_holds(copy, at):
    """One NaN among wrong answers that would have proved the pair weak by the second look."""
    bits, dead = np.zeros((1, 2, 200), bool), np.zeros((1, 2, 200), bool)
    clean = ask(bits, np.arange(200)[None], 0.6, 1e-12, 20)
    assert clean.holds[0]
    assert clean.samples[0] >= 80
    dead[0, copy, at] = True
    found = ask(bits, np.arange(200)[None], 0.6, 1e-12, 20, dead)
    assert not found.holds[0]
    assert found.evaluations[0] == 1 + copy
    # It is given up at the end of the chunk of the NaN.
    assert found.samples[0] == copy * clean.samples[0] / 2 + (at // 20 + 1) * 20


def test_all_nan_never_holds():
    bits = np.zeros((1, 2, 100), bool)
    found = ask(bits, np.arange(100)[None], 0.99, 0.5, 10, np.ones_like(bits))
    assert (found.holds[0], found.samples[0], found.evaluations[0]) == (False, 10, 1)


def test_undecided_does_not_hold():
    """Exactly at the aim on all images: nothing is shown, and plus is read to its end."""
    bits = np.tile(np.arange(10) < 6, (1, 2, 20))
    found = ask(bits, np.arange(200)[None], 0.6, 0.01, 10)
    assert (found.holds[0], found.samples[0], found.evaluations[0]) == (False, 200, 1)
    one_under = np.where(np.array([[[True], [False]]]), False, bits)
    found = ask(one_under, np.arange(200)[None], 0.6, 0.01, 10)
    assert not found.holds[0]
    assert found.evaluations[0] == 2


@pytest.mark.parametrize("aim", [5e-4, 1e-6, 0.0])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_an_aim_near_zero_accepts_no_accurate_copy(aim, share):
    """`check_hyper` allows any cap in (0, 1) and any margin below; in float32 the aim may be 0."""
    bits = np.broadcast_to(np.arange(400) % 10 < 10 * share, (1, 2, 400))
    assert not ask(bits, np.arange(400)[None], aim, 0.01, 20).holds[0]


def test_an_aim_near_one_accepts_weak_copies():
    assert ask(np.zeros((1, 2, 400), bool), np.arange(400)[None], 0.9995, 0.01, 20).holds[0]


def test_shares_of_error_sum_to_one():
    """Σ_{j=2}^{J} 1/(j(j − 1)) = 1 − 1/J, so that the shares of J attempts are 1 − 1/(4J)."""
    shares = np.asarray(jax.vmap(share_of_error)(jnp.arange(1, 5001)), np.float64)
    assert np.all(shares > 0)
    sums = np.cumsum(shares)
    np.testing.assert_allclose(sums, 1 - 0.25 / np.arange(1, 5001), rtol=1e-6)
    assert shares[0] == 0.75


@pytest.mark.parametrize("aim", [5e-4, 0.005, 0.04, 0.3, 0.6, 0.95, 0.9995])
def test_the_evidence_is_a_supermartingale(aim):
    """E[likelihood ratio after n images] ≤ 1 at every accuracy ≥ aim, summed over all outcomes."""
    evidence = jax.vmap(lambda right, wrong: _evidence(right, wrong, jnp.float32(aim), -1))
    for n in (1, 2, 5, 12, 40):
        right = np.arange(n + 1)
        ours = np.exp(np.asarray(evidence(right, n - right), np.float64))
        for share in (aim, aim + 0.25 * (1 - aim), aim + 0.9 * (1 - aim), 1.0):
            expected = float(stats.binom.pmf(right, n, share) @ ours)
            assert expected <= 1 + 1e-4, (n, share)
            if share == aim:  # then a martingale
                assert expected == pytest.approx(1, rel=1e-3)


def chance(share: float, aim: float, error: float, chunk: int, looks: int) -> tuple[float, float]:
    """P(shown under), P(given up) of one copy, by the exact distribution of the running count."""
    alive, under, over = np.array([1.0]), 0.0, 0.0  # alive[r]: undecided with r right
    step = stats.binom.pmf(np.arange(chunk + 1), chunk, share)
    for look in range(1, looks + 1):
        alive = np.convolve(alive, step)
        right = np.arange(len(alive))
        yes = likelihood_ratio(right, look * chunk - right, aim) * error >= 1
        no = ~yes & (likelihood_ratio(right, look * chunk - right, aim, +1) * FUTILE >= 1)
        under, over = under + alive[yes].sum(), over + alive[no].sum()
        alive = np.where(yes | no, 0, alive)
    return under, over


@pytest.mark.parametrize("chunk", [1, 50])
@pytest.mark.parametrize("error", [0.0075, 0.05, 0.3])
@pytest.mark.parametrize("aim", [0.15, 0.6, 0.9])
def test_exact_error_rates(aim, error, chunk):
    """Of the definition, which `test_verdict_is_the_mixture_test` ties to the library."""
    looks = 400 // chunk
    assert chance(aim, aim, error, chunk, looks)[0] <= error
    assert chance(aim + 0.02, aim, error, chunk, looks)[0] <= error
    assert chance(aim, aim, error, chunk, looks)[1] <= FUTILE
    assert chance(aim - 0.02, aim, error, chunk, looks)[1] <= FUTILE
    assert chance(aim, aim, error, chunk, looks)[0] > error / 20  # the bound is not idle


@pytest.mark.parametrize("aim", [0.3, 0.6, 0.85])
def test_agrees_with_all_data_far_from_the_aim(aim):
    """Ten points away, wrong decisions are as rare as stated; samples are a part of the split."""
    rng, count, error, size = np.random.default_rng(3), 600, 0.01, 1500
    for far, other in ((-0.1, -0.1), (0.1, -0.2), (-0.2, 0.1), (0.12, 0.12)):
        bits = random_bits(rng, np.broadcast_to([aim + far, aim + other], (count, 2)), size)
        found = ask(bits, orders(rng, count, size, size), aim, error, 50)
        truth = bool(far < 0 and other < 0)
        assert np.all(np.all(bits.mean(axis=2) <= aim, axis=1) == truth)  # on all data
        wrong = int(np.sum(found.holds != truth))
        rate = 2 * FUTILE if truth else error
        assert wrong <= stats.binom.ppf(1 - UNLIKELY, count, rate)
        assert np.mean(found.samples) < 0.5 * 2 * size
