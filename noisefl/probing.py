"""The probe of a real model: draws, accuracies and logits of noised copies of the base."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from noisefl import evaluate, noise, split, strategy
from noisefl.calibrate import Probe, Reading
from noisefl.config import Config
from noisefl.data import FederatedData

Params = Any


def make_probe(
    model: nn.Module,
    cut: split.Split | None,
    base: Params,
    paths: Any,
    data: FederatedData,
    config: Config,
) -> Probe:
    """What a calibrator may ask about `base`.

    Args:
      model: the model.
      cut: `split.at` of the model and `paths`.
      base: W.
      paths: `noise.target` of the model.
      data: the federation, of which the judging split is used.
      config: static options.
    """
    apply: evaluate.Apply = model.apply
    images, labels = judging_split(data, config)
    batch = strategy.eval_batch(config)
    accuracy_of = split.accuracy_of(model, cut, base, images, labels, batch)

    def of_copy(copy: Params) -> jax.Array:
        """NaN of a dead copy, which would else be wrong on every image and so hold any cap."""
        return jnp.where(evaluate.is_finite(copy), accuracy_of(copy), jnp.nan)

    def accuracy(draw: noise.Draw, strength: jax.Array) -> Reading:
        xi = noise.scaled(base, draw, strength, config.noise_scale)
        plus, minus = (of_copy(noise.apply(base, xi, sign)) for sign in (1, -1))
        return Reading(plus, minus, jnp.int32(2), jnp.int32(2 * labels.shape[0]))

    def copies(
        draw: noise.Draw, strengths: jax.Array, chosen: jax.Array, shared: jax.Array | None
    ) -> jax.Array:
        def one(strength: jax.Array, images: jax.Array, kept: list[jax.Array]) -> jax.Array:
            copy = noise.apply(base, noise.scaled(base, draw, strength, config.noise_scale), 1)
            if cut is None:
                return apply({"params": copy}, evaluate.scale(images))
            return cut.above(copy, images, *kept)

        def of_batch(images: jax.Array, *kept: jax.Array) -> jax.Array:
            # One by one, so that a forward pass has one kernel.
            return jnp.stack([one(strength, images, [*kept]) for strength in strengths], axis=1)

        arrays = (images[chosen],) if shared is None else (images[chosen], shared)
        return jnp.moveaxis(evaluate.in_batches(of_batch, arrays, batch), 1, 0)

    def below(chosen: jax.Array) -> jax.Array:
        assert cut is not None
        return cut.below(base, images[chosen], batch)

    def logits(draw: noise.Draw, strengths: jax.Array, chosen: jax.Array) -> jax.Array:
        return copies(draw, strengths, chosen, below(chosen) if cut else None)

    return Probe(
        draw=lambda key: noise.draw(key, base, paths, config.noise_distribution),
        accuracy=accuracy,
        logits=logits,
        labels=labels,
        below=below if cut else None,
        above=copies if cut else None,
    )


def judging_split(data: FederatedData, config: Config) -> tuple[jax.Array, jax.Array]:
    """Images uint8 [N, H, W, Ch] and labels int32 [N] on which copies are judged."""
    if config.accuracy_on == "test":
        return data.test_images, data.test_labels
    return data.validation_images, data.validation_labels
