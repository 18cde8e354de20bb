"""The contract of a calibrator: what it is given, what it answers."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from noisefl.config import Hyper

Params = Any
Draw = Any  # a pytree of unit noise, `noise.Draw`


class Reading(NamedTuple):
    """Accuracies of both copies at one draw and strength, and what it cost to learn them."""

    plus: jax.Array  # float32 []
    minus: jax.Array  # float32 []
    evaluations: jax.Array  # int32 []: models evaluated
    samples: jax.Array  # int32 []: forward passes of single images


class Probe(NamedTuple):
    """All that a calibrator may ask about the base W.

    `draw(key)` draws unit noise. `accuracy(draw, strength)` is the Reading of W ± strength · draw
    on all N images of the judging split, NaN for a copy that has parameters which are not finite;
    what its calls share is computed once. `logits(draw,
    strengths, images)`, with signed strengths [G] and indices int32 [n] into that split, is float32
    [G, n, C] of the copies W + strength · draw, and costs G · n forward passes.

    Where the model is cut below the noise (`split.py`), `below(images)` is what all copies share of
    these images, [n, …], and `above(draw, strengths, images, shared)` their logits from that. It
    saves seconds, not forward passes, which are counted as if nothing were shared.
    """

    draw: Callable[[jax.Array], Draw]
    accuracy: Callable[[Draw, jax.Array], Reading]
    logits: Callable[[Draw, jax.Array, jax.Array], jax.Array]
    labels: jax.Array  # int32 [N]
    below: Callable[[jax.Array], jax.Array] | None = None
    above: Callable[[Draw, jax.Array, jax.Array, jax.Array], jax.Array] | None = None

    def of(self, images: jax.Array) -> Callable[[Draw, jax.Array], jax.Array]:
        """`logits` of these images, int32 [n]: (draw, strengths) → [G, n, C], for many calls."""
        if self.below is None or self.above is None:
            return lambda draw, strengths: self.logits(draw, strengths, images)
        above, shared = self.above, self.below(images)
        return lambda draw, strengths: above(draw, strengths, images, shared)


@struct.dataclass
class Calibration:
    """The noise of a round and what is known of it.

    Counts are part of the result, so that the cost of a calibrator is measured and not guessed.
    """

    draw: Draw  # unit noise that ships
    strength: jax.Array  # float32 []: its strength, in units of Config.noise_scale
    feasible: jax.Array  # bool []: the calibrator vouches for both copies, as it documents
    plus_accuracy: jax.Array  # float32 []: of the shipped pair; NaN if not seen on all N images
    minus_accuracy: jax.Array  # float32 []
    tries: jax.Array  # int32 []: draws or strengths judged
    evaluations: jax.Array  # int32 []
    samples: jax.Array  # int32 []


Carry = Any


def num_classes(probe: Probe) -> int:
    """C, from the shape of the logits."""
    one = jnp.zeros(1)

    def logits(key: jax.Array) -> jax.Array:
        return probe.logits(probe.draw(key), one, one.astype(jnp.int32))

    return jax.eval_shape(logits, jax.eval_shape(lambda: jax.random.key(0))).shape[-1]


class Calibrator(NamedTuple):
    """A pair of pure functions.

    `init() → carry`, and `calibrate(key, base, probe, hyper, carry) → (Calibration, carry)`: called
    once a protected round. It must end on all inputs, a NaN base and an unreachable cap included.
    """

    init: Callable[[], Carry]
    calibrate: Callable[[jax.Array, Params, Probe, Hyper, Carry], tuple[Calibration, Carry]]


def aim(hyper: Hyper) -> jax.Array:
    """float32 []: what the accuracy of a copy is held to, cap − cap_margin."""
    return hyper.cap - hyper.cap_margin


def holds(reading: Reading, hyper: Hyper) -> jax.Array:
    """bool []: neither copy exceeds the aim. A NaN accuracy does not hold."""
    return (reading.plus <= aim(hyper)) & (reading.minus <= aim(hyper))


def warm_start(carry: jax.Array, hyper: Hyper, factor: float) -> jax.Array:
    """`factor` times the strength of the round before, within σ0 … σ_max; σ0 in the first round.

    Args:
      carry: float32 [], the strength that shipped last; NaN before.
    """
    low = jnp.float32(hyper.strength)
    return jnp.where(jnp.isnan(carry), low, jnp.clip(factor * carry, low, hyper.strength_max))


def no_noise(like: Any) -> Calibration:
    """The calibration of a round without noise: nothing tried, nothing spent.

    Args:
      like: a `Draw`, or its shapes.
    """
    none, nan = jnp.int32(0), jnp.float32(jnp.nan)
    zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)
    return Calibration(zero, jnp.float32(0), jnp.bool_(True), nan, nan, none, none, none)
