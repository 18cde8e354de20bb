"""VGG-11 with group normalisation.

Simonyan & Zisserman 2015 (arXiv 1409.1556), column A, with one dense layer in place of three, as is
usual for small images; Wu & He 2018 (arXiv 1803.08494) for the normalisation.
"""

import jax
from flax import linen as nn

STAGES = ((1,), (2,), (4, 4), (8, 8), (8, 8))  # of the width, between poolings


class VGG11(nn.Module):
    """Eight 3 × 3 convolutions of 64 to 512, five poolings: 9,231,114 parameters on 3 channels and
    10 classes, as with batch normalisation. An odd row or column is pooled by itself."""

    num_classes: int = 10
    width: int = 64
    groups: int = 2

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images [B, H, W, Ch] to logits [B, C]."""
        place = 0
        for stage in STAGES:
            for times in stage:
                place += 1
                x = nn.Conv(times * self.width, (3, 3), name=f"conv{place}")(x)
                x = nn.relu(nn.GroupNorm(self.groups, name=f"norm{place}")(x))
            x = nn.max_pool(x, (2, 2), (2, 2), padding="SAME")
        return nn.Dense(self.num_classes, name="head")(x.mean((1, 2)))
