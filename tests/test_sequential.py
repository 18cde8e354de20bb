"""What `Sequential` and `Predictive` read and ship, call by call.

`test_guarantee` has how often they are wrong; `test_climb` the ladder that both climb.
"""

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_calibrate import fake
from test_wager import capital, share_of_attempt

from noisefl import calibrate
from noisefl.calibrate import Bill, Probe, Questions

SMALL: Any = {"scouts": 60, "chunk": 12, "limit": 300, "strength": 0.1, "strength_max": 2.5}
RULES = {
    "sequential": calibrate.Sequential(**SMALL, step=1.5, max_tries=9, error_rate=0.04),
    "predictive": calibrate.Predictive(**SMALL, step=1.4, max_tries=9, error_rate=0.04, gap=1 / 30),
}
both = pytest.mark.parametrize("name", RULES)

# Classes 0, 1 and 2 are 25 %, 30 % and 45 % of the split, and unlike.
THREE = np.random.default_rng(4).permutation(np.repeat([0, 1, 2], [100, 120, 180]))
BOUNDS = np.random.default_rng(5).random(400) - np.array([0.15, -0.35, 0.15])[THREE]


@functools.cache
def compiled(name: str, variants: int):
    calls: list = []

    def one(key, rule, carry, bounds, height, slope):
        def share(s, draw, v):
            return height - slope * s + jnp.where((v == variants - 1) & (s > 0), 0.05, 0)

        probe = fake(share, THREE, bounds, variants, calls, classes=3)
        decision, _, probe, carry = rule.calibrate(key, probe, carry)
        return decision, probe.bill, carry

    return jax.jit(one), calls


def calibrated(
    name: str, variants: int = 2, carry: float = math.nan, seed: int = 1, bounds: Any = BOUNDS,
    height: float = 0.8, slope: float = 0.3, **numbers: Any,
):  # fmt: skip
    """(Decision, Bill, carry, scouts, [(draw, strength, variant, images)] of scouts, of the jury).

    An image is right where its bound lies under height − slope · strength, 0.05 more in the last.
    """
    run, calls = compiled(name, variants)
    calls.clear()
    arguments = np.float32(carry), np.float32(bounds), np.float32(height), np.float32(slope)
    out = jax.device_get(run(jax.random.key(seed), RULES[name].replace(**numbers), *arguments))
    jax.effects_barrier()
    ((_, scouts),) = (call for call in calls if call[0] == "clean")
    asked = [(float(z), float(s), int(v), i) for kind, *rest in calls if kind == "logits"
             for z, s, v, i in [rest]]  # fmt: skip
    assert {kind for kind, *_ in calls} == {"clean", "logits"}  # never a whole split
    seen = [call for call in asked if np.array_equal(call[3], scouts)]
    judged = [call for call in asked if not np.array_equal(call[3], scouts)]
    assert not {*scouts.tolist()} & {i for *_, images in judged for i in images.tolist()}
    assert bool(seen) == (name == "predictive")
    return *out, scouts, seen, judged


