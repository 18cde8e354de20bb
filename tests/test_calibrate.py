"""`calibrate`: one contract over all calibrators, and closed forms of each.

The toy probes know nothing of models: accuracy is a function of strength and draw.
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

# Every calibrator that a Config can name, by (calibrator, redraw). Add others here.
CALIBRATORS = {
    names: calibrate.from_config(Config(calibrator=names[0], redraw=names[1]))
    for names in itertools.product(CHOICES["calibrator"], CHOICES["redraw"])
    if names != ("fixed", "rescale")  # refused: nothing is redrawn
}
LOOPS = [names for names in CALIBRATORS if names[0] in ("additive", "geometric")]
every = pytest.mark.parametrize("names", CALIBRATORS, ids="-".join)
every_loop = pytest.mark.parametrize("names", LOOPS, ids="-".join)

BASE = {"w": jnp.zeros(1)}
IMAGES = 7
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


def make_probe(kind, seen: list | None = None) -> Probe:
    """`kind` indexes PROBES and may be traced; `seen` collects the strengths asked for."""

    def accuracy(draw, strength):
        if seen is not None:
            seen.append((float(strength), float(draw["w"][0])))
        plus, minus = jax.lax.switch(kind, list(PROBES.values()), strength, draw["w"][0])
        as_float = functools.partial(jnp.asarray, dtype=jnp.float32)
        return Reading(as_float(plus), as_float(minus), jnp.int32(2), jnp.int32(2 * IMAGES))

    return Probe(lambda key: {"w": jax.random.normal(key, (1,))}, accuracy)


traces: dict[tuple[str, str], int] = dict.fromkeys(CALIBRATORS, 0)


@functools.cache
def compiled(names):
    def run(key, kind, hyper):
        traces[names] += 1
        calibrator = CALIBRATORS[names]
        return calibrator.calibrate(key, BASE, make_probe(kind), hyper, calibrator.init())

    return jax.jit(run)


def hyper(**fields) -> Hyper:
    start = {"strength": 0.5, "strength_step": 0.7, "strength_factor": 1.4, "strength_max": 6.0}
    return as_arrays(Hyper(**{**start, "max_tries": 40, **fields}))


def run(names, kind="falls", seed=0, **fields):
    return compiled(names)(jax.random.key(seed), KINDS[kind], hyper(**fields))[0]


def same(ours, theirs, rtol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol), ours, theirs)


@every
@pytest.mark.parametrize("kind", PROBES)
@pytest.mark.parametrize(
    "fields", [{}, {"cap_margin": 0.1}, {"max_tries": 3}, {"cap": 0.99}], ids=str
)
def test_contract(names, kind, fields):
    numbers = hyper(**fields)
    result = run(names, kind, **fields)
    assert (result.strength.dtype, result.feasible.dtype) == (jnp.float32, jnp.bool_)

    # It ends, within its bounds, and counts what it spent.
    assert 1 <= result.tries <= numbers.max_tries
    assert 0 < result.strength <= numbers.strength_max
    assert (result.evaluations, result.samples) == (2 * result.tries, 2 * IMAGES * result.tries)

    # The pair that ships is the pair that was judged, and `feasible` is honest about it.
    plus, minus = (np.float32(a) for a in (result.plus_accuracy, result.minus_accuracy))
    again = make_probe(KINDS[kind]).accuracy(result.draw, result.strength)
    same((plus, minus), (again.plus, again.minus))
    aim = np.float32(numbers.cap) - np.float32(numbers.cap_margin)
    assert bool(result.feasible) == bool(plus <= aim and minus <= aim)
    if "nan" in kind:
        assert not result.feasible


@every
def test_key_decides_the_draw(names):
    first, again, other = (run(names, seed=seed).draw["w"] for seed in (0, 0, 1))
    assert first == again
    assert first != other


@every
def test_jit_is_eager(names):
    """With jit off the loop is Python's, and every probe of it is seen."""
    for kind in ("falls", "by the draw", "nan"):
        seen = []
        with jax.disable_jit():
            eager, carry = CALIBRATORS[names].calibrate(
                jax.random.key(0),
                BASE,
                make_probe(KINDS[kind], seen),
                hyper(),
                CALIBRATORS[names].init(),
            )
        same(run(names, kind), eager)
        assert jax.tree.structure(carry) == jax.tree.structure(CALIBRATORS[names].init())
        assert len(seen) == eager.tries
        assert seen[-1] == (pytest.approx(float(eager.strength)), float(eager.draw["w"][0]))
        if names[0] != "fixed" and eager.tries > 1:
            strengths, draws = zip(*seen, strict=True)
            assert list(strengths) == sorted(strengths)
            assert len(set(draws)) == (len(seen) if names[1] == "fresh" else 1)


@every
def test_new_numbers_compile_nothing(names):
    run(names)
    before = traces[names]
    run(names, seed=5, strength=0.01, strength_step=3.0, strength_factor=9.0, strength_max=1.0)
    run(names, cap=0.1, cap_margin=0.05, max_tries=1)
    assert traces[names] == before == 1


@every
def test_lanes_are_single_runs(names):
    seeds, kinds, caps = [3, 4, 5], ["falls", "by the draw", "nan"], [0.7, 0.65, 0.6]
    lanes = [hyper(cap=cap) for cap in caps]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *lanes)
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    calibrator = CALIBRATORS[names]

    def one(key, kind, hyper):
        return calibrator.calibrate(key, BASE, make_probe(kind), hyper, calibrator.init())[0]

    mapped = jax.jit(jax.vmap(one))(keys, jnp.array([KINDS[kind] for kind in kinds]), stacked)
    for lane in range(3):
        single = run(names, kinds[lane], seeds[lane], cap=caps[lane])
        same(jax.tree.map(lambda leaf, lane=lane: leaf[lane], mapped), single)


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
    assert not result.feasible
    assert result.strength == 6.0
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
    assert not result.feasible
    assert result.tries == tries
    expected = strength_of_try(names, tries - 1, hyper())
    assert result.strength == pytest.approx(expected, rel=1e-5)


@every
def test_a_base_under_the_cap_needs_no_noise(names):
    """σ0 = 0 asks this first."""
    result = run(names, "flat at chance", strength=0.0)
    assert (result.tries, result.evaluations, result.samples) == (1, 2, 2 * IMAGES)
    assert result.strength == 0
    assert result.feasible


@every
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
