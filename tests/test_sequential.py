"""What `sequential` and `predictive` read and ship, call by call.

`test_guarantee` has how often they are wrong; `test_climb` the ladder that both climb.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_calibrate import BASE, hyper
from test_wager import capital, share_of_attempt

from noisefl import calibrate
from noisefl.calibrate import Probe


def images_probe(right_at, labels, calls: list) -> Probe:
    """`right_at(strengths [G, 1], images [n])` → bool [G, n]; calls hold all that was asked for.

    Those of a vmap come one by one, and no order is promised beyond that of one loop.
    """
    labels = jnp.asarray(labels, jnp.int32)

    def logits(draw, strengths, images):
        right = right_at(strengths[:, None], images)
        jax.debug.callback(lambda *call: calls.append(call), strengths, images, draw)
        return jax.nn.one_hot((labels[images] + ~right) % 3, 3)

    def accuracy(draw, strength):
        raise AssertionError("never a whole split")

    return Probe(jax.random.normal, accuracy, logits, labels)


@functools.cache
def compiled(calibrator, right_at, labels: tuple, numbers: tuple):
    calls: list = []

    def one(key, carry):
        probe = images_probe(right_at, labels, calls)
        return calibrator.calibrate(key, BASE, probe, hyper(**dict(numbers)), carry)

    return jax.jit(one), calls


def calibrated(calibrator, right_at, labels, carry, seed: int, **numbers):
    """(result, carry after, [(strengths, images, draw)] of all calls) of one compiled run."""
    run, calls = compiled(calibrator, right_at, tuple(labels), tuple(numbers.items()))
    calls.clear()
    result, after = jax.device_get(run(jax.random.key(seed), carry))
    jax.effects_barrier()
    return result, after, [tuple(np.asarray(part) for part in call) for call in calls]


def all_right(signed, images):
    return signed + images > -99


THREE = np.random.default_rng(4).permutation(np.repeat([0, 1, 2], [100, 120, 180]))
BOUNDS = np.random.default_rng(5).random(400)


def right_in_three(signed, images):
    """Accuracies of the classes of THREE fall with the strength, each from its own height."""
    share = 0.8 - 0.3 * jnp.abs(signed) + jnp.where(signed < 0, 0.05, 0)
    share += jnp.asarray([0.15, -0.35, 0.15])[jnp.asarray(THREE)[images]]
    return jnp.asarray(BOUNDS)[images] < share


IN_THREE = {
    "sequential": calibrate.sequential(chunk=12, limit=300, step=1.5),
    "predictive": calibrate.predictive(scouts=60, gap=0.02 / 0.6, chunk=12, limit=300, step=1.4),
}


@pytest.mark.parametrize("carry", [math.nan, 1e-5, 0.9, 1e4])
@pytest.mark.parametrize("name", ["sequential", "predictive"])
def test_what_ships_as_feasible_was_accepted(name, carry):
    """Whatever the carry, on the images that both shipped copies were shown they won 1/α_j.

    Classes 0, 1 and 2 are 25%, 30% and 45% of the split, and unlike.
    """
    numbers = {"strength": 0.1, "strength_max": 2.5, "max_tries": 9, "error_rate": 0.04}
    case = (IN_THREE[name], right_in_three, THREE.tolist(), np.float32(carry), 1)
    result, after, calls = calibrated(*case, **numbers)
    assert result.samples == sum(len(signed) * len(images) for signed, images, _ in calls)
    # Scouts are asked of the base, at strength 0, and of pairs of copies.
    scouts = [call for call in calls if len(call[0]) > 1 or call[0][0] == 0]
    judged = [call for call in calls if len(call[0]) == 1 and call[0][0] != 0]
    pairs = [call for call in scouts if len(call[0]) == 2]
    assert len(pairs) == len(scouts) - (name == "predictive")
    assert len({float(draw) for *_, draw in pairs}) == (3 if name == "predictive" else 0)
    assert result.feasible
    assert after == result.strength
    copies = list(dict.fromkeys((float(signed[0]), float(draw)) for signed, _, draw in judged))
    assert result.evaluations == len(copies) + sum(len(call[0]) for call in scouts)
    shipped = (float(result.strength), float(result.draw))
    assert copies[-2:] == [shipped, (-shipped[0], shipped[1])]
    # The first draw that is verified is one of those that scouts saw, and later ones are new.
    draws = list(dict.fromkeys(draw for _, draw in copies))
    seen = {float(draw) for *_, draw in scouts}
    assert [draw in seen for draw in draws] == [
        name == "predictive" and j == 0 for j in range(len(draws))
    ]
    for signed, drawn in copies[-2:]:
        looks = [read for strengths, read, draw in judged if (strengths, draw) == (signed, drawn)]
        images = np.concatenate(looks)
        assert len(set(images.tolist())) == len(images)
        assert not {*images.tolist()} & {i for call in scouts for i in call[1].tolist()}
        blocks = images.reshape(-1, 3)
        np.testing.assert_array_equal(THREE[blocks], np.broadcast_to(range(3), blocks.shape))
        right = np.asarray(right_in_three(signed, blocks))
        won = capital(right @ [0.25, 0.3, 0.45], 0.6)
        bound_of_error = -math.log(0.04 * share_of_attempt(int(result.tries)))
        assert won[-4:].max() >= bound_of_error - 1e-3
        assert won[:-4].max(initial=0) <= bound_of_error + 1e-3  # and no more were asked for


CLEAN, NOISE = np.random.default_rng(9).normal(size=(2, 4000, 5))
CLEAN += [0.2, 0.1, 0, -0.1, -0.2]
FIVE = CLEAN.argmax(axis=1)  # the base is right on all images, and surest of the first classes
CLEAN *= np.array([2, 1.5, 1, 0.8, 0.6])[FIVE][:, None]


def pull(draw):
    """How fast a copy moves with the strength; the fastest draw needs the least."""
    return jnp.exp(draw / 3)


@functools.cache
def linear(gap: float, bend: float = 0.0, dead: float = 0.0):
    """`predictive` without a climb, on logits exactly linear in the strength, and its calls.

    Args:
      gap: in accuracy.
      bend: of logits that are not linear: how much both copies move alike.
      dead: added to the logits of copies.
    """
    calls: list = []

    def logits(draw, strengths, images):
        jax.debug.callback(lambda *call: calls.append(call), strengths, images, draw)
        clean, noise = (jnp.asarray(table, jnp.float32)[images] for table in (CLEAN, NOISE))
        moved = (pull(draw) * strengths)[:, None, None]
        return clean + moved * noise + jnp.abs(moved) * (bend * noise[:, ::-1] + dead)

    def accuracy(draw, strength):
        raise AssertionError("never a whole split")

    def one(key, carry):
        probe = Probe(jax.random.normal, accuracy, logits, jnp.asarray(FIVE, jnp.int32))
        numbers = hyper(strength=0.02, strength_max=1e6, max_tries=1)
        calibrator = calibrate.predictive(scouts=400, gap=gap / 0.6)
        return calibrator.calibrate(key, BASE, probe, numbers, carry)

    return jax.jit(one), calls


@pytest.mark.parametrize("seed", [2, 3, 4])
@pytest.mark.parametrize("carry", [math.nan, 0.05, 1.0, 6.0])
@pytest.mark.parametrize("gap", [0.02, 0.1])
def test_predictive_is_exact_on_linear_logits(gap, carry, seed):
    """Before any verification, the better copy is on target on the scouts, one step less not.

    Scouts are as many of each class, which weigh as much as their classes in the split.
    """
    run, calls = linear(gap)
    calls.clear()
    result, _ = jax.device_get(run(jax.random.key(seed), np.float32(carry)))
    jax.effects_barrier()
    start = np.float32(0.02 if math.isnan(carry) else carry)
    ((_, scouts, _),) = (call for call in calls if call[0].tolist() == [0])  # the base
    pairs = [(*signed.tolist(), float(draw)) for signed, _, draw in calls if len(signed) == 2]
    assert {pair[:2] for pair in pairs[:3]} == {(start, -start)}
    draws = {pair[2] for pair in pairs}
    assert len(draws) == 3
    assert float(result.draw) in draws
    assert all(np.array_equal(read, scouts) for signed, read, _ in calls if len(signed) == 2)
    assert len(set(scouts.tolist())) == 400
    assert np.bincount(FIVE[scouts]).tolist() == 5 * [80]
    weights = (np.bincount(FIVE) / 4000)[FIVE[scouts]] / 80

    def better(draw, strength) -> float:
        moved = float(pull(draw) * strength) * NOISE[scouts]
        copies = (CLEAN[scouts] + moved, CLEAN[scouts] - moved)
        return max(weights @ (copy.argmax(axis=1) == FIVE[scouts]) for copy in copies)

    step = 16 ** (1 / 64)  # of the grid, 65 strengths from 1/4 to 4
    one = 1.5 / 400  # float32 may break a near tie of one image the other way
    assert better(result.draw, result.strength) <= 0.6 - gap + one
    assert better(result.draw, result.strength / step) > 0.6 - gap - one
    assert abs(better(result.draw, result.strength) - (0.6 - gap)) < 0.05
    if 0.3 < result.strength / start < 3.0:  # within the first grid, one secant of each is enough
        assert len(pairs) == 3
        # None of the others needs less.
        assert min(better(draw, result.strength / step**2) for draw in draws) > 0.6 - gap - one
    assert 0.3 < result.strength / start < 3.0 or carry != 1.0


def foretold(run, calls, carry: float) -> tuple[list[float], int]:
    """The secants' strengths along the draw that ships and the strength that ships, and images."""
    calls.clear()
    result, _ = jax.device_get(run(jax.random.key(2), np.float32(carry)))
    jax.effects_barrier()
    pairs = [(float(signed[0]), float(draw)) for signed, _, draw in calls if len(signed) == 2]
    assert {strength for strength, _ in pairs[:3]} == {np.float32(carry)}
    assert {draw for _, draw in pairs[3:]} <= {float(result.draw)}
    return [carry, *(strength for strength, _ in pairs[3:]), float(result.strength)], len(pairs)


