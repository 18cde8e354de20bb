"""Data files and result folders that something has happened to."""

import gzip
import io
import json
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from data_files import idx_bytes, tiny
from fuzz_flags import PATHS, mutated, texts
from hypothesis import strategies as st
from hypothesis.extra import numpy as of_numpy

NAMES = ("x_train", "y_train", "x_test", "y_test")
IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte",
       "t10k-labels-idx1-ubyte")  # fmt: skip
SOUND: dict[str, np.ndarray] = dict(zip(NAMES, tiny(1, 9, 5, (4, 3), 3), strict=True))


class Change(NamedTuple):
    """Something that happens to the bytes of a file."""

    name: str
    at: float  # share of the file
    some: bytes

    def __call__(self, sound: bytes) -> bytes:
        at = int(self.at * len(sound))
        return {
            "none": sound,
            "cut": sound[:at],
            "flipped": sound[:at] + bytes(x ^ 1 << len(self.some) % 8 for x in sound[at : at + 1])
            + sound[at + 1 :],
            "written over": sound[:at] + self.some + sound[at + len(self.some) :],
            "put in": sound[:at] + self.some + sound[at:],
            "taken out": sound[:at] + sound[at + len(self.some) :],
            "longer": sound + self.some,
            "twice": sound + sound,
            "replaced": self.some,
        }[self.name]  # fmt: skip


changes = st.builds(
    Change,
    st.sampled_from(["none", *["cut", "flipped", "written over"] * 3, "put in", "taken out",
                     "longer", "twice", "replaced"]),
    st.floats(0, 1, exclude_max=True),
    st.binary(min_size=1, max_size=9) | st.sampled_from([b"\0" * 40, b"PK\x05\x06" + bytes(18)]),
)  # fmt: skip


def dtypes() -> st.SearchStrategy[Any]:
    kinds = [*"?bBhHiIlLqQefdgFDOUSMm", "V3", ">u2", ">i8", "u1,i4"]
    return st.sampled_from([np.dtype(f"{k}3" if k in "US" else k) for k in kinds])


@st.composite
def contents(draw: st.DrawFn) -> dict[str, np.ndarray]:
    """Arrays of an .npz: the sound ones, but for one or two."""
    found = dict(SOUND)
    if draw(st.booleans()):
        found["train_writers"] = np.arange(9) // 2
    for name in draw(st.lists(st.sampled_from(list(found)), min_size=1, max_size=2, unique=True)):
        array = found[name]
        with np.errstate(all="ignore"):
            found[name] = draw(st.sampled_from(REPLACED))(array, draw)
    if draw(st.integers(0, 7)) == 0:
        del found[draw(st.sampled_from(list(found)))]
    return found


def _as(array: np.ndarray, draw: st.DrawFn) -> np.ndarray:
    kind = draw(dtypes())
    try:
        return array.astype(kind)
    except (TypeError, ValueError):
        return np.zeros(array.shape, kind)


def _other(array: np.ndarray, draw: st.DrawFn) -> np.ndarray:
    return draw(
        of_numpy.arrays(
            array.dtype, of_numpy.array_shapes(min_dims=0, max_dims=5, max_side=9, min_side=0)
        )
    )


def _value(array: np.ndarray, draw: st.DrawFn) -> np.ndarray:
    """One entry is something else, in a wider type."""
    values = [
        -1,
        2**31 - 2,
        2**31 - 1,
        2**31,
        2**62,
        255,
        256,
        np.nan,
        np.inf,
        -np.inf,
        0.5,
        "3",
        None,
    ]
    value = draw(st.sampled_from(values))
    wide = array.astype(
        np.int64 if isinstance(value, int) else np.float64 if isinstance(value, float) else object
    )
    if wide.size:
        wide.flat[draw(st.integers(0, wide.size - 1))] = value
    return wide


REPLACED: list[Callable[[np.ndarray, st.DrawFn], np.ndarray]] = [
    _as, _as, _value, _value, _value, _other,
    lambda x, draw: x[: draw(st.integers(0, len(x)))],
    lambda x, draw: x[:0],
    lambda x, draw: np.concatenate([x, x]),
    lambda x, draw: x[..., None],
    lambda x, draw: x[None],
    lambda x, draw: x.reshape(-1),
    lambda x, draw: np.asfortranarray(x[::-1]),
    lambda x, draw: x[0],
]  # fmt: skip


# Files by name below a folder, from text, bytes or what makes them.
Made = dict[str, bytes | Callable[[Path], object]]


# 4 GB of zeros in a thousandth of the room: members of gzip one after another.
BOMB = gzip.compress(bytes(1 << 24), mtime=0) * 256


def _sparse(path: Path) -> None:
    with open(path, "wb") as file:
        file.write(idx_bytes(np.zeros((9, 4, 3), np.uint8)))
        file.truncate(1 << 40)


