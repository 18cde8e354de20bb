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
from test_wager import capital, share_of_attempt

from noisefl.calibrate import Bill, Probe, Questions, Sequential
from noisefl.calibrate.blocks import Blocks
from noisefl.calibrate.climb import climb
from noisefl.calibrate.wager import FUTILE

DRAWS, RUNGS, TOP = 5, 11, 1.0  # of a table: draws, and strengths 0.5, 0.55, …, σ_max


class Lane(NamedTuple):
    """One population, one jury, one set of numbers."""

    base: Any  # float32 []: accuracy at strength 0
    accuracy: Any  # float32 [DRAWS, RUNGS, V]
    threshold: Any  # float32 [V, N]; the base has those of copy 0
    dead: Any  # bool [V, N]: a NaN logit
    jury: Any  # Blocks
    bare: Any  # bool []
    start: Any
    step: Any
    aim: Any
    error: Any
    max_tries: Any

    def narrow(self) -> "Lane":
        """NumPy arrays and numbers in 32 bits, as JAX takes them."""
        kinds = {"f": np.float32, "i": np.int32, "b": np.bool_}
        return jax.tree.map(lambda leaf: kinds[np.asarray(leaf).dtype.kind](leaf), self)


def rung(strength):
    return (strength - 0.5) * 20


def table_probe(lane: Lane, shares: bool, calls: list | None) -> Probe:
    """`shares`: what all copies share of an image is its number, and it is all they look at."""
    labels = jnp.arange(lane.threshold.shape[1]) % 3

    def note(*asked: Any) -> None:
        if calls is not None:
            add = calls.append
            jax.debug.callback(lambda *a: add(jax.tree.map(np.asarray, a)), *asked, ordered=True)

    def below(images: Any) -> Any:
        note(images)
        return jnp.stack([images, -images], axis=1).astype(jnp.float32)

    def logits(draw: Any, strength: Any, variant: Any, images: Any, kept: Any) -> Any:
        assert (kept is None) != shares
        note(draw, strength, variant, images)
        images = kept[:, 0].astype(jnp.int32) if shares else images
        of = jnp.where(strength > 0, variant, 0)
        copy = lane.accuracy[draw % DRAWS, jnp.round(rung(strength)).astype(jnp.int32), variant]
        right = lane.threshold[of][images] < jnp.where(strength > 0, copy, lane.base)
        told = jnp.where(right, labels[images], (labels[images] + 1) % 3)
        # One NaN beside a label that still looks right, as well as on it.
        dead = lane.dead[of][images][:, None] & (jnp.arange(3) == 0)
        return jnp.where(dead, jnp.nan, jax.nn.one_hot(told, 3))

    def asked(*_: Any) -> Any:
        raise AssertionError("neither a whole split, nor the base, nor a draw but by `draw_of`")

    questions = Questions(
        lane.accuracy.shape[-1], "linear", labels, asked, asked, asked, logits, asked,
        below if shares else None,
    )  # fmt: skip
    return Probe(Bill.empty(), questions)


@functools.cache
def compiled(chunk: int, redraw: bool = False, shares: bool = False, lanes: bool = False):
    """climb() of one lane or of stacked ones, and where all calls of single ones are noted."""
    calls: list = []

    def one(lane: Lane):
        rule = Sequential(
            cap=lane.aim, error_rate=lane.error, max_tries=lane.max_tries, strength_max=TOP,
            step=lane.step, chunk=chunk,
        )  # fmt: skip
        probe = table_probe(lane, shares, None if lanes else calls)
        decision, evidence, probe = climb(
            rule, probe, lambda number: number, lane.bare, lane.start, lane.jury, redraw
        )
        return decision, evidence.accuracy, probe.bill

    return jax.jit(jax.vmap(one) if lanes else one), calls


class Naive(NamedTuple):
    feasible: bool
    strength: float
    draw: int
    reads: list  # [(attempt, draw, strength, variant, images)] in order, a chunk each
    near: float  # least distance to a bound, in log capital
    why: set  # how copies ended


