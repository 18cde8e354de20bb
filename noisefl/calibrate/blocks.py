"""The judging split in random blocks, each with one image of every stratum of the classes.

A degraded copy has lost some classes and kept others: with noise on the last layer of a LeNet near
60 %, three fifths of the variance of "is this image correct" lies between the classes, whose labels
the server knows. Stratified sampling (Neyman 1934) takes that part out.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from noisefl import evaluate
from noisefl.calibrate.base import Probe

STRATA = 10


class Blocks(NamedTuple):
    """T blocks of S images. The weighted share of correct images of a block has as its mean, given
    all blocks before it, the accuracy of the model on new images with the classes' shares.

    That is exact where every stratum is one class, or the labels are as random as the images. For
    strata of several classes it holds on average over the blocks alone: class counts are fixed, and
    drawn from without putting back. Computed for binary populations of 5 to 300 images, the chance
    that a bet against them wins was then at most 0.89 of what it may be.
    """

    images: jax.Array  # int32 [T, S], indices into the split; no image of weight > 0 comes twice
    weights: jax.Array  # float32 [S], the strata's shares; they sum to 1
    number: jax.Array  # int32 []: blocks of distinct images; those beyond are not to be read

    def slice(self, start: int, stop: int | None = None) -> "Blocks":
        images = self.images[start:stop]
        number = jnp.clip(self.number - start, 0, images.shape[0])
        return Blocks(images, self.weights, number)

    def accuracy(self, logits: jax.Array, labels: jax.Array) -> jax.Array:
        """float32 []: that of all blocks, of logits [T · S, C] and labels int32 [T · S]."""
        right = evaluate.correct(logits, labels).reshape(self.images.shape)
        return jnp.mean(right.astype(jnp.float32), axis=0) @ self.weights


def blocks(key: jax.Array, labels: jax.Array, num_classes: int, images: int) -> Blocks:
    """Deals that many images, or all there are, out to blocks.

    A stratum is one class, or several neighbours of about N / STRATA images where there are more
    than `STRATA`, or where classes are of unlike sizes; a large class may then leave strata empty,
    whose images weigh nothing. Where a stratum is too small for half of the blocks, strata are
    every tenth image of the split instead, and nothing is gained.

    Args:
      key: randomness of the order.
      labels: int32 [N].
      num_classes: C.
      images: T · S at most, but at least one block.
    """
    size = labels.shape[0]
    strata = max(1, min(STRATA, num_classes, size))
    number = min(size, max(strata, images)) // strata

    counts = jnp.bincount(labels, length=num_classes)
    middle = jnp.cumsum(counts) - counts / 2
    of_class = jnp.clip(jnp.floor(strata * middle / size), 0, strata - 1).astype(jnp.int32)
    held = jnp.bincount(of_class[labels], length=strata)
    fewest = jnp.min(jnp.where(held > 0, held, size))
    by_class = fewest >= max(1, number // 2)

    place = jnp.arange(size, dtype=jnp.int32) % strata
    stratum = jnp.where(by_class, of_class[labels], place)
    held = jnp.where(by_class, held, jnp.bincount(place, length=strata))
    # The largest of random numbers, a row a stratum: a fraction of the time of sorting them all.
    lots = jax.random.uniform(key, (size,))
    drawn = jnp.where(stratum == jnp.arange(strata)[:, None], lots, -1.0)
    return Blocks(
        images=lax.top_k(drawn, number)[1].T,
        weights=held / size,
        number=jnp.where(by_class, jnp.minimum(fewest, number), number).astype(jnp.int32),
    )


def deal(key: jax.Array, probe: Probe, images: int, stratified: bool) -> Blocks:
    """Of the judging split; not `stratified`, any images, as if all were of one class."""
    if stratified:
        return blocks(key, probe.labels, probe.num_classes, images)
    order = jax.random.permutation(key, probe.labels.shape[0])[:images]
    strata = min(STRATA, order.size)
    number = order.size // strata
    return Blocks(
        images=order[: number * strata].reshape(number, strata).astype(jnp.int32),
        weights=jnp.full(strata, 1 / strata),
        number=jnp.int32(number),
    )
