"""Residual networks with group normalisation, which needs no statistics beside the parameters.

He et al. 2016 (arXiv 1512.03385); Wu & He 2018 (arXiv 1803.08494) for the normalisation, which
Hsieh et al. 2020 (arXiv 1910.00189) and Reddi et al. 2021 (arXiv 2003.00295) put in place of batch
normalisation where clients own unlike data.
"""

import jax
from flax import linen as nn


class ResNet8(nn.Module):
    """A 3 × 3 stem and three blocks of two 3 × 3 convolutions, 16, 32 and 64 wide, with biases.

    MLPerf Tiny (Banbury et al. 2021, arXiv 2106.07597) has it with batch normalisation: 78,666
    numbers on 32 × 32 × 3, 10 classes, of which 480 are running statistics. Here 78,186.
    """

    num_classes: int = 10
    width: int = 16
    groups: int = 2

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images [B, H, W, Ch] to logits [B, C]."""
        x = nn.Conv(self.width, (3, 3), name="stem")(x)
        x = nn.relu(nn.GroupNorm(self.groups, name="norm")(x))
        for stage in range(3):
            step, name = 1 + (stage > 0), f"block{stage + 1}"
            x = Block(self.width << stage, step, self.groups, True, name=name)(x)
        return nn.Dense(self.num_classes, name="head")(x.mean((1, 2)))


class ResNet18(nn.Module):
    """A 3 × 3 stem and four stages of two blocks, 64 to 512 wide, without biases: the form for
    small images, without the first pooling. 11,173,962 parameters on 32 × 32 × 3, 10 classes, as
    with batch normalisation. With `imagenet`, a 7 × 7 stem and that pooling: 11,689,512 with 1,000
    classes."""

    num_classes: int = 10
    width: int = 64
    groups: int = 2
    imagenet: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images [B, H, W, Ch] to logits [B, C]."""
        size, step = (7, 2) if self.imagenet else (3, 1)
        x = nn.Conv(self.width, (size, size), step, use_bias=False, name="stem")(x)
        x = nn.relu(nn.GroupNorm(self.groups, name="norm")(x))
        if self.imagenet:
            x = nn.max_pool(x, (3, 3), (2, 2), padding="SAME")
        for stage in range(4):
            for block in range(2):
                step = 2 if stage > 0 and block == 0 else 1
                name = f"block{2 * stage + block + 1}"
                x = Block(self.width << stage, step, self.groups, False, name=name)(x)
        return nn.Dense(self.num_classes, name="head")(x.mean((1, 2)))


class Block(nn.Module):
    """Two 3 × 3 convolutions beside the identity, or beside a 1 × 1 convolution where the shape
    changes; that one is normalised where convolutions have no biases."""

    features: int
    step: int
    groups: int
    biased: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, H, W, Ch] to [B, ⌈H / step⌉, ⌈W / step⌉, features]."""
        side, biased = x, self.biased
        y = nn.Conv(self.features, (3, 3), self.step, use_bias=biased, name="conv1")(x)
        y = nn.relu(nn.GroupNorm(self.groups, name="norm1")(y))
        y = nn.Conv(self.features, (3, 3), use_bias=biased, name="conv2")(y)
        y = nn.GroupNorm(self.groups, name="norm2")(y)
        if side.shape != y.shape:
            side = nn.Conv(self.features, (1, 1), self.step, use_bias=biased, name="side")(x)
            if not biased:
                side = nn.GroupNorm(self.groups, name="norm_side")(side)
        return nn.relu(y + side)
