"""The MNIST CNN of McMahan et al. 2017 (arXiv 1602.05629, section 3)."""

import jax
from flax import linen as nn


class McMahanCNN(nn.Module):
    """Two 5 × 5 convolutions (32, 64), each with 2 × 2 max pooling, 512 dense units, softmax.

    1,663,370 parameters on 28 × 28 × 1 images and 10 classes, 832 of them in the first layer.
    """

    num_classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images [B, H, W, Ch] in [0, 1] to logits [B, C]."""
        x = nn.max_pool(nn.relu(nn.Conv(32, (5, 5), name="conv1")(x)), (2, 2), (2, 2))
        x = nn.max_pool(nn.relu(nn.Conv(64, (5, 5), name="conv2")(x)), (2, 2), (2, 2))
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(512, name="dense1")(x))
        return nn.Dense(self.num_classes, name="dense2")(x)
