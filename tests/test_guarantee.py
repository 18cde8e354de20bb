"""The guarantee of `sequential` and `predictive`: how often a pair ships wrongly as feasible.

Populations are infinite, with as many images of each class as the split has: image i has a
threshold u_i ~ U(0, 1), fresh in each repetition, and a copy that is right on a share p_c of class
c is right on it iff u_i < p_c. A round fails if it ships as feasible a pair of which one true
accuracy, the mean p_c over the images, exceeds the aim. The guarantee allows a share δ of failures.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from test_calibrate import BASE, hyper

from noisefl import calibrate
from noisefl.calibrate import Probe, Reading

AIM, REPEATS, SIZE = 0.6, 2000, 400
UNLIKELY = 1e-6  # chance of a calibrator exactly at its error rate to fail one test below
CURVES = {  # log strength → true accuracies of plus and minus
    "a hair above at any strength": lambda x: (AIM + 1e-4 + 0 * x, 0.3 + 0 * x),
    "the other copy a hair above": lambda x: (0.3 + 0 * x, AIM + 1e-4 + 0 * x),
    "two points above": lambda x: (AIM + 0.02 + 0 * x, AIM + 0.02 + 0 * x),
    "crosses": lambda x: (AIM - 0.25 * jnp.tanh(x), AIM - 0.02 - 0.25 * jnp.tanh(x)),
    "only the first is bad": lambda x: (jnp.where(x < -0.6, AIM + 1e-4, 0.5), 0.4 + 0 * x),
}
COUNTS = {  # images of each class
    "classes alike": 10 * [40],
    "classes differ": 10 * [40],
    # Strata of one class and of two: 0, 1, 2 + 3, 4, 5, 6, 7 + 8, 9.
    "strata of unlike classes": [86, 74, 14, 20, 40, 46, 34, 26, 34, 26],
    # Class 3 alone is a stratum too small for half of the blocks.
    "every tenth": [80, 80, 66, 14, 54, 40, 40, 14, 6, 6],
    # All is as alike as in the first, and images right at one strength say nothing of another.
    "every strength its own luck": 10 * [40],
}
CALIBRATORS = {
    "sequential": calibrate.sequential(chunk=40, limit=SIZE, step=1.03),
    # No gap: half of what it foretells is above the aim, and only the verification knows.
    "predictive": calibrate.predictive(
        draws=2, scouts=30, gap=0.0, chunk=40, limit=SIZE, step=1.03
    ),
    "bisection": calibrate.bisection(),
}
CALIBRATORS["sequential, any labels"] = calibrate.sequential(
    chunk=40, limit=SIZE, step=1.03, stratified=False
)
CALIBRATORS["predictive, any labels"] = calibrate.predictive(
    draws=2, scouts=30, gap=0.0, chunk=40, limit=SIZE, step=1.03, stratified=False
)


def spread(classes: str) -> np.ndarray:
    """How far p_c is from the mean p, in units of min(p, 1 − p); weighted, they sum to zero.

    Large classes are better than small ones, and neighbours unlike.
    """
    counts = np.array(COUNTS[classes])
    far = counts / 40 + np.tile([0.7, -0.7], 5)
    far -= counts @ far / SIZE
    alike = classes in ("classes alike", "every strength its own luck")
    return 0 * far if alike else 0.95 * far / np.abs(far).max()


class World(NamedTuple):
    """A population, less its thresholds."""

    curve: Any  # int32 [], index of CURVES
    labels: Any  # int32 [SIZE]; of `simulated`, [REPEATS, SIZE]
    far: Any  # float32 [10], `spread`
    luck: Any  # float32 []: how fast thresholds change with the strength


def population(world: World, key) -> Probe:
    """Logits are smooth in the strength, as those of a network, but for "its own luck"."""
    labels = world.labels
    start, speed = jax.random.uniform(key, (2, SIZE))

    def copies(strength):
        """p_c − u_i of plus and of minus, [SIZE] each."""
        means = jax.lax.switch(world.curve, list(CURVES.values()), jnp.log(strength + 1e-6))
        threshold = (start + world.luck * speed * strength) % 1
        means = [jnp.asarray(p, jnp.float32) for p in means]
        return [(p + world.far * jnp.minimum(p, 1 - p))[labels] - threshold for p in means]

    def accuracy(draw, strength):
        plus, minus = (jnp.mean(copy > 0, dtype=jnp.float32) for copy in copies(strength))
        return Reading(plus, minus, jnp.int32(2), jnp.int32(2 * SIZE))

    def logits(draw, strengths, images):
        def copy(signed):
            plus, minus = copies(jnp.abs(signed))
            margin = jnp.where(signed < 0, minus, plus)[images]
            return jax.nn.one_hot(labels[images], 10) * margin[:, None]

        return jnp.stack([copy(signed) for signed in strengths])

    return Probe(jax.random.normal, accuracy, logits, labels)


@functools.cache
def simulated(name: str):
    def one(key, world, error_rate):
        ours, theirs, before = jax.random.split(key, 3)
        numbers = hyper(
            cap=AIM + 0.05,
            cap_margin=0.05,
            strength=0.5,
            strength_max=4.0,
            max_tries=6,
            error_rate=error_rate,
        )
        # The round before says nothing of these images, and may have ended anywhere.
        carry = jnp.exp(jax.random.uniform(before, minval=-0.7, maxval=0.7))
        result, _ = CALIBRATORS[name].calibrate(
            ours, BASE, population(world, theirs), numbers, carry
        )
        true = jax.lax.switch(world.curve, list(CURVES.values()), jnp.log(result.strength))
        bad = jnp.maximum(*[jnp.asarray(p, jnp.float32) for p in true]) > calibrate.aim(numbers)
        return result.feasible, result.feasible & bad

    def all_of(world, error_rate):
        keys = jax.random.split(jax.random.key(17), REPEATS)
        over = World(curve=None, labels=0, far=None, luck=None)
        shipped, failed = jax.vmap(one, (0, over, None))(keys, world, error_rate)
        return jnp.sum(shipped), jnp.sum(failed)

    return jax.jit(all_of)


def failures(
    name: str, curve: str, classes: str, error_rate: float, fresh: bool = False
) -> tuple[int, int]:
    """Of REPEATS rounds: (shipped as feasible, of which wrongly). `fresh`: with labels drawn anew
    in each, ten classes alike."""
    labels = np.tile(np.repeat(np.arange(10), COUNTS[classes]), (REPEATS, 1))
    if fresh:
        labels = np.random.default_rng(23).integers(0, 10, labels.shape)
    luck = 1000.0 if classes == "every strength its own luck" else 0.0
    far = jnp.asarray(spread(classes), jnp.float32)
    world = World(list(CURVES).index(curve), jnp.asarray(labels, jnp.int32), far, luck)
    shipped, failed = simulated(name)(world, jnp.float32(error_rate))
    return int(shipped), int(failed)


def allowed(error_rate: float) -> int:
    """Binomial(REPEATS, δ) exceeds this with chance at most UNLIKELY: 149 for 5%, 44 for 1%."""
    return int(stats.binom.ppf(1 - UNLIKELY, REPEATS, error_rate))


HARDEST = "a hair above at any strength"
CASES = [
    *((curve, "classes alike", 0.05) for curve in CURVES),
    *((HARDEST, classes, 0.05) for classes in COUNTS),
    *((HARDEST, classes, 0.01) for classes in ("classes differ", "every strength its own luck")),
    *(("only the first is bad", classes, 0.05) for classes in ("classes differ", "every tenth")),
]


@pytest.mark.parametrize(("curve", "classes", "error_rate"), dict.fromkeys(CASES))
@pytest.mark.parametrize("name", ["sequential", "predictive"])
def test_failures_are_as_rare_as_stated(name, curve, classes, error_rate):
    shipped, failed = failures(name, curve, classes, error_rate)
    assert failed <= allowed(error_rate)
    assert shipped > 50 or curve not in ("crosses", "only the first is bad")


@pytest.mark.parametrize("classes", COUNTS)
@pytest.mark.parametrize("curve", ["crosses", HARDEST])
def test_the_simulation_can_fail(curve, classes):
    """`bisection` knows its N images alone, and ships pairs above the aim far more often."""
    _, failed = failures("bisection", curve, classes, 0.05)
    assert failed > 3 * allowed(0.05)


@pytest.mark.parametrize("classes", COUNTS)
@pytest.mark.parametrize("name", ["sequential", "predictive"])
def test_the_simulation_sees_a_larger_error_rate(name, classes):
    """The bound of 5% is close enough to tell a test that spends 50%, which keeps its own."""
    _, failed = failures(name, HARDEST, classes, 0.5)
    assert allowed(0.05) < failed <= allowed(0.5)


@pytest.mark.parametrize("classes", ["classes alike", "classes differ"])
@pytest.mark.parametrize("name", ["sequential", "predictive"])
def test_without_strata_the_labels_may_be_a_sample_too(name, classes):
    _, failed = failures(f"{name}, any labels", HARDEST, classes, 0.05, fresh=True)
    assert failed <= allowed(0.05)
    shipped, failed = failures(f"{name}, any labels", "crosses", classes, 0.05, fresh=True)
    assert failed <= allowed(0.05)
    assert shipped > 50
    _, failed = failures(f"{name}, any labels", HARDEST, classes, 0.5, fresh=True)
    assert allowed(0.05) < failed <= allowed(0.5)