def naive(lane: Lane, chunk: int, redraw: bool) -> Naive:
    jury, aim, variants = lane.jury, float(lane.aim), lane.accuracy.shape[-1]
    most, strata = jury.images.shape
    step = max(1, min(chunk // strata, most))
    reads, why, near = [], set(), math.inf
    if jury.number < step:
        return Naive(False, float(lane.start), 0, reads, near, {"no jury"})

    def passes(draw: int, strength: float, v: int, attempt: int) -> bool:
        nonlocal near
        shares, of = [], v if strength > 0 else 0
        accuracy = lane.accuracy[draw % DRAWS, round(rung(strength)), v] if strength else lane.base
        for first in range(0, int(jury.number) - step + 1, step):
            blocks = jury.images[first : first + step]
            reads.append((attempt, draw, strength, v, blocks.ravel().tolist()))
            for images in blocks:
                right = (lane.threshold[of, images] < accuracy) & ~lane.dead[of, images]
                shares.append(float(np.sum(jury.weights.astype(float)[right])))
            if lane.dead[of, blocks].any():
                why.add("dead")
                return False
            error = lane.error * share_of_attempt(attempt)
            under = capital(shares, aim)[-step:].max() + math.log(error)
            over = capital(shares, aim, over=True)[-step:].max() + math.log(FUTILE)
            near = min(near, abs(under), abs(over))
            if under >= 0 or over >= 0:
                why.add(f"{'over' if under < 0 else 'passed'} {'first' if v == 0 else 'later'}")
                return under >= 0
        why.add("undecided")
        return False

    draw, strength = 0, 0.0 if lane.bare else float(lane.start)
    attempts = max(int(lane.max_tries), 2 if lane.bare else 1)
    for attempt in range(1, attempts + 1):
        copies = range(variants if strength > 0 else 1)
        if all(passes(draw, strength, v, attempt) for v in copies):
            return Naive(True, strength, draw, reads, near, why)
        if attempt == attempts:
            break
        draw = attempt if redraw or strength >= TOP else draw
        strength = min(strength * float(lane.step), TOP) if strength > 0 else float(lane.start)
    return Naive(False, strength, draw, reads, near, why)


def lanes(count: int, most: int, strata: int, variants: int, seed: int) -> Lane:
    """Random ones, stacked; accuracies near the aim and far from it, on both sides."""
    rng, size = np.random.default_rng(seed), most * strata + 3
    aim = rng.uniform(0.15, 0.9, count)
    far = rng.choice([0.3, 0.1, 0.02, -0.1, -0.3, -0.8], (DRAWS, RUNGS, variants, count))
    kind = rng.integers(0, 4, count)  # copies but the last may be weak, or all, or all for once
    far[:, :, :-1, kind == 1] = -0.3
    far[:, :, :, kind == 2] = rng.choice([-0.3, 0.3], (DRAWS, RUNGS, 1, np.sum(kind == 2)))
    dead = np.where(kind == 3, 0.3 / size, 0)[:, None, None]
    weights = rng.dirichlet([2.0] * strata, count) * (rng.random((count, strata)) < 0.9)
    weights[:, 0] += 1e-3
    weights /= weights.sum(axis=1, keepdims=True)
    number = np.where(rng.random(count) < 0.5, most, rng.integers(0, most + 1, count))
    images = rng.permuted(np.tile(np.arange(size), (count, 1)), axis=1)[:, : most * strata]
    return Lane(
        base=np.clip(aim + rng.choice([-0.4, 0.3], count), 0, 1),
        accuracy=np.moveaxis(np.clip(aim + far, 0, 1), -1, 0),
        threshold=rng.random((count, variants, size)),
        dead=rng.random((count, variants, size)) < dead,
        jury=Blocks(*map(jnp.asarray, (images.reshape(count, most, strata), weights, number))),
        bare=rng.random(count) < 0.3,
        start=rng.choice([0.5, 0.65, 0.95, 1.0], count),
        step=rng.choice([1.3, 2.0], count),
        aim=aim,
        error=rng.choice([0.3, 0.05, 0.01], count),
        max_tries=rng.integers(1, 8, count),
    ).narrow()


def pick(tree, lane: int):
    return jax.tree.map(lambda leaf: np.asarray(leaf)[lane], tree)


def same(found, expected: Naive):
    decision, accuracy, bill = found
    assert bool(decision.feasible) == expected.feasible
    assert decision.strength == pytest.approx(expected.strength, rel=1e-6)
    assert decision.draw == expected.draw
    assert bill.tries == len({attempt for attempt, *_ in expected.reads})
    assert bill.evaluations == len({read[:4] for read in expected.reads})
    assert bill.samples == sum(len(images) for *_, images in expected.reads)
    assert np.isnan(accuracy).all()


@pytest.mark.parametrize(
    ("most", "strata", "chunk", "redraw", "variants", "shares"),
    [
        (60, 5, 25, False, 2, True),
        (100, 1, 7, True, 5, False),
        (40, 10, 3000, False, 1, False),
        (60, 5, 25, True, 2, True),
    ],
)
def test_climb_is_three_nested_loops(most, strata, chunk, redraw, variants, shares):
    """And what all copies share of an image is computed once, and changes nothing."""
    every = lanes(240, most, strata, variants, seed=most)
    found = jax.device_get(compiled(chunk, redraw, shares, lanes=True)[0](every))
    why, later, compared = set(), set(), 0
    for i in range(240):
        expected = naive(pick(every, i), chunk, redraw)
        if expected.near > 1e-3:  # else float32 may fall on the other side
            same(pick(found, i), expected)
            why |= expected.why
            tries = min(len({attempt for attempt, *_ in expected.reads}), 3)
            later |= {(expected.feasible, min(expected.draw, 2), tries, expected.strength > 0)}
            compared += 1
    assert compared > 210
    assert why >= {"passed first", "over first", "dead", "undecided", "no jury"}
    assert variants == 1 or why >= {"passed later", "over later"}
    # Copies ship from first and later attempts, from first and later draws, and bare.
    second = (True, 1, 2, True) if redraw else (True, 0, 3, True)
    assert later >= {(True, 0, 1, True), second, (True, 2, 3, True), (False, 2, 3, True)}
    assert (True, 0, 1, False) in later
    assert not any(strength == 0 and not ships for ships, *_, strength in later)
    # Lanes of a vmap are single runs, and these read the same images in the same order.
    (run, calls), again = compiled(chunk, redraw, shares), 0
    for i in range(16):
        calls.clear()
        single = jax.device_get(run(pick(every, i)))
        jax.effects_barrier()
        jax.tree.map(np.testing.assert_array_equal, single, pick(found, i))
        expected = naive(pick(every, i), chunk, redraw)
        if expected.near <= 1e-3:
            continue
        reads = [(d, pytest.approx(s), v, images) for _, d, s, v, images in expected.reads]
        asked = [call for call in calls if len(call) == 4]
        assert [(d, s, v, images.tolist()) for d, s, v, images in asked] == reads
        computed = [image for call in calls if len(call) == 1 for image in call[0].tolist()]
        read = {image for *_, images in reads for image in images}
        assert sorted(computed) == (sorted(read) if shares else [])
        again += sum(len(images) for *_, images in reads) > len(read)
    assert again > 3


def plain(right, dead: Any = False, number: Any = 100, **fields: Any) -> Lane:
    """A hundred blocks of two images in order, one attempt; right and dead fit bool [2, 200]."""
    images = jnp.arange(200).reshape(100, 2)
    numbers = {"base": 0.5, "bare": False, "start": 0.5, "step": 2.0, "max_tries": 1}
    numbers |= {"aim": 0.6, "error": 0.01, "accuracy": np.full((DRAWS, RUNGS, 2), 0.5)}
    return Lane(
        threshold=np.broadcast_to(np.where(right, 0.0, 1.0), (2, 200)),
        dead=np.broadcast_to(dead, (2, 200)),
        jury=Blocks(images, jnp.full(2, 0.5), number),
        **{**numbers, **fields},
    ).narrow()


def climbed(lane: Lane):
    """(Decision, Bill), by chunks of ten blocks."""
    decision, _, bill = jax.device_get(compiled(20)[0](lane))
    return decision, bill


@pytest.mark.parametrize("copy", [0, 1])
@pytest.mark.parametrize("at", [0, 19, 20, 39])
def test_a_nan_logit_never_holds(copy, at):
    """One NaN among wrong answers that would have proved the pair weak."""
    decision, clean = climbed(plain(False, error=1e-12))
    assert (decision.feasible, clean.samples >= 80) == (True, True)
    dead = np.arange(400).reshape(2, 200) == 200 * copy + at
    decision, bill = climbed(plain(False, dead, error=1e-12))
    assert (decision.feasible, bill.evaluations) == (False, 1 + copy)
    # It is given up at the end of the chunk of the NaN.
    assert bill.samples == copy * clean.samples / 2 + (at // 20 + 1) * 20


def test_undecided_does_not_hold():
    """Exactly at the aim on all images: nothing is shown, and all are read."""
    at_aim = np.tile(np.arange(10) < 6, (2, 20))
    for number, read in ((100, 200), (57, 100)):  # blocks beyond a jury's number are not read
        decision, bill = climbed(plain(at_aim, number=number))
        assert (decision.feasible, bill.samples, bill.evaluations) == (False, read, 1)
    decision, bill = climbed(plain(np.array([[False], [True]]) & at_aim))
    assert (decision.feasible, bill.evaluations) == (False, 2)


@pytest.mark.parametrize("aim", [5e-4, 1e-6, 0.0, -0.1])
def test_an_aim_near_zero_accepts_no_accurate_copy(aim):
    """In float32 cap − cap_margin may be 0 for numbers that a rule's `check` allows."""
    for wrong in (0, 2) if aim > 0 else (0, 2, 4):
        right = np.tile(np.arange(4) >= wrong, 50)
        assert not climbed(plain(right, aim=aim))[0].feasible
    assert climbed(plain(False, aim=0.9995))[0].feasible


@pytest.mark.parametrize("number", [0, 9])
@pytest.mark.parametrize("bare", [False, True])
def test_without_a_chunk_of_blocks_it_ends_at_once(number, bare):
    """All wrong, and as many attempts as one likes; a chunk is ten blocks. A base that nobody
    tested is not handed out."""
    lane = plain(False, number=number, max_tries=99, bare=bare)
    if number == 0:  # a split of one image has none at all
        lane = lane._replace(jury=lane.jury._replace(images=np.zeros((0, 2), int)))
    decision, bill = climbed(lane)
    assert (decision.feasible, decision.strength, decision.draw) == (False, 0.5, 0)
    assert jax.tree.leaves(bill) == [0, 0, 0]
