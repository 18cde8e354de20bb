"""How many arithmetic operations a model's products take, counted from its shapes."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn


class Operations(NamedTuple):
    """Floating-point operations an image, a multiplication and an addition being two.

    Only convolutions (counted as the direct sum, whatever their lowering) and dense layers count;
    biases, activations, pooling and the update do not.
    """

    forward: int
    step: int  # forward and backward; the first layer has no gradient of its input


def count(model: nn.Module, image_shape: tuple[int, int, int]) -> Operations:
    """Operations of one image through `model`."""
    layers: list[int] = []

    def note(next_call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        out = next_call(*args, **kwargs)
        if context.method_name == "__call__" and context.module.has_variable("params", "kernel"):
            kernel = context.module.get_variable("params", "kernel")
            places = out.size // out.shape[-1]  # where the kernel is applied
            layers.append(2 * kernel.size * places)
        return out

    with nn.intercept_methods(note):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *image_shape)))
    forward = sum(layers)
    return Operations(forward, 3 * forward - layers[0])
