"""The CNN of two 3 × 3 convolutions that later federated benchmarks use."""

import jax
from flax import linen as nn

from noisefl.models.layers import Conv, Dense
from noisefl.models.lowering import Lowering


class TwoConvCNN(nn.Module):
    """Convolutions 32 and 64 (3 × 3), one 2 × 2 max pooling, 128 dense units, softmax.

    Without dropout, the network of Reddi et al. 2021 (arXiv 2003.00295) for EMNIST, of FLUTE for
    FEMNIST and of pfl-research for CIFAR-10. 1,199,882 parameters on 28 × 28 × 1, 10 classes.
    """

    num_classes: int = 10
    lowering: Lowering = Lowering()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images [B, H, W, Ch] in [0, 1] to logits [B, C]."""
        how = self.lowering
        x = nn.relu(Conv(32, 3, "VALID", how, name="conv1")(x))
        x = nn.relu(Conv(64, 3, "VALID", pool=True, lowering=how, name="conv2")(x))
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(Dense(128, how, name="dense1")(x))
        return Dense(self.num_classes, how, name="dense2")(x)
