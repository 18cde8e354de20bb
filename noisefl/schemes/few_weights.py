"""A few weights moved uphill on the loss: how little disables a model."""

from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict
from jax import lax
from jax.flatten_util import ravel_pytree

from noisefl import evaluate, keys
from noisefl.cohort import Cohort
from noisefl.errors import refuse
from noisefl.models import Functions, with_leaves
from noisefl.parts import part, size
from noisefl.probing import Judge
from noisefl.schemes.base import OneCopy

Params = Any


class Shift(NamedTuple):
    """The secret of a round."""

    places: jax.Array  # int32 [n], among all parameters in the order of their leaves
    direction: jax.Array  # float32 [n], of RMS 1


@part
class FewWeights(OneCopy):
    """All clients receive W with n of its weights shifted; the server takes the shift out.

    g is the gradient of the mean cross-entropy on a random sample of the server's judging images,
    and P the n places where |g| is largest; the copy is

        W + strength · RMS(W) · g_P / RMS(g_P)

    on P, and W elsewhere. A calibrator that draws again draws another sample, and pays a gradient
    for it that its bill does not count. The papers search for their weights for longer, by a mask
    that is learnt (NNSplitter) or step by step (AdvParams); one gradient is their first step.
    Fewer entries than n differ where fewer have a gradient.

    Attributes:
      entries: n.
      sample: images that g is taken on, with replacement.

    Raises:
      ValueError: in `fit`, a model of fewer parameters than n.

    References:
      NNSplitter, arXiv 2305.00097. AdvParams, arXiv 2105.13697.
    """

    source: ClassVar[str] = "NNSplitter, arXiv 2305.00097; AdvParams, arXiv 2105.13697"

    entries: int = size(256, "n, weights that are shifted", unit="parameters")
    sample: int = size(256, "judging images that their gradient is taken on", unit="images")

    def fit(self, model: Functions, image_shape: tuple[int, int, int], cohort: Cohort) -> None:
        shapes = model.shapes(image_shape)
        all_of_them = sum(leaf.size for leaf in jax.tree.leaves(shapes))
        if self.entries > all_of_them:
            raise refuse("entries", self.entries, f"the model has {all_of_them} parameters")

    def draw(self, key: jax.Array, base: Params, judge: Judge) -> Shift:
        """The places and the direction on a fresh sample."""
        total = judge.labels.shape[0]
        chosen = jax.random.randint(keys.stream(key, "sample"), (self.sample,), 0, total)
        images, labels = evaluate.scale(judge.images[chosen]), judge.labels[chosen]

        def loss(params: Params) -> jax.Array:
            logits = judge.model.apply(params, images)
            hot = jax.nn.one_hot(labels, logits.shape[-1])
            return jnp.mean(optax.softmax_cross_entropy(logits, hot))

        gradient = jax.grad(loss)(base)
        state = judge.model.state_of(base)  # no weights: a variance must stay positive
        leaves: dict[Any, jax.Array] = flatten_dict(gradient)  # pyright: ignore
        still = {path: jnp.zeros_like(leaves[path]) for path in state}
        slope = ravel_pytree(with_leaves(gradient, still))[0]
        places = lax.top_k(jnp.abs(slope), self.entries)[1]
        size = jnp.sqrt(jnp.mean(jnp.square(slope[places])))
        direction = slope[places] / jnp.where(size > 0, size, 1)  # a flat loss shows no way
        return Shift(places, direction)

    def variant(self, base: Params, draw: Shift, strength: jax.Array, variant: jax.Array) -> Params:
        flat, unravel = ravel_pytree(base)
        scale = jnp.sqrt(jnp.mean(jnp.square(flat)))
        return unravel(flat.at[draw.places].add(strength * scale * draw.direction))
