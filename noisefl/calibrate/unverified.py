"""Proxies that never look at an accuracy: what it costs to have no guarantee."""

import jax
import jax.numpy as jnp

from noisefl import keys
from noisefl.calibrate.base import Calibration, Calibrator, Draw, Probe
from noisefl.config import Hyper


def _shipped(draw: Draw, strength: jax.Array, evaluations: int, samples: int) -> Calibration:
    """A calibration that nobody vouches for: never `feasible`."""
    nan = jnp.float32(jnp.nan)
    count = jnp.int32
    return Calibration(
        draw, strength, jnp.bool_(False), nan, nan, count(1), count(evaluations), count(samples)
    )


def unverified() -> Calibrator:
    """One draw at σ0, not looked at. With noise_scale="relative" that is a fixed r.

    Guarantee: none.
    """

    def calibrate(key, base, probe: Probe, hyper: Hyper, carry):
        del base
        draw = probe.draw(keys.stream(key, "draw"))
        return _shipped(draw, jnp.float32(hyper.strength), 0, 0), carry

    return Calibrator(init=lambda: (), calibrate=calibrate)


def snr(images: int = 64) -> Calibrator:
    """The strength at which the logits' noise is σ0 times their spread, from few images.

    The noise is measured at σ0 and taken to be proportional to the strength.

    Guarantee: none.

    Args:
      images: of which logits are taken.
    """

    def calibrate(key, base, probe: Probe, hyper: Hyper, carry):
        del base
        size = probe.labels.shape[0]
        number = min(images, size)
        chosen = jax.random.permutation(keys.stream(key, "images"), size)[:number]
        draw = probe.draw(keys.stream(key, "draw"))
        strength = jnp.float32(hyper.strength)
        signed = strength * jnp.asarray([0.0, 1.0, -1.0])
        clean, *pair = probe.logits(draw, signed, chosen.astype(jnp.int32))
        spread = jnp.std(clean - jnp.mean(clean, axis=1, keepdims=True))
        noise = jnp.sqrt(jnp.mean(jnp.square(jnp.stack(pair) - clean)))
        strength = strength * strength * spread / noise
        # A dead base has no spread, or NaN: then σ0.
        low, high = jnp.float32(hyper.strength), jnp.float32(hyper.strength_max)
        strength = jnp.where(jnp.isfinite(strength), jnp.clip(strength, low / 100, high), low)
        return _shipped(draw, strength, 3, 3 * number), carry

    return Calibrator(init=lambda: (), calibrate=calibrate)
