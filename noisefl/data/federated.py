"""The data a round reads: on the device once, as bytes, with the table of who holds what."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from noisefl.data.load import Dataset
from noisefl.data.partition import NOT_NEGATIVE, PARTITIONS, integers, partition
from noisefl.errors import refuse, whole
from noisefl.parts import Part, choice, number, part, size


@struct.dataclass
class Images:
    """What all lanes of a program share. Pixels stay uint8; whoever reads them divides by 255."""

    train_images: jax.Array  # uint8 [N, H, W, Ch], all of them; no client holds one of validation
    train_labels: jax.Array  # int32 [N]
    test_images: jax.Array  # uint8 [T, H, W, Ch]
    test_labels: jax.Array  # int32 [T]


@struct.dataclass
class Federation:
    """Device arrays: the images, and a lane's own table of clients and validation split."""

    images: Images
    clients: jax.Array  # int32 [K, P]: row k holds indices into the training images in its first
    counts: jax.Array  # int32 [K]: n_k entries, between 1 and P, and 0 beyond
    validation_images: jax.Array  # uint8 [V, H, W, Ch], held by the server and by no client
    validation_labels: jax.Array  # int32 [V]

    @property
    def train_images(self) -> jax.Array:
        """uint8 [N, H, W, Ch]."""
        return self.images.train_images

    @property
    def train_labels(self) -> jax.Array:
        """int32 [N]."""
        return self.images.train_labels

    @property
    def test_images(self) -> jax.Array:
        """uint8 [T, H, W, Ch]."""
        return self.images.test_images

    @property
    def test_labels(self) -> jax.Array:
        """int32 [T]."""
        return self.images.test_labels

    @property
    def num_clients(self) -> int:
        """K."""
        return self.counts.shape[-1]

    def classes_of(self, clients: jax.Array, classes: int) -> jax.Array:
        """int32 [M, C]: how many images of each of the C classes these clients, int32 [M], own."""
        rows = self.clients[clients]
        valid = jnp.arange(rows.shape[1]) < self.counts[clients][:, None]
        labels = jnp.where(valid, self.train_labels[rows], classes)  # no image, no class
        nobody = jnp.zeros((rows.shape[0], classes), jnp.int32)
        return nobody.at[jnp.arange(rows.shape[0])[:, None], labels].add(1, mode="drop")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, Ch)."""
        height, width, channels = self.images.train_images.shape[1:]
        return height, width, channels


@part
class Deal(Part):
    """How training images are dealt out: some to the server's validation split, the rest to
    clients.

    McMahan et al. 2017, section 3, for "iid" and "shards"; see `partition`.
    """

    num_clients: int = size(100, "K, the population", unit="clients")
    partition: str = choice("iid", PARTITIONS, "how training images are dealt out to the clients")
    shards_per_client: int = size(2, "of shards: label-sorted pieces a client gets", unit="shards")
    dirichlet_alpha: Any = number(
        0.5, "of dirichlet: small is few labels a client, large is near IID", low=0, high=1e9,
        inside="(]",
    )  # fmt: skip
    size_sigma: Any = number(
        1.0, "of lognormal: standard deviation of log client size", low=0, high=100
    )
    validation_size: int = size(
        5000, "training images that the server keeps for validation", unit="images"
    )


class Holdings(NamedTuple):
    """Who holds which training image, as indices in NumPy; the first step of `federate`."""

    validation: np.ndarray  # int [V], in the order drawn
    clients: np.ndarray  # int [K, P], as in `Federation`
    counts: np.ndarray  # int32 [K]


def holdings(
    labels: np.ndarray, deal: Deal, seed: int, writers: np.ndarray | None = None
) -> Holdings:
    """Which of the N training images go to validation, and which to whom.

    Args:
      labels: integers [N].
      deal: how.
      seed: as of `federate`.
      writers: integers [N], of `Dataset`.

    Raises:
      ValueError: an argument out of range, named with its value.
    """
    labels = integers("labels", labels)
    if not isinstance(deal, Deal):
        raise refuse("deal", deal, "must be a noisefl.Deal")
    if not 1 <= deal.validation_size < len(labels):
        raise refuse("validation_size", deal.validation_size, f"must be 1 to {len(labels) - 1}")
    seed = whole("seed", seed, 0, math.inf, NOT_NEGATIVE)
    for name in ("dirichlet_alpha", "size_sigma"):
        if np.ndim(getattr(deal, name)):
            raise refuse(
                name, getattr(deal, name), "must be one number: lanes are dealt one by one"
            )
    if writers is not None:
        writers = integers("writers", writers, len(labels))
    carve_seed, partition_seed = np.random.SeedSequence(seed).spawn(2)
    drawn = np.random.default_rng(carve_seed).permutation(len(labels))
    held, rest = drawn[: deal.validation_size], np.sort(drawn[deal.validation_size :])
    table = partition(
        labels[rest],
        deal.num_clients,
        deal.partition,
        partition_seed,
        shards_per_client=deal.shards_per_client,
        dirichlet_alpha=float(str(deal.dirichlet_alpha)),
        size_sigma=float(str(deal.size_sigma)),
        writers=None if writers is None else writers[rest],
    )
    filled = np.arange(table.indices.shape[1]) < table.counts[:, None]
    clients = np.where(filled, rest[table.indices], 0).astype(np.int32)
    return Holdings(held, clients, table.counts)


def federate(dataset: Dataset, deal: Deal | None = None, *, seed: int, **fields: Any) -> Federation:
    """Takes a validation split out of the training images, deals the rest out, puts all on device.

    Validation images are drawn uniformly without replacement and lie in the order drawn, so the
    first v of them are a random sample too. The training images that remain keep their order.

    Args:
      dataset: what `load` returned.
      deal: how; or its fields by name, e.g. `num_clients=100, partition="shards"`.
      seed: not negative. Validation and partition are independent streams of it.

    Returns:
      `Federation`. No image is in two of a client's table, validation and test unless the source
      itself holds it twice. Images that are on the device already are shared, not copied.

    Raises:
      ValueError: an argument out of range, named with its value.
    """
    if not isinstance(dataset, Dataset):
        raise refuse(
            "dataset", dataset, "must be what noisefl.load or noisefl.data.arrays returned"
        )
    if not isinstance(deal, Deal | None):
        raise refuse("deal", deal, "must be a noisefl.Deal, or None")
    how: Deal = Deal(**fields) if deal is None else deal.replace(**fields)
    held, clients, counts = holdings(
        np.asarray(dataset.train_labels), how, seed, dataset.train_writers
    )
    return Federation(
        images=Images(
            train_images=jnp.asarray(dataset.train_images),
            train_labels=jnp.asarray(dataset.train_labels),
            test_images=jnp.asarray(dataset.test_images),
            test_labels=jnp.asarray(dataset.test_labels),
        ),
        clients=jnp.asarray(clients),
        counts=jnp.asarray(counts),
        validation_images=jnp.asarray(dataset.train_images[held]),
        validation_labels=jnp.asarray(dataset.train_labels[held]),
    )
