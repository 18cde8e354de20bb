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

    `draw(key)` draws unit noise; `accuracy(draw, strength)` is the Reading of W ± strength · draw.
    """

    draw: Callable[[jax.Array], Draw]
    accuracy: Callable[[Draw, jax.Array], Reading]


@struct.dataclass
class Calibration:
    """The noise of a round and what is known of it.

    Counts are part of the result, so that the cost of a calibrator is measured and not guessed.
    """

    draw: Draw  # unit noise that ships
    strength: jax.Array  # float32 []: its strength, in units of Config.noise_scale
    feasible: jax.Array  # bool []: both copies were seen at or under cap − cap_margin
    plus_accuracy: jax.Array  # float32 []: of the shipped pair; NaN if it was not evaluated
    minus_accuracy: jax.Array  # float32 []
    tries: jax.Array  # int32 []: draws or strengths judged
    evaluations: jax.Array  # int32 []
    samples: jax.Array  # int32 []


Carry = Any


class Calibrator(NamedTuple):
    """A pair of pure functions.

    `init() → carry`, and `calibrate(key, base, probe, hyper, carry) → (Calibration, carry)`: called
    once a protected round. It must end on all inputs, a NaN base and an unreachable cap included.
    """

    init: Callable[[], Carry]
    calibrate: Callable[[jax.Array, Params, Probe, Hyper, Carry], tuple[Calibration, Carry]]


def holds(reading: Reading, hyper: Hyper) -> jax.Array:
    """bool []: neither copy exceeds the aim, cap − cap_margin. A NaN accuracy does not hold."""
    aim = hyper.cap - hyper.cap_margin
    return (reading.plus <= aim) & (reading.minus <= aim)


def no_noise(like: Any) -> Calibration:
    """The calibration of a round without noise: nothing tried, nothing spent.

    Args:
      like: a `Draw`, or its shapes.
    """
    none, nan = jnp.int32(0), jnp.float32(jnp.nan)
    zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)
    return Calibration(zero, jnp.float32(0), jnp.bool_(True), nan, nan, none, none, none)
