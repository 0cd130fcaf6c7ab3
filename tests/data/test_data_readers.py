"""Readers of public datasets, on tiny files of the official layouts, and what is said where files are missing."""

from __future__ import annotations

import gzip
import hashlib
import pickle
import struct
import tarfile
import threading
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.io
import torch
import torchvision.datasets as tv
from PIL import Image

from kdbench.data import download
from kdbench.data.load import load_bundle
from kdbench.data.readers import digits, tiny_imagenet
from kdbench.errors import UserError, under

RNG = np.random.default_rng(0)


def load(reader: str, root: Path, **keys):
    path = f"kdbench.data.readers.{reader}"
    with under("dataset"):
        return load_bundle(reader, path, str(root), "cache", **{"download": False} | keys)


def no_checksums(monkeypatch, module: str) -> None:
    """Files need only be there."""
    monkeypatch.setattr(f"torchvision.datasets.{module}.check_integrity", lambda path, md5=None: Path(path).is_file())


def idx(values: np.ndarray) -> bytes:
    """The format of MNIST: magic number, dimensions, bytes."""
    return (
        struct.pack(">BBBB", 0, 0, 8, values.ndim) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()
    )


def mnist_files(folder: Path, packed: bool = False) -> tuple[np.ndarray, np.ndarray]:
    folder.mkdir(parents=True, exist_ok=True)
    images, labels = RNG.integers(0, 256, (20, 28, 28), dtype=np.uint8), (np.arange(20) % 10).astype(np.uint8)
    for part in ("train", "t10k"):
        for name, values in ((f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", labels)):
            path = folder / (f"{name}.gz" if packed else name)
            path.write_bytes(gzip.compress(idx(values)) if packed else idx(values))
    return images, labels


def check(bundle, images: np.ndarray, labels: np.ndarray) -> None:
    for split in (bundle.train, bundle.test):
        assert split.inputs.dtype == torch.uint8 and split.labels.dtype == torch.int64 and split.inputs.is_contiguous()
        assert np.array_equal(split.inputs.numpy(), images) and np.array_equal(split.labels.numpy(), labels)


@pytest.mark.parametrize(("reader", "folder"), [("mnist.mnist", "MNIST"), ("mnist.fashion_mnist", "FashionMNIST")])
def test_mnist(tmp_path, reader, folder):
    images, labels = mnist_files(tmp_path / folder / "raw")
    bundle = load(reader, tmp_path)
    check(bundle, images[:, None], labels)
    assert bundle.info == (10, 1, 28) and len(set(bundle.classes)) == 10


def test_archives_put_there_by_hand_are_unpacked_without_a_network(tmp_path, monkeypatch):
    raw = tmp_path / "MNIST" / "raw"
    images, labels = mnist_files(raw, packed=True)
    files = sorted(raw.glob("*.gz"))
    with pytest.raises(UserError, match=r"is broken \(md5 is not .*\): remove it"):  # not the real MNIST
        load("mnist.mnist", tmp_path)
    real = [(path.name, hashlib.md5(path.read_bytes()).hexdigest()) for path in files]
    monkeypatch.setattr(tv.MNIST, "resources", real)
    check(load("mnist.mnist", tmp_path), images[:, None], labels)


@pytest.mark.parametrize(
    ("reader", "kind", "key"), [("cifar10", tv.CIFAR10, "labels"), ("cifar100", tv.CIFAR100, "fine_labels")]
)
def test_cifar(tmp_path, monkeypatch, reader, kind, key):
    images = RNG.integers(0, 256, (10, 3, 32, 32), dtype=np.uint8)
    names = [f"name {number}" for number in range(10)]
    batch = pickle.dumps({"data": images.reshape(10, -1), key: list(range(10))})
    meta = pickle.dumps({kind.meta["key"]: names})
    contents = {name: batch for name, _ in kind.train_list + kind.test_list} | {kind.meta["filename"]: meta}
    archive = tmp_path / kind.filename
    with tarfile.open(archive, "w:gz") as packed:
        for name, content in contents.items():
            (tmp_path / "part").write_bytes(content)
            packed.add(tmp_path / "part", f"{kind.base_folder}/{name}")
    # The real archive's checksums, for this one.
    sums = {name: hashlib.md5(content).hexdigest() for name, content in contents.items()}
    for listed in ("train_list", "test_list"):
        monkeypatch.setattr(kind, listed, [[name, sums[name]] for name, _ in getattr(kind, listed)])
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": sums[kind.meta["filename"]]})
    monkeypatch.setattr(kind, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    bundle = load(f"cifar.{reader}", tmp_path)
    assert np.array_equal(bundle.train.inputs.numpy(), np.concatenate([images] * len(kind.train_list)))
    assert np.array_equal(bundle.test.inputs.numpy(), images) and bundle.test.labels.tolist() == list(range(10))
    assert bundle.classes == tuple(names)


def test_svhn(tmp_path, monkeypatch):
    no_checksums(monkeypatch, "svhn")
    images = RNG.integers(0, 256, (12, 3, 32, 32), dtype=np.uint8)
    labels = np.array([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 1, 2])  # 10 is the digit 0
    (tmp_path / "svhn").mkdir()
    for part in ("train", "test"):
        content = {"X": images.transpose(2, 3, 1, 0), "y": labels[:, None]}
        scipy.io.savemat(tmp_path / "svhn" / f"{part}_32x32.mat", content)
    check(load("svhn.svhn", tmp_path), images, labels % 10)


def test_stl10(tmp_path, monkeypatch):
    no_checksums(monkeypatch, "stl10")
    images = RNG.integers(0, 256, (10, 3, 96, 96), dtype=np.uint8)
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    for part in ("train", "test"):
        (folder / f"{part}_X.bin").write_bytes(np.ascontiguousarray(images.transpose(0, 1, 3, 2)).tobytes())
        (folder / f"{part}_y.bin").write_bytes(np.arange(1, 11, dtype=np.uint8).tobytes())
    (folder / "unlabeled_X.bin").write_bytes(b"")
    check(load("stl10.stl10", tmp_path), images, np.arange(10))


def tiny_zip(path: Path, classes: int = 3, per_class: int = 4) -> None:
    """The official layout: train/<class>/images/*.JPEG, val/images/*.JPEG and val/val_annotations.txt."""
    base, scratch = "tiny-imagenet-200", path.with_suffix(".JPEG")
    with zipfile.ZipFile(path, "w") as packed:
        for number in range(classes):
            for image in range(per_class):
                Image.new("RGB", (16, 16), (80 * number, 0, 10 * image)).save(scratch, format="PNG")
                packed.write(scratch, f"{base}/train/n{number}/images/n{number}_{image}.JPEG")
            packed.write(scratch, f"{base}/val/images/val_{number}.JPEG")
        lines = [f"val_{number}.JPEG\tn{number}\t0\t0\t62\t62\n" for number in reversed(range(classes))]
        packed.writestr(f"{base}/val/val_annotations.txt", "".join(lines))


def test_tiny_imagenet(tmp_path, monkeypatch):
    archive = tmp_path / "tiny-imagenet-200.zip"
    tiny_zip(archive)
    with pytest.raises(UserError, match="is broken"):
        load("tiny_imagenet.tiny_imagenet", tmp_path)
    wanted = ((archive.name, hashlib.md5(archive.read_bytes()).hexdigest()),)
    monkeypatch.setattr(tiny_imagenet, "FILES", tiny_imagenet.FILES._replace(wanted=wanted))
    for _ in range(2):  # from the zip, then from the folder
        bundle = load("tiny_imagenet.tiny_imagenet", tmp_path)
        assert bundle.classes == ("n0", "n1", "n2") and bundle.info == (3, 3, 16)
        assert bundle.train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
        assert bundle.test.labels.tolist() == [2, 1, 0] and bundle.test.inputs[:, 0, 0, 0].tolist() == [160, 80, 0]
        archive.unlink(missing_ok=True)
    (tmp_path / "tiny-imagenet-200" / "val" / "val_annotations.txt").unlink()
    with pytest.raises(UserError, match=r"val_annotations.txt cannot be read"):
        load("tiny_imagenet.tiny_imagenet", tmp_path)


def test_imagenet(tmp_path):
    for part, number in (("train", 3), ("val", 1)):
        for name in ("n01", "n02"):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for image in range(number):
                Image.new("RGB", (30, 20), (50 * image, 0, 0)).save(folder / f"{image}.JPEG", quality=100)
    bundle = load("imagefolder.imagenet", tmp_path, size=8, resize=10)
    assert (len(bundle.train), len(bundle.test)) == (6, 2) and bundle.info == (2, 3, 8) and bundle.val is None
    with pytest.raises(UserError, match=r"dataset.root = .* train/ and val/ .*val\. .*ILSVRC2012_img_val.tar"):
        (tmp_path / "val").rename(tmp_path / "elsewhere")
        load("imagefolder.imagenet", tmp_path)


NEEDED = {
    "mnist.mnist": "MNIST/raw",
    "mnist.fashion_mnist": "FashionMNIST/raw",
    "cifar.cifar10": "",
    "cifar.cifar100": "",
    "svhn.svhn": "svhn",
    "stl10.stl10": "",
    "tiny_imagenet.tiny_imagenet": "",
}


@pytest.mark.parametrize("reader", NEEDED)
@pytest.mark.parametrize("fetch", [False, True])
def test_missing_data_says_what_to_put_where(tmp_path, monkeypatch, reader, fetch):
    monkeypatch.setattr(download, "answers", lambda url: False)  # no network
    with pytest.raises(UserError) as raised:
        load(reader, tmp_path, download=fetch)
    words = str(raised.value)
    assert ("does not answer" if fetch else "dataset.download is false") in words
    assert f" into {tmp_path / NEEDED[reader]} (from http" in words and "(md5 " in words


def test_servers_that_do_not_answer_cost_seconds(monkeypatch):
    asked = threading.Event()

    def hang(*args, **kwargs):
        asked.wait(5)
        raise OSError

    monkeypatch.setattr(download, "REACH_SECONDS", 0.2)
    monkeypatch.setattr(download.urllib.request, "urlopen", hang)
    start = time.perf_counter()
    assert not download.answers("http://example.org/data.zip")
    assert time.perf_counter() - start < 3
    asked.set()
    assert not download.answers("no address")


def test_a_failing_download_is_a_message(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "answers", lambda url: True)

    def fetch(*args, **kwargs):
        raise RuntimeError("File not found or corrupted.")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", fetch)
    with pytest.raises(
        UserError, match=r"CIFAR-10 could not be read or downloaded: File not found.*Put cifar-10-python.tar.gz"
    ):
        load("cifar.cifar10", tmp_path, download=True)


def test_digits_are_scikit_learns_whether_read_from_its_file_or_by_it(monkeypatch, tmp_path):
    from sklearn.datasets import load_digits

    pixels, labels = digits._table()
    assert np.array_equal(pixels, load_digits().images) and np.array_equal(labels, load_digits().target)
    elsewhere = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(digits.importlib.util, "find_spec", lambda name: elsewhere)
    assert np.array_equal(digits._table()[0], pixels)
