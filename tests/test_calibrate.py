"""`calibrate`: one contract over all calibrators, and closed forms of the source's loops.

The toy probes know nothing of models: accuracy is a function of strength and draw, and an image is
right where its fixed threshold lies under that accuracy. `test_calibrators` has the other closed
forms, `test_guarantee` the coverage.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from noisefl import Config, Hyper, calibrate
from noisefl.calibrate import Probe, Reading
from noisefl.config import CHOICES, as_arrays

LOOPS = list(itertools.product(("additive", "geometric"), CHOICES["redraw"]))
# Every calibrator that a Config can name, by (calibrator, redraw). New choices come in by
# themselves; "rescale" is refused where no loop rescales.
CALIBRATORS = {
    names: calibrate.from_config(Config(calibrator=names[0], redraw=names[1]))
    for names in itertools.product(CHOICES["calibrator"], CHOICES["redraw"])
    if names in LOOPS or names[1] == "fresh"
}
SEQUENTIAL, UNSEEN = ("sequential", "predictive"), ("unverified", "snr")
every = pytest.mark.parametrize("names", CALIBRATORS, ids="-".join)
every_loop = pytest.mark.parametrize("names", LOOPS, ids="-".join)
loops_and_fixed = pytest.mark.parametrize("names", [*LOOPS, ("fixed", "fresh")], ids="-".join)

BASE = {"w": jnp.zeros(1)}
IMAGES = 120  # two looks of a sequential test, and a rest
BATCH = 16  # draws × strengths of "parallel"
THRESHOLDS = (np.random.default_rng(0).permutation(IMAGES) + 0.5) / IMAGES
LABELS = jnp.asarray(np.random.default_rng(1).integers(0, 2, IMAGES), jnp.int32)
PROBES = {  # (strength, one N(0, 1) number of the draw) → accuracies of plus and minus
    "falls": lambda s, z: (0.9 - 0.1 * s, 0.95 - 0.1 * s),
    "flat above": lambda s, z: (jnp.float32(0.3), 0.8 + 0 * s),
    "flat at chance": lambda s, z: (jnp.float32(0.1), 0.1 + 0 * s),
    "up and down": lambda s, z: (0.75 + 0.25 * jnp.cos(3 * s), 0.75 + 0.25 * jnp.sin(3 * s + 2)),
    "by the draw": lambda s, z: (0.7 + 0.2 * jnp.tanh(z), 0.8 - 0.01 * s - 0.1 * jnp.tanh(z)),
    "luck": lambda s, z: (jnp.where(z > 0.5, 0.6, 0.7), 0.5 + 0 * s),
    "nan": lambda s, z: (jnp.nan * s, jnp.float32(0.1)),
    "nan at once": lambda s, z: (jnp.float32(0.1), jnp.float32(jnp.nan) + 0 * s),
}
KINDS = {name: index for index, name in enumerate(PROBES)}


class Bill:
    """What the probes of one run with jit off were asked for."""

    def __init__(self):
        self.strengths: list[float] = []  # of whole-split accuracies
        self.draws: list[float] = []
        self.evaluations = self.samples = 0
        self.asked: list = []  # [(strengths, images)], of logits


def make_probe(kind, bill: Bill | None = None) -> Probe:
    """`kind` indexes PROBES and may be traced; `bill` needs jit off."""

    def closed_form(draw, strength):
        pair = jax.lax.switch(kind, list(PROBES.values()), strength, draw["w"][0])
        return tuple(jnp.asarray(a, jnp.float32) for a in pair)

    def accuracy(draw, strength):
        if bill is not None:
            bill.strengths.append(float(strength))
            bill.draws.append(float(draw["w"][0]))
            bill.evaluations, bill.samples = bill.evaluations + 2, bill.samples + 2 * IMAGES
        plus, minus = closed_form(draw, strength)
        return Reading(plus, minus, jnp.int32(2), jnp.int32(2 * IMAGES))

    def logits(draw, strengths, images):
        if bill is not None:  # each call of a vmap by its draw, and none for a shape alone
            note = bill.asked.append
            jax.debug.callback(lambda draw, *asked: note(asked), draw, strengths, images)

        def copy(signed):
            plus, minus = closed_form(draw, jnp.abs(signed))
            share = jnp.where(signed < 0, minus, plus)
            right = jnp.asarray(THRESHOLDS, jnp.float32)[images] < share
            told = jnp.where(right, LABELS[images], 1 - LABELS[images])
            dead = jnp.where(jnp.isnan(share), jnp.nan, 0)
            return jax.nn.one_hot(told, 2) + dead

        return jnp.stack([copy(signed) for signed in strengths])

    return Probe(lambda key: {"w": jax.random.normal(key, (1,))}, accuracy, logits, LABELS)


traces: dict[tuple[str, str], int] = dict.fromkeys(CALIBRATORS, 0)


@functools.cache
def compiled(names):
    def run(key, kind, hyper, carry):
        traces[names] += 1
        return CALIBRATORS[names].calibrate(key, BASE, make_probe(kind), hyper, carry)

    return jax.jit(run)


def hyper(**fields) -> Hyper:
    start = {"strength": 0.5, "strength_step": 0.7, "strength_factor": 1.4, "strength_max": 6.0}
    return as_arrays(Hyper(**{**start, "max_tries": 40, **fields}))


def run(names, kind="falls", seed=0, **fields):
    start = CALIBRATORS[names].init()
    return compiled(names)(jax.random.key(seed), KINDS[kind], hyper(**fields), start)[0]


def same(ours, theirs, rtol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol), ours, theirs)


@every
@pytest.mark.parametrize("kind", PROBES)
@pytest.mark.parametrize(
    "fields", [{}, {"cap_margin": 0.1}, {"max_tries": 3}, {"cap": 0.99}], ids=str
)
def test_contract(names, kind, fields):
    numbers, name, result = hyper(**fields), names[0], run(names, kind, **fields)
    assert (result.strength.dtype, result.feasible.dtype) == (jnp.float32, jnp.bool_)
    for count in (result.tries, result.evaluations, result.samples):
        assert count.dtype == jnp.int32

    # It ends, within its bounds; a whole first batch is tried in any case.
    most = max(int(numbers.max_tries), BATCH if name == "parallel" else 1)
    assert 1 <= result.tries <= most
    low = numbers.strength / 100 if name == "snr" else numbers.strength
    assert low <= result.strength <= numbers.strength_max

    # The pair that ships is the pair that was judged, and `feasible` is honest about it.
    plus, minus = (np.float32(a) for a in (result.plus_accuracy, result.minus_accuracy))
    again = make_probe(KINDS[kind]).accuracy(result.draw, result.strength)
    aim = np.float32(numbers.cap) - np.float32(numbers.cap_margin)
    if name in SEQUENTIAL + UNSEEN:
        assert np.isnan([plus, minus]).all()
        assert not (result.feasible and name in UNSEEN)
        # Twenty points above the cap on every image order there is.
        assert not (result.feasible and kind == "flat above" and numbers.cap < 0.7)
    else:
        same((plus, minus), (again.plus, again.minus))
        assert bool(result.feasible) == bool(plus <= aim and minus <= aim)
        cost = (2 * result.tries, 2 * IMAGES * result.tries)
        assert (result.evaluations, result.samples) == cost
    assert not ("nan" in kind and result.feasible)
    assert result.feasible or kind != "flat at chance" or name in UNSEEN


@every
def test_key_decides_the_draw(names):
    first, again, other = (run(names, seed=seed).draw["w"] for seed in (0, 0, 1))
    assert first == again
    assert first != other


@pytest.mark.parametrize("kind", ["falls", "by the draw", "nan at once"])
@pytest.mark.parametrize("names", [n for n in CALIBRATORS if n[0] != "parallel"], ids="-".join)
def test_jit_is_eager(names, kind):
    """With jit off the loop is Python's, and every probe of it is seen and on the bill.

    Not of "parallel", which asks under vmap; its bill is twice its tries (`test_contract`).
    """
    bill, fields = Bill(), {"max_tries": 6}
    with jax.disable_jit():
        eager, carry = CALIBRATORS[names].calibrate(
            jax.random.key(0),
            BASE,
            make_probe(KINDS[kind], bill),
            hyper(**fields),
            CALIBRATORS[names].init(),
        )
    same(run(names, kind, **fields), eager)
    assert jax.tree.structure(carry) == jax.tree.structure(CALIBRATORS[names].init())
    jax.effects_barrier()
    asked = sum(len(strengths) * len(images) for strengths, images in bill.asked)
    assert eager.samples == bill.samples + asked
    if names[0] in SEQUENTIAL + UNSEEN:
        assert not bill.strengths  # never a whole split
        return
    assert (eager.evaluations, eager.tries) == (bill.evaluations, len(bill.strengths))
    last = bill.strengths.index(float(eager.strength))
    assert bill.draws[last] == float(eager.draw["w"][0])
    assert len(set(bill.draws)) == (len(bill.draws) if names in LOOPS[::2] else 1)
    if names in LOOPS:
        assert bill.strengths == sorted(bill.strengths)
        assert last == bill.strengths.index(bill.strengths[-1])


@every
def test_new_numbers_compile_nothing(names):
    run(names)
    before = traces[names]
    run(names, seed=5, strength=0.01, strength_step=3.0, strength_factor=9.0, strength_max=1.0)
    run(names, cap=0.1, cap_margin=0.05, max_tries=1, error_rate=0.2)
    assert traces[names] == before == 1


@every
def test_lanes_of_a_scan_are_single_runs(names):
    """The carry of one round is the next one's, in each lane its own; and it compiles nothing."""
    kinds, caps = ["falls", "by the draw", "nan", "flat at chance"], [0.7, 0.65, 0.6, 0.5]
    lanes = [hyper(cap=cap, max_tries=20) for cap in caps]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *lanes)
    numbers = jnp.array([KINDS[kind] for kind in kinds])
    keys = jax.vmap(jax.random.key)(jnp.arange(12)).reshape(3, 4)
    calibrator = CALIBRATORS[names]

    def one(key, kind, hyper, carry):
        return calibrator.calibrate(key, BASE, make_probe(kind), hyper, carry)

    def rounds(keys):
        def step(carry, keys):
            result, carry = jax.vmap(one)(keys, numbers, stacked, carry)
            return carry, result

        start = jax.tree.map(lambda leaf: jnp.full(4, leaf), calibrator.init())
        return jax.lax.scan(step, start, keys)[1]

    mapped = jax.jit(rounds)(keys)
    for lane in range(4):
        carry, kind = calibrator.init(), KINDS[kinds[lane]]
        for t in range(3):
            single, carry = compiled(names)(keys[t, lane], kind, lanes[lane], carry)
            picked = jax.tree.map(lambda leaf, at=(t, lane): leaf[at], mapped)
            same(picked, single, rtol=1e-5)
    assert traces[names] == 1


