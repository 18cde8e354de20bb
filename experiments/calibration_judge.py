"""The judge of `experiments.bench_calibration`: accuracies on test that no calibrator sees."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from experiments.calibration_figures import RATIOS
from noisefl import Config, evaluate, noise, split, strategy


class Judge(NamedTuple):
    """Test accuracies, jitted once for all calibrators."""

    owner: Any  # (params, data) → float32 []
    pair: Any  # (base, data, draw, strength) → float32 [2], of the copies that shipped
    around: Any  # the same → float32 [G], the higher one at RATIOS times the strength; where the
    # model is not cut below the noise, on 1,000 test images


def make_judge(model: nn.Module, options: Config) -> Judge:
    """Of one model; of the options it reads where the noise is, in which units."""
    cut = split.at(model, noise.target(model, options), options.image_shape)
    batch = strategy.eval_batch(options)

    def copies(base, data, draw, size: int) -> Any:
        images, labels = data.test_images[:size], data.test_labels[:size]
        accuracy_of = split.accuracy_of(model, cut, base, images, labels, batch)

        def pair(strength: jax.Array) -> jax.Array:
            xi = noise.scaled(base, draw, strength, options.noise_scale)
            return jnp.stack([accuracy_of(noise.apply(base, xi, sign)) for sign in (1, -1)])

        return pair

    def around(base, data, draw, strength):
        # Without a cut each strength is a forward pass of the whole model.
        pair = copies(base, data, draw, 10_000 if cut else 1_000)
        return lax.map(lambda ratio: jnp.max(pair(ratio * strength)), jnp.asarray(RATIOS))

    def owner(params, data):
        test = data.test_images, data.test_labels
        return evaluate.accuracy(model.apply, params, *test, batch)

    def shipped(base, data, draw, strength):
        return copies(base, data, draw, 10_000)(strength)

    return Judge(jax.jit(owner), jax.jit(shipped), jax.jit(around))
