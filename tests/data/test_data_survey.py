"""Survey of a set: images without content, equal ones of two classes, copies between train and test, missing images."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kdbench.data import survey
from kdbench.data.bundle import ImageFiles, Source, fingerprint
from kdbench.data.cache import cached_images
from kdbench.data.files import find_images
from kdbench.data.load import load_bundle
from kdbench.errors import UserError


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def shapes(root: Path, count: int = 10, form: str = "png") -> Path:
    for part, number in (("train", count), ("test", count // 2)):
        for kind, name in enumerate(("disc", "star")):
            (root / part / name).mkdir(parents=True, exist_ok=True)
            for row in range(number):
                pixels = np.random.default_rng([kind, row, number]).integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{row}.{form}")
    return root


def load(root, **keys):
    reader = "kdbench.data.readers.imagefolder.imagefolder"
    return load_bundle("shapes", reader, str(root), "cache", **{"workers": 0, "size": 8} | keys)


@pytest.mark.parametrize("limit", [0, 1])
@pytest.mark.parametrize("form", ["png", "bmp"])  # bmp: all files are of one size
def test_copies_between_train_and_test_are_counted(tmp_path, caplog, limit, form):
    root = shapes(tmp_path / "shapes", form=form)
    load(root, in_memory_limit=limit)
    assert "also in the training set" not in caplog.text
    for row in range(3):
        shutil.copy(root / "test" / "disc" / f"{row}.{form}", root / "train" / "disc" / f"copy{row}.{form}")
    load(root, in_memory_limit=limit)
    assert "shapes: 3 of 10 test images are also in the training set" in caplog.text
    assert "another class" not in caplog.text


@pytest.mark.parametrize("limit", [0, 1])
def test_constant_and_crossed_images_are_counted(tmp_path, caplog, limit):
    root = shapes(tmp_path / "shapes")
    for row in range(2):
        Image.new("RGB", (8, 8), (row, 9, 9)).save(root / "train" / "disc" / f"blank{row}.png")
        shutil.copy(root / "train" / "star" / f"{row}.png", root / "train" / "disc" / f"star{row}.png")
    for _ in range(2):  # found, then known
        caplog.clear()
        load(root, in_memory_limit=limit)
        assert "2 of 24 training images are constant" in caplog.text
        assert "4 of 24 training images are identical to one of another class" in caplog.text


@pytest.mark.parametrize("kind", [torch.float32, torch.int64])
def test_copies_of_vectors_and_of_texts_are_counted(caplog, kind):
    train = torch.arange(60).reshape(20, 3).to(kind)
    held_out = (train + 100)[:10].clone()
    source = Source(("a", "b"), train, torch.arange(20) % 2, held_out, torch.arange(10) % 2)
    survey.survey("rows", source, "cache")
    assert not caplog.text
    held_out[2], held_out[5], train[1] = train[7], train[8], train[0]
    if kind.is_floating_point:
        train[7, 0], held_out[2, 0] = 0.0, -0.0
    survey.survey("rows", source, "cache")
    assert "rows: 2 of 10 test samples are also in the training set, to the last bit" in caplog.text
    assert "2 of 20 training samples are identical to one of another class" in caplog.text


def test_nothing_is_said_of_a_sound_set(tmp_path, caplog):
    load(shapes(tmp_path / "shapes"))
    load_bundle("digits", "kdbench.data.readers.digits.digits", None, "cache")
    load_bundle("fake", "kdbench.data.readers.fake.fake", None, "cache")
    assert caplog.text == "" or "WARNING" not in caplog.text


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 5, 5), (3, 7, 3), (1, 1, 1)])
def test_row_hashes_are_equal_for_equal_rows_only(shape):
    images = noise(300, *shape)
    exact = {bytes(row.numpy().tobytes()) for row in images}
    assert len(set(survey.row_hashes(images).tolist())) == len(exact)
    assert torch.equal(survey.row_hashes(images)[7:9], survey.row_hashes(images[7:9]))


def test_row_hashes_see_every_byte():
    """Pairs of changes in the highest byte of two words cancel in a plain sum of products once in 256 times."""
    base = torch.zeros(1, 64, dtype=torch.uint8)
    first = torch.arange(256, dtype=torch.uint8).repeat_interleave(256)
    second = torch.arange(256, dtype=torch.uint8).repeat(256)
    images = base.repeat(65536, 1)
    images[:, 7], images[:, 15] = first, second
    assert len(survey.row_hashes(images).unique()) == 65536


def test_copies_are_compared_byte_by_byte():
    images, others = noise(50, 3, 4, 4), noise(20, 3, 4, 4, seed=1)
    others[3], others[9] = images[40], images[0]
    hashes = survey.row_hashes(images)
    assert survey.copies(images, hashes, others) == 2
    assert survey.copies(images, torch.zeros_like(hashes), others) == 0  # whatever the hashes say
    assert survey.copies(images, hashes, noise(5, 1, 4, 4)) == 0


def short(download: bool) -> Source:
    images = noise(40, 3, 4, 4)
    return Source(("a", "b"), images[:30], torch.arange(30) % 2, images[30:], torch.arange(10) % 2, published=(30, 12))


def test_published_numbers_are_compared(caplog):
    load_bundle("Shapes-30", "test_data_survey.short", None, "cache")
    assert "Shapes-30 has 10 test images here, published are 12" in caplog.text
    assert "training images here" not in caplog.text


def test_an_edit_in_place_makes_another_streamed_set(tmp_path):
    root = shapes(tmp_path / "shapes", form="bmp")
    first = load(root, in_memory_limit=0)
    assert load(root, in_memory_limit=0).fingerprint == first.fingerprint
    path = root / "train" / "disc" / "0.bmp"
    size, pixels = path.stat().st_size, 255 - np.asarray(Image.open(path))
    Image.fromarray(pixels).save(path)
    os.utime(path, ns=(1, 2 + path.stat().st_mtime_ns))
    second = load(root, in_memory_limit=0)
    assert path.stat().st_size == size
    assert second.fingerprint != first.fingerprint and second.mean != first.mean
    moved = root.rename(tmp_path / "elsewhere")
    assert load(moved, in_memory_limit=0).fingerprint == second.fingerprint
    (moved / "train" / "disc" / "0.bmp").rename(moved / "train" / "disc" / "new.bmp")
    assert load(moved, in_memory_limit=0).fingerprint != second.fingerprint


def test_labels_count_for_what_is_known_of_a_streamed_set(tmp_path, caplog):
    root = shapes(tmp_path / "shapes")
    load(root, in_memory_limit=0)
    shutil.copy2(root / "train" / "star" / "1.png", root / "train" / "disc" / "1.png")
    load(root, in_memory_limit=0)
    assert "2 of 20 training images are identical to one of another class" in caplog.text


def test_damaged_findings_are_measured_again(tmp_path, caplog):
    root = shapes(tmp_path / "shapes")
    first = load(root, in_memory_limit=0)
    kept = next(Path("cache").glob("*.stats.json"))
    for text in ("", "{}", "[1, 2]", "null", "[[1], [1], [1, 2, 3], []]"):
        kept.write_text(text)
        caplog.clear()
        assert load(root, in_memory_limit=0).mean == first.mean and "is broken" in caplog.text, text


def test_a_cache_is_shared_and_leaves_nothing_half_written(tmp_path):
    root = shapes(tmp_path / "shapes")
    files = ImageFiles(find_images(root / "train", "x"), 8, 8, 3)
    before = os.umask(0o022)
    try:
        made = cached_images(files, root, "cache")
        (path,) = Path("cache").glob("*.safetensors")
        assert stat.S_IMODE(path.stat().st_mode) == 0o644
        left = path.with_suffix(".1.partial")
        left.write_bytes(b"of a killed process")
        path.write_bytes(b"")
        assert torch.equal(cached_images(files, root, "cache").images, made.images) and not left.exists()
    finally:
        os.umask(before)


def test_a_cache_that_is_there_needs_no_lock(tmp_path, monkeypatch):
    root = shapes(tmp_path / "shapes")
    files = ImageFiles(find_images(root / "train", "x"), 8, 8, 3)
    made = cached_images(files, root, "cache")
    monkeypatch.setattr("kdbench.data.cache.lock", lambda path: pytest.fail("locked"))
    assert cached_images(files, root, "cache").fingerprint == made.fingerprint == fingerprint(made.images)


def test_a_file_that_goes_away_is_named(tmp_path):
    root = shapes(tmp_path / "shapes")
    files = ImageFiles(find_images(root / "train", "x"), 8, 8, 3)
    (root / "train" / "star" / "3.png").unlink()
    with pytest.raises(UserError, match=r"cannot read the image .*star/3\.png"):
        fingerprint(files)
