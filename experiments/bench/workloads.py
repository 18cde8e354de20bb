"""Training workloads of published simulators, with synthetic images of the right shape, and how
many arithmetic operations their products take."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

import noisefl
from noisefl import Cohort, Experiment, Federation, Strategy, models
from noisefl.data import Images
from noisefl.local import SGD, Training


@dataclasses.dataclass(frozen=True)
class Workload:
    """One setting: E = 1, equal clients."""

    source: str  # whose setting it is
    model: str
    num_classes: int  # C
    image_shape: tuple[int, int, int]  # (H, W, Ch)
    num_clients: int  # K
    cohort: int  # M, clients a round
    client_size: int  # images a client
    batch_size: int  # B

    @property
    def steps(self) -> int:
        """Client steps a round, of all clients."""
        return self.cohort * -(-self.client_size // self.batch_size)

    @property
    def images(self) -> int:
        """Images trained on in a round."""
        return self.cohort * self.client_size

    def network(self) -> nn.Module:
        """The model."""
        return models.by_name(self.model, self.num_classes)

    def experiment(self, strategy: Strategy) -> Experiment:
        """Plain FedAvg, as the drivers run it: the warm-up of the default scheme never ends."""
        experiment = Experiment(
            model=self.network(),
            cohort=Cohort(self.cohort),
            local=Training(SGD(learning_rate=0.01), batch_size=self.batch_size),
            strategy=strategy,
        )
        return noisefl.fedavg(experiment).resolved()

    def data(self) -> Federation:
        """Uniform random pixels and labels; clients share a pool of at most 20,000 images."""
        random = np.random.default_rng(0)
        pool = min(20_000, self.num_clients * self.client_size)

        def images(count: int) -> tuple[jax.Array, jax.Array]:
            pixels = random.integers(0, 256, (count, *self.image_shape), np.uint8)
            labels = random.integers(0, self.num_classes, count, np.int32)
            return jnp.asarray(pixels), jnp.asarray(labels)

        train, validation, test = images(pool), images(100), images(10_000)
        shape = (self.num_clients, self.client_size)
        return Federation(
            Images(*train, *test),
            jnp.asarray(random.integers(0, pool, shape, np.int32)),
            jnp.full(self.num_clients, self.client_size, jnp.int32),
            *validation,
        )


WORKLOADS = {
    "mcmahan": Workload(
        "McMahan et al. 2017, MNIST CNN", "mcmahan", 10, (28, 28, 1), 100, 10, 600, 10
    ),
    "femnist": Workload("FLUTE, FEMNIST CNN", "two_conv", 62, (28, 28, 1), 3400, 10, 200, 20),
    "cifar10": Workload("pfl-research, CIFAR-10", "two_conv", 10, (32, 32, 3), 1000, 50, 50, 10),
    "lenet": Workload("quickstart of this project", "lenet5", 10, (28, 28, 1), 100, 10, 550, 10),
}


def compiled(experiment: Experiment, rounds: int, data: Federation) -> Any:
    """(root key, state, data, experiment) → state: the rounds as one program, state donated."""

    def many(key: Any, state: Any, data: Federation, experiment: Experiment) -> Any:
        def one(state: Any, _: None) -> tuple[Any, None]:
            return noisefl.step(key, state, data, experiment)[0], None

        return lax.scan(one, state, length=rounds)[0]

    key = jax.random.key(0)
    state = jax.eval_shape(lambda key: noisefl.init(key, experiment, data), key)
    return jax.jit(many, donate_argnums=1).lower(key, state, data, experiment).compile()


class Operations(NamedTuple):
    """Floating-point operations an image, a multiplication and an addition being two.

    Only convolutions (counted as the direct sum, whatever their lowering) and dense layers count;
    biases, activations, pooling and the update do not.
    """

    forward: int
    step: int  # forward and backward; the first layer has no gradient of its input


def operations(model: nn.Module, image_shape: tuple[int, int, int]) -> Operations:
    """Operations of one image through `model`, counted from its shapes."""
    layers: list[int] = []

    def note(next_call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        out = next_call(*args, **kwargs)
        if context.method_name == "__call__" and context.module.has_variable("params", "kernel"):
            places = out.size // out.shape[-1]  # where the kernel is applied
            layers.append(2 * context.module.get_variable("params", "kernel").size * places)
        return out

    with nn.intercept_methods(note):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *image_shape)))
    return Operations(sum(layers), 3 * sum(layers) - layers[0])
