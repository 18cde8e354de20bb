"""Tiny data sets and their files in every format that `load` reads, written by hand."""

import gzip
import importlib
import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from noisefl.data import Dataset, load

FIELDS = ("train_images", "train_labels", "test_images", "test_labels")
FILES = ("train-images.idx3", "train-labels.idx1", "t10k-images.idx3", "t10k-labels.idx1")


def tiny(seed=0, train=30, test=12, shape=(28, 28), classes=10):
    """Random images and labels, in the order x_train, y_train, x_test, y_test."""
    rng = np.random.default_rng(seed)
    sets = []
    for count in (train, test):
        labels = rng.integers(0, classes, count).astype(np.uint8)
        labels[0] = classes - 1  # the largest label is the number of classes less one
        sets += [rng.integers(0, 256, (count, *shape)).astype(np.uint8), labels]
    return sets


def idx_bytes(array):
    """The idx format written from its description, not from the reader."""
    header = bytes([0, 0, 8, array.ndim]) + b"".join(struct.pack(">I", n) for n in array.shape)
    return header + array.tobytes()


def write_idx(folder: Path, arrays, dot=False, zipped=True):
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in zip(FILES, arrays, strict=True):
        name = (name if dot else name.replace(".", "-")) + "-ubyte"
        raw = idx_bytes(array)
        if zipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(raw, mtime=0))
        else:
            (folder / name).write_bytes(raw)
    return str(folder)


def write_npz(path: Path, arrays, keys=("x_train", "y_train", "x_test", "y_test")):
    np.savez(path, **dict(zip(keys, arrays, strict=True)))
    return str(path)


def assert_same(a: Dataset, b: Dataset):
    for field in FIELDS:
        np.testing.assert_array_equal(getattr(a, field), getattr(b, field), err_msg=field)
    assert a.num_classes == b.num_classes


def pairs(images, labels):
    """Each image with its label as bytes, sorted by content: equal whatever the order was."""
    return sorted(x.tobytes() + bytes([y]) for x, y in zip(images, labels, strict=True))


def refuses(*args, **kwargs) -> str:
    """The message with which `load` refuses; it is one line, and says argument and value."""
    with pytest.raises(ValueError, match=r"^(dataset|data_dir)='.*': .+") as caught:
        load(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def late(module: str) -> Any:
    """Imported in the test, as the library does; untyped, as TFDS is mostly made at run time."""
    return importlib.import_module(module)


def write_prepared(root: Path, name: str, splits: dict[str, tuple], file_format="array_record"):
    """Writes `{split: (images, labels)}` as TFDS does, without TensorFlow.

    The real builder and its features; only the writing of records is our own.
    """
    tfds = late("tensorflow_datasets")
    tf_example_pb2 = late("tensorflow_datasets.proto").tf_example_pb2
    open_record_file = late("array_record.python.array_record_module").ArrayRecordWriter
    builder = tfds.builder(name, data_dir=root, file_format=file_format)
    folder = Path(builder.data_path)
    folder.mkdir(parents=True)
    infos = []
    for split, (images, labels) in splits.items():
        writer = open_record_file(
            str(folder / f"{builder.name}-{split}.{file_format}-00000-of-00001"), "group_size:1"
        )
        for image, label in zip(images, labels, strict=True):
            png = io.BytesIO()
            Image.fromarray(image.squeeze()).save(png, "PNG")
            example = tf_example_pb2.Example()
            feature = example.features.feature
            feature["image"].bytes_list.value.append(png.getvalue())
            feature["label"].int64_list.value.append(int(label))
            if "id" in builder.info.features:
                feature["id"].bytes_list.value.append(b"id")
            writer.write(example.SerializeToString())
        writer.close()
        template = tfds.core.ShardedFileTemplate(
            dataset_name=builder.name, split=split, filetype_suffix=file_format, data_dir=folder
        )
        infos.append(
            tfds.core.SplitInfo(
                name=split, shard_lengths=[len(labels)], num_bytes=1, filename_template=template
            )
        )
    builder.info.set_splits(tfds.core.splits.SplitDict(infos))
    builder.info.write_to_directory(folder)
    return str(root)
