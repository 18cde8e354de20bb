"""Training workloads of published simulators, with synthetic images of the right shape, and how
many arithmetic operations their products take."""

import dataclasses
import os
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jax.sharding import PartitionSpec

import noisefl
from noisefl import Cohort, Experiment, Federation, Strategy, mesh, models
from noisefl.data import Images
from noisefl.local import SGD, Training

LEARNING_RATE = 0.01


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
            local=Training(SGD(learning_rate=LEARNING_RATE), batch_size=self.batch_size),
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


def split_cpu() -> None:
    """Before the first use of a device: one a core, as the driver has them."""
    jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))


class Rounds(NamedTuple):
    """A program of rounds and what it begins with, on all devices that share its clients.

    `program(root key, state, data, experiment) → state`; the state is donated.
    """

    program: Any
    key: jax.Array
    state: Any
    data: Federation
    experiment: Experiment
    compile_seconds: float


def compiled(experiment: Experiment, rounds: int, data: Federation) -> Rounds:
    """The rounds as one program; clients are dealt out to the devices, as those of a single run."""
    clients = sum(experiment.cohort.sizes)
    shared = jax.devices()[:clients] if jax.default_backend() == "cpu" else jax.devices()[:1]
    on = mesh.make(len(shared), shared)
    axis = mesh.CLIENTS if len(shared) > 1 else ""
    experiment = experiment.replace(strategy=experiment.strategy.replace(clients_axis=axis))

    def many(key: Any, state: Any, data: Federation, experiment: Experiment) -> Any:
        def one(state: Any, _: None) -> tuple[Any, None]:
            return noisefl.step(key, state, data, experiment)[0], None

        return lax.scan(one, state, length=rounds)[0]

    key = jax.random.key(0)
    state = jax.jit(noisefl.init)(key, experiment, data)
    key, state, data, experiment = jax.device_put(
        (key, state, data, experiment), mesh.everywhere(on)
    )
    everywhere = PartitionSpec()
    spread = jax.shard_map(
        many, mesh=on, in_specs=everywhere, out_specs=everywhere, check_vma=False
    )
    begin = time.perf_counter()
    program = jax.jit(spread, donate_argnums=1).lower(key, state, data, experiment).compile()
    return Rounds(program, key, state, data, experiment, time.perf_counter() - begin)


class Operations(NamedTuple):
    """Floating-point operations an image, a multiplication and an addition being two.

    Only convolutions (counted as the direct sum, whatever their lowering) and dense layers count;
    biases, activations, pooling and the update do not.
    """

    forward: int
    step: int  # forward and backward; the first layer has no gradient of its input


def operations(model: Any, image_shape: tuple[int, int, int]) -> Operations:
    """Operations of one image through `model`, counted from its shapes."""
    made = models.functions(model)
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    layers = made.program(made.shapes(image_shape), images).products()
    return Operations(sum(layers), 3 * sum(layers) - layers[0])
