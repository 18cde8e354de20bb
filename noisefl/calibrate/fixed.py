"""One strength for all rounds, verified but never adapted."""

import jax.numpy as jnp

from noisefl import keys
from noisefl.calibrate.base import Calibration, Calibrator, Probe, holds
from noisefl.config import Hyper


def fixed() -> Calibrator:
    """One draw at σ0, evaluated once so that `feasible` is honest. Controls the cap in no way.

    Guarantee: as `bisection`, of the rounds that are feasible.
    """

    def calibrate(key, base, probe: Probe, hyper: Hyper, carry):
        del base
        draw, strength = probe.draw(keys.stream(key, "try", 0)), jnp.float32(hyper.strength)
        reading = probe.accuracy(draw, strength)
        return Calibration(
            draw=draw,
            strength=strength,
            feasible=holds(reading, hyper),
            plus_accuracy=reading.plus,
            minus_accuracy=reading.minus,
            tries=jnp.int32(1),
            evaluations=reading.evaluations,
            samples=reading.samples,
        ), carry

    return Calibrator(init=lambda: (), calibrate=calibrate)
