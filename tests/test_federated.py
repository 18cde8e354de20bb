"""`federate`: nothing lost, nothing shared between the splits, and the right things on device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from noisefl.data import SCHEMES, Dataset, FederatedData, federate


def numbered(train=500, test=80, classes=10) -> Dataset:
    """Image i of the source shows the number i; its label is a function of that number."""

    def images(numbers):
        pixels = np.zeros((len(numbers), 4, 3, 1), np.uint8)
        pixels[:, 0, 0, 0], pixels[:, 0, 1, 0] = numbers % 256, numbers // 256
        return pixels

    numbers = np.arange(train + test)
    labels = (numbers * 7 % classes).astype(np.int32)
    return Dataset(
        "numbered",
        images(numbers[:train]),
        labels[:train],
        images(numbers[train:]),
        labels[train:],
        classes,
    )


def read(images) -> np.ndarray:
    pixels = np.asarray(images).astype(int)
    return pixels[:, 0, 0, 0] + 256 * pixels[:, 0, 1, 0]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_splits_are_disjoint_and_whole(scheme):
    data = federate(numbered(), num_clients=7, scheme=scheme, seed=3, validation_size=60)
    train, validation, test = (
        read(images) for images in (data.train_images, data.validation_images, data.test_images)
    )
    assert len(validation) == 60
    assert len(set(validation)) == 60
    assert train.tolist() == list(range(500))
    assert test.tolist() == list(range(500, 580))
    # The clients' images, gathered as a round gathers them, are the others, once each.
    held = [
        number
        for row, count in zip(data.clients, data.counts, strict=True)
        for number in read(data.train_images[row[:count]])
    ]
    assert sorted([*held, *validation]) == list(range(500))
    beyond = np.arange(data.clients.shape[1]) >= np.asarray(data.counts)[:, None]
    assert not np.asarray(data.clients)[beyond].any()


def test_labels_stay_with_their_images():
    data = federate(numbered(), num_clients=7, seed=3, validation_size=60)
    for images, labels in (
        (data.train_images, data.train_labels),
        (data.validation_images, data.validation_labels),
        (data.test_images, data.test_labels),
    ):
        np.testing.assert_array_equal(read(images) * 7 % 10, labels)


def test_the_scheme_sees_the_labels_of_the_training_images():
    data = federate(numbered(), num_clients=22, scheme="shards", seed=0, validation_size=60)
    labels = np.asarray(data.train_labels)
    kinds = [len(set(labels[row[:n]])) for row, n in zip(data.clients, data.counts, strict=True)]
    assert np.mean(kinds) <= 4  # two shards of ten sorted images; IID would be near 9


def test_types_and_shapes():
    data = federate(numbered(), num_clients=7, seed=0, validation_size=60)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(data))
    assert {name: (str(leaf.dtype), leaf.shape) for name, leaf in vars(data).items()} == dict(
        train_images=("uint8", (500, 4, 3, 1)),
        train_labels=("int32", (500,)),
        clients=("int32", (7, 63)),
        counts=("int32", (7,)),
        validation_images=("uint8", (60, 4, 3, 1)),
        validation_labels=("int32", (60,)),
        test_images=("uint8", (80, 4, 3, 1)),
        test_labels=("int32", (80,)),
    )


def test_a_traced_client_gathers_its_images():
    data = federate(numbered(), num_clients=7, seed=0, validation_size=60)

    @jax.jit
    def total(data: FederatedData, client):
        valid = jnp.arange(data.clients.shape[1]) < data.counts[client]
        return jnp.sum(jnp.where(valid, data.train_labels[data.clients[client]], 0))

    each = [int(total(data, k)) for k in range(7)]
    assert sum(each) == int(data.train_labels.sum() - data.validation_labels.sum())


def test_seed_decides_everything():
    def numbers(seed, scheme="iid"):
        data = federate(numbered(), num_clients=7, scheme=scheme, seed=seed, validation_size=60)
        return read(data.validation_images).tolist(), np.asarray(data.clients).tolist()

    assert numbers(0) == numbers(0)
    assert numbers(0)[0] != numbers(1)[0]
    assert numbers(0)[1] != numbers(1)[1]
    # The scheme does not disturb the draw of the validation split.
    assert numbers(0)[0] == numbers(0, "lognormal")[0]


def test_validation_and_partition_are_separate_streams():
    """With one stream for both, dealing out would repeat the permutation of the carve."""
    source = numbered(train=501)
    data = federate(source, num_clients=1, scheme="iid", seed=5, validation_size=1)
    dealt = np.asarray(data.clients[0])
    rng = np.random.default_rng(5)
    first = rng.permutation(501)
    for stream in (first[first < 500], np.random.default_rng(5).permutation(500)):
        assert np.mean(dealt == stream) < 0.05  # two random permutations agree in 1 place of 500
    carve = np.random.default_rng(np.random.SeedSequence(5).spawn(1)[0]).permutation(500)
    assert np.mean(dealt == carve) < 0.05


@pytest.mark.parametrize("size", [0, -1, 500, 501])
def test_validation_size_out_of_range(size):
    with pytest.raises(ValueError, match=f"^validation_size={size}: must be 1 to 499$"):
        federate(numbered(), num_clients=7, seed=0, validation_size=size)


def test_other_refusals():
    with pytest.raises(ValueError, match=r"^seed=-1"):
        federate(numbered(), num_clients=7, seed=-1, validation_size=60)
    with pytest.raises(ValueError, match=r"^num_clients=441.*440"):
        federate(numbered(), num_clients=441, seed=0, validation_size=60)
    with pytest.raises(ValueError, match=r"^alpha=-1"):
        federate(
            numbered(), num_clients=7, scheme="dirichlet", alpha=-1, seed=0, validation_size=60
        )
