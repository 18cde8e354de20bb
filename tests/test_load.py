"""`load` from the package and from files, and the one order that every route ends in."""

import gzip
import hashlib
import importlib.resources
import io
import os
import sys
import zipfile

import fuzz
import numpy as np
import pytest
from data_files import FIELDS, assert_same, idx_bytes, pairs, refuses, tiny, write_idx, write_npz

from noisefl import data
from noisefl.data import load

# --- embedded MNIST -------------------------------------------------------------------------------


def test_embedded_file_is_the_original():
    folder = importlib.resources.files("noisefl.data") / "mnist"
    readme = (folder / "README.md").read_text()
    with (folder / "mnist.npz").open("rb") as file, np.load(file) as arrays:
        stored = [arrays[key] for key in ("x_train", "y_train", "x_test", "y_test")]
    # The published sha256 of the four files, decompressed.
    known = (
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    )
    for array, digest in zip(stored, known, strict=True):
        assert hashlib.sha256(idx_bytes(array)).hexdigest() == digest
        assert digest in readme
    assert stored[1][:5].tolist() == [5, 0, 4, 1, 9]
    assert stored[3][:5].tolist() == [7, 2, 1, 0, 4]
    for words in ("LeCun", "Cortes", "Burges", "Share Alike 3.0"):
        assert words in readme


@pytest.fixture(scope="module")
def mnist():
    return load("mnist")


def test_embedded_mnist_loads_whole(mnist):
    data = mnist
    assert data.train_images.shape == (60000, 28, 28, 1)
    assert data.test_images.shape == (10000, 28, 28, 1)
    assert data.train_images.dtype == data.test_images.dtype == np.uint8
    assert data.train_labels.dtype == data.test_labels.dtype == np.int32
    assert data.num_classes == 10
    train = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    test = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert np.bincount(data.train_labels).tolist() == train
    assert np.bincount(data.test_labels).tolist() == test
    # Every image kept its label through the sort.
    embedded = importlib.resources.files("noisefl.data") / "mnist" / "mnist.npz"
    with embedded.open("rb") as file, np.load(file) as arrays:
        stored = pairs(arrays["x_test"], arrays["y_test"])
    assert pairs(data.test_images, data.test_labels) == stored


def test_order_is_pinned(mnist):
    """A changed hash or sort would silently change the meaning of every published seed."""
    assert mnist.train_labels[:10].tolist() == [4, 3, 8, 3, 2, 4, 9, 6, 4, 3]


# --- folders and .npz -----------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("dot", [True, False])
def test_idx_folder_round_trip(tmp_path, dot, zipped):
    arrays = tiny(classes=7)
    data = load(write_idx(tmp_path / "digits", arrays, dot, zipped))
    assert data.num_classes == 7
    assert data.train_images.shape == (30, 28, 28, 1)
    assert pairs(data.train_images, data.train_labels) == pairs(*arrays[:2])
    assert pairs(data.test_images, data.test_labels) == pairs(*arrays[2:])


@pytest.mark.parametrize("keys", [("x_train", "y_train", "x_test", "y_test"), FIELDS])
@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 1), (5, 4, 3)])
def test_npz_round_trip(tmp_path, keys, shape):
    arrays = tiny(shape=shape)
    data = load(write_npz(tmp_path / "a.npz", arrays, keys))
    assert data.train_images.shape == (30, 5, 4, shape[2] if len(shape) == 3 else 1)
    assert pairs(data.train_images, data.train_labels) == pairs(*arrays[:2])


def test_npz_of_keras_cifar_has_column_labels(tmp_path):
    x, y, x_test, y_test = tiny(shape=(8, 8, 3))
    flat = load(write_npz(tmp_path / "flat.npz", [x, y, x_test, y_test]))
    column = [x, y[:, None].astype(np.int64), x_test, y_test[:, None].astype(np.int64)]
    assert_same(flat, load(write_npz(tmp_path / "column.npz", column)))


