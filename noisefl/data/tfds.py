"""Image-classification sets by their TensorFlow Datasets name, without TensorFlow where possible.

- mnist, fashion_mnist, kmnist: original files, found or downloaded with TFDS's own addresses and
  checksums, read directly.
- Data that TFDS has prepared as array_record: read through `as_data_source`, no TensorFlow.
- Anything else: TensorFlow prepares it once (`pip install 'noisefl[tfds]'`).
"""

import difflib
import hashlib
import importlib.util
import os
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np

from noisefl.data import idx
from noisefl.errors import refuse

IDX_FAMILY = ("mnist", "fashion_mnist", "kmnist")
OFFLINE_SECONDS = 8.0  # TFDS by itself retries for over 200 s before it reports a missing network


def read(name: str, data_dir: str | os.PathLike | None) -> tuple[idx.Arrays, int]:
    """Arrays of the TFDS set `name` in whatever order they are stored, and its number of classes.

    Looks, in this order, for the original files of the idx family in `data_dir` itself and in its
    `originals/<name>`, for prepared data, and last to the network, which fills one of the two.

    Raises:
      ValueError: see `load`.
    """
    import tensorflow_datasets as tfds  # late: takes a second, and embedded MNIST needs none of it

    root = _root(data_dir)
    builder = _builder(tfds, name, root)
    keys = _supervised_keys(tfds, name, builder)
    num_classes = builder.info.features[keys[1]].num_classes

    if builder.name in IDX_FAMILY:
        downloads = root / "originals" / builder.name
        for folder in (root, downloads):
            if all((folder / info.filename).is_file() for info in builder.url_infos.values()):
                _verify(folder, builder)
                return idx.read_folder(folder), num_classes
        if not _is_prepared(builder):
            _download_originals(tfds, builder, downloads)
            return idx.read_folder(downloads), num_classes
    if not _is_prepared(builder):
        _prepare(tfds, name, builder)
    return _read_prepared(tfds, name, builder, keys), num_classes


def _root(data_dir: str | os.PathLike | None) -> Path:
    """The folder, or where TFDS itself would look."""
    given = data_dir or os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    allowed = "must be an existing folder"
    try:
        root = Path(given).expanduser()
        if data_dir is None or root.is_dir():
            return root
    except (OSError, RuntimeError) as error:  # a name too long, the home of nobody
        allowed = f"cannot be read ({error})"
    raise refuse("data_dir", str(given), allowed)


