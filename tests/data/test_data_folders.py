"""Folders of a set: spellings of its parts and classes, what is left out and said, and what is refused by name."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kdbench.data.files import LeftOut, find_images, images_below
from kdbench.data.load import load_bundle
from kdbench.data.readers.folders import part_of
from kdbench.errors import UserError, under

CLASSES = ("elm", "oak")


def grow(root: Path, names=CLASSES, count: int = 4, seed: int = 0, form: str = "png") -> Path:
    """Class folders of random images, no two alike."""
    rng = np.random.default_rng([seed, *root.name.encode()])
    for name in names:
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            image = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            image.save(root / name / f"{number}.{form}", format={"jfif": "JPEG", "jpe": "JPEG"}.get(form))
    return root


def load(root, **keys):
    reader = "kdbench.data.readers.imagefolder.imagefolder"
    with under("dataset"):
        return load_bundle("trees", reader, str(root), "cache", **{"workers": 0, "size": 8} | keys)


def sizes(bundle) -> tuple[int, int, int]:
    return len(bundle.train), 0 if bundle.val is None else len(bundle.val), len(bundle.test)


SPELLINGS = [
    (("train", "valid"), (8, 0, 4)),
    (("train", "valid", "test"), (8, 4, 4)),
    (("Train", "Test"), (8, 0, 4)),
    (("TRAINING", "Validation", "Testing"), (8, 4, 4)),
    (("training_set", "dev", "eval"), (8, 4, 4)),
    (("train2017", "val2017"), (8, 0, 4)),
    (("Training Data", "test_images"), (8, 0, 4)),
]


@pytest.mark.parametrize(("parts", "expected"), SPELLINGS, ids=["-".join(parts) for parts, _ in SPELLINGS])
def test_parts_in_any_spelling(tmp_path, parts, expected):
    for part in parts:
        grow(tmp_path / part, count=4 if part == parts[0] else 2)
    bundle = load(tmp_path)
    assert sizes(bundle) == expected and bundle.classes == CLASSES


def test_names_that_are_no_parts():
    for name in ("trainer", "testament", "station", "devil", "validate", "tests2", "1"):
        assert part_of(name) is None, name


@pytest.mark.parametrize(
    ("folders", "flat", "words"),
    [
        (("train", "Training"), (), r"(train|Training)/ and (train|Training)/ in .* would both be a training set"),
        (("train", "val", "dev"), (), "would both be a validation set"),
        (("validation", "test"), (), "looks like a (validation|test) set, but there is no train/"),
        (("test",), CLASSES, "test looks like a test set, but there is no train/"),
        ((), ("Train", "Test"), "Test/, Train/ in .* hold no class folders, and are taken for no classes"),
        ((), ("train", "val", "oak"), "train/, val/ in .* hold no class folders"),
        (("train",), ("test",), "test holds no class folders: move its images"),
    ],
)
def test_parts_that_are_refused_by_name(tmp_path, folders, flat, words):
    for part in folders:
        grow(tmp_path / part)
    if flat:
        grow(tmp_path, flat)
    with pytest.raises(UserError, match=words):
        load(tmp_path)


@pytest.mark.parametrize("parts", [("trn", "tst"), ("fold1", "fold2"), ("x_train", "x_test")])
def test_parts_under_unknown_names_are_told_from_classes(tmp_path, parts, caplog):
    for part in parts:
        grow(tmp_path / part)
    load(tmp_path)
    assert f"the classes {', '.join(sorted(parts))} all hold the same folders (elm, oak)" in caplog.text


def test_a_class_may_have_folders_of_its_own(tmp_path, caplog):
    for name, inside in (("elm", ("young", "old")), ("oak", ("tall", "old"))):
        grow(tmp_path / name, inside)
    load(tmp_path)
    assert "all hold the same folders" not in caplog.text


def test_a_class_may_be_called_train(tmp_path):
    assert load(grow(tmp_path, ("bus", "car", "train"), 5)).classes == ("bus", "car", "train")


def test_what_lies_beside_train_is_said(tmp_path, caplog):
    for part in ("train", "test", "spare"):
        grow(tmp_path / part)
    Image.new("RGB", (8, 8)).save(tmp_path / "cover.png")
    assert sizes(load(tmp_path)) == (8, 0, 8)
    assert "8 images in spare/, beside train/" in caplog.text and "1 images beside train/" in caplog.text


def test_what_is_left_out_is_said_with_its_count(tmp_path, caplog):
    root = grow(tmp_path / "trees", count=5)
    for number in range(3):
        (root / "oak" / f"{number}.heic").write_bytes(b"x")
    (root / "oak" / "notes.TXT").write_text("x")
    (root / "oak" / "readme").write_text("x")
    (root / "elm" / ".secret.png").write_bytes(b"x")
    (root / "elm" / ".DS_Store").write_bytes(b"x")
    (root / "elm" / "Thumbs.db").write_bytes(b"x")
    grow(root, ("__MACOSX", ".thumbnails"))
    grow(root / "elm", ("@eaDir", "_thumbs", "nested"))
    Image.new("RGB", (8, 8)).save(root / "cover.png")
    bundle = load(root)
    assert bundle.classes == CLASSES and sizes(bundle) == (12, 0, 2)
    line = next(line for line in caplog.messages if "left out" in line)
    kinds = ["3 .heic", "1 .txt", "1 files without extension", "1 hidden files", "1 folder __MACOSX", "1 folder @eaDir"]
    for kind in [*kinds, "1 folder _thumbs", "1 folder .thumbnails", "1 images beside the class folders of trees/"]:
        assert kind in line
    assert "DS_Store" not in line and "db" not in line


@pytest.mark.parametrize("form", ["jfif", "jpe", "dib", "avif", "jp2", "pcx", "tga", "apng", "JPG", "Webp"])
def test_extensions_that_pillow_reads(tmp_path, form, caplog):
    root = grow(tmp_path / "trees", ("elm",), 4)
    try:
        grow(root, ("oak",), 4, form=form)
    except (OSError, KeyError, ValueError) as error:
        pytest.skip(f"Pillow here cannot write it: {error}")
    assert sum(sizes(load(root))) == 8 and "left out" not in caplog.text


def test_an_empty_folder_says_what_was_left_out(tmp_path):
    root = grow(tmp_path / "trees")
    (root / "pine").mkdir()
    (root / "pine" / "1.heic").write_bytes(b"x")
    with pytest.raises(UserError, match=r"no images in .*/pine \(looked for .*; left out: 1 \.heic\)"):
        load(root)


def test_links_in_circles_are_followed_once(tmp_path, caplog):
    root = grow(tmp_path / "trees")
    (root / "oak" / "self").symlink_to(root / "oak")
    (root / "oak" / "up").symlink_to(root)
    (root / "elm" / "deep").mkdir()
    grow(root / "elm", ("deep",), 2, seed=1)
    (root / "elm" / "again").symlink_to(root / "elm" / "deep")
    outside = grow(tmp_path / "elsewhere", ("more",), 3)
    (root / "oak" / "linked").symlink_to(outside / "more")
    (root / "whole").symlink_to(root)
    left_out = LeftOut()
    assert len(images_below(root / "oak", left_out)) == 7 and left_out.total() == 2
    assert len(images_below(root / "elm", LeftOut())) == 6
    with pytest.raises(UserError, match=r"no images in .*whole"):
        load(root)
    (root / "whole").unlink()
    assert sum(sizes(load(root))) == 13
    assert "3 links to a folder that is read already or lies above" in caplog.text


def test_one_folder_under_two_names_is_refused(tmp_path):
    root = grow(tmp_path / "trees")
    (root / "yew").symlink_to(root / "oak")
    with pytest.raises(UserError, match=r"oak and .*yew are the same folder"):
        load(root)


def test_dead_links_pipes_and_devices_are_left_out(tmp_path, caplog):
    root = grow(tmp_path / "trees", count=5)
    (root / "oak" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (root / "oak" / "round.png").symlink_to(root / "oak" / "round.png")
    (root / "oak" / "zero.png").symlink_to("/dev/zero")
    os.mkfifo(root / "oak" / "pipe.png")
    assert sum(sizes(load(root))) == 10
    assert "2 dead links" in caplog.text and "2 pipes, devices or sockets" in caplog.text


def test_one_name_in_two_unicode_forms(tmp_path):
    one, two = (unicodedata.normalize(form, "häs") for form in ("NFC", "NFD"))
    grow(tmp_path / "a" / "train", (one, "oak"))
    grow(tmp_path / "a" / "test", (two, "oak"), 2)
    bundle = load(tmp_path / "a")
    assert bundle.classes == (one, "oak") and torch.bincount(bundle.test.labels).tolist() == [2, 2]
    assert load(grow(tmp_path / "b", (two, "oak"), 5)).classes == (one, "oak")
    with pytest.raises(UserError, match="are one class, häs, spelled in two ways"):
        load(grow(tmp_path / "c", (one, two)))


def test_case_of_class_folders(tmp_path, caplog):
    grow(tmp_path / "train")
    grow(tmp_path / "test", ("Elm", "OAK"), 2)
    bundle = load(tmp_path)
    assert bundle.classes == CLASSES and torch.bincount(bundle.test.labels).tolist() == [2, 2]
    assert "is taken for the class elm" in caplog.text
    grow(tmp_path / "test", ("elm",), 2)
    with pytest.raises(UserError, match=r"are one class, elm, spelled in two ways"):
        load(tmp_path)
    load(grow(tmp_path / "both", ("oak", "Oak"), 5))
    assert "classes differ in case only: Oak and oak" in caplog.text


def test_classes_of_one_part_only(tmp_path, caplog):
    grow(tmp_path / "train", ("elm", "oak", "yew"))
    grow(tmp_path / "test", ("oak",), 2)
    (tmp_path / "test" / "yew").mkdir()
    (tmp_path / "test" / "ash").mkdir()  # empty: nothing of it could be asked
    assert sizes(load(tmp_path)) == (12, 0, 2)
    assert "test has no images of 2 of 3 classes (elm, yew)" in caplog.text
    grow(tmp_path / "test", ("ash",), 1)
    with pytest.raises(UserError, match="test/ash is a class that is not in the training set"):
        load(tmp_path)


def test_a_name_that_is_no_utf8_is_refused(tmp_path):
    root = grow(tmp_path / "trees")
    try:
        os.rename(os.fsencode(root / "oak"), os.fsencode(root) + b"/\xff\xfe")
    except OSError:
        pytest.skip("this file system has no such names")
    with pytest.raises(UserError, match="is no UTF-8: rename it"):
        load(root)


@pytest.mark.parametrize("test", [0.2, 0.5, 20, 38])
def test_a_class_keeps_an_image_to_train_on(tmp_path, test):
    root = grow(tmp_path / "trees", ("oak",), 38)
    grow(root, ("elm",), 2)
    bundle = load(root, test=test, validation=1 / 3 if test < 20 else 0)
    assert set(bundle.train.labels.tolist()) == {0, 1}
    assert len(bundle.test) == (test * 40 if test < 1 else test)


def test_classes_too_small_to_split_are_refused_by_name(tmp_path):
    root = grow(tmp_path / "trees", ("oak", "elm"), 5)
    grow(root, ("yew",), 1)
    with pytest.raises(UserError, match=r"1 of 3 classes have one image only \(yew\)"):
        load(root)
    grow(root, ("yew",), 2)
    with pytest.raises(UserError, match=r"dataset.test = 10.*: must be at most 9, to leave each class an image"):
        load(root, test=10)
    with pytest.raises(UserError, match=r"dataset.validation = 8.*: must be at most 7, to leave an image of each"):
        load(root, test=2, validation=8)


def test_a_folder_without_permission_is_named(tmp_path):
    root = grow(tmp_path / "trees")
    (root / "oak" / "shut").mkdir(mode=0)
    if os.access(root / "oak" / "shut", os.R_OK):
        pytest.skip("this user may read everything")
    with pytest.raises(UserError, match=r"cannot read the folder .*shut"):
        find_images(root, "dataset.root")


def test_a_folder_of_the_caches_beside_the_parts_is_not_counted(tmp_path, caplog):
    """dataset.root=data, where kdbench keeps its own."""
    for part in ("train", "test"):
        grow(tmp_path / "data" / part, ("elm", "oak"), 3, seed=len(part))
    (tmp_path / "data" / "cache").mkdir()
    load(tmp_path / "data")
    assert "left out" not in caplog.text