STRANGE: list[bytes | Callable[[Path], object]] = [
    b"", b"\0", b"\0\0\x08\xff", idx_bytes(np.zeros((0, 4, 3), np.uint8)),
    b"\0\0\x08\x03" + struct.pack(">III", 2**31, 28, 28) + bytes(100),
    b"\0\0\x08\x03" + struct.pack(">III", 2**32 - 1, 2**32 - 1, 2**32 - 1),
    b"\0\0\x08\x03" + struct.pack(">III", 2**31, 0, 28),
    b"\0\0\x08\xff" + b"\0\0\0\1" * 255 + b"\7",
    b"\0\0\x08\0\1", b"\0\0\x0d\x01" + bytes(40), b"\x80\x04K\x01.",
    gzip.compress(b"", mtime=0), gzip.compress(idx_bytes(SOUND["y_train"]), mtime=0),
    _sparse, Path.mkdir, os.mkfifo, lambda path: path.symlink_to(path.name),
    lambda path: path.symlink_to("/dev/zero"), lambda path: path.symlink_to("nowhere"),
]  # fmt: skip


def npz(arrays: dict[str, np.ndarray], compressed: bool = False) -> bytes:
    file = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(file, **arrays)  # pyright: ignore
    return file.getvalue()


def npz_of_members(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content, method)
    return file.getvalue()


def npy(header: str, body: bytes = b"") -> bytes:
    """A member of an .npz whose header says anything."""
    text = header.encode("latin1") + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text) % 2**16) + text + body


HEADERS = [
    "{'descr': '|u1', 'fortran_order': False, 'shape': (9, 4, 3), }",
    "{'descr': '|u1', 'fortran_order': False, 'shape': (9, 4, 2), }",
    "{'descr': '|u1', 'fortran_order': True, 'shape': (9, 4, 3), }",
    "{'descr': '|u1', 'fortran_order': False, 'shape': (2147483648, 28, 28), }",
    "{'descr': '|u1', 'fortran_order': False, 'shape': (99999999999999999999,), }",
    "{'descr': '|u1', 'fortran_order': False, 'shape': (-9, -4, 3), }",
    "{'descr': '|u1', 'fortran_order': False, 'shape': (9.0, 4, 3), }",
    "{'descr': '|O', 'fortran_order': False, 'shape': (9,), }",
    "{'descr': [('a', '|u1')], 'fortran_order': False, 'shape': (9,), }",
    "{'descr': '|S99999999999', 'fortran_order': False, 'shape': (9,), }",
    "{'descr': '|u1', 'fortran_order': False}", "[]", "(" * 3000, "{'a': " * 900, "0" * 60_000,
    "\0", "{'descr': '|u1', 'fortran_order': False, 'shape': (True, 4, 3), }", "é(",
]  # fmt: skip


@st.composite
def npz_files(draw: st.DrawFn) -> tuple[Any, dict[str, np.ndarray] | None]:
    """What lies at a path, and the arrays that it holds for certain,
    None if there is no telling."""
    kind = draw(st.integers(0, 9))
    if kind < 4:
        arrays = draw(contents())
        return npz(arrays), arrays
    if kind < 7:
        change = draw(changes)
        return change(npz(SOUND, draw(st.booleans()))), SOUND
    if kind < 9:
        parts = {f"{name}.npy": _member(array) for name, array in SOUND.items()}
        name = draw(st.sampled_from([*parts, "\n.npy", "other.npy", "x_train", "x_train.npy/"]))
        sound = parts.get(name, parts["x_train.npy"])
        head = draw(st.sampled_from(HEADERS))
        body = draw(
            st.sampled_from([b"", bytes(200), SOUND["x_train"].tobytes(), b"\x80\x04K\x01."])
        )
        parts[name] = draw(st.sampled_from([npy(head, body), draw(changes)(sound), *STRANGE_TEXTS]))
        if draw(st.integers(0, 9)) == 0:
            parts = {"\n.npy": sound, "b": b""}
        method = draw(
            st.sampled_from(
                [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2]
            )
        )
        return npz_of_members(parts, method), None
    return draw(st.sampled_from(STRANGE)), None


STRANGE_TEXTS = [one for one in STRANGE if isinstance(one, bytes)]


def _member(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array)
    return file.getvalue()


@st.composite
def idx_folders(draw: st.DrawFn) -> tuple[Made, bool]:
    """Four files or more, and whether all are compressed: then a change cannot go unnoticed."""
    zipped = draw(st.booleans())
    found: Made = {}
    for name, array in zip(IDX, SOUND.values(), strict=True):
        raw = idx_bytes(array)
        found[name + ".gz" * zipped] = gzip.compress(raw, mtime=0) if zipped else raw
    for name in draw(st.lists(st.sampled_from(list(found)), min_size=1, max_size=2, unique=True)):
        kind, sound = draw(st.integers(0, 9)), found[name]
        assert isinstance(sound, bytes)
        if kind < 6:
            found[name] = draw(changes)(sound)
        elif kind == 6:
            found[name] = (sound + BOMB) if zipped else (sound + bytes(1 << 22))
        elif kind < 9:
            strange = draw(st.sampled_from(STRANGE))
            wrap = zipped and isinstance(strange, bytes) and draw(st.booleans())
            found[name] = gzip.compress(strange, mtime=0) if wrap else strange  # pyright: ignore
        else:
            del found[name]
    return found, zipped


