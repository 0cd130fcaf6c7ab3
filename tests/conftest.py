"""What all tests share: one thread a worker, no network, and no writing outside the test's own folder."""

from __future__ import annotations

import os

# Before torch is imported: the tests' networks are tiny, and two OpenMP pools on two cores slow each other down.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import functools
import gc
import logging
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from PIL import Image

from tests.support.shell import kdbench

REPOSITORY = Path(__file__).parent.parent


def pytest_collection_finish() -> None:
    """All that is imported by now stays to the end: Python's collector, which would look through those half a million
    objects again and again, takes a quarter of the time that composing a configuration takes."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000)


@pytest.fixture
def repository() -> Path:
    """The checkout that the tests run from."""
    return REPOSITORY


@pytest.fixture(autouse=True)
def _own_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test works in a folder of its own: outputs/ and data/ are relative to where a command is typed."""
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))


@pytest.fixture(autouse=True)
def _own_logging() -> Iterator[None]:
    """A command that a test runs in this process sets up logging: what it leaves would write into a gone folder."""
    loggers = [logging.getLogger(), logging.getLogger("kdbench.failure")]
    before = [(one, list(one.handlers), one.level, one.propagate) for one in loggers]
    yield
    for one, handlers, level, propagate in before:
        for handler in [h for h in one.handlers if h not in handlers and not type(h).__module__.startswith("_pytest")]:
            one.removeHandler(handler)
            handler.close()
        one.setLevel(level)
        one.propagate = propagate


@pytest.fixture(autouse=True, scope="session")
def _yaml_read_once() -> None:
    """The tests compose a thousand configurations of the same files: each version of a file is parsed once."""
    load, known = FileConfigSource.load_config, {}

    @functools.wraps(load)
    def remembered(self, config_path):
        path = os.path.join(self.path, self._normalize_file_name(config_path))
        if not os.path.exists(path):
            return load(self, config_path)
        about = os.stat(path)
        key = (self.provider, os.path.realpath(path), about.st_mtime_ns, about.st_size)
        if key not in known:
            known[key] = pickle.dumps(load(self, config_path))
        return pickle.loads(known[key])

    FileConfigSource.load_config = remembered


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of class folders: red and blue pictures of several sizes, one on its side, one gray."""
    root = tmp_path_factory.mktemp("photos") / "photos"
    random = np.random.default_rng(0)
    for name, colour in (("blue", (30, 40, 200)), ("red", (200, 40, 30))):
        (root / name).mkdir(parents=True)
        for i in range(20):
            shape = (20 + i, 30, 3)
            pixels = np.clip(random.normal(colour, 30, shape), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i:02}.png")
    return root


@pytest.fixture(scope="session")
def photo_run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    words = ["dataset=imagefolder", f"dataset.root={photos}", "dataset.size=16", "dataset.resize=20", "teacher=none",
             "loss=ce", "student=resnet8", "schedule.epochs=6", "schedule.batch_size=8", "trainer.progress=none",
             f"dataset.cache={folder.parent}/cache", f"hydra.run.dir={folder}"]  # fmt: skip
    assert kdbench("train", *words) == 0
    return folder
