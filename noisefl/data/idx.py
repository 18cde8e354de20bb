"""The idx format, in which MNIST and its relatives are published: four files in a folder.

A file is a 4-byte magic number (0, 0, element type, number of axes), one big-endian uint32 for the
length of each axis, then the elements in C order. Element type 8 is uint8, the only one read here.
"""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from noisefl.errors import refuse

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # train x, y, then test x, y

STEMS = (
    ("train-images", "idx3-ubyte"),
    ("train-labels", "idx1-ubyte"),
    ("t10k-images", "idx3-ubyte"),
    ("t10k-labels", "idx1-ubyte"),
)


def read_folder(folder: Path) -> Arrays:
    """Reads the four files of `folder`, each compressed or plain, `-idx` or `.idx` in its name.

    Returns:
      Training images and labels, then test images and labels, in the order of the files.

    Raises:
      ValueError: a file is missing, damaged, or not an idx file of bytes.
    """
    train_x, train_y, test_x, test_y = (_read(_find(folder, *stem)) for stem in STEMS)
    return train_x, train_y, test_x, test_y


def _find(folder: Path, stem: str, kind: str) -> Path:
    for name in (f"{stem}-{kind}", f"{stem}.{kind}"):
        for path in (folder / f"{name}.gz", folder / name):
            if path.is_file():
                return path
    raise refuse("dataset", str(folder), f"the folder must hold {stem}-{kind} or {stem}-{kind}.gz")


def _read(path: Path) -> np.ndarray:
    raw = path.read_bytes()
    if path.suffix == ".gz":
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise refuse("dataset", str(path), f"is not a whole gzip file ({error})") from error
    if len(raw) < 4 or raw[:3] != b"\0\0\x08" or len(raw) < 4 + 4 * raw[3]:
        raise refuse("dataset", str(path), "must be an idx file of unsigned bytes")
    axes = raw[3]
    shape = struct.unpack(f">{axes}I", raw[4 : 4 + 4 * axes])
    if len(raw) - 4 - 4 * axes != math.prod(shape):
        raise refuse("dataset", str(path), f"holds fewer or more bytes than its header {shape}")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).reshape(shape)