def strength_of_try(names, j: int, numbers: Hyper) -> float:
    if names[0] == "additive":
        raised = numbers.strength + j * numbers.strength_step
    else:
        raised = numbers.strength * numbers.strength_factor**j
    return float(min(raised, numbers.strength_max))


@every_loop
@pytest.mark.parametrize(
    "fields",
    [{}, {"cap": 0.93}, {"cap": 0.55}, {"cap_margin": 0.15}, {"strength": 2.0, "cap": 0.5}],
    ids=str,
)
def test_tries_of_a_falling_accuracy(names, fields):
    """The first j at which the worse copy, 0.95 − σ/10, is at or under the aim."""
    numbers, result = hyper(**fields), run(names, "falls", **fields)
    aim = float(numbers.cap) - float(numbers.cap_margin)
    j = next(j for j in range(99) if 0.95 - 0.1 * strength_of_try(names, j, numbers) <= aim)
    assert result.feasible
    assert result.tries == j + 1
    assert result.strength == pytest.approx(strength_of_try(names, j, numbers), rel=1e-5)
    assert result.minus_accuracy == pytest.approx(0.95 - 0.1 * float(result.strength), rel=1e-5)
    assert result.plus_accuracy == pytest.approx(0.90 - 0.1 * float(result.strength), rel=1e-5)