@both
@pytest.mark.parametrize("variants", [2, 3])
@pytest.mark.parametrize("carry", [math.nan, 1e-5, 0.9, 1e4])
def test_what_ships_as_feasible_was_accepted(name, variants, carry):
    """Whatever the carry, on the images that all shipped copies were shown they won 1/α_j."""
    decision, bill, after, scouts, seen, judged = calibrated(name, variants, carry)
    if not decision.feasible:  # from 1e-5 nine steps do not reach what it needs
        assert carry == 1e-5
        np.testing.assert_equal(after, np.float32(carry))
        return
    assert after == decision.strength
    copies = list(dict.fromkeys((draw, strength, v) for draw, strength, v, _ in judged))
    shipped = (float(decision.draw), float(decision.strength))
    assert copies[-variants:] == [(*shipped, v) for v in range(variants)]
    assert len({copy[:2] for copy in copies}) == bill.tries
    # Scouts are as many of each class; each of three draws was seen, and of the first verified.
    assert len({*scouts.tolist()}) == 60
    assert np.bincount(THREE[scouts]).tolist() == [20, 20, 20]
    assert len({draw for draw, *_ in seen}) == (3 if seen else 0)
    first = copies[0][0]
    assert not seen or [draw in {z for z, *_ in seen} for draw, *_ in copies] == [
        draw == first for draw, *_ in copies
    ]
    for v in range(variants):
        images = np.concatenate([read for *copy, read in judged if tuple(copy) == (*shipped, v)])
        assert len(set(images.tolist())) == len(images)
        blocks = images.reshape(-1, 3)
        np.testing.assert_array_equal(THREE[blocks], np.broadcast_to(range(3), blocks.shape))
        share = 0.8 - 0.3 * decision.strength + 0.05 * (v == variants - 1)
        won = capital((BOUNDS[blocks] < share) @ [0.25, 0.3, 0.45], 0.6)
        bound_of_error = -math.log(0.04 * share_of_attempt(int(bill.tries)))
        assert won[-4:].max() >= bound_of_error - 1e-3
        assert won[:-4].max(initial=0) <= bound_of_error + 1e-3  # and no more were asked for


@pytest.mark.parametrize(
    ("name", "carry", "start"),
    [
        *(("sequential", carry, start) for carry, start in ((math.nan, 0.5), (0.6, 0.42))),
        *(("sequential", carry, start) for carry, start in ((0.01, 0.007), (99.0, 2.5))),
        ("predictive", math.nan, 2.5),  # the strongest is foretold
    ],
)
def test_ladders_of_fresh_draws(name, carry, start):
    """All images right: each attempt fails, has its own draw, and those after σ_max stay there."""
    numbers = {"height": 9.0, "slope": 0.0, "strength": 0.5, "step": 2.0, "max_tries": 7}
    decision, bill, after, _, seen, judged = calibrated(name, carry=carry, **numbers)
    draws, strengths = zip(*dict.fromkeys((z, s) for z, s, *_ in judged), strict=True)
    np.testing.assert_allclose(strengths, [min(start * 2**j, 2.5) for j in range(7)], rtol=1e-6)
    assert len({*draws}) == 7
    assert {draw for draw, *_ in seen} & {*draws} == ({draws[0]} if seen else set())
    assert (bool(decision.feasible), bill.tries, decision.draw) == (False, 7, draws[-1])
    assert decision.strength == np.float32(strengths[-1])
    np.testing.assert_equal(after, np.float32(carry))


@both
@pytest.mark.parametrize("carry", [math.nan, 0.4])
def test_a_base_that_only_seems_to_hold(name, carry):
    """All scouts wrong, all others right: strength 0 is tested first, and then come the strengths
    that would have come without it; of the secants, one of each draw."""
    scouts = calibrated(name)[3]
    bounds = np.where(np.isin(np.arange(400), scouts), 99.0, -99.0)
    decision, bill, _, again, seen, judged = calibrated(
        name, carry=carry, bounds=bounds, max_tries=4
    )
    assert {*again.tolist()} == {*scouts.tolist()}  # pyright: ignore
    start = 0.1 if math.isnan(carry) else carry
    step = float(RULES[name].step)
    if name == "sequential":
        second = start if math.isnan(carry) else 0.7 * carry
    else:
        second = start / 4
        assert {(strength, len(images)) for _, strength, _, images in seen} == {
            (np.float32(start), 60)
        }
        assert len(seen) == 3 * 2
    tried = list(dict.fromkeys(strength for _, strength, *_ in judged))
    assert tried == pytest.approx([0, second, second * step, second * step**2], rel=1e-5)
    assert {v for *_, v, _ in judged} == {0}
    assert (decision.feasible, bill.tries) == (False, 4)


