"""The CNN of two 3 × 3 convolutions that later federated benchmarks use."""

import jax
from flax import linen as nn


class TwoConvCNN(nn.Module):
    """Convolutions 32 and 64 (3 × 3), one 2 × 2 max pooling, 128 dense units, softmax.

    Without dropout, the network of Reddi et al. 2021 (arXiv 2003.00295) for EMNIST, of FLUTE for
    FEMNIST and of pfl-research for CIFAR-10. 1,199,882 parameters on 28 × 28 × 1, 10 classes.
    """

    num_classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images [B, H, W, Ch] in [0, 1] to logits [B, C]."""
        x = nn.relu(nn.Conv(32, (3, 3), padding="VALID", name="conv1")(x))
        x = nn.relu(nn.Conv(64, (3, 3), padding="VALID", name="conv2")(x))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(128, name="dense1")(x))
        return nn.Dense(self.num_classes, name="dense2")(x)
