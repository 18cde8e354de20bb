"""A vision transformer: patches of an image as words.

Dosovitskiy et al. 2021 (arXiv 2010.11929). Its first convolution, which the source's scheme noises,
is the projection of the patches.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn


class ViT(nn.Module):
    """Small by default, for 28 × 28 images: 4 × 4 patches, four blocks of four heads, 64 wide.

    With `patch=16, width=192, heads=3, depth=12, expansion=4` it is DeiT-Ti (Touvron et al. 2021,
    arXiv 2012.12877): 5,717,416 parameters on 224 × 224 × 3 and 1,000 classes.
    """

    num_classes: int = 10
    patch: int = 4
    width: int = 64
    depth: int = 4
    heads: int = 4
    expansion: int = 2

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images [B, H, W, Ch] to logits [B, C]."""
        edges, small = (self.patch, self.patch), nn.initializers.normal(0.02)
        x = nn.Conv(self.width, edges, edges, padding="VALID", name="patches")(x)
        x = x.reshape(x.shape[0], -1, self.width)
        token = self.param("token", small, (1, 1, self.width))
        x = jnp.concatenate([jnp.tile(token, (x.shape[0], 1, 1)), x], axis=1)
        x = x + self.param("places", small, (1, x.shape[1], self.width))
        for block in range(1, self.depth + 1):
            y = nn.LayerNorm(name=f"norm{block}")(x)
            x = x + nn.MultiHeadDotProductAttention(self.heads, name=f"attention{block}")(y)
            y = nn.LayerNorm(name=f"norm_dense{block}")(x)
            y = nn.gelu(nn.Dense(self.expansion * self.width, name=f"wide{block}")(y))
            x = x + nn.Dense(self.width, name=f"narrow{block}")(y)
        x = nn.LayerNorm(name="norm")(x)
        return nn.Dense(self.num_classes, name="head")(x[:, 0])
