"""LeNet-5 (LeCun et al. 1998), in today's form: ReLU and max pooling."""

import jax
from flax import linen as nn

from noisefl.models.layers import Conv, Dense
from noisefl.models.lowering import Lowering


class LeNet5(nn.Module):
    """Convolutions 6 and 16 (5 × 5), dense 120 and 84, softmax: 61,706 parameters on MNIST."""

    num_classes: int = 10
    lowering: Lowering = Lowering()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images [B, H, W, Ch] in [0, 1] to logits [B, C]."""
        how = self.lowering
        x = nn.relu(Conv(6, 5, pool=True, lowering=how, name="conv1")(x))
        x = nn.relu(Conv(16, 5, "VALID", pool=True, lowering=how, name="conv2")(x))
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(Dense(120, how, name="dense1")(x))
        x = nn.relu(Dense(84, how, name="dense2")(x))
        return Dense(self.num_classes, how, name="dense3")(x)
