"""A model cut at its first noised layer: what lies below sees no noise, and is computed once."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from noisefl import evaluate
from noisefl.models import Functions

Params = Any
LARGEST = 2048  # numbers kept for an image; more would cost more to read than to compute again


class Split(NamedTuple):
    """A model, and the module whose input is kept."""

    model: nn.Module
    path: tuple[str, ...]

    def below(self, params: Params, images: jax.Array, batch: int) -> jax.Array:
        """The layer's input, [N, …], of images uint8 [N, H, W, Ch], `batch` a forward pass."""

        def one(images: jax.Array) -> jax.Array:
            kept: list[jax.Array] = []

            def keep(next_call: Any, args: Any, kwargs: Any, context: Any) -> Any:
                if self._is_it(context) and not kept:
                    if not args:
                        raise LookupError("called by keyword")
                    kept.append(args[0])
                return next_call(*args, **kwargs)

            with nn.intercept_methods(keep):
                self.model.apply({"params": params}, evaluate.scale(images))
            return kept[0]

        return evaluate.in_batches(one, (images,), batch)

    def above(self, params: Params, images: jax.Array, kept: jax.Array | None) -> jax.Array:
        """Logits [B, C] from the layer's kept input.

        The whole model is traced. What only the kept input needed is dead code to XLA; a branch
        that passes the layer by is computed from the images, as ever.
        """
        used: list[bool] = []

        def put(next_call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            if self._is_it(context) and not used:
                used.append(True)
                return next_call(kept, *args[1:], **kwargs)
            return next_call(*args, **kwargs)

        with nn.intercept_methods(put):
            logits = self.model.apply({"params": params}, evaluate.scale(images))
        assert isinstance(logits, jax.Array)
        return logits

    def _is_it(self, context: Any) -> bool:
        return context.method_name == "__call__" and tuple(context.module.path) == self.path


def at(
    model: Functions, paths: tuple[tuple[str, ...], ...], image_shape: tuple[int, int, int]
) -> Split | None:
    """The cut below the first called layer that owns one of the noised parameters at `paths`.

    None where nothing is saved: at the first layer of all; in a model that is no Flax module;
    where another parameter than a layer's kernel or bias is noised; where the layer's input is too
    large to be kept; or where that input is not one array with an entry for each image.
    """
    if model.module is None or not paths:
        return None
    layers = [layer.path for layer in model.layers(image_shape)]
    owners = {path[:-1] for path in paths}
    if not owners <= set(layers):
        return None
    first = min(owners, key=layers.index)
    if first == layers[0]:
        return None
    split = Split(model.module, first)
    params = jax.eval_shape(lambda key: model.init(key, image_shape), jax.random.key(0))
    images = jax.ShapeDtypeStruct((2, *image_shape), jnp.uint8)
    try:
        kept = jax.eval_shape(lambda p, x: split.below(p, x, 2), params, images)
    except LookupError:
        return None
    return split if kept.shape[:1] == (2,) and kept.size <= 2 * LARGEST else None


def accuracy_of(
    model: Functions,
    split: Split | None,
    base: Params,
    images: jax.Array,
    labels: jax.Array,
    batch: int,
    axis: str = "",
) -> Callable[[Params], jax.Array]:
    """`evaluate.accuracy` of noised copies of `base`, params → float32 [].

    Args:
      model: the model.
      split: `at` of the model and the noised parameters; what lies below is computed once, here.
      base: parameters that all copies share below the split.
      images: uint8 [N, H, W, Ch].
      labels: int32 [N].
      batch: images a forward pass.
      axis: a mapped axis over which the images are split. None if empty.
    """
    if split is None:
        return lambda params: evaluate.accuracy(model.apply, params, images, labels, batch, axis)
    size = labels.shape[0]
    images, labels = evaluate.mine(images, labels, axis)
    kept = split.below(base, images, batch)

    def accuracy(params: Params) -> jax.Array:
        right = evaluate.count(
            lambda images, kept: split.above(params, images, kept), (images, kept), labels, batch
        )
        return evaluate.share(lax.psum(right, axis) if axis else right, size)

    return accuracy
