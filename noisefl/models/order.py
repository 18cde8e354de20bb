"""The layers of any Flax model, in the order in which it calls them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn


class Layer(NamedTuple):
    """A module that owns a kernel: its path in the parameter tree, and whether the kernel has more
    than two axes, by which a convolution is told from a dense layer."""

    path: tuple[str, ...]
    convolution: bool


def layer_order(model: nn.Module, image_shape: tuple[int, int, int]) -> tuple[Layer, ...]:
    """The layers that own a kernel, in call order.

    The parameter tree itself cannot tell: JAX sorts its keys, so that "classifier" would come
    before "conv1".

    Args:
      model: maps images [B, H, W, Ch] to logits.
      image_shape: (H, W, Ch).
    """
    called: list[Layer | None] = []

    def note(next_call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        place = len(called)
        called.append(None)  # in the order of entry; what a layer calls inside comes after it
        out = next_call(*args, **kwargs)
        if context.method_name == "__call__" and context.module.has_variable("params", "kernel"):
            kernel = context.module.get_variable("params", "kernel")
            layer = Layer(tuple(context.module.path), kernel.ndim > 2)
            if layer not in called:
                called[place] = layer
        return out

    with nn.intercept_methods(note):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *image_shape)))
    return tuple(layer for layer in called if layer is not None)
