"""What a round needs of a model, whatever it is written in: init, apply, the order of its
layers."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from noisefl.errors import refuse
from noisefl.models.order import Layer, layer_order

Params = Any
Model = Any  # a Flax linen module, or a pair (init, apply)


class Functions(NamedTuple):
    """A model as pure functions.

    Attributes:
      init: (key, image_shape) → params.
      apply: (params, images float32 [B, H, W, Ch] in [0, 1]) → logits [B, C].
      layers: image_shape → the layers that own a kernel, in call order.
      module: the Flax module, None of a pair.
    """

    init: Callable[[jax.Array, tuple[int, int, int]], Params]
    apply: Callable[[Params, jax.Array], jax.Array]
    layers: Callable[[tuple[int, int, int]], tuple[Layer, ...]]
    module: nn.Module | None


def functions(model: Model) -> Functions:
    """A linen module, or a pair `(init(key, images) → params, apply(params, images) → logits)`.

    The layers of a pair are those of its parameters that end in "kernel", in the order in which JAX
    sorts them.

    Raises:
      ValueError: it is neither.
    """
    if isinstance(model, nn.Module):
        return Functions(
            lambda key, shape: model.init(key, jnp.zeros((1, *shape)))["params"],
            lambda params, images: model.apply({"params": params}, images),  # pyright: ignore
            lambda shape: layer_order(model, shape),
            model,
        )
    if isinstance(model, tuple) and len(model) == 2 and all(map(callable, model)):
        init, apply = model

        def begin(key: jax.Array, shape: tuple[int, int, int]) -> Params:
            return init(key, jnp.zeros((1, *shape)))

        def layers(shape: tuple[int, int, int]) -> tuple[Layer, ...]:
            shapes = jax.eval_shape(lambda key: begin(key, shape), jax.random.key(0))
            found = jax.tree_util.tree_flatten_with_path(shapes)[0]
            return tuple(
                Layer(tuple(part.key for part in path[:-1]), leaf.ndim > 2)
                for path, leaf in found
                if getattr(path[-1], "key", None) == "kernel"
            )

        return Functions(begin, apply, layers, None)
    allowed = "must be a Flax linen module, or a pair of functions (init, apply)"
    raise refuse("model", type(model).__name__, allowed)