def test_order_does_not_depend_on_the_route_or_the_stored_order(tmp_path):
    arrays = tiny()
    arrays[0][7], arrays[1][7] = arrays[0][3], arrays[1][3]  # a duplicate
    arrays[0][8], arrays[1][8] = arrays[0][4], (arrays[1][4] + 1) % 10  # one image, two labels
    rng = np.random.default_rng(1)
    train, test = rng.permutation(30), rng.permutation(12)
    shuffled = [arrays[0][train], arrays[1][train], arrays[2][test], arrays[3][test]]
    folder = load(write_idx(tmp_path / "raw", arrays))
    assert_same(folder, load(write_npz(tmp_path / "shuffled.npz", shuffled)))


def test_bare_name_is_never_a_folder(tmp_path, monkeypatch):
    write_idx(tmp_path / "no_such_set", tiny())
    monkeypatch.chdir(tmp_path)
    assert "image set of TFDS" in refuses("no_such_set")
    assert load("./no_such_set").num_classes == 10


@pytest.mark.parametrize(
    ("position", "change", "says"),
    [
        (0, lambda x: x.astype(np.float32) / 255, "uint8"),
        (0, lambda x: x.astype(np.int64), "uint8"),
        (0, lambda x: x[0], "uint8"),
        (0, lambda x: x[:-1], "labels must be integers"),
        (0, lambda x: x[:, :-1], "one shape"),
        (0, lambda x: x[:, :0], "no training images"),
        (1, lambda y: y.astype(np.float32), "labels must be integers"),
        (1, lambda y: y[:, None].repeat(2, 1), "labels must be integers"),
        (1, lambda y: y.astype(np.int64) - 10, "0 or more"),
        (3, lambda y: y[:0], "labels must be integers"),
    ],
)
def test_bad_arrays_are_refused(tmp_path, position, change, says):
    arrays = tiny()
    arrays[position] = change(arrays[position])
    assert says in refuses(write_npz(tmp_path / "a.npz", arrays))


def test_bad_files_are_refused(tmp_path):
    path = tmp_path / "a.npz"
    assert "no such file" in refuses(str(path))
    path.write_bytes(b"not a zip")
    assert ".npz" in refuses(str(path))
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    assert ".npz" in refuses(str(path))
    assert "holds a, b" in refuses(write_npz(path, tiny()[:2], ("a", "b")))

    folder = write_idx(tmp_path / "digits", tiny())
    labels = tmp_path / "digits" / "train-labels-idx1-ubyte.gz"
    good = labels.read_bytes()
    labels.write_bytes(good[:-9])
    assert "whole gzip" in refuses(folder)
    whole = idx_bytes(np.zeros(30, np.uint8))
    for wrong in (whole[:-1], whole + b"0"):
        labels.write_bytes(gzip.compress(wrong))
        assert "header" in refuses(folder)
    labels.write_bytes(gzip.compress(b"\0\0\x0d\1" + bytes(34)))  # element type 13 is float32
    assert "unsigned bytes" in refuses(folder)
    labels.unlink()
    assert "train-labels" in refuses(folder)
    assert "data_dir" in refuses(folder, data_dir=str(tmp_path))


def zeros(size: int) -> bytes:
    """As gzip, in a thousandth of the room."""
    return gzip.compress(bytes(1 << 24), mtime=0) * (size >> 24)


