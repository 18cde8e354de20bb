"""A name or a path → images and labels, in one fixed order whatever the source.

Routes: MNIST embedded in this package, a folder of idx files, an .npz file, TensorFlow Datasets.
TFDS shuffles relative to the original files, so the same image has another index on another route
and a partition by index would mean another thing. Every route therefore ends with the same sort,
by a hash of each image and its label (`_canonical_order`).
"""

import dataclasses
import functools
import hashlib
import importlib.resources
import os
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np

from noisefl.data import idx, tfds
from noisefl.errors import refuse, whole

WRITERS = "train_writers"
_NPZ_KEYS = (  # of Keras, then our own
    ("x_train", "y_train", "x_test", "y_test"),
    ("train_images", "train_labels", "test_images", "test_labels"),
)


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Images and labels on the host, in the canonical order.

    Attributes:
      name: what `load` was asked for.
      train_images: uint8 [N, H, W, Ch], 0 to 255.
      train_labels: int32 [N], 0 to C − 1.
      test_images: uint8 [N of test, H, W, Ch].
      test_labels: int32 [N of test].
      num_classes: C.
    """

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    num_classes: int
    train_writers: np.ndarray | None = None  # int32 [N]: who made which, where the source says


def arrays(
    train_images: np.ndarray, train_labels: np.ndarray, test_images: np.ndarray,
    test_labels: np.ndarray, num_classes: int | None = None,
    train_writers: np.ndarray | None = None, name: str = "arrays",
) -> Dataset:  # fmt: skip
    """A data set of any arrays, checked and put into the order of all other routes.

    Args:
      train_images: uint8 [N, H, W] or [N, H, W, Ch].
      train_labels: integers [N], from 0.
      test_images: uint8, of the same shape but for their number.
      test_labels: integers.
      num_classes: C; None is the largest label + 1.
      train_writers: integers [N]: who made which image, for `partition="writers"`.
      name: for messages.

    Raises:
      ValueError: an array of another type or shape, or a label out of range.
    """
    given = {
        "train_images": train_images, "train_labels": train_labels,
        "test_images": test_images, "test_labels": test_labels,
    }  # fmt: skip
    train_x, train_y, test_x, test_y = (_array(of, values) for of, values in given.items())
    if num_classes is not None:
        allowed = "must be a whole number, at least 1, or None"
        num_classes = whole("num_classes", num_classes, 1, 2**31 - 1, allowed)
    if train_writers is not None:
        train_writers = _array("train_writers", train_writers)
    return _dataset(name, (train_x, train_y, test_x, test_y), num_classes, train_writers)


def _array(name: str, given: Any) -> np.ndarray:
    try:
        return np.asarray(given)
    except (TypeError, ValueError):  # keys of JAX; lists of lists of several lengths
        raise refuse(name, given, "must be an array") from None


def load(name: str, data_dir: str | os.PathLike | None = None) -> Dataset:
    """Loads a data set of images of one shape.

    Images come in an order computed from their content, so an index means the same image on every
    route. Exception: sets that TFDS stores as JPEG may decode to other bytes with another decoder,
    and then come in another order.

    Args:
      name: one of

        - `"mnist"`: embedded in the package, needs neither network nor `data_dir`;
        - a path ending in `.npz`, with x_train, y_train, x_test, y_test (Keras) or train_images,
          train_labels, test_images, test_labels; and train_writers, if it says who made them;
        - a path with a separator in it (`./digits`) to a folder of idx files, e.g.
          train-images-idx3-ubyte.gz; plain or compressed; their checksums are not verified;
        - a name that TFDS knows, with its configuration if any: `fashion_mnist`, `emnist/letters`.

      data_dir: for a TFDS name only: a TFDS data folder, or for mnist, fashion_mnist and kmnist
        a folder of the four original .gz files, verified against the checksums of TFDS. None is
        the TFDS default, `$TFDS_DATA_DIR` or `~/tensorflow_datasets`.

    Returns:
      A `Dataset`. C is what TFDS declares; for files, the largest label + 1.

    Raises:
      ValueError: unknown name, missing, damaged or unsuitable data, or a download that cannot be
        made; the message says what to do.
    """
    if not isinstance(name, str):
        raise refuse("dataset", name, "must be a text: a name or a path")
    if not isinstance(data_dir, str | os.PathLike | None):
        raise refuse("data_dir", data_dir, "must be a folder, or None")
    if _is_path(name):
        if data_dir is not None:
            raise refuse("data_dir", data_dir, f"is for data-set names; {name} is a path already")
        path = _existing(name)
        if path.is_dir():
            return _dataset(name, idx.read_folder(path))
        return _dataset(name, *_read_npz(path))
    if name == "mnist" and data_dir is None:
        embedded = importlib.resources.files("noisefl.data") / "mnist" / "mnist.npz"
        with embedded.open("rb") as file:
            return _dataset(name, _read_npz(file)[0], 10)
    return _dataset(name, *tfds.read(name, data_dir))


@functools.lru_cache(maxsize=1)  # it keeps the images
def channels_of(dataset: Dataset) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Means and standard deviations of the training images' channels, pixels in [0, 1], [Ch] each.

    A channel of one value has the deviation 1.
    """
    images = np.asarray(dataset.train_images)
    # By counts of the 256 values, some images at a time: exact, and no wider copy of all of them.
    values = np.arange(256) / 255
    means, deviations = [], []
    for channel in np.moveaxis(images, -1, 0):
        some = np.array_split(channel, -(-len(channel) // 1000))
        counts = sum(np.bincount(part.ravel(), minlength=256) for part in some)
        shares = counts / channel.size
        mean = float(values @ shares)
        deviation = float(np.sqrt(((values - mean) ** 2) @ shares))
        means.append(round(mean, 6))
        deviations.append(round(deviation, 6) or 1.0)
    return tuple(means), tuple(deviations)


def _is_path(name: str) -> bool:
    # A bare name is never a folder: one called "cifar10" that happens to lie in the working
    # directory must not replace the data set. A TFDS name may hold a "/" (emnist/letters).
    if name.endswith(".npz") or name.startswith(("/", ".", "~")):
        return True
    try:
        return any(mark in name for mark in "/\\") and Path(name).exists()
    except OSError:  # too long for one
        return False


def _existing(name: str) -> Path:
    """A file or a folder: of a pipe nobody knows when it ends."""
    try:
        path = Path(name).expanduser()
        if path.is_file() or path.is_dir():
            return path
        allowed = "must be a file or a folder" if path.exists() else "no such file or folder"
    except (OSError, RuntimeError) as error:  # a name too long, the home of nobody
        allowed = f"cannot be read ({error})"
    raise refuse("dataset", name, allowed)


def _read_npz(file: Path | IO[bytes]) -> tuple[idx.Arrays, None, np.ndarray | None]:
    """Arrays, no number of classes, and writers if there are any."""
    try:
        with zipfile.ZipFile(file) as archive:
            held = {name.removesuffix(".npy") for name in archive.namelist() if name[-4:] == ".npy"}
            for keys in _NPZ_KEYS:
                if held.issuperset(keys):
                    train_x, train_y, test_x, test_y = (_member(archive, key) for key in keys)
                    writers = _member(archive, WRITERS) if WRITERS in held else None
                    return (train_x, train_y, test_x, test_y), None, writers
            found = ", ".join(sorted(held)) or "none"
    except Exception as error:  # zipfile, its decompressors and NumPy's header each have their own
        said = f"{type(error).__name__}: {error}"
        raise refuse("dataset", str(file), f"must be a readable .npz file ({said})") from error
    raise refuse(
        "dataset", str(file), f"must hold {' or '.join(map(str, _NPZ_KEYS))}, and holds {found}"
    )


def _member(archive: zipfile.ZipFile, key: str) -> np.ndarray:
    """One array, read to its end: only there its checksum is compared, which `np.load` does not do
    where a header says less than there is."""
    with archive.open(f"{key}.npy") as file:
        array = np.lib.format.read_array(file, allow_pickle=False)
        if file.read(1):
            raise ValueError(f"{key} holds more than its header {list(array.shape)}")
    return array


def _dataset(
    name: str, given: idx.Arrays, num_classes: int | None = None,
    writers: np.ndarray | None = None,
) -> Dataset:  # fmt: skip
    """Checks the arrays, adds the channel axis of grey images, sorts."""
    train_x, train_y, order = _checked(name, "training", *given[:2])
    test_x, test_y, _ = _checked(name, "test", *given[2:])
    if train_x.shape[1:] != test_x.shape[1:]:
        shapes = f"{train_x.shape[1:]} in training and {test_x.shape[1:]} in test"
        raise refuse("dataset", name, f"images must have one shape, and have {shapes}")
    largest = int(max(train_y.max(), test_y.max()))
    num_classes = largest + 1 if num_classes is None else num_classes
    if largest >= num_classes:
        raise refuse("dataset", name, f"has label {largest}, allowed are 0 to {num_classes - 1}")
    if writers is not None:
        writers = np.asarray(writers)
        if writers.shape != train_y.shape or not np.issubdtype(writers.dtype, np.integer):
            what = f"{writers.dtype} {list(writers.shape)} for {len(train_y)} images"
            raise refuse("dataset", name, f"writers must be integers [N], are {what}")
        writers = np.unique(writers[order], return_inverse=True)[1].astype(np.int32)
    return Dataset(name, train_x, train_y, test_x, test_y, num_classes, writers)


def _checked(
    name: str, split: str, images: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images and labels in the canonical order, and that order."""
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        what = f"{images.dtype} {list(images.shape)}"
        raise refuse("dataset", name, f"{split} images must be uint8 [N, H, W(, Ch)], are {what}")
    if labels.shape == (len(images), 1):
        labels = labels[:, 0]  # as Keras stores CIFAR
    if not np.issubdtype(labels.dtype, np.integer) or labels.shape != (len(images),):
        what = f"{labels.dtype} {list(labels.shape)} for {len(images)} images"
        raise refuse("dataset", name, f"{split} labels must be integers [N], are {what}")
    if images.size == 0:
        raise refuse("dataset", name, f"has no {split} images")
    if labels.min() < 0 or labels.max() >= 2**31 - 1:
        span = f"{labels.min()} to {labels.max()}"
        raise refuse("dataset", name, f"{split} labels must be 0 or more (int32), are {span}")
    images = images.reshape(*images.shape[:3], -1)
    labels = labels.astype(np.int32)
    order = _canonical_order(images, labels)
    return images[order], labels[order], order


def _canonical_order(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Ranks by a 128-bit hash of pixels and label: int [N].

    Two entries of one hash are the same image with the same label, so their order is free. A hash
    rather than the pixels themselves: neighbours in this order have nothing in common, so the
    first n images are as good as a random sample, and shards cut within a label are too.
    """
    digests = b"".join(
        hashlib.blake2b(image.tobytes() + label.tobytes(), digest_size=16).digest()
        for image, label in zip(images, labels.astype("<i4"), strict=True)
    )
    keys = np.frombuffer(digests, ">u8").reshape(-1, 2)
    return np.lexsort((keys[:, 1], keys[:, 0]))
