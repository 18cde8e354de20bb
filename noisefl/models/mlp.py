"""The multilayer perceptron "2NN" of McMahan et al. 2017 (arXiv 1602.05629, section 3)."""

import jax
from flax import linen as nn


class MLP(nn.Module):
    """Two hidden layers of 200 units: 199,210 parameters on MNIST.

    It has no convolution; its "first layer", which the scheme noises, is the first dense layer.
    """

    num_classes: int = 10
    hidden: int = 200

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images [B, H, W, Ch] in [0, 1] to logits [B, C]."""
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(self.hidden, name="dense1")(x))
        x = nn.relu(nn.Dense(self.hidden, name="dense2")(x))
        return nn.Dense(self.num_classes, name="dense3")(x)
