"""Training workloads of published simulators, with synthetic images of the right shape."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from noisefl import Round, keys
from noisefl.config import Config, Hyper
from noisefl.data import FederatedData


@dataclasses.dataclass(frozen=True)
class Workload:
    """One setting: E = 1, equal clients.

    Attributes:
      source: whose setting it is.
      model: name of the model.
      num_classes: C.
      image_shape: (H, W, Ch).
      num_clients: K.
      cohort: M, clients a round.
      client_size: images a client.
      batch_size: B.
    """

    source: str
    model: str
    num_classes: int
    image_shape: tuple[int, int, int]
    num_clients: int
    cohort: int
    client_size: int
    batch_size: int

    @property
    def steps(self) -> int:
        """Client steps a round, of all clients."""
        return self.cohort * -(-self.client_size // self.batch_size)

    @property
    def images(self) -> int:
        """Images trained on in a round."""
        return self.cohort * self.client_size

    def config(self, **options: object) -> Config:
        return Config(
            image_shape=self.image_shape,
            num_clients=self.num_clients,
            client_fraction=self.cohort / self.num_clients,
            batch_size=self.batch_size,
            local_test_size=1,
            **options,  # pyright: ignore[reportArgumentType]
        )

    def data(self) -> FederatedData:
        """Uniform random pixels and labels; clients share a pool of at most 20,000 images."""
        random = np.random.default_rng(0)
        pool = min(20_000, self.num_clients * self.client_size)

        def images(count: int) -> tuple[jax.Array, jax.Array]:
            pixels = random.integers(0, 256, (count, *self.image_shape), np.uint8)
            return jnp.asarray(pixels), jnp.asarray(
                random.integers(0, self.num_classes, count, np.int32)
            )

        train, validation, test = images(pool), images(100), images(10_000)
        shape = (self.num_clients, self.client_size)
        return FederatedData(
            train_images=train[0],
            train_labels=train[1],
            clients=jnp.asarray(random.integers(0, pool, shape, np.int32)),
            counts=jnp.full(self.num_clients, self.client_size, jnp.int32),
            validation_images=validation[0],
            validation_labels=validation[1],
            test_images=test[0],
            test_labels=test[1],
        )


WORKLOADS = {
    "mcmahan": Workload(
        "McMahan et al. 2017, MNIST CNN", "mcmahan", 10, (28, 28, 1), 100, 10, 600, 10
    ),
    "femnist": Workload("FLUTE, FEMNIST CNN", "two_conv", 62, (28, 28, 1), 3400, 10, 200, 20),
    "cifar10": Workload("pfl-research, CIFAR-10", "two_conv", 10, (32, 32, 3), 1000, 50, 50, 10),
    "lenet": Workload("quickstart of this project", "lenet5", 10, (28, 28, 1), 100, 10, 550, 10),
}


def compiled(round_: Round, rounds: int, data: FederatedData, hyper: Hyper) -> Any:
    """The rounds as one program, state donated."""

    def many(key, state, data, hyper):
        def one(state, _):
            return round_.step(keys.stream(key, "round", state.round), state, data, hyper)[0], None

        return lax.scan(one, state, length=rounds)[0]

    state = jax.eval_shape(round_.init, jax.random.key(0))
    lowered = jax.jit(many, donate_argnums=1).lower(jax.random.key(0), state, data, hyper)
    return lowered.compile()
