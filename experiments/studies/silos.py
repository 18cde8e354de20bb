"""FedAvg among ten silos on Fashion-MNIST, as Li et al. 2022 ran it (NIID-Bench, arXiv 2102.02079).

Their table of accuracies has 89.6 ± 0.3 % where the silos' data are IID and 88.1 ± 0.6 % where each
class is split by Dirichlet(0.5). `--preset=experiments.studies.silos:fedavg` of `experiments.run`
is their experiment; data set, partition and rounds are flags (docs/results.md, "FedAvg against the
published figures").
"""

import jax
import optax
from flax import linen as nn

import noisefl
from noisefl import Experiment
from noisefl.cohort import Cohort
from noisefl.local import Optax, Training

# As PyTorch initialises its layers: U(−1/√fan_in, 1/√fan_in).
KERNEL = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class SimpleCNN(nn.Module):
    """Their "simple-cnn": convolutions 6 and 16 (5 × 5, none of them padded), dense 120 and 84."""

    num_classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for channels in (6, 16):
            x = nn.relu(nn.Conv(channels, (5, 5), padding="VALID", kernel_init=KERNEL)(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = x.reshape(x.shape[0], -1)
        for units in (120, 84):
            x = nn.relu(nn.Dense(units, kernel_init=KERNEL)(x))
        return nn.Dense(self.num_classes, kernel_init=KERNEL)(x)


def decayed(
    learning_rate: jax.Array, momentum: jax.Array, decay: jax.Array
) -> optax.GradientTransformation:
    """SGD as PyTorch has it: the decay is part of the gradient, before the momentum."""
    return optax.chain(
        optax.add_decayed_weights(decay),  # pyright: ignore[reportArgumentType]
        optax.sgd(learning_rate, momentum),  # pyright: ignore[reportArgumentType]
    )


def fedavg() -> Experiment:
    """Ten silos that all take part in every round, E = 10, B = 64, η = 0.01, momentum 0.9."""
    numbers = {"learning_rate": 0.01, "momentum": 0.9, "decay": 1e-5}
    local = Training(
        Optax(decayed, numbers), local_epochs=10, batch_size=64, batch_order="every_epoch"
    )
    return noisefl.fedavg(Experiment(SimpleCNN(), cohort=Cohort(clients_per_round=10), local=local))
