"""Which client holds which training image: labels → a client table of indices, in NumPy.

Every partition hands out every image exactly once: the clients are a partition of 0 … N − 1.
"""

import math
from numbers import Real
from typing import Any, NamedTuple

import numpy as np

from noisefl.errors import nearest, refuse, whole

NOT_NEGATIVE = "must be a whole number, and not negative"
PARTITIONS = ("iid", "shards", "dirichlet", "lognormal", "writers")


class Partition(NamedTuple):
    """A client table, padded to the largest client.

    Attributes:
      indices: int32 [K, P]: row k holds the images of client k in its first `counts[k]` entries.
        The rest is 0, a valid index: mask by `counts`, never by value.
      counts: int32 [K]: n_k, at least 1. P is the largest.
    """

    indices: np.ndarray
    counts: np.ndarray


def partition(
    labels: np.ndarray,
    num_clients: int,
    how: str,
    seed: int | np.random.SeedSequence,
    *,
    shards_per_client: int = 2,
    dirichlet_alpha: float = 0.5,
    size_sigma: float = 1.0,
    writers: np.ndarray | None = None,
) -> Partition:
    """Deals N images out to K clients, each image to exactly one and at least one to each.

    Ways:
      - `"iid"`: a random permutation cut into K parts whose sizes differ by at most one.
      - `"shards"`: McMahan et al. 2017, section 3: sort by label (stably), cut into
        K · shards_per_client contiguous shards, give each client shards_per_client of them at
        random. Where N is not a multiple, the first N mod K · shards_per_client shards are one
        image longer, so that nothing is dropped.
      - `"dirichlet"`: Yurochkin et al. 2019, section 4: each class is split over the clients in
        proportions drawn from Dirichlet(dirichlet_alpha · 1_K). Sizes become unequal as well as
        labels. A client left empty then receives one image from the largest client.
      - `"lognormal"`: labels IID; sizes in proportion to exp(size_sigma · z_k), z_k ~ N(0, 1).
      - `"writers"`: whole writers, dealt out at random; of as many clients as writers each is one.
        Each client has one image for certain; the other N − K are dealt in proportion, rounded by
        largest remainder.

    Args:
      labels: integers [N].
      num_clients: K, at most N.
      how: one of `PARTITIONS`.
      seed: not negative. The same seed gives the same table within one NumPy release; NumPy
        reserves the right to change the streams of its generators between releases.
      shards_per_client: of `"shards"`.
      dirichlet_alpha: of `"dirichlet"`, positive: small is few labels a client, large is near IID.
      size_sigma: of `"lognormal"`, standard deviation of log size; 0 is equal sizes.
      writers: of `"writers"`, integers [N]: who made which image.

    Returns:
      The client table, [K, P].

    Raises:
      ValueError: an argument out of range, named with its value.

    References:
      McMahan et al. 2017, arXiv 1602.05629. Yurochkin et al. 2019, Bayesian Nonparametric
      Federated Learning of Neural Networks, arXiv 1905.12022.
    """
    labels = integers("labels", labels)
    if not (isinstance(how, str) and how in PARTITIONS):
        raise refuse("partition", how, nearest(str(how), PARTITIONS))
    allowed = f"must be 1 to {len(labels)}, the training images"
    num_clients = whole("num_clients", num_clients, 1, len(labels), allowed)
    if not isinstance(seed, np.random.SeedSequence):
        seed = whole("seed", seed, 0, math.inf, NOT_NEGATIVE)
    rng = np.random.default_rng(seed)
    if how == "iid":
        clients = np.array_split(rng.permutation(len(labels)), num_clients)
    elif how == "shards":
        clients = _shards(labels, num_clients, shards_per_client, rng)
    elif how == "dirichlet":
        clients = _dirichlet(labels, num_clients, dirichlet_alpha, rng)
    elif how == "lognormal":
        clients = _lognormal(len(labels), num_clients, size_sigma, rng)
    else:
        clients = _by_writer(writers, len(labels), num_clients, rng)
    return _padded(clients)


