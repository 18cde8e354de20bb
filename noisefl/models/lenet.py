"""LeNet-5 (LeCun et al. 1998), in today's form: ReLU and max pooling."""

import jax
from flax import linen as nn


class LeNet5(nn.Module):
    """Convolutions 6 and 16 (5 × 5), dense 120 and 84, softmax: 61,706 parameters on MNIST."""

    num_classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images [B, H, W, Ch] in [0, 1] to logits [B, C]."""
        x = nn.max_pool(nn.relu(nn.Conv(6, (5, 5), name="conv1")(x)), (2, 2), (2, 2))
        x = nn.relu(nn.Conv(16, (5, 5), padding="VALID", name="conv2")(x))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(120, name="dense1")(x))
        x = nn.relu(nn.Dense(84, name="dense2")(x))
        return nn.Dense(self.num_classes, name="dense3")(x)