@pytest.mark.parametrize("carry", [0.2, 0.5, 1.0, 3.0, 9.0])
def test_a_secant_is_trusted_near_itself_alone(carry):
    """Within 1.5 of its strength where logits bend; on straight ones up to the grid's ends."""
    for bend, near in ((0.7, 1.5), (0.0, 3.96)):
        strengths, pairs = foretold(*linear(0.05, bend), carry)
        assert pairs == 3 + len(strengths) - 2 < 7
        steps = [max(a / b, b / a) for a, b in itertools.pairwise(strengths)]
        assert steps[-1] <= near + 1e-3
        assert all(step > near - 1e-3 for step in steps[:-1])
        if bend and carry in (0.2, 9.0):
            assert len(steps) > 1


@pytest.mark.parametrize("dead", [0.0, math.nan])
def test_secants_end_after_four(dead):
    """From a hundred thousand times the strength that is needed, in grids that reach down to a
    quarter; and where copies are dead and so hold at the weakest."""
    strengths, pairs = foretold(*linear(0.05, dead=dead), 1e5)
    assert pairs == 6
    assert strengths == pytest.approx([1e5 / 4**n for n in range(5)], rel=1e-4)


@pytest.mark.parametrize(
    ("name", "labels"),
    [("sequential", [2]), ("predictive", [2]), ("predictive", [1, 1, 0]), ("snr", [2])],
)
def test_a_tiny_split_ends(name, labels):
    """One image is the least that a split can hold."""
    calibrator = calibrate.BY_NAME[name]()
    result, *_ = calibrated(calibrator, all_right, labels, calibrator.init(), 0, max_tries=3)
    assert not result.feasible


