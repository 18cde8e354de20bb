"""Strict settings for all tests, and the tiny federation that several of them run on."""

import os
import signal
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from noisefl.data import Federation, Images

# XLA dies of a flag that it does not know; this one went with JAX 0.11.1.
EMITTERS = jax.__version_info__ < (0, 11, 1)
# Compiles in a third of the time, here and in the processes that tests start.
QUICK = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1" + (
    " --xla_cpu_use_fusion_emitters=false" if EMITTERS else ""
)
# What users get, XLA's default, is compared with it where that matters: options of one compilation,
# or the environment of a process.
DEFAULT: Any = {
    "xla_backend_optimization_level": 3,
    **({"xla_cpu_use_fusion_emitters": True} if EMITTERS else {}),
}
USERS = {"XLA_FLAGS": os.environ.get("XLA_FLAGS", "")}


def pytest_configure(config):
    """XLA reads its flags when a device is first used, which is after this."""
    os.environ["XLA_FLAGS"] = f"{USERS['XLA_FLAGS']} {QUICK}".strip()
    # What a shell starts with `&` ignores Ctrl-C, and so does what that starts; tests send it.
    signal.signal(signal.SIGINT, signal.default_int_handler)


jax.config.update("jax_legacy_prng_key", "error")  # typed keys only
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def no_leaked_settings():
    """A test that changes JAX's global settings must put them back."""
    before = dict(jax.config.values)
    yield
    after = dict(jax.config.values)
    assert {k: v for k, v in after.items() if before.get(k) != v} == {}


class TinyCNN(nn.Module):
    """One convolution and one dense layer, 3 classes: 137 parameters on 6 × 6 images."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.max_pool(nn.relu(nn.Conv(4, (3, 3), name="conv1")(x)), (2, 2), (2, 2))
        return nn.Dense(3, name="dense1")(x.reshape(x.shape[0], -1))


@pytest.fixture(scope="session")
def tiny_model() -> nn.Module:
    return TinyCNN()


@pytest.fixture(scope="session")
def tiny_data() -> Federation:
    """6 ragged clients of 6 × 6 images whose class is the brightest third of the columns."""
    rng = np.random.default_rng(5)

    def split(size: int) -> tuple[jax.Array, jax.Array]:
        labels = rng.integers(0, 3, size).astype(np.int32)
        images = rng.integers(0, 120, (size, 6, 6, 1)).astype(np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[:, 2 * label : 2 * label + 2] += 100
        return jnp.asarray(images), jnp.asarray(labels)

    counts = np.array([9, 5, 7, 3, 8, 6], np.int32)
    table, start = np.zeros((6, 9), np.int32), 0
    for row, count in zip(table, counts, strict=True):
        row[:count] = np.arange(start, start + count)
        start += count
    train, validation, test = split(start), split(21), split(34)
    images = Images(*train, *test)
    return Federation(images, jnp.asarray(table), jnp.asarray(counts), *validation)
