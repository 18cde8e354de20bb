"""From options to data and a model that takes them; complaints are about flags."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from experiments.options import FEDERATE, Options
from noisefl import Dataset, FederatedData, federate, load
from noisefl.config import refuse
from noisefl.data import holdings
from noisefl.models import by_name


@functools.lru_cache(maxsize=1)  # the images of one data set at a time
def dataset_of(name: str, data_dir: str | None) -> Dataset:
    """A data set with its images on the device, where every lane can share them.

    Raises:
      ValueError, OSError: as `load` does.
    """
    dataset = load(name, data_dir)
    return dataclasses.replace(
        dataset,
        train_images=jnp.asarray(dataset.train_images),
        test_images=jnp.asarray(dataset.test_images),
    )


def federated(dataset: Dataset, federation: dict[str, Any]) -> FederatedData:
    """`federate`, whose complaints about arguments become ones about flags."""
    with _in_flags():
        return federate(dataset, **federation)


def table_width(dataset: Dataset, federation: dict[str, Any]) -> int:
    """Columns of the table of `federated`, in a tenth of its time; complains as it does."""
    with _in_flags():
        return holdings(dataset.train_labels, **federation).clients.shape[1]


def model_of(options: Options, dataset: Dataset) -> nn.Module:
    """Raises ValueError if the model does not take the data set's images."""
    shape = dataset.train_images.shape[1:]
    name = options.driver.model
    model = by_name(name, dataset.num_classes, options.lowering)
    try:
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *shape)))
    except (ValueError, TypeError, ZeroDivisionError):
        raise refuse("model", name, f"does not take images of shape {shape}") from None
    return model


@contextlib.contextmanager
def _in_flags() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        message = str(error)
        for flag, name in FEDERATE.items():
            if message.startswith(f"{name}="):
                message = flag + message.removeprefix(name)
                break
        raise ValueError(message) from None
