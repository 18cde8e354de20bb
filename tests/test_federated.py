"""`federate`: nothing lost, nothing shared between the splits, and the right things on device."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from noisefl.data import (
    PARTITIONS,
    Dataset,
    Deal,
    Federation,
    federate,
    holdings,
    partition,
)


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
        (numbers[:train] % 90).astype(np.int32),
    )


def read(images) -> np.ndarray:
    pixels = np.asarray(images).astype(int)
    return pixels[:, 0, 0, 0] + 256 * pixels[:, 0, 1, 0]


def dealt(seed: int, **fields: Any) -> Any:
    """`numbered` over 7 clients, unless the fields say otherwise."""
    given: Any = {"num_clients": 7, "validation_size": 60, **fields}
    return federate(numbered(), seed=seed, **given)


@pytest.mark.parametrize("how", PARTITIONS)
def test_splits_are_disjoint_and_whole(how):
    data = jax.tree.map(np.asarray, dealt(3, partition=how))
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
    beyond = np.arange(data.clients.shape[1]) >= data.counts[:, None]
    assert not data.clients[beyond].any()


def test_labels_stay_with_their_images():
    data = dealt(3)
    for images, labels in (
        (data.train_images, data.train_labels),
        (data.validation_images, data.validation_labels),
        (data.test_images, data.test_labels),
    ):
        np.testing.assert_array_equal(read(images) * 7 % 10, labels)


def test_the_partition_sees_the_labels_of_the_training_images():
    data = jax.tree.map(np.asarray, dealt(0, num_clients=22, partition="shards"))
    rows = zip(data.clients, data.counts, strict=True)
    kinds = [len(set(data.train_labels[row[:count]])) for row, count in rows]
    assert np.mean(kinds) <= 4  # two shards of ten sorted images; IID would be near 9


def test_types_and_shapes():
    data = dealt(0)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(data))
    found = {**vars(data), **vars(data.images)}
    del found["images"]
    assert {name: (str(leaf.dtype), leaf.shape) for name, leaf in found.items()} == dict(
        train_images=("uint8", (500, 4, 3, 1)),
        train_labels=("int32", (500,)),
        clients=("int32", (7, 63)),
        counts=("int32", (7,)),
        validation_images=("uint8", (60, 4, 3, 1)),
        validation_labels=("int32", (60,)),
        test_images=("uint8", (80, 4, 3, 1)),
        test_labels=("int32", (80,)),
    )
    for name, leaf in vars(data.images).items():
        assert getattr(data, name) is leaf
    assert (data.num_clients, data.image_shape) == (7, (4, 3, 1))
    # A stack of lanes has the same numbers.
    assert data.replace(counts=data.counts[None]).num_clients == 7  # pyright: ignore


def test_a_deal_and_its_fields_say_the_same():
    """Fields by name, a deal, and one on top of the other; numbers as they were written."""
    deal = Deal(num_clients=7, partition="dirichlet", dirichlet_alpha=0.3, validation_size=60)
    by_deal = federate(numbered(), deal, seed=1)
    wide = Deal(num_clients=9, partition="dirichlet", dirichlet_alpha=0.3)
    for other in (
        dealt(1, partition="dirichlet", dirichlet_alpha=0.3),
        federate(numbered(), wide, seed=1, num_clients=7, validation_size=60),
    ):
        jax.tree.map(np.testing.assert_array_equal, by_deal, other)
    labels = numbered().train_labels
    held = holdings(labels, deal, 1)
    np.testing.assert_array_equal(held.clients, by_deal.clients)
    np.testing.assert_array_equal(held.counts, by_deal.counts)
    np.testing.assert_array_equal(labels[held.validation], by_deal.validation_labels)
    # 0.3 in float32 is not 0.3; the shares drawn are those of 0.3.
    rest = np.setdiff1d(np.arange(500), held.validation)
    stream = np.random.SeedSequence(1).spawn(2)[1]
    direct = partition(labels[rest], 7, "dirichlet", stream, dirichlet_alpha=0.3)
    np.testing.assert_array_equal(held.counts, direct.counts)


def test_images_on_the_device_are_shared_by_federations_of_other_seeds():
    source = numbered()
    onto = [jnp.asarray(x) for x in (source.train_images, source.train_labels)]
    placed: Any = Dataset("numbered", *onto, source.test_images, source.test_labels, 10)  # pyright: ignore
    one, two = (federate(placed, num_clients=7, seed=n, validation_size=60) for n in (0, 1))
    assert one.train_images is two.train_images is placed.train_images


def test_a_traced_client_gathers_its_images():
    data = dealt(0)

    @jax.jit
    def total(data: Federation, client):
        valid = jnp.arange(data.clients.shape[1]) < data.counts[client]
        return jnp.sum(jnp.where(valid, data.train_labels[data.clients[client]], 0))

    each = [int(total(data, k)) for k in range(7)]
    assert sum(each) == int(data.train_labels.sum() - data.validation_labels.sum())


def test_seed_decides_everything():
    def numbers(seed, how="iid"):
        data = dealt(seed, partition=how)
        return read(data.validation_images).tolist(), np.asarray(data.clients).tolist()

    assert numbers(0) == numbers(0)
    assert numbers(0)[0] != numbers(1)[0]
    assert numbers(0)[1] != numbers(1)[1]
    # The partition does not disturb the draw of the validation split.
    assert numbers(0)[0] == numbers(0, "lognormal")[0]


def test_validation_and_partition_are_separate_streams():
    """With one stream for both, dealing out would repeat the permutation of the carve."""
    source = numbered(train=501)
    data = federate(source, num_clients=1, partition="iid", seed=5, validation_size=1)
    dealt = np.asarray(data.clients[0])
    rng = np.random.default_rng(5)
    first = rng.permutation(501)
    for stream in (first[first < 500], np.random.default_rng(5).permutation(500)):
        assert np.mean(dealt == stream) < 0.05  # two random permutations agree in 1 place of 500
    carve = np.random.default_rng(np.random.SeedSequence(5).spawn(1)[0]).permutation(500)
    assert np.mean(dealt == carve) < 0.05


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"validation_size": 0}, "validation_size=0: must be a whole number, at least 1$"),
        ({"validation_size": -1}, "validation_size=-1: must be"),
        ({"validation_size": 500}, "validation_size=500: must be 1 to 499$"),
        ({"validation_size": 501}, "validation_size=501: must be 1 to 499$"),
        ({"seed": -1}, "seed=-1"),
        ({"num_clients": 0}, "num_clients=0"),
        ({"num_clients": 441}, "num_clients=441.*440"),
        ({"partition": "shard"}, "partition='shard'.*did you mean shards"),
        ({"partition": "dirichlet", "dirichlet_alpha": -1}, "dirichlet_alpha=-1"),
        ({"partition": "lognormal", "size_sigma": float("nan")}, "size_sigma=nan"),
        ({"partition": "shards", "shards_per_client": 63}, "shards_per_client=63.*1 to 62"),
    ],
)
def test_refusals(changes, says):
    with pytest.raises(ValueError, match=f"^{says}") as caught:
        dealt(**{"seed": 0, **changes})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("unknown", ["scheme", "alpha"])
def test_a_field_that_no_deal_has(unknown):
    with pytest.raises(TypeError, match=unknown):
        dealt(0, **{unknown: 1})
