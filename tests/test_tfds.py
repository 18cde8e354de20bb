"""`load` through TensorFlow Datasets. No test needs a network: servers run on this machine."""

import contextlib
import gzip
import hashlib
import http.server
import importlib.util
import socket
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from data_files import assert_same, idx_bytes, late, pairs, refuses, tiny, write_idx, write_prepared

from noisefl.data import load
from noisefl.data import tfds as tfds_route


def stub_originals(monkeypatch, folder: Path, url="http://127.0.0.1:9/", name="FashionMNIST"):
    """Makes the files in `folder` the originals that TFDS expects under `url`."""
    checksums = late("tensorflow_datasets.core.download.checksums")
    mnist = late("tensorflow_datasets.image_classification.mnist")
    infos = {}
    for path in sorted(folder.glob("*.gz")):
        raw = path.read_bytes()
        infos[url + path.name] = checksums.UrlInfo(
            size=len(raw), checksum=hashlib.sha256(raw).hexdigest(), filename=path.name
        )
    monkeypatch.setattr(getattr(mnist, name), "url_infos", infos)


@contextlib.contextmanager
def serve(folder: Path):
    """An HTTP server on this machine, for the download route."""
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    handler.log_message = lambda *_: None  # type: ignore[attr-defined]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def test_originals_in_data_dir_are_verified_and_read(tmp_path, monkeypatch):
    arrays = tiny()
    folder = write_idx(tmp_path / "given", arrays)
    stub_originals(monkeypatch, tmp_path / "given")
    assert_same(load("fashion_mnist", data_dir=folder), load(folder))

    file = tmp_path / "given" / "t10k-images-idx3-ubyte.gz"
    file.write_bytes(gzip.compress(idx_bytes(tiny(seed=1)[2])))
    message = refuses("fashion_mnist", data_dir=folder)
    assert "t10k-images-idx3-ubyte.gz" in message
    assert "sha256" in message


def test_mnist_with_a_data_dir_is_not_the_embedded_one(tmp_path, monkeypatch):
    folder = write_idx(tmp_path / "given", tiny())
    stub_originals(monkeypatch, tmp_path / "given", name="MNIST")
    assert len(load("mnist", data_dir=folder).train_labels) == 30


def test_prepared_data_come_in_the_order_of_the_originals(tmp_path):
    arrays = tiny()
    shuffle = np.random.default_rng(2).permutation(30)
    splits = {"train": (arrays[0][shuffle], arrays[1][shuffle]), "test": tuple(arrays[2:])}
    root = write_prepared(tmp_path / "prepared", "kmnist", splits)
    assert_same(load("kmnist", data_dir=root), load(write_idx(tmp_path / "raw", arrays)))


def test_prepared_colour_data(tmp_path):
    arrays = tiny(shape=(32, 32, 3), classes=4)
    splits = {"train": tuple(arrays[:2]), "validation": tuple(arrays[2:])}  # no split "test"
    data = load("cifar10", data_dir=write_prepared(tmp_path, "cifar10", splits))
    assert data.num_classes == 10  # declared by TFDS, though only 4 occur
    assert data.train_images.shape == (30, 32, 32, 3)
    assert pairs(data.test_images, data.test_labels) == pairs(*arrays[2:])


