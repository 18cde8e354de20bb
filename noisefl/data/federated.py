"""The data a round reads: on the device once, as bytes, with the table of who holds what."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from noisefl.config import refuse
from noisefl.data.load import Dataset
from noisefl.data.partition import partition


@struct.dataclass
class FederatedData:
    """Device arrays. Pixels stay uint8, a quarter of float32; whoever reads them divides by 255.

    Attributes:
      train_images: uint8 [N, H, W, Ch], all training images; no client holds one of validation.
      train_labels: int32 [N].
      clients: int32 [K, P], indices into the training images; row k is valid in its first
        `counts[k]` entries and 0 beyond.
      counts: int32 [K], n_k, between 1 and P.
      validation_images: uint8 [V, H, W, Ch], held by the server and by no client.
      validation_labels: int32 [V].
      test_images: uint8 [T, H, W, Ch].
      test_labels: int32 [T].
    """

    train_images: jax.Array
    train_labels: jax.Array
    clients: jax.Array
    counts: jax.Array
    validation_images: jax.Array
    validation_labels: jax.Array
    test_images: jax.Array
    test_labels: jax.Array


class Holdings(NamedTuple):
    """Who holds which training image, as indices in NumPy; the first step of `federate`.

    Attributes:
      validation: int [V], in the order drawn.
      clients: int32 [K, P], as in `FederatedData`.
      counts: int32 [K].
    """

    validation: np.ndarray
    clients: np.ndarray
    counts: np.ndarray


def holdings(
    labels: np.ndarray,
    *,
    num_clients: int,
    scheme: str,
    seed: int,
    validation_size: int,
    **of_scheme: Any,
) -> Holdings:
    """Which of the N training images go to validation, and which to whom.

    Args:
      labels: integers [N].
      num_clients, scheme, seed, validation_size, of_scheme: as `federate` takes them.

    Raises:
      ValueError: an argument out of range, named with its value.
    """
    if not 1 <= validation_size < len(labels):
        raise refuse("validation_size", validation_size, f"must be 1 to {len(labels) - 1}")
    if seed < 0:
        raise refuse("seed", seed, "must not be negative")
    carve_seed, partition_seed = np.random.SeedSequence(seed).spawn(2)
    drawn = np.random.default_rng(carve_seed).permutation(len(labels))
    held, rest = drawn[:validation_size], np.sort(drawn[validation_size:])
    table = partition(labels[rest], num_clients, scheme, partition_seed, **of_scheme)
    filled = np.arange(table.indices.shape[1]) < table.counts[:, None]
    clients = np.where(filled, rest[table.indices], 0).astype(np.int32)
    return Holdings(held, clients, table.counts)


def federate(
    dataset: Dataset,
    *,
    num_clients: int,
    scheme: str = "iid",
    seed: int,
    validation_size: int = 5000,
    shards_per_client: int = 2,
    alpha: float = 0.5,
    size_sigma: float = 1.0,
) -> FederatedData:
    """Takes a validation split out of the training images, deals the rest out, puts all on device.

    Validation images are drawn uniformly without replacement and lie in the order drawn, so the
    first v of them are a random sample too. The training images that remain keep their order.

    Args:
      dataset: what `load` returned.
      num_clients: K.
      scheme: of `partition`, as are shards_per_client, alpha and size_sigma.
      seed: not negative. Validation and partition are independent streams of it.
      validation_size: V, at least 1 and less than the training images.

    Returns:
      `FederatedData`. No image is in two of a client's table, validation and test unless the source
      itself holds it twice. Images that are on the device already are shared, not copied.

    Raises:
      ValueError: an argument out of range, named with its value.
    """
    held, clients, counts = holdings(
        np.asarray(dataset.train_labels),
        num_clients=num_clients,
        scheme=scheme,
        seed=seed,
        validation_size=validation_size,
        shards_per_client=shards_per_client,
        alpha=alpha,
        size_sigma=size_sigma,
    )
    return FederatedData(
        train_images=jnp.asarray(dataset.train_images),
        train_labels=jnp.asarray(dataset.train_labels),
        clients=jnp.asarray(clients),
        counts=jnp.asarray(counts),
        validation_images=jnp.asarray(dataset.train_images[held]),
        validation_labels=jnp.asarray(dataset.train_labels[held]),
        test_images=jnp.asarray(dataset.test_images),
        test_labels=jnp.asarray(dataset.test_labels),
    )
