"""One strength for all rounds, verified but never adapted."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from noisefl import keys
from noisefl.calibrate.base import Calibrator, Decision, Evidence, Probe
from noisefl.calibrate.loop import ON_SPLIT
from noisefl.parts import Number, number, part


@part
class Fixed(Calibrator):
    """One draw at σ0, evaluated once so that `feasible` is honest. Controls the cap in no way.

    Guarantee: as `Loop`, of the rounds that are feasible.
    """

    guarantee: ClassVar[str] = ON_SPLIT

    strength: Number = number(
        1.0, "of the first try, where nothing better is known", unit="σ, or r", low=0
    )

    def calibrate(
        self, key: jax.Array, probe: Probe, carry: Any
    ) -> tuple[Decision, Evidence, Probe, Any]:
        draw, strength = probe.draw(keys.stream(key, "try", 0)), jnp.float32(self.strength)
        accuracy, probe = probe.accuracy(draw, strength)
        return Decision(draw, strength, self.holds(accuracy)), Evidence(accuracy), probe, carry
