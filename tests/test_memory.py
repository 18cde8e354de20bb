"""Memory, by XLA's own plan of the compiled round: bounded by the clients side by side alone.

Nothing is run but the last tests: shapes are enough to compile.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from noisefl import (
    Config,
    FederatedData,
    Hyper,
    check_hyper,
    keys,
    make_round,
    models,
    simulate,
)
from noisefl.config import as_arrays

KEY = keys.root(0)


def abstract(clients: int, samples: int, held: int, image=(28, 28, 1)) -> FederatedData:
    """Shapes of a federation of `clients` with `samples` each; `held` images to judge and test."""

    def integers(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    def images(size: int) -> Any:
        return jax.ShapeDtypeStruct((size, *image), jnp.uint8)

    size = clients * samples
    return FederatedData(
        *(images(size), integers(size)),
        *(integers(clients, samples), integers(clients)),
        *(images(held), integers(held)),
        *(images(held), integers(held)),
    )


def plan(model: nn.Module, config: Config, data: FederatedData) -> Any:
    """XLA's plan of one round's memory."""
    round_ = make_round(model, config)
    state = jax.eval_shape(round_.init, KEY)
    hyper = as_arrays(Hyper())
    stats = jax.jit(round_.step).lower(KEY, state, data, hyper).compile().memory_analysis()
    if stats is None:
        pytest.skip("this backend has no memory plan")
    return stats


def total(stats: Any) -> int:
    return stats.argument_size_in_bytes + stats.output_size_in_bytes + stats.temp_size_in_bytes


def bytes_of(model: nn.Module, image=(28, 28, 1)) -> int:
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *image)))
    return sum(4 * int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))


def test_a_round_of_a_thousand_clients_does_not_hold_a_thousand_models():
    """MNIST over 1000 clients, all of them in every round, at the default of clients_at_once."""
    model = models.McMahanCNN()
    stats = plan(model, Config(num_clients=1000, client_fraction=1.0), abstract(1000, 60, 10_000))
    # The plan is of the whole round: 80,000 images, and two models in and two models out.
    assert stats.argument_size_in_bytes > 80_000 * 28 * 28 + 2 * bytes_of(model)
    assert stats.output_size_in_bytes >= 2 * bytes_of(model)
    assert total(stats) < 6e9 < 1000 * bytes_of(model)


IMAGE = (8, 8, 1)
TINY = models.MLP(num_classes=3, hidden=64)  # 8515 parameters: much more than a client's indices


@functools.cache
def temporary(cohort: int, at_once: int, gather: str = "step") -> int:
    """Bytes that a round of `cohort` clients needs beside its inputs and outputs."""
    config = Config(
        image_shape=IMAGE,
        num_clients=cohort,
        client_fraction=1.0,
        clients_at_once=at_once,
        batch_size=2,
        local_test_size=4,
        eval_batch=4,
        gather=gather,
    )
    return plan(TINY, config, abstract(cohort, 4, 8, IMAGE)).temp_size_in_bytes


def test_memory_grows_with_the_clients_side_by_side():
    """By a trained model for each more."""
    one, eight, every = (temporary(64, at_once) for at_once in (1, 8, 0))
    assert eight - one >= (8 - 1) * bytes_of(TINY, IMAGE) / 2  # one alone has room for its sum
    assert every - eight >= (64 - 8) * bytes_of(TINY, IMAGE)


@pytest.mark.parametrize("gather", ["step", "client"])
@pytest.mark.parametrize("at_once", [1, 8])
def test_memory_does_not_grow_with_the_cohort(at_once, gather):
    """But by the few numbers that name a client, its sign, weight, accuracy and place in the draw:
    far less than its 4 images of 64 pixels, and than its model of 34 kB."""
    few, many = (temporary(cohort, at_once, gather) for cohort in (64, 256))
    assert many - few < (256 - 64) * 4 * 64
    assert bytes_of(TINY, IMAGE) / 100 > 4 * 64


# Donated state

CONFIG = Config(
    image_shape=(6, 6, 1),
    num_clients=6,
    client_fraction=1.0,
    batch_size=4,
    noise_scale="relative",
    local_test_size=20,
    eval_batch=8,
)
HYPER = check_hyper(Hyper(learning_rate=0.5, cap=0.5, strength_step=0.5, max_tries=3), CONFIG)


@pytest.fixture(scope="module")
def simulations(tiny_model):
    """Chunks of 2 rounds, and of 5."""
    round_ = make_round(tiny_model, CONFIG)
    return round_, *(simulate.make_simulation(round_, tiny_model, CONFIG, r) for r in (2, 5))


def deleted(state) -> list[bool]:
    return [leaf.is_deleted() for leaf in jax.tree.leaves(state)]


def test_the_state_that_went_in_is_gone(simulations, tiny_data):
    """All of it, also that of a chunk which has nothing to do; key, data and hyper stay."""
    round_, pair, _ = simulations
    state, hyper = jax.jit(round_.init)(KEY), as_arrays(HYPER)
    for last in (2, 2):
        new, _ = pair(KEY, state, tiny_data, hyper, jnp.int32(last))
        assert all(deleted(state))
        assert not any(deleted((new, KEY, tiny_data, hyper)))
        state = new
    assert int(state.round) == 2


def test_chunks_never_read_a_state_that_is_gone(simulations, tiny_data):
    """Each state is gone as soon as the generator goes on, and the last one stays."""
    round_, pair, _ = simulations
    state = jax.jit(round_.init)(KEY)
    before, states, rows = state, [], []
    for now, some in simulate.chunks(pair, KEY, state, tiny_data, HYPER, 5):
        assert all(deleted(before))
        assert not any(deleted(now))
        before = now
        states.append(now)
        rows += some
    assert [int(row["round"]) for row in rows] == [1, 2, 3, 4, 5]
    assert len(states) == 3
    assert not any(deleted(states[-1]))
    assert all(flag for old in states[:-1] for flag in deleted(old))


def test_chunks_are_one_long_chunk(simulations, tiny_data):
    """Two compiled programs: 5 rounds of 3 steps, each a sum of at most 36 terms that another
    program may order otherwise, which is worth 5 · 3 · 36 · 2⁻²⁴ of the largest parameter."""
    round_, pair, five = simulations
    ends, all_rows = [], []
    for simulation in (pair, five):
        state, rows = jax.jit(round_.init)(KEY), []
        for now, some in simulate.chunks(simulation, KEY, state, tiny_data, HYPER, 5):
            state, rows = now, rows + some
        ends.append(jax.tree.map(np.asarray, state))
        all_rows.append(rows)
    assert max(row["strength"] for row in all_rows[0]) > 0
    for ours, theirs in zip(*map(jax.tree.leaves, ends), strict=True):
        room = 5 * 3 * 36 * 2.0**-24 * max(1.0, float(np.max(np.abs(theirs.astype(float)))))
        np.testing.assert_allclose(ours.astype(float), theirs.astype(float), rtol=0, atol=room)
    for ours, theirs in zip(*all_rows, strict=True):
        assert ours == pytest.approx(theirs, rel=5 * 3 * 36 * 2.0**-24, nan_ok=True)
