"""Memory, by XLA's own plan of the compiled round: bounded by the clients side by side alone.

Nothing is run: shapes are enough to compile.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import noisefl
from noisefl import calibrate, keys, measure, models, schemes, simulate
from noisefl.data import Federation, Images
from noisefl.experiment import Experiment
from noisefl.local import Training

KEY = keys.root(0)
SAMPLES, HELD = 4, 1000  # images a client; to judge and to test on, and each client's own model too


def abstract(clients: int, image: tuple[int, int, int]) -> Federation:
    """Shapes of a federation."""

    def integers(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    def images(size: int) -> Any:
        return jax.ShapeDtypeStruct((size, *image), jnp.uint8)

    size = clients * SAMPLES
    shared = Images(images(size), integers(size), images(HELD), integers(HELD))
    table = integers(clients, SAMPLES), integers(clients)
    return Federation(shared, *table, images(HELD), integers(HELD))


@functools.cache
def plan(model: Any, image: tuple[int, int, int], clients: int, **strategy: Any) -> Any:
    """XLA's plan of a chunk of rounds of all clients, with all that is measured of them."""
    experiment = Experiment(
        model=model,
        cohort=noisefl.Cohort(clients_per_round=clients),
        local=Training(batch_size=2),
        scheme=schemes.Noised(calibrator=calibrate.Unverified()),
        strategy=noisefl.Strategy(**strategy),
    )
    kept, data = measure.Standard(local_test_size=1000), abstract(clients, image)
    state = jax.eval_shape(lambda e, d: simulate.begin(KEY, e, d, kept), experiment, data)
    chunk = jax.jit(simulate.chunk_of_rounds(2, kept), donate_argnums=1)
    stats = chunk.lower(KEY, state, data, experiment, jnp.int32(2)).compile().memory_analysis()
    if stats is None:
        pytest.skip("this backend has no memory plan")
    return stats


def bytes_of(model: Any, image: tuple[int, int, int]) -> int:
    params = jax.eval_shape(lambda: models.functions(model).init(KEY, image))
    return sum(4 * int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))


IMAGE = (8, 8, 1)
# 8515 parameters: much more than a client's indices.
TINY: Any = models.MLP(num_classes=3, hidden=64)


def temporary(clients: int, at_once: int, gather: str) -> int:
    """Bytes that rounds need beside their inputs and outputs."""
    how: Any = {"clients_at_once": at_once, "gather": gather, "eval_batch": HELD}
    return plan(TINY, IMAGE, clients, **how).temp_size_in_bytes


def test_memory_grows_with_the_clients_side_by_side():
    """By a trained model for each more, its gradient and its sum, and by no more images of an
    evaluation: those side by side share a forward pass of 1,000."""
    one, eight, every = (temporary(64, at_once, "step") for at_once in (1, 8, 0))
    model = bytes_of(TINY, IMAGE)
    assert 0 < eight - one < (8 - 1) * 6 * model  # one has the room that an evaluation needs
    assert (64 - 8) * model <= every - eight < (64 - 8) * 6 * model
    assert 6 * model < 1000 * 4 * 64  # what one layer makes of 1,000 images


@pytest.mark.parametrize("at_once", [1, 8])
def test_memory_does_not_grow_with_the_cohort(at_once):
    """But by the few numbers that name a client, its group, weight, accuracy and place in the draw:
    far less than its 4 images of 64 pixels, its model of 34 kB, and what its model makes of 1,000
    images."""
    few, many = (temporary(clients, at_once, "step") for clients in (64, 1000))
    assert many - few < (1000 - 64) * SAMPLES * 64
    assert bytes_of(TINY, IMAGE) / 100 > SAMPLES * 64


def test_images_fetched_at_once_are_those_of_the_clients_side_by_side():
    fetched, each = temporary(1000, 8, "client"), temporary(1000, 8, "step")
    assert fetched - each < 2 * 8 * (SAMPLES * 64 + bytes_of(TINY, IMAGE))


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_a_thousand_clients_at_a_targets_default_do_not_hold_a_thousand_models(target):
    """The CNN of McMahan et al. 2017; evaluations are of 1,000 images for each client."""
    model: Any = models.McMahanCNN()
    image = 28, 28, 1
    stats = plan(model, image, 1000, target=target)
    # The plan is of the whole round: all images, and two models in and two models out.
    assert stats.argument_size_in_bytes > (1000 * SAMPLES + 2 * HELD) * 28 * 28
    assert stats.argument_size_in_bytes > 2 * bytes_of(model, image)
    assert stats.output_size_in_bytes >= 2 * bytes_of(model, image)
    whole = stats.argument_size_in_bytes + stats.output_size_in_bytes + stats.temp_size_in_bytes
    room = {"cpu": 1 / 6, "gpu": 1}[target]  # one client after another; 100 side by side
    assert whole < room * 1000 * bytes_of(model, image)
