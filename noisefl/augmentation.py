"""What local training does to a batch of images before the model sees it, on the device."""

from typing import ClassVar

import jax
import jax.numpy as jnp

from noisefl import keys
from noisefl.parts import Number, Part, count, number, part


@part
class Augmentation(Part):
    """Base: a part with `change`."""

    abstract: ClassVar[bool] = True
    identity: ClassVar[bool] = False  # it changes nothing, so that no key is drawn for it

    def change(self, key: jax.Array, images: jax.Array) -> jax.Array:
        """Other images of the same shape.

        Args:
          key: of this batch.
          images: uint8 [B, H, W, Ch].
        """
        raise NotImplementedError


@part
class Plain(Augmentation):
    """Images as they are."""

    identity: ClassVar[bool] = True

    def change(self, key: jax.Array, images: jax.Array) -> jax.Array:
        return images


@part
class FlipCrop(Augmentation):
    """Each image mirrored at random, and shifted by whole pixels both ways, zeros coming in: what
    is usual for CIFAR-10 (He et al. 2016, arXiv 1512.03385, section 4.2: flip ½, 4 pixels).

    Attributes:
      flip: probability that left and right change places. Digits and letters want 0.
      shift: largest shift up, down, left and right; each whole number is equally likely.
    """

    flip: Number = number(0.5, "probability that an image is mirrored", low=0, high=1)
    shift: Number = count(4, "largest shift in each direction", unit="pixels")

    def change(self, key: jax.Array, images: jax.Array) -> jax.Array:
        batch, height, width, _ = images.shape
        mirrored = jax.random.bernoulli(keys.stream(key, "flip"), self.flip, (batch, 1, 1, 1))
        images = jnp.where(mirrored, images[:, :, ::-1], images)
        by = jax.random.randint(keys.stream(key, "shift"), (batch, 2), -self.shift, self.shift + 1)

        def one(image: jax.Array, by: jax.Array) -> jax.Array:
            rows, columns = jnp.arange(height) + by[0], jnp.arange(width) + by[1]
            inside = ((rows >= 0) & (rows < height))[:, None] & (columns >= 0) & (columns < width)
            moved = image[jnp.clip(rows, 0, height - 1)][:, jnp.clip(columns, 0, width - 1)]
            return jnp.where(inside[..., None], moved, 0)

        return jax.vmap(one)(images, by)
