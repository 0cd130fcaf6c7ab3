"""Pack: a streamed set decoded once. Evaluation is the same to the last bit, crops are of the resized image."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kdbench.data import pack as pack_module
from kdbench.data.augment.strong import ResizedCrop
from kdbench.data.augment.views import CropFlip
from kdbench.data.batches import EvaluationBatches, Loading, TrainingBatches
from kdbench.data.bundle import ImageFiles
from kdbench.data.load import load_bundle
from kdbench.errors import UserError


def photos(root: Path) -> Path:
    rng = np.random.default_rng(0)
    for name in ("fern", "moss"):
        (root / name).mkdir(parents=True)
        for number in range(8):
            small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
            small.resize((64, 48 + number), Image.Resampling.BICUBIC).save(root / name / f"{number}.png")
    return root


def load(root, **keys):
    reader = "kdbench.data.readers.imagefolder.imagefolder"
    options = {"workers": 0, "size": 16, "resize": 20, "in_memory_limit": 0, "augment": CropFlip(pad=2)}
    return load_bundle("plants", reader, str(root), "cache", **options | keys)


def inputs(data) -> list[torch.Tensor]:
    made = TrainingBatches(data, data.train, Loading(4, seed=3))
    return [batch.input for batch in made.epoch(0, 1)]


def held_out(data) -> list[torch.Tensor]:
    return [batch.input for batch in EvaluationBatches(data, data.test, Loading(3))]


def test_whole_images_are_the_same_to_the_last_bit(tmp_path):
    root = photos(tmp_path / "plants")
    files, pack = load(root), load(root, packed=True)
    assert (pack.mean, pack.std, pack.classes) == (files.mean, files.std, files.classes)
    for one, two in zip(inputs(files) + held_out(files), inputs(pack) + held_out(pack), strict=True):
        assert torch.equal(one, two)


def test_crops_are_of_the_resized_image(tmp_path):
    root = photos(tmp_path / "plants")
    same = {"size": 16, "resize": 48, "augment": ResizedCrop()}
    for path in root.rglob("*.png"):  # 48 pixels already: nothing is resized, and crops are the same too
        with Image.open(path) as image:
            image.resize((64, 48)).save(path)
    for one, two in zip(inputs(load(root, **same)), inputs(load(root, packed=True, **same)), strict=True):
        assert torch.equal(one, two)
    small = {**same, "resize": 20, "mean": 0.5, "std": 1.0}
    for one, two in zip(inputs(load(root, **small)), inputs(load(root, packed=True, **small)), strict=True):
        assert 0 < (one - two).abs().mean() < 0.05  # the same crops, a little softer


def test_workers_and_spawned_processes_read_the_same_pack(tmp_path):
    root = photos(tmp_path / "plants")
    alone, helped = (inputs(load(root, packed=True, augment=ResizedCrop(), workers=n)) for n in (0, 2))
    assert all(torch.equal(one, two) for one, two in zip(alone, helped, strict=True))
    files = load(root, packed=True).train.inputs
    assert len(pickle.dumps(files)) < 10_000  # what a spawned worker gets names the pack and does not hold it


def test_a_pack_is_made_once_and_again_for_edited_images(tmp_path, monkeypatch):
    root = photos(tmp_path / "plants")
    first = load(root, packed=True)
    assert first.fingerprint != load(root).fingerprint  # other crops: another set for teachers
    with monkeypatch.context() as patch:  # not undo(), which would leave the test's own folder, too
        patch.setattr(pack_module, "_build", lambda *given: pytest.fail("made again"))
        assert load(root, packed=True).fingerprint == first.fingerprint
    for path in (root / "fern").iterdir():
        Image.new("RGB", (64, 50)).save(path)
    assert load(root, packed=True).fingerprint != first.fingerprint
    assert not list(Path("cache").glob("*.partial"))


def test_subsets_and_extra_images(tmp_path):
    root = photos(tmp_path / "plants")
    extra = photos(tmp_path / "extra")
    for keys in ({"subset": 6}, {"validation": 4}, {"transfer": {"extra": str(extra)}}):
        files, pack = load(root, **keys), load(root, packed=True, **keys)
        for split in ("train", "transfer"):
            one, two = (TrainingBatches(data, getattr(data, split), Loading(4, seed=1)) for data in (files, pack))
            pairs = zip(one.epoch(0, 1), two.epoch(0, 1), strict=True)
            assert all(torch.equal(left.input, right.input) for left, right in pairs)


def test_damage_is_named(tmp_path):
    root = photos(tmp_path / "plants")
    assert isinstance(load(root, packed=True).train.inputs, ImageFiles)
    target = next(Path("cache").glob("*.pack"))
    target.write_bytes(target.read_bytes()[:-7])
    with pytest.raises(UserError, match=r"\.pack is broken: remove it and .*\.npy"):
        load(root, packed=True)
    (root / "moss" / "3.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"cannot read the image .*moss/3\.png"):
        load(root, packed=True)