CLIMBER, FORETELLER = calibrate.sequential(chunk=60, step=2.0), calibrate.predictive(chunk=30)


@pytest.mark.parametrize(("carry", "start"), [(math.nan, 0.5), (0.6, 0.5), (1.0, 0.7), (99.0, 2.5)])
def test_sequential_climbs_its_ladder_with_fresh_draws(carry, start):
    """All images right: each attempt fails, has its own draw, and those after σ_max stay there."""
    numbers = {"strength": 0.5, "strength_max": 2.5, "max_tries": 7}
    case = (CLIMBER, all_right, [0, 1, 2] * 20, np.float32(carry), 3)
    result, after, calls = calibrated(*case, **numbers)
    expected = [min(start * 2**j, 2.5) for j in range(7)]
    np.testing.assert_allclose([float(s[0]) for s, *_ in calls], expected, rtol=1e-6)
    draws = [float(draw) for *_, draw in calls]
    assert len(set(draws)) == 7
    assert (bool(result.feasible), int(result.tries), float(result.draw)) == (False, 7, draws[-1])
    assert result.strength == pytest.approx(expected[-1])
    np.testing.assert_equal(after, np.float32(carry))


def test_predictive_gives_up_a_draw_at_the_largest_strength():
    """All images right: the strongest is foretold, and there each attempt has a draw of its own.

    Scouts, who are half of a small split, saw the first of them alone.
    """
    numbers = {"strength": 0.5, "strength_max": 2.5, "max_tries": 5}
    case = (FORETELLER, all_right, [0, 1, 2] * 20, np.float32(math.nan), 3)
    result, after, calls = calibrated(*case, **numbers)
    draws = [float(draw) for signed, _, draw in calls if signed.tolist() == [2.5]]
    assert len(set(draws)) == len(draws) == 5
    seen = {float(draw) for signed, _, draw in calls if len(signed) == 2}
    assert len(seen) == 3
    assert {len(images) for _, images, _ in calls} == {30}
    assert {i for _, images, _ in calls for i in images.tolist()} == {*range(60)}
    assert seen & set(draws) == {draws[0]}
    assert (bool(result.feasible), int(result.tries), float(result.draw)) == (False, 5, draws[-1])
    assert result.strength == 2.5
    assert math.isnan(after)
