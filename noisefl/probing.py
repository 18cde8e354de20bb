"""The judge of a round: accuracies on the server's split, and the probe of a real model."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from noisefl import evaluate, split
from noisefl.calibrate import Bill, Draw, Probe, Questions
from noisefl.models import Functions

Params = Any


class Copies(NamedTuple):
    """How a scheme makes V copies of a base from a draw and a strength. Pure functions."""

    variants: int  # V
    moves: str  # how they move with the strength: "linear", "smooth" or "discrete"
    touched: tuple[tuple[str, ...], ...]  # paths of the parameters that may differ from the base's
    draw: Callable[[jax.Array], Draw]  # key → draw
    copy: Callable[[Draw, jax.Array, jax.Array], Params]  # (draw, strength, variant) → params


class Judge(NamedTuple):
    """What the parts of a round may ask about models, on the judging split of N images."""

    model: Functions
    image_shape: tuple[int, int, int]
    images: jax.Array  # uint8 [N, H, W, Ch]
    labels: jax.Array  # int32 [N]
    batch: int  # images a forward pass
    axis: str = ""  # mapped axis over which all N images are split, of `Strategy.clients_axis`

    def accuracy(self, params: Params) -> jax.Array:
        """float32 [], on all N images."""
        images = self.images, self.labels
        return evaluate.accuracy(self.model.apply, params, *images, self.batch, self.axis)

    def probe(self, base: Params, copies: Copies) -> Probe:
        """What a calibrator may ask about a base and its copies, the bill empty."""
        cut = split.at(self.model, copies.touched, self.image_shape)
        apply, images = self.model.apply, self.images
        accuracy_of = split.accuracy_of(
            self.model, cut, base, images, self.labels, self.batch, self.axis
        )

        def of_copy(draw: Draw, strength: jax.Array, variant: Any) -> jax.Array:
            """NaN of a dead copy, which would else be wrong on every image and so hold any cap."""
            copy = copies.copy(draw, strength, jnp.int32(variant))
            return jnp.where(evaluate.is_finite(copy), accuracy_of(copy), jnp.nan)

        def accuracy(draw: Draw, strength: jax.Array) -> jax.Array:
            return lax.map(lambda v: of_copy(draw, strength, v), jnp.arange(copies.variants))

        def forward(params: Params, chosen: jax.Array, shared: jax.Array | None) -> jax.Array:
            def of_batch(some: jax.Array, *kept: jax.Array) -> jax.Array:
                if cut is None:
                    return apply(params, evaluate.scale(some))
                return cut.above(params, some, *kept)

            if cut is not None and shared is None:
                shared = below(chosen)
            arrays = (images[chosen],) if shared is None else (images[chosen], shared)
            return evaluate.in_batches(of_batch, arrays, self.batch)

        def below(chosen: jax.Array) -> jax.Array:
            assert cut is not None
            return cut.below(base, images[chosen], self.batch)

        return Probe(
            Bill.empty(),
            Questions(
                variants=copies.variants,
                moves=copies.moves,
                labels=self.labels,
                draw=copies.draw,
                accuracy=accuracy,
                bare=lambda: jnp.where(evaluate.is_finite(base), accuracy_of(base), jnp.nan),
                logits=lambda draw, strength, variant, chosen, shared: forward(
                    copies.copy(draw, strength, variant), chosen, shared
                ),
                clean=lambda chosen, shared: forward(base, chosen, shared),
                below=None if cut is None else below,
            ),
        )
