"""The idx format, in which MNIST and its relatives are published: four files in a folder.

A file is a 4-byte magic number (0, 0, element type, number of axes), one big-endian uint32 for the
length of each axis, then the elements in C order. Element type 8 is uint8, the only one read here.
"""

import gzip
import math
import struct
import zlib
from io import BufferedIOBase
from pathlib import Path

import numpy as np

from noisefl.errors import refuse

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # train x, y, then test x, y

MOST_AXES = 4  # of images in colour
PIECE = 1 << 20  # bytes
DEFLATED = 1032  # bytes that one of gzip can hold

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
    zipped = path.suffix == ".gz"
    try:
        most = path.stat().st_size * (DEFLATED if zipped else 1)
        with gzip.open(path) if zipped else path.open("rb") as file:
            return _parsed(file, path, most)
    except MemoryError:
        raise refuse("dataset", str(path), "does not fit in memory") from None
    except (OSError, EOFError, zlib.error) as error:
        what = "is not a whole gzip file" if zipped else "cannot be read"
        raise refuse("dataset", str(path), f"{what} ({error})") from error


def _parsed(file: BufferedIOBase, path: Path, most: int) -> np.ndarray:
    """What the file holds, which is `most` bytes at most."""
    begin = file.read(4)
    axes = begin[3] if begin[:3] == b"\0\0\x08" and len(begin) == 4 else 0
    lengths = file.read(4 * axes)
    if not 1 <= axes <= MOST_AXES or len(lengths) < 4 * axes:
        raise refuse("dataset", str(path), "must be an idx file of unsigned bytes")
    shape = struct.unpack(f">{axes}I", lengths)
    size, content = math.prod(shape), bytearray()
    # A piece at a time: a header may declare anything, and a few bytes of gzip may hold anything.
    while len(content) <= size <= most and (piece := file.read(PIECE)):
        content += piece
    if len(content) != size or size == 0:
        raise refuse("dataset", str(path), f"holds fewer or more bytes than its header {shape}")
    return np.frombuffer(content, np.uint8).reshape(shape)
