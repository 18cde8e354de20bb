"""Proxies that never look at an accuracy: what it costs to have no guarantee."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from noisefl import keys
from noisefl.calibrate.base import Calibrator, Decision, Evidence, Probe, below, unseen
from noisefl.parts import Number, number, part, size


@part
class Unverified(Calibrator):
    """One draw at σ0, not looked at. Where the scale is relative that is a fixed r.

    Guarantee: none; no round is feasible.
    """

    strength: Number = number(
        1.0, "of the first try, where nothing better is known", unit="σ, or r", low=0
    )

    def calibrate(
        self, key: jax.Array, probe: Probe, carry: Any
    ) -> tuple[Decision, Evidence, Probe, Any]:
        draw = probe.draw(keys.stream(key, "draw"))
        found = Decision(draw, jnp.float32(self.strength), jnp.bool_(False))
        return found, unseen(probe.variants), probe, carry


@part
class SNR(Calibrator):
    """The strength at which the logits' noise is a given share of their spread, from few images.

    The noise is measured at σ0 and taken to be proportional to the strength. A base whose logits
    are dead or have no spread, and one that the noise does not move, get σ0.

    Guarantee: none; no round is feasible.
    """

    judges: ClassVar[tuple[str, ...]] = ("linear", "smooth")

    signal_ratio: Number = number(1.0, "noise of the logits over their spread", low=0, inside="()")
    strength: Number = number(
        1.0, "of the first try, where nothing better is known", unit="σ, or r", low=0, inside="()"
    )
    strength_max: Number = number(
        50.0, "σ_max, the largest strength", unit="σ, or r", low=0, inside="()"
    )
    images: int = size(64, "images of which logits are taken", unit="images")

    def check(self) -> None:
        super().check()
        below(self, "strength", "strength_max")

    def calibrate(
        self, key: jax.Array, probe: Probe, carry: Any
    ) -> tuple[Decision, Evidence, Probe, Any]:
        number = min(self.images, probe.size)
        order = jax.random.permutation(keys.stream(key, "images"), probe.size)
        chosen = order[:number].astype(jnp.int32)
        draw, shared = probe.draw(keys.stream(key, "draw")), probe.below(chosen)
        clean, probe = probe.clean(chosen, shared)
        first = jnp.float32(self.strength)
        copies, probe = probe.logits(draw, first, chosen, shared)
        spread = jnp.std(clean - jnp.mean(clean, axis=1, keepdims=True))
        noise = jnp.sqrt(jnp.mean(jnp.square(copies - clean)))
        strength = self.signal_ratio * first * spread / noise
        sound = jnp.isfinite(strength) & (strength > 0)
        strength = jnp.where(sound, jnp.minimum(strength, self.strength_max), first)
        found = Decision(draw, strength, jnp.bool_(False))
        return found, unseen(probe.variants), probe, carry