CLEAN, NOISE = np.random.default_rng(9).normal(size=(2, 4000, 5))
CLEAN += [0.2, 0.1, 0, -0.1, -0.2]
FIVE = CLEAN.argmax(axis=1)  # the base is right on all images, and surest of the first classes
CLEAN *= np.array([2, 1.5, 1, 0.8, 0.6])[FIVE][:, None]


def pull(draw):
    """How fast a copy moves with the strength; the fastest draw needs the least."""
    return np.exp(draw / 3)


def along(v: int) -> np.ndarray:
    """The direction of copy v: that of a pair, and of a third beside it."""
    return [NOISE, -NOISE, NOISE[:, ::-1]][v]


@functools.cache
def linear(variants: int):
    """`Predictive` without a climb, on logits linear in the strength, and the scouts' calls."""
    calls: list = []

    def one(key, carry, gap, pace, bend, dead):
        def logits(draw, s, v, images, kept):
            note = calls.append
            jax.debug.callback(lambda *c: note(tuple(map(np.asarray, c))), draw, s, v, images)
            tables = jnp.asarray(np.stack([along(i) for i in range(variants)]), jnp.float32)
            clean, noise = jnp.asarray(CLEAN, jnp.float32)[images], tables[v][images]
            moved = pace * jnp.exp(draw / 3) * s
            # Bent: both copies of a pair move alike.
            return clean + moved * noise + moved * (bend * tables[0][images][:, ::-1] + dead)

        def clean(images, kept):
            return jnp.asarray(CLEAN, jnp.float32)[images]

        def asked(*_):
            raise AssertionError("never a whole split")

        labels = jnp.asarray(FIVE, jnp.int32)
        questions = Questions(
            variants, "linear", labels, jax.random.normal, asked, asked, logits, clean
        )
        rule = calibrate.Predictive(scouts=400, limit=1600, strength_max=1e6, gap=gap, max_tries=1)
        decision, _, probe, _ = rule.calibrate(key, Probe(Bill.empty(), questions), carry)
        return decision, probe.bill

    return jax.jit(one), calls


def foretold(variants=2, seed=2, carry=math.nan, gap=0.05, pace=1.0, bend=0.0, dead=0.0):
    """(Decision, [(draw, strength)] of the scouts' secants, scouts' images)."""
    run, calls = linear(variants)
    calls.clear()
    numbers = map(np.float32, (carry, gap / 0.6, pace, bend, dead))
    decision, _ = jax.device_get(run(jax.random.key(seed), *numbers))
    jax.effects_barrier()
    scouts = [call for call in calls if len(call[3]) == 400]  # a look of the jury is at 50
    assert all(np.array_equal(call[3], scouts[0][3]) for call in scouts)
    secants = [(float(draw), float(s)) for draw, s, v, _ in scouts if v == 0]
    assert len(scouts) == variants * len(secants)
    return decision, secants, scouts[0][3]


@pytest.mark.parametrize("variants", [2, 3])
@pytest.mark.parametrize("pace", [1 / 200, 0.05, 1.0, 6.0, 200.0])
@pytest.mark.parametrize("gap", [0.02, 0.1])
def test_predictive_is_exact_on_linear_logits(variants, gap, pace):
    """Before any verification, the best copy is on target on the scouts, one step less not; and
    whatever strength that takes, within 200 times of the first."""
    for seed in (2, 3):
        decision, secants, scouts = foretold(variants, seed, gap=gap, pace=pace)
        draws = {draw for draw, _ in secants}
        assert len(draws) == 3
        assert float(decision.draw) in draws
        assert len(set(scouts.tolist())) == 400
        assert np.bincount(FIVE[scouts]).tolist() == 5 * [80]
        weights = (np.bincount(FIVE) / 4000)[FIVE[scouts]] / 80

        def best(draw, strength, s=scouts, w=weights) -> float:
            moved = [CLEAN[s] + pace * pull(draw) * strength * along(v)[s] for v in range(variants)]
            return max(w @ (copy.argmax(axis=1) == FIVE[s]) for copy in moved)

        step, one = 16 ** (1 / 64), 1.5 / 400  # float32 may break a near tie otherwise
        assert best(decision.draw, decision.strength) <= 0.6 - gap + one
        assert best(decision.draw, decision.strength / step) > 0.6 - gap - one
        if 0.3 < decision.strength < 3.0:  # within the first grid, from which the draw is chosen
            others = min(best(draw, decision.strength / step**2) for draw in draws)
            assert others > 0.6 - gap - one
        assert len(secants) <= 3 + 4


