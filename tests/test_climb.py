"""`climb` against attempts → copies → chunks in nested Python loops, written from its docstring.

Tables stand for models: of each draw, strength and copy the probe looks up the accuracy, and an
image is right where its own threshold lies under that.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_calibrate import hyper
from test_wager import capital, share_of_attempt

from noisefl.calibrate import Probe
from noisefl.calibrate.blocks import Blocks
from noisefl.calibrate.climb import climb
from noisefl.calibrate.wager import FUTILE

DRAWS, RUNGS, TOP = 5, 11, 1.0  # of a table: draws, and strengths 0.5, 0.55, …, σ_max


class Lane(NamedTuple):
    """One population, one jury, one set of numbers."""

    accuracy: Any  # float32 [DRAWS, RUNGS, 2]
    threshold: Any  # float32 [2, N]
    dead: Any  # bool [2, N]: a NaN logit
    jury: Any  # Blocks
    start: Any
    factor: Any
    aim: Any
    error: Any
    max_tries: Any

    def narrow(self) -> "Lane":
        """NumPy arrays and numbers in 32 bits, as JAX takes them."""
        kinds = {"f": np.float32, "i": np.int32, "b": np.bool_}
        return jax.tree.map(lambda leaf: kinds[np.asarray(leaf).dtype.kind](leaf), self)


def rung(strength):
    return (abs(strength) - 0.5) * 20


def table_probe(lane: Lane, calls: list | None) -> Probe:
    labels = jnp.arange(lane.threshold.shape[1]) % 3

    def logits(draw, strengths, images):
        (signed,) = strengths
        if calls is not None:
            note = calls.append
            jax.debug.callback(lambda *call: note(call), draw, signed, images, ordered=True)
        minus = (signed < 0).astype(jnp.int32)
        share = lane.accuracy[draw % DRAWS, jnp.round(rung(signed)).astype(jnp.int32), minus]
        right = lane.threshold[minus][images] < share
        told = jnp.where(right, labels[images], (labels[images] + 1) % 3)
        # One NaN beside a label that still looks right, as well as on it.
        dead = lane.dead[minus][images][:, None] & (jnp.arange(3) == 0)
        return jnp.where(dead, jnp.nan, jax.nn.one_hot(told, 3))[None]

    def asked(*_):
        raise AssertionError("neither a whole split nor a draw but by `draw_of`")

    return Probe(asked, asked, logits, labels)


@functools.cache
def compiled(chunk: int, redraw: bool = False, lanes: bool = False):
    """climb() of one lane or of stacked ones, and where all calls of single ones are noted."""
    calls: list = []

    def one(lane: Lane):
        numbers = {"error_rate": lane.error, "max_tries": lane.max_tries, "strength_max": TOP}
        numbers = hyper(cap=lane.aim, cap_margin=0.0, **numbers)
        probe, ladder = table_probe(lane, None if lanes else calls), (lane.factor, chunk, redraw)
        return climb(probe, lambda number: number, lane.start, lane.jury, numbers, *ladder)

    return jax.jit(jax.vmap(one) if lanes else one), calls


class Naive(NamedTuple):
    feasible: bool
    strength: float
    draw: int
    tries: int
    reads: list  # [(attempt, draw, signed strength, images)] in order, a chunk each
    near: float  # least distance to a bound, in log capital
    why: set  # how copies ended


def naive(lane: Lane, chunk: int, redraw: bool) -> Naive:
    jury, aim = lane.jury, float(lane.aim)
    most, strata = jury.images.shape
    step = max(1, min(chunk // strata, most))
    reads, why, near = [], set(), math.inf
    if jury.number < step:
        return Naive(False, float(lane.start), 0, 1, reads, near, {"no jury"})

    def passes(draw: int, signed: float, attempt: int) -> bool:
        nonlocal near
        minus, shares = int(signed < 0), []
        accuracy = lane.accuracy[draw % DRAWS, round(rung(signed)), minus]
        for first in range(0, int(jury.number) - step + 1, step):
            blocks = jury.images[first : first + step]
            reads.append((attempt, draw, signed, blocks.ravel().tolist()))
            for images in blocks:
                right = (lane.threshold[minus, images] < accuracy) & ~lane.dead[minus, images]
                shares.append(float(np.sum(jury.weights.astype(float)[right])))
            if lane.dead[minus, blocks].any():
                why.add("dead")
                return False
            error = lane.error * share_of_attempt(attempt)
            under = capital(shares, aim)[-step:].max() + math.log(error)
            over = capital(shares, aim, over=True)[-step:].max() + math.log(FUTILE)
            near = min(near, abs(under), abs(over))
            if under >= 0 or over >= 0:
                why.add("over" if under < 0 else "minus passed" if minus else "plus passed")
                return under >= 0
        why.add("undecided")
        return False

    draw, strength = 0, float(lane.start)
    for attempt in range(1, int(lane.max_tries) + 1):
        if passes(draw, strength, attempt) and passes(draw, -strength, attempt):
            return Naive(True, strength, draw, attempt, reads, near, why)
        if attempt == lane.max_tries:
            break
        draw = attempt if redraw or strength >= TOP else draw
        strength = min(strength * float(lane.factor), TOP)
    return Naive(False, strength, draw, int(lane.max_tries), reads, near, why)


def lanes(count: int, most: int, strata: int, seed: int) -> Lane:
    """Random ones, stacked; accuracies near the aim and far from it, on both sides."""
    rng, size = np.random.default_rng(seed), most * strata + 3
    aim = rng.uniform(0.15, 0.9, count)
    far = rng.choice([0.3, 0.1, 0.02, -0.1, -0.3, -0.8], (DRAWS, RUNGS, 2, count))
    kind = rng.integers(0, 4, count)  # plus may be weak all over, or both, or both for once
    far[:, :, 0, kind == 1] = -0.3
    far[:, :, :, kind == 2] = rng.choice([-0.3, 0.3], (DRAWS, RUNGS, 1, np.sum(kind == 2)))
    dead = rng.random((count, 2, size)) < np.where(kind == 3, 0.3 / size, 0)[:, None, None]
    weights = rng.dirichlet([2.0] * strata, count) * (rng.random((count, strata)) < 0.9)
    weights[:, 0] += 1e-3
    weights /= weights.sum(axis=1, keepdims=True)
    number = np.where(rng.random(count) < 0.5, most, rng.integers(0, most + 1, count))
    images = rng.permuted(np.tile(np.arange(size), (count, 1)), axis=1)[:, : most * strata]
    images = images.reshape(count, most, strata)
    return Lane(
        accuracy=np.moveaxis(np.clip(aim + far, 0, 1), -1, 0),
        threshold=rng.random((count, 2, size)),
        dead=dead,
        jury=Blocks(*map(jnp.asarray, (images, weights, number))),
        start=rng.choice([0.5, 0.65, 0.95, 1.0], count),
        factor=rng.choice([1.3, 2.0], count),
        aim=aim,
        error=rng.choice([0.3, 0.05, 0.01], count),
        max_tries=rng.integers(1, 8, count),
    ).narrow()


def pick(tree, lane: int):
    return jax.tree.map(lambda leaf: leaf[lane], tree)


def same(found, expected: Naive):
    assert bool(found.feasible) == expected.feasible
    assert found.strength == pytest.approx(expected.strength, rel=1e-6)
    assert (found.draw, found.tries) == (expected.draw, expected.tries)
    assert found.evaluations == len({(attempt, signed) for attempt, _, signed, _ in expected.reads})
    assert found.samples == sum(len(images) for *_, images in expected.reads)
    assert np.isnan([found.plus_accuracy, found.minus_accuracy]).all()


@pytest.mark.parametrize(
    ("most", "strata", "chunk", "redraw"),
    [(60, 5, 25, False), (100, 1, 7, True), (40, 10, 3, False), (60, 5, 25, True)],
)
def test_climb_is_three_nested_loops(most, strata, chunk, redraw):
    every = lanes(300, most, strata, seed=most)
    found = jax.device_get(compiled(chunk, redraw, lanes=True)[0](every))
    why, later, compared = set(), set(), 0
    for i in range(300):
        expected = naive(pick(every, i), chunk, redraw)
        if expected.near > 1e-3:  # else float32 may fall on the other side
            same(pick(found, i), expected)
            why |= expected.why
            later |= {(expected.feasible, min(expected.draw, 2), min(expected.tries, 3))}
            compared += 1
    assert compared > 270
    assert why >= {"plus passed", "minus passed", "over", "dead", "undecided", "no jury"}
    # Pairs ship from first and later attempts, and from first and later draws.
    second = (True, 1, 2) if redraw else (True, 0, 3)
    assert later >= {(True, 0, 1), second, (True, 2, 3), (False, 2, 3)}
    # Lanes of a vmap are single runs, and these read the same images in the same order.
    run, calls = compiled(chunk, redraw)
    for i in range(25):
        calls.clear()
        single = jax.device_get(run(pick(every, i)))
        jax.effects_barrier()
        jax.tree.map(np.testing.assert_array_equal, single, pick(found, i))
        expected = naive(pick(every, i), chunk, redraw)
        if expected.near > 1e-3:
            reads = [(draw, pytest.approx(s), images) for _, draw, s, images in expected.reads]
            assert [(draw, s, images.tolist()) for draw, s, images in calls] == reads


def plain(right, dead: Any = False, number: Any = 100, **fields: Any) -> Lane:
    """A hundred blocks of two images in order, one attempt; right and dead fit bool [2, 200]."""
    images = jnp.arange(200).reshape(100, 2)
    numbers = {"start": 0.5, "factor": 2.0, "aim": 0.6, "error": 0.01, "max_tries": 1}
    numbers["accuracy"] = np.full((DRAWS, RUNGS, 2), 0.5)
    return Lane(
        threshold=np.broadcast_to(np.where(right, 0.0, 1.0), (2, 200)),
        dead=np.broadcast_to(dead, (2, 200)),
        jury=Blocks(images, jnp.full(2, 0.5), number),
        **{**numbers, **fields},
    ).narrow()


def climbed(lane: Lane, chunk: int = 20):
    return jax.device_get(compiled(chunk)[0](lane))


def first(shares, error: float, over: bool = False) -> int:
    """Blocks until the capital reaches 1/error, against an aim of 0.6."""
    return int(np.argmax(capital(shares, 0.6, over) >= -math.log(error))) + 1


@pytest.mark.parametrize("chunk", [2, 20, 1000])
def test_looks_are_at_chunk_ends(chunk):
    """Even where all images are wrong from the first, only whole chunks are read."""
    found, step = climbed(plain(False), chunk), min(chunk // 2, 100)
    assert found.samples == 2 * 2 * step * -(-first(np.zeros(99), 0.0075) // step)


@pytest.mark.parametrize("copy", [0, 1])
@pytest.mark.parametrize("at", [0, 19, 20, 39])
def test_a_nan_logit_never_holds(copy, at):
    """One NaN among wrong answers that would have proved the pair weak."""
    clean = climbed(plain(False, error=1e-12))
    assert (clean.feasible, clean.samples >= 80) == (True, True)
    dead = np.arange(400).reshape(2, 200) == 200 * copy + at
    found = climbed(plain(False, dead, error=1e-12))
    assert (found.feasible, found.evaluations) == (False, 1 + copy)
    # It is given up at the end of the chunk of the NaN.
    assert found.samples == copy * clean.samples / 2 + (at // 20 + 1) * 20


def test_all_nan_never_holds():
    found = climbed(plain(False, True, aim=0.99, error=0.5, max_tries=5))
    assert (found.feasible, found.tries, found.samples) == (False, 5, 100)


def test_undecided_does_not_hold():
    """Exactly at the aim on all images: nothing is shown, and all are read."""
    at_aim = np.tile(np.arange(10) < 6, (2, 20))
    for number, read in ((100, 200), (57, 100)):  # blocks beyond a jury's number are not read
        found = climbed(plain(at_aim, number=number))
        assert (found.feasible, found.samples, found.evaluations) == (False, read, 1)
    found = climbed(plain(np.array([[False], [True]]) & at_aim))
    assert (found.feasible, found.evaluations) == (False, 2)


@pytest.mark.parametrize("aim", [5e-4, 1e-6, 0.0, -0.1])
def test_an_aim_near_zero_accepts_no_accurate_copy(aim):
    """In float32 cap − cap_margin may be 0 for numbers that `check_hyper` allows."""
    for wrong in (0, 2) if aim > 0 else (0, 2, 4):
        right = np.tile(np.arange(4) >= wrong, 50)
        assert not climbed(plain(right, aim=aim)).feasible
    assert climbed(plain(False, aim=0.9995)).feasible


@pytest.mark.parametrize("number", [0, 9])
def test_without_a_chunk_of_blocks_it_ends_at_once(number):
    """All wrong, and as many attempts as one likes; a chunk is ten blocks."""
    lane = plain(False, number=number, max_tries=99)
    if number == 0:  # a split of one image has none at all
        lane = lane._replace(jury=lane.jury._replace(images=np.zeros((0, 2), int)))
    found = climbed(lane)
    assert (found.feasible, found.tries, found.strength, found.draw) == (False, 1, 0.5, 0)
    assert (found.evaluations, found.samples) == (0, 0)


@pytest.mark.parametrize("fails", range(5))
def test_later_attempts_spend_their_shares_of_the_error(fails):
    """All right in the first attempts, then all wrong: at strengths 0.5 and 1 of the first draw,
    at 1, which is σ_max, of others."""
    accuracy = np.full((DRAWS, RUNGS, 2), -1.0)
    accuracy[0, : [0, 1, RUNGS][min(fails, 2)]] = 2
    accuracy[2 : max(fails, 2)] = 2
    found = climbed(plain(True, accuracy=accuracy, max_tries=fails + 1), 2)
    draw = fails if fails > 1 else 0
    assert (found.feasible, found.tries, found.draw) == (True, fails + 1, draw)
    assert found.strength == (1 if fails else 0.5)
    shown = first(np.zeros(99), 0.01 * share_of_attempt(fails + 1))
    assert found.samples == 2 * (fails * first(np.ones(99), FUTILE, over=True) + 2 * shown)