def integers(name: str, given: Any, size: int | None = None) -> np.ndarray:
    """Integers [N], of at least one image, and of so many if that is said.

    Raises:
      ValueError: anything else.
    """
    try:
        found = np.asarray(given)
    except (TypeError, ValueError):  # keys of JAX; lists of lists of several lengths
        found = np.zeros(0)
    if found.dtype.kind not in "iu" or found.ndim != 1 or len(found) != (size or len(found) or 1):
        raise refuse(name, given, f"must be integers [{size or 'N'}]")
    return found


def _shards(
    labels: np.ndarray, num_clients: int, shards_per_client: int, rng: np.random.Generator
) -> list[np.ndarray]:
    most = len(labels) // num_clients
    allowed = f"must be 1 to {most}, the images a client with num_clients={num_clients}"
    shards_per_client = whole("shards_per_client", shards_per_client, 1, most, allowed)
    by_label = np.argsort(labels, kind="stable")
    shards = np.array_split(by_label, num_clients * shards_per_client)
    dealt = rng.permutation(len(shards)).reshape(num_clients, shards_per_client)
    return [np.concatenate([shards[shard] for shard in row]) for row in dealt]


def _dirichlet(
    labels: np.ndarray, num_clients: int, alpha: float, rng: np.random.Generator
) -> list[np.ndarray]:
    # Beyond, the sum of K alphas may overflow and the shares with it.
    if not (isinstance(alpha, Real) and 0 < alpha <= 1e9):
        raise refuse("dirichlet_alpha", alpha, "must be positive, and at most 1e9")
    pieces: list[list[np.ndarray]] = [[] for _ in range(num_clients)]
    for label in np.unique(labels):
        images = rng.permutation(np.flatnonzero(labels == label))
        shares = rng.dirichlet(np.full(num_clients, float(alpha)))
        cuts = np.rint(np.cumsum(shares[:-1]) * len(images)).astype(int)
        for client, piece in zip(pieces, np.split(images, cuts), strict=True):
            client.append(piece)
    clients = [np.concatenate(client) for client in pieces]
    for k, client in enumerate(clients):
        # Moving one image ends for certain; drawing anew until nobody is empty need not.
        if len(client) == 0:
            donor = max(range(num_clients), key=lambda j: len(clients[j]))
            taken = rng.integers(len(clients[donor]))  # the pieces lie in the order of labels
            clients[k] = clients[donor][taken : taken + 1]
            clients[donor] = np.delete(clients[donor], taken)
    return clients


def _lognormal(
    num_images: int, num_clients: int, size_sigma: float, rng: np.random.Generator
) -> list[np.ndarray]:
    if not (isinstance(size_sigma, Real) and 0 <= size_sigma <= 100):
        raise refuse("size_sigma", size_sigma, "must be 0 to 100")
    logs = float(size_sigma) * rng.standard_normal(num_clients)
    weights = np.exp(logs - logs.max())  # the largest is 1: no overflow at any sigma
    ideal = (num_images - num_clients) * weights / weights.sum()
    extra = np.floor(ideal).astype(int)
    missing = num_images - num_clients - extra.sum()
    extra[np.argsort(extra - ideal, kind="stable")[:missing]] += 1
    return np.split(rng.permutation(num_images), np.cumsum(1 + extra)[:-1])


def _by_writer(
    writers: np.ndarray | None, images: int, num_clients: int, rng: np.random.Generator
) -> list[np.ndarray]:
    if writers is None:
        raise refuse("partition", "writers", "the data set does not say who made its images")
    writers = integers("writers", writers, images)
    by_writer = np.argsort(writers, kind="stable")
    starts = np.flatnonzero(np.diff(writers[by_writer])) + 1
    pieces = np.split(by_writer, starts)
    if num_clients > len(pieces):
        allowed = f"must be 1 to {len(pieces)}, the writers of the training images"
        raise refuse("num_clients", num_clients, allowed)
    dealt = np.array_split(rng.permutation(len(pieces)), num_clients)
    return [np.concatenate([pieces[writer] for writer in some]) for some in dealt]


def _padded(clients: list[np.ndarray]) -> Partition:
    counts = np.array([len(client) for client in clients], np.int32)
    indices = np.zeros((len(clients), counts.max()), np.int32)
    for row, client in zip(indices, clients, strict=True):
        row[: len(client)] = client
    return Partition(indices, counts)