def lay_out(folder: Path, made: Made) -> None:
    """The files, or what else is to be at their places."""
    for name, content in made.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            content(folder / name)


def described(path: Path) -> np.ndarray:
    """What a sound idx file holds, by the description of the format."""
    raw = path.read_bytes()
    raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
    shape = struct.unpack_from(f">{raw[3]}I", raw, 4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


names = st.one_of(
    st.sampled_from([*PATHS, "mnist", "MNIST", "mnist/", "emnist/letter", "fashion_mnist", "x/y"]),
    mutated(st.sampled_from(["mnist", "emnist/letters", "./folder", "x.npz", "cifar10/3.0.2"])),
    texts,
    st.sampled_from([None, 3, b"mnist", Path("x.npz"), ["mnist"], np.str_("x.npz")]),
)  # fmt: skip


# Folders of results

# Bytes below a folder.
Held = dict[str, bytes]

JUNK = [
    None, True, -1, 0, 3, 2**63, 10**400, 0.5, -0.0, float("nan"), float("inf"), 1e308, "", "x",
    "noise",
    "\ud800", "\0", "a\nb", "0.5", [], [None], ["x"], {}, {"x": 1}, [[]], {"": {}}, "../../x", "/",
    "x" * 300,
]  # fmt: skip


@st.composite
def _json(draw: st.DrawFn, text: str) -> str:
    """The same with one value, key or entry changed."""
    if text.startswith("[["):  # too deep to be read again
        return text
    tree = json.loads(text)
    places: list[tuple[Any, Any]] = []

    def visit(of: Any) -> None:
        for key in (
            list(of) if isinstance(of, dict) else range(len(of)) if isinstance(of, list) else ()
        ):
            places.append((of, key))
            visit(of[key])

    visit(tree)
    how = draw(st.sampled_from(["junk", "junk", "junk", "gone", "renamed", "root", "deep"]))
    if how == "root" or not places:
        tree = draw(st.sampled_from(JUNK))
    elif how == "deep":
        return "[" * draw(st.sampled_from([900, 100_000]))
    else:
        of, key = draw(st.sampled_from(places))
        if how == "junk":
            of[key] = draw(st.sampled_from(JUNK))
        elif how == "renamed" and isinstance(of, dict):
            of[draw(st.sampled_from(["x", "\ud800", "", "round", "grid"]))] = of.pop(key)
        else:
            del of[key]
    return json.dumps(tree)


@st.composite
def _lines(draw: st.DrawFn, text: str) -> str:
    """Lines of JSON of which one or two are changed, lost, doubled or out of their order."""
    lines = text.splitlines()
    for _ in range(draw(st.integers(1, 2))):
        at = draw(st.integers(0, max(len(lines) - 1, 0)))
        how = draw(st.sampled_from(["json", "json", "gone", "twice", "first", "x", ""]))
        if how == "json" and lines and lines[at][:1] == "{":
            lines[at] = draw(_json(lines[at]))
        elif how in ("json", "gone"):
            del lines[at : at + 1]
        elif how == "twice":
            lines[at:at] = lines[at : at + 1]
        elif how == "first":
            lines = lines[at:] + lines[:at]
        else:
            lines[at:at] = [how]
    return "\n".join(lines) + "\n"


def damaged(sound: Held, names: Callable[[str], bool]) -> st.SearchStrategy[Made]:
    """What lies in a folder after one or two of some files have been damaged."""
    some = sorted(filter(names, sound))

    @st.composite
    def made(draw: st.DrawFn) -> Made:
        found: Made = dict(sound)
        for name in draw(st.lists(st.sampled_from(some), min_size=1, max_size=2, unique=True)):
            text = name.endswith((".json", ".jsonl"))
            kind = draw(st.integers(0, 9))
            if kind < 6 and text:
                of = _lines if name.endswith("l") else _json
                found[name] = draw(of(sound[name].decode())).encode("utf-8", "surrogatepass")
            elif kind < 8:
                found[name] = draw(changes)(sound[name])
            elif kind == 8:
                found[name] = draw(
                    st.sampled_from([Path.mkdir, b"", b"{}", b"[]\n", b"\xff\xfe", _dangling])
                )
            else:
                del found[name]
        return found

    return made()


def _dangling(path: Path) -> None:
    path.symlink_to("nowhere")


def held(folder: Path) -> Held:
    """All files below."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