@every_loop
@pytest.mark.parametrize("kind", ["flat above", "nan", "nan at once"])
def test_an_unreachable_cap_ends_at_the_largest_strength(names, kind):
    """One draw is not tried there twice; fresh draws are, as long as there are tries."""
    numbers, result = hyper(), run(names, kind)
    last = next(j for j in range(99) if strength_of_try(names, j, numbers) >= 6.0)
    assert (result.feasible, result.strength) == (False, 6.0)
    assert result.tries == (last + 1 if names[1] == "rescale" else 40)


@every_loop
def test_luck_at_the_largest_strength(names):
    """Where only the draw decides, fresh ones are drawn until one holds."""
    tries = []
    for seed in range(12):
        result = run(names, "luck", seed, strength=0.5, strength_max=0.5)
        assert bool(result.feasible) == (result.draw["w"][0] > 0.5)
        assert result.strength == 0.5
        tries.append(int(result.tries))
        if names[1] == "fresh":
            assert result.feasible
    assert (max(tries) == 1) == (names[1] == "rescale")


@every_loop
@pytest.mark.parametrize("tries", [1, 2, 3])
def test_max_tries_ends_earlier(names, tries):
    result = run(names, "flat above", max_tries=tries)
    assert (result.feasible, result.tries) == (False, tries)
    expected = strength_of_try(names, tries - 1, hyper())
    assert result.strength == pytest.approx(expected, rel=1e-5)


@loops_and_fixed
def test_a_base_under_the_cap_needs_no_noise(names):
    """σ0 = 0 asks this first."""
    result = run(names, "flat at chance", strength=0.0)
    assert (result.tries, result.evaluations, result.samples) == (1, 2, 2 * IMAGES)
    assert (result.strength, result.feasible) == (0, True)