def _builder(tfds: Any, name: str, root: Path) -> Any:
    base = name.split("/")[0]
    try:
        own = bool(base) and (root / base).is_dir()  # a user's own prepared set is in no list
    except OSError:  # too long for one
        own = False
    if not own:
        known = tfds.list_builders(with_community_datasets=False)
        if base not in known:
            close = difflib.get_close_matches(base.lower(), known, n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else "no known name is close"
            allowed = (
                "must be mnist, an image set of TFDS, a folder of idx files or a path to an .npz"
            )
            raise refuse("dataset", name, f"{allowed}; {hint}")
    try:
        return tfds.builder(name, data_dir=root)
    except Exception as error:  # TFDS raises many kinds, over many lines
        raise refuse("dataset", name, f"TFDS does not offer it ({_line(error)})") from error


def _supervised_keys(tfds: Any, name: str, builder: Any) -> tuple[str, str]:
    """The names of the image and of the label among the features; refuses what is not both."""
    features, keys = builder.info.features, builder.info.supervised_keys
    kinds = [features[key] for key in keys or () if isinstance(key, str)]
    if (
        len(kinds) != 2
        or not isinstance(kinds[0], tfds.features.Image)
        or not isinstance(kinds[1], tfds.features.ClassLabel)
    ):
        raise refuse("dataset", name, "must be an image-classification set (one image, one label)")
    shape, dtype = kinds[0].shape, np.dtype(kinds[0].np_dtype)
    if None in shape or dtype != np.uint8:
        raise refuse("dataset", name, f"images must be uint8 of one shape, are {dtype} {shape}")
    return keys


def _verify(folder: Path, builder: Any) -> None:
    for info in builder.url_infos.values():
        found = hashlib.sha256((folder / info.filename).read_bytes()).hexdigest()
        if found != info.checksum:
            raise refuse(
                "data_dir",
                str(folder),
                f"{info.filename} is not the original file of {builder.name} "
                f"(sha256 must be {info.checksum}, is {found})",
            )


def _download_originals(tfds: Any, builder: Any, folder: Path) -> None:
    """Fetches the original .gz files into `folder`; TFDS checks their checksums."""
    urls = {info.filename: url for url, info in builder.url_infos.items()}
    remedy = (
        f"place the original files {', '.join(sorted(urls))} in a folder and name it as "
        "data_dir, or use the embedded mnist or an .npz file"
    )
    _require_network(builder.name, next(iter(urls.values())), remedy)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            manager = tfds.download.DownloadManager(
                download_dir=scratch,
                url_infos=builder.url_infos,
                dataset_name=builder.name,
            )
            for filename, path in manager.download(urls).items():
                os.replace(path, folder / filename)
    except Exception as error:  # requests, TFDS and the file system each have their own
        raise refuse("dataset", builder.name, f"no download ({_line(error)}); {remedy}") from error


def _require_network(name: str, url: str, remedy: str) -> None:
    """Raises within `OFFLINE_SECONDS` unless `url` answers, proxies of the environment included."""
    import requests  # of TFDS

    outcome = ["no answer"]

    def probe() -> None:
        try:
            with requests.get(url, stream=True, timeout=OFFLINE_SECONDS / 2) as response:
                outcome[0] = "" if response.ok else f"HTTP {response.status_code}"
        except requests.RequestException as error:
            outcome[0] = type(error).__name__

    # A thread, because no timeout of requests bounds the look-up of the host's name; a daemon, so
    # that a stuck look-up does not keep the interpreter alive.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(OFFLINE_SECONDS)
    if outcome[0]:
        raise refuse("dataset", name, f"cannot be downloaded ({outcome[0]} from {url}); {remedy}")


def _is_prepared(builder: Any) -> bool:
    return (Path(builder.data_path) / "dataset_info.json").is_file()


def _prepare(tfds: Any, name: str, builder: Any) -> None:
    """Downloads and prepares as array_record, so that later reads need no TensorFlow."""
    if importlib.util.find_spec("tensorflow") is None:
        raise refuse(
            "dataset",
            name,
            f"no prepared data in {builder.data_path}; to prepare it needs TensorFlow: "
            "pip install 'noisefl[tfds]', or name a folder prepared elsewhere as data_dir, "
            "or use an .npz file",
        )
    # A set without web addresses of its own is checked against the host of TFDS itself.
    urls = [url for url in builder.url_infos or {} if url.startswith("http")]
    remedy = "name a folder prepared elsewhere as data_dir, or use an .npz file"
    _require_network(name, (urls or ["https://storage.googleapis.com/tfds-data"])[0], remedy)
    try:
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(try_download_gcs=False),
            file_format="array_record",
        )
    except Exception as error:  # as above; the manual instructions of some sets end here too
        raise refuse("dataset", name, f"TFDS could not prepare it ({_line(error)})") from error


def _read_prepared(tfds: Any, name: str, builder: Any, keys: tuple[str, str]) -> idx.Arrays:
    splits = builder.info.splits
    test = next((split for split in ("test", "validation") if split in splits), None)
    if test is None or "train" not in splits:
        have = ", ".join(splits) or "none"
        raise refuse("dataset", name, f"needs a split train and a test or validation, has {have}")
    arrays = []
    for split in ("train", test):
        count = splits[split].num_examples
        images = np.empty((count, *builder.info.features[keys[0]].shape), np.uint8)
        labels = np.empty(count, np.int64)
        examples = _examples(tfds, name, builder, split)
        try:
            for row, example in zip(range(count), examples, strict=True):
                images[row], labels[row] = example[keys[0]], example[keys[1]]
        except Exception as error:  # each reader of records and of images has its own
            raise refuse("dataset", name, f"{split} cannot be read ({_line(error)})") from error
        arrays += [images, labels]
    return tuple(arrays)


def _examples(tfds: Any, name: str, builder: Any, split: str) -> Any:
    try:
        return builder.as_data_source(split=split)
    except NotImplementedError as error:  # stored as tfrecord, which only TensorFlow reads
        if importlib.util.find_spec("tensorflow") is None:
            raise refuse(
                "dataset",
                name,
                f"{builder.data_path} is stored as {builder.info.file_format.value}; prepare it "
                "as array_record, or install TensorFlow: pip install 'noisefl[tfds]'",
            ) from error
        return tfds.as_numpy(builder.as_dataset(split=split))


def _line(error: Exception) -> str:
    """The first line of an error, with its type: TFDS and requests write paragraphs."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"