def test_prepared_data_that_cannot_be_used(tmp_path, monkeypatch):
    arrays = tiny(shape=(32, 32, 3))
    splits = {"train": tuple(arrays[:2])}
    root = write_prepared(tmp_path / "one", "cifar10", splits)
    assert "has train" in refuses("cifar10", data_dir=root)

    find_spec = importlib.util.find_spec
    without = lambda name, *rest: None if name == "tensorflow" else find_spec(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", without)
    splits["test"] = tuple(arrays[2:])
    root = write_prepared(tmp_path / "two", "cifar10", splits, file_format="tfrecord")
    assert "stored as tfrecord" in refuses("cifar10", data_dir=root)
    message = refuses("cifar10", data_dir=str(tmp_path))  # nothing prepared
    assert "noisefl[tfds]" in message
    assert "as data_dir" in message


def test_unsuitable_names():
    message = refuses("fashion_mnits")
    assert "did you mean fashion_mnist" in message
    assert "no known name is close" in refuses("zzzzzzzz")
    assert "one shape" in refuses("cats_vs_dogs")
    assert "image-classification" in refuses("celeb_a")
    assert "does not offer" in refuses("emnist/no_such_configuration")
    assert "existing folder" in refuses("fashion_mnist", data_dir="/no/such/folder")
    assert "no such file" in refuses("./no/such/folder")


def test_download(tmp_path, monkeypatch):
    folder = write_idx(tmp_path / "server", tiny())
    home = tmp_path / "home"
    home.mkdir()
    with serve(tmp_path / "server") as url:
        stub_originals(monkeypatch, tmp_path / "server", url)
        first = load("fashion_mnist", data_dir=str(home))
    assert_same(first, load(folder))
    kept = sorted(path.name for path in (home / "originals" / "fashion_mnist").iterdir())
    assert kept == sorted(path.name for path in (tmp_path / "server").iterdir())
    assert_same(first, load("fashion_mnist", data_dir=str(home)))  # the server is gone by now


def test_download_of_other_bytes_is_refused(tmp_path, monkeypatch):
    write_idx(tmp_path / "server", tiny())
    home = tmp_path / "home"
    home.mkdir()
    with serve(tmp_path / "server") as url:
        stub_originals(monkeypatch, tmp_path / "server", url)
        write_idx(tmp_path / "server", tiny(seed=1))
        assert "NonMatchingChecksumError" in refuses("fashion_mnist", data_dir=str(home))
    assert not list(home.glob("originals/fashion_mnist/*"))


def refuses_in_time(monkeypatch, tmp_path: Path, url: str) -> str:
    write_idx(tmp_path / "server", tiny())
    stub_originals(monkeypatch, tmp_path / "server", url)
    (tmp_path / "home").mkdir()
    start = time.monotonic()
    message = refuses("fashion_mnist", data_dir=str(tmp_path / "home"))
    assert time.monotonic() - start < 15
    for remedy in ("train-images-idx3-ubyte.gz", "as data_dir", "embedded mnist", ".npz"):
        assert remedy in message
    return message


def test_no_connection_is_told_in_time(tmp_path, monkeypatch):
    with socket.socket() as taken:  # bound but not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/"
        assert "ConnectionError" in refuses_in_time(monkeypatch, tmp_path, url)


def test_silent_server_is_told_in_time(tmp_path, monkeypatch):
    assert tfds_route.OFFLINE_SECONDS < 10
    monkeypatch.setattr(tfds_route, "OFFLINE_SECONDS", 2.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        assert "Timeout" in refuses_in_time(monkeypatch, tmp_path, url)


def test_stuck_name_lookup_is_told_in_time(tmp_path, monkeypatch):
    release = threading.Event()

    def stuck(*_, **__):
        release.wait(60)
        raise socket.gaierror("released")

    monkeypatch.setattr(socket, "getaddrinfo", stuck)
    monkeypatch.setattr(tfds_route, "OFFLINE_SECONDS", 0.5)
    try:
        assert "no answer" in refuses_in_time(monkeypatch, tmp_path, "http://example.invalid/")
    finally:
        release.set()


def test_server_error_is_not_retried(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    with serve(tmp_path / "empty") as url:
        assert "HTTP 404" in refuses_in_time(monkeypatch, tmp_path, url)


@pytest.mark.parametrize(
    ("name", "shape", "classes"),
    [
        ("emnist/byclass", (28, 28, 1), 62),  # FEMNIST's images, without their writers
        ("emnist/letters", (28, 28, 1), 37),
        ("cifar100", (32, 32, 3), 100),
        ("svhn_cropped", (32, 32, 3), 10),
    ],
)
def test_other_sets_by_name(tmp_path, name, shape, classes):
    arrays = tiny(shape=shape, classes=9)
    splits = {"train": tuple(arrays[:2]), "test": tuple(arrays[2:])}
    data = load(name, data_dir=write_prepared(tmp_path, name, splits))
    assert (data.num_classes, data.train_images.shape[1:]) == (classes, shape)
    assert pairs(data.train_images, data.train_labels) == pairs(*arrays[:2])
    assert data.train_writers is None