@pytest.mark.parametrize("carry", [0.2, 1.0, 9.0])
def test_a_secant_is_trusted_near_itself_alone(carry):
    """Within 1.5 of its strength where logits bend, or copies are no pair; on straight ones up to
    the grid's ends."""
    for variants, bend, near in ((2, 0.7, 1.5), (2, 0.0, 3.96), (3, 0.0, 1.5)):
        decision, secants, _ = foretold(variants, carry=carry, bend=bend)
        assert {s for _, s in secants[:3]} == {np.float32(carry)}
        assert {draw for draw, _ in secants[3:]} <= {float(decision.draw)}
        strengths = [carry, *(s for _, s in secants[3:]), float(decision.strength)]
        steps = [max(a / b, b / a) for a, b in itertools.pairwise(strengths)]
        assert steps[-1] <= near + 1e-3
        assert all(step > near - 1e-3 for step in steps[:-1])
        assert len(steps) > 1 or near > 2 or carry == 1.0


@pytest.mark.parametrize("dead", [0.0, math.nan])
def test_secants_end_after_five(dead):
    """From a hundred thousand times the strength that is needed, in grids that reach down to a
    quarter; and where copies are dead and so hold at the weakest."""
    decision, secants, _ = foretold(carry=1e5, dead=dead)
    strengths = [1e5, *(s for _, s in secants[3:]), float(decision.strength)]
    assert strengths == pytest.approx([1e5 / 4**n for n in range(6)], rel=1e-4)


def test_few_images_leave_a_gap_that_they_can_prove():
    """Of 300, most first tries hold; at a gap of a twelfth one in four does."""
    labels = jnp.asarray(FIVE[:300], jnp.int32)
    base, tables = jnp.asarray(CLEAN), jnp.asarray(np.stack([along(0), along(1)]))

    def logits(draw, s, v, images, kept):
        return base[images] + jnp.exp(draw / 3) * s * tables[v][images]

    def clean(images, kept):
        return base[images]

    def asked(*_):
        raise AssertionError("never a whole split")

    def one(key):
        questions = Questions(2, "linear", labels, jax.random.normal, asked, asked, logits, clean)
        rule = calibrate.Predictive(error_rate=0.05, max_tries=1)
        probe = Probe(Bill.empty(), questions)
        decision, *_ = rule.calibrate(key, probe, jnp.float32(math.nan))
        return decision.feasible

    feasible = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), 200))
    assert np.mean(feasible) > 0.8


@pytest.mark.parametrize(("size", "scouts"), [(40, 10), (100, 25), (480, 120), (2000, 120)])
def test_scouts_are_a_quarter_of_a_small_split_at_most(size, scouts):
    labels = jnp.asarray(np.arange(size) % 5, jnp.int32)

    def asked(*_):
        raise AssertionError("nobody looks yet")

    def clean(images, kept):  # of which the number of classes is read
        return jnp.zeros((*images.shape, 5))

    questions = Questions(2, "linear", labels, asked, asked, asked, asked, clean)
    first, jury = calibrate.Predictive().seat(jax.random.key(1), Probe(Bill.empty(), questions))
    assert first.images.size == scouts
    assert jury.images.size == min(size, 120 + 1500) - scouts
    assert not set(first.images.reshape(-1).tolist()) & set(jury.images.reshape(-1).tolist())
