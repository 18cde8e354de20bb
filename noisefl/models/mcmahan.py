"""The MNIST CNN of McMahan et al. 2017 (arXiv 1602.05629, section 3)."""

import jax
from flax import linen as nn

from noisefl.models.layers import Conv, Dense
from noisefl.models.lowering import Lowering


class McMahanCNN(nn.Module):
    """Two 5 × 5 convolutions (32, 64), each with 2 × 2 max pooling, 512 dense units, softmax.

    1,663,370 parameters on 28 × 28 × 1 images and 10 classes, 832 of them in the first layer.
    """

    num_classes: int = 10
    lowering: Lowering = Lowering()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images [B, H, W, Ch] in [0, 1] to logits [B, C]."""
        how = self.lowering
        x = nn.relu(Conv(32, 5, pool=True, lowering=how, name="conv1")(x))
        x = nn.relu(Conv(64, 5, pool=True, lowering=how, name="conv2")(x))
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(Dense(512, how, name="dense1")(x))
        return Dense(self.num_classes, how, name="dense2")(x)