def test_what_is_no_data_set_is_not_read_to_its_end(tmp_path):
    """Nor is what a header declares allocated: of all of them there is no room for a tenth."""
    images = tmp_path / "digits" / "train-images-idx3-ubyte.gz"
    folder, sound = write_idx(tmp_path / "digits", tiny()), images.read_bytes()
    huge = b"\0\0\x08\x03" + (2**31).to_bytes(4, "big") * 3
    with fuzz.thrifty(1 << 28):
        for content in (
            sound + zeros(1 << 32),
            gzip.compress(huge),
            gzip.compress(huge) + zeros(1 << 30),
        ):
            images.write_bytes(content)
            assert "holds fewer or more bytes than its header" in refuses(folder)
        images.unlink()
        with (tmp_path / "digits" / "train-images-idx3-ubyte").open("wb") as file:
            file.write(idx_bytes(tiny()[0]))
            file.truncate(1 << 40)  # of holes
        assert "holds fewer or more" in refuses(folder)
        lies = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            lies, {"descr": "|u1", "fortran_order": False, "shape": (2**40,)}
        )
        write_members(tmp_path / "a.npz", lies.getvalue())
        assert "MemoryError" in refuses(str(tmp_path / "a.npz"))
    os.mkfifo(tmp_path / "b.npz")
    assert "must be a file or a folder" in refuses(str(tmp_path / "b.npz"))
    assert "cannot be read" in refuses("~no_such_user/a.npz")
    too_long = "no such file or folder" if sys.version_info >= (3, 14) else "cannot be read"
    assert too_long in refuses(f"./{'a' * 300}")
    with pytest.raises(ValueError, match=r"^dataset=.*: must be a text: a name or a path$"):
        load(tmp_path / "a.npz")


def write_members(path, first: bytes) -> None:
    """An .npz whose x_train is what it is."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x_train.npy", first)
        for name in ("y_train", "x_test", "y_test"):
            archive.writestr(f"{name}.npy", b"")


def test_a_header_that_says_less_than_there_is_hides_nothing(tmp_path):
    """NumPy reads what the header says, and compares the checksum at the end of the file only."""
    path = tmp_path / "a.npz"
    write_npz(path, tiny())
    raw = path.read_bytes()
    for count in (b"(30,", b"(12,"):  # of images, and of labels as well
        raw = raw.replace(count, b"(10,")
    path.write_bytes(raw)
    assert "x_train holds more than its header" in refuses(str(path))


# `arrays`, writers and channels


def some(shape=(12, 3, 4, 2)):
    rng = np.random.default_rng(3)
    return rng.integers(0, 256, shape).astype(np.uint8), rng.integers(0, 3, shape[0])


def test_arrays_come_in_the_order_of_every_other_route(tmp_path):
    train, test, writers = some(), some((5, 3, 4, 2)), np.arange(12) // 3 * 10
    names = "x_train", "y_train", "x_test", "y_test"
    stored = dict(zip(names, (*train, *test), strict=True))
    np.savez(tmp_path / "mine.npz", **stored, train_writers=writers)
    one, other = data.arrays(*train, *test, train_writers=writers), load(str(tmp_path / "mine.npz"))
    for field in ("train_images", "train_labels", "test_images", "test_labels", "train_writers"):
        np.testing.assert_array_equal(getattr(one, field), getattr(other, field), err_msg=field)
    assert one.num_classes == 3
    # Writers are numbered from 0, and stay with their images.
    found = {image.tobytes(): int(w) for image, w in zip(train[0], writers, strict=True)}
    assert one.train_writers is not None
    for image, writer in zip(one.train_images, one.train_writers, strict=True):
        assert found[image.tobytes()] == 10 * writer
    with pytest.raises(ValueError, match=r"^dataset='arrays': writers must be integers \[N\], are"):
        data.arrays(*train, *test, train_writers=writers[:-1])
    with pytest.raises(ValueError, match=r"^dataset='mine': has label 2, allowed are 0 to 1"):
        data.arrays(*train, *test, num_classes=2, name="mine")


def test_channels_are_those_of_the_training_images():
    train, test = some(), some((5, 3, 4, 2))
    train[0][..., 1] = 7
    means, deviations = data.channels_of(data.arrays(*train, *test))
    pixels = train[0].astype(float) / 255
    np.testing.assert_allclose(means, pixels.mean((0, 1, 2)), atol=1e-6)
    np.testing.assert_allclose(deviations, [pixels[..., 0].std(), 1.0], atol=1e-6)
    # Of MNIST as everybody quotes them.
    assert data.channels_of(load("mnist")) == ((0.13066,), (0.308108,))
