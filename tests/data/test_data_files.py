"""Folders of images: listing, the cache of decoded images, streaming, and messages that name the path."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kdbench.data import cache, decode, survey
from kdbench.data.augment.library import Timm
from kdbench.data.augment.mix import Mixup
from kdbench.data.augment.strong import Cutout, RandomErasing, ResizedCrop
from kdbench.data.augment.views import Compose, CropFlip
from kdbench.data.batches import EvaluationBatches, Loading, TrainingBatches
from kdbench.data.bundle import ImageFiles
from kdbench.data.files import find_images
from kdbench.data.load import load_bundle
from kdbench.data.stream import box
from kdbench.errors import UserError, under


def image_folder(root: Path, per_class: int = 4, size: tuple[int, int] = (12, 12), seed: int = 0) -> Path:
    """Class folders owl, cat and dog of random PNGs."""
    rng = np.random.default_rng(seed)
    for name in ("owl", "cat", "dog"):
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(per_class):
            pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


def load(root, **keys):
    reader = "kdbench.data.readers.imagefolder.imagefolder"
    with under("dataset"):
        return load_bundle(name="folder", reader=reader, root=str(root), cache="cache", **{"workers": 0} | keys)


def test_class_folders_get_a_fixed_test_split(tmp_path):
    root = image_folder(tmp_path / "birds", per_class=10)
    bundle = load(root)
    assert bundle.classes == ("cat", "dog", "owl") and bundle.info == (3, 3, 12)
    assert (
        torch.bincount(bundle.train.labels).tolist() == [8] * 3
        and torch.bincount(bundle.test.labels).tolist() == [2] * 3
    )
    assert torch.equal(load(root, split_seed=5).test.inputs, bundle.test.inputs)
    with Image.open(root / "cat" / "0.png") as image:
        first = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    everything = torch.cat([bundle.train.inputs, bundle.test.inputs])
    assert (everything == first).all((1, 2, 3)).sum() == 1


@pytest.mark.parametrize(("parts", "has_val"), [(("test",), False), (("val",), False), (("test", "val"), True)])
def test_train_and_test_folders(tmp_path, parts, has_val):
    image_folder(tmp_path / "train", 5)
    for seed, part in enumerate(parts, start=1):
        image_folder(tmp_path / part, 2, seed=seed)
    bundle = load(tmp_path)
    assert (len(bundle.train), len(bundle.test)) == (15, 6) and (bundle.val is not None) == has_val
    used = image_folder(tmp_path / "alone", 2, seed=1)  # as the first of the parts
    assert set(load(used, test=2).test.inputs.float().mean((1, 2, 3)).tolist()) <= set(
        bundle.test.inputs.float().mean((1, 2, 3)).tolist()
    )
    if has_val:
        assert bundle.val.rows.tolist() == [-1] * 6
        assert len(load(tmp_path, validation=3).val) == 3 and load(tmp_path, validation=3).val.rows.min() >= 0


def test_sizes_and_channels(tmp_path):
    root = image_folder(tmp_path, size=(24, 16))
    bundle = load(root, size=8, channels=1)
    assert bundle.info == (3, 1, 8)
    wide = load(root, size=8, resize=16)
    with Image.open(root / "cat" / "0.png") as image:
        middle = torch.from_numpy(np.array(image)).permute(2, 0, 1)[:, 4:12, 8:16]
    assert (torch.cat([wide.train.inputs, wide.test.inputs]) == middle).all((1, 2, 3)).sum() == 1


def test_decoded_images_are_cached(tmp_path, monkeypatch):
    root = image_folder(tmp_path / "birds")
    first = load(root)
    calls = []
    real = decode.read_images
    monkeypatch.setattr(cache, "read_images", lambda *args: calls.append(args) or real(*args))
    second = load(root)
    assert not calls  # from the cache
    assert torch.equal(first.train.inputs, second.train.inputs)
    assert (first.fingerprint, first.mean, first.std) == (second.fingerprint, second.mean, second.std)
    moved = root.rename(tmp_path / "moved")
    assert load(moved).fingerprint == first.fingerprint and not calls  # the same files elsewhere
    target = next(path for path in Path("cache").glob("*.safetensors") if path.stat().st_size > 4000)
    for spoil in (
        lambda data: data[:-9],
        lambda data: data[:-9] + b"wrong" + data[-4:],
        lambda data: b"",
        lambda data: b"?" * 9,
    ):
        target.write_bytes(spoil(target.read_bytes()))
        calls.clear()
        assert torch.equal(load(moved).train.inputs, first.train.inputs) and calls  # made again
        assert not list(Path("cache").glob("*.partial"))
    image_folder(moved, seed=1)  # other pixels, the same names and sizes in bytes
    assert load(moved).fingerprint != first.fingerprint
    calls.clear()
    for path in moved.rglob("*.png"):
        os.utime(path, ns=(0, 0))
    load(moved)
    assert calls  # touched


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, caplog):
    root = image_folder(tmp_path / "birds")
    Path("cache").write_text("a file where the folder should be")
    assert len(load(root).train) > 0 and "no cache of decoded images" in caplog.text


def test_many_formats(tmp_path):
    image = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    expected = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    for name, mode in (("rgb.bmp", "RGB"), ("rgb.tif", "RGB"), ("rgba.png", "RGBA"), ("rgb.ppm", "RGB")):
        image.convert(mode).save(tmp_path / name)
        assert torch.equal(decode.decode(str(tmp_path / name), 3), expected), name
    for name, mode in (
        ("palette.png", "P"),
        ("gray.jpg", "L"),
        ("cmyk.jpg", "CMYK"),
        ("gray.gif", "L"),
        ("bits.png", "1"),
    ):
        image.convert(mode).save(tmp_path / name)
        with Image.open(tmp_path / name) as reread:
            near = torch.from_numpy(np.array(reread.convert("RGB"))).permute(2, 0, 1).int()
        assert (decode.decode(str(tmp_path / name), 3).int() - near).abs().max() <= 2, name
    deep = Image.fromarray((np.arange(64, dtype=np.uint16) * 1000).reshape(8, 8))
    deep.save(tmp_path / "deep.png")
    got = decode.decode(str(tmp_path / "deep.png"), 1)
    assert got.dtype == torch.uint8 and torch.equal(
        got[0].flatten().int(), (torch.arange(64) * 1000 / 257).round().int()
    )


def test_many_images_are_decoded_by_processes(tmp_path, monkeypatch):
    root = image_folder(tmp_path, per_class=30)
    files = ImageFiles(find_images(root, "x"), 8, 10, 3)
    alone = decode.read_images(files)[0]
    monkeypatch.setattr(decode, "_MANY", 50)
    monkeypatch.setattr(decode, "_CHUNK", 20)
    assert torch.equal(decode.read_images(files)[0], alone)
    (root / "dog" / "7.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"^cannot read the image .*dog/7.png"):
        decode.read_images(files)
    (root / "owl" / "3.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"^2 images cannot be read:\n  .*dog/7.png: the file is.*\n  .*owl/3.png"):
        decode.read_images(files)
    monkeypatch.setattr(decode, "_NAMED", 2)
    with pytest.raises(UserError, match=r"^at least 2 of 90 images cannot be read:"):
        decode.read_images(files)


def streamed(root, **keys):
    bundle = load(root, size=8, in_memory_limit=0, **keys)
    assert isinstance(bundle.train.inputs, ImageFiles)
    return bundle


def epoch_of(bundle, number: int, **options):
    made = TrainingBatches(bundle, bundle.train, Loading(4, seed=3, **options))
    assert made.views is None
    return [part for batch in made.epoch(number, 2) for part in (batch.input, batch.view, *batch.target[:3])]


AT_DECODING = Compose([ResizedCrop(), Timm(), RandomErasing(1.0)])


@pytest.mark.parametrize(
    "augment",
    [ResizedCrop(), CropFlip(pad=2), Compose([ResizedCrop(), Cutout(size=3)]), AT_DECODING, Timm()],
    ids=["crop", "pad", "both", "images", "image"],
)
def test_streams_replay(tmp_path, augment):
    root = image_folder(tmp_path, size=(20, 14))
    bundle = streamed(root, augment=augment)
    first, again = epoch_of(bundle, 1), epoch_of(bundle, 1)
    assert all(torch.equal(a, b) for a, b in zip(first, again)) and len(first) == len(again) == 15
    assert not torch.equal(epoch_of(bundle, 0)[0], first[0])


def test_workers_change_nothing(tmp_path):
    root = image_folder(tmp_path, size=(20, 14))
    alone, helped = (epoch_of(streamed(root, augment=AT_DECODING, workers=n), 0) for n in (0, 2))
    assert all(torch.equal(a, b) for a, b in zip(alone, helped)) and len(alone) == len(helped)


@pytest.mark.parametrize("parts", [[CropFlip(pad=2)], [CropFlip(pad=2), Timm(), Cutout(size=2)]], ids=len)
def test_streams_equal_memory_where_nothing_is_cropped_at_decoding(tmp_path, parts):
    root, augment = image_folder(tmp_path, size=(20, 14)), Compose(parts)
    memory = load(root, size=8, in_memory_limit=1, augment=augment)
    mean_std = {"mean": memory.mean, "std": memory.std}
    stream = streamed(root, augment=augment, **mean_std)
    for bundle_pair in (("train", 0), ("train", 1)):
        epochs = [
            list(TrainingBatches(bundle, bundle.train, Loading(4, seed=1)).epoch(bundle_pair[1], 2))
            for bundle in (stream, memory)
        ]
        for left, right in zip(*epochs, strict=True):
            assert torch.equal(left.input, right.input) and torch.equal(left.target.label, right.target.label)
    for left, right in zip(
        *(EvaluationBatches(bundle, bundle.test, Loading(2)) for bundle in (stream, memory)), strict=True
    ):
        assert torch.equal(left.input, right.input) and torch.equal(left.target.row, right.target.row)


def test_streams_mix_subset_and_extend(tmp_path):
    root = image_folder(tmp_path / "birds", per_class=8)
    extra = image_folder(tmp_path / "extra", per_class=1)
    bundle = streamed(root, mix={"kind": "mixup"}, validation=0.25, transfer={"omit": ["owl"], "extra": str(extra)})
    assert bundle.mix == Mixup() and len(bundle.val) == 5
    assert bundle.transfer.labels[-3:].tolist() == [-1] * 3 and bundle.transfer.rows.max() == bundle.num_rows - 1
    batch = next(TrainingBatches(bundle, bundle.transfer, Loading(4)).epoch(0, 1))
    assert batch.input.shape == (4, 3, 8, 8) and batch.target.label.shape == (4, 3)
    with pytest.raises(UserError, match=r"dataset.transfer.crops = \d+: must be 0 for a dataset that is streamed"):
        streamed(root, transfer={"crops": 2})


def test_streamed_statistics_are_kept(tmp_path, monkeypatch):
    root = image_folder(tmp_path / "birds")
    first = streamed(root)
    assert first.mean == pytest.approx(load(root, size=8).mean, abs=1e-5)
    monkeypatch.setattr(survey, "read_images", lambda files: pytest.fail("measured again"))
    assert (streamed(root).mean, streamed(root).std) == (first.mean, first.std)


def test_random_crops_are_of_the_full_resolution(tmp_path):
    gradient = np.broadcast_to(np.arange(64, dtype=np.uint8)[None, :, None] * 4, (64, 64, 3))
    root = image_folder(tmp_path)
    for path in root.rglob("*.png"):
        Image.fromarray(np.ascontiguousarray(gradient)).save(path)
    bundle = streamed(root, augment=ResizedCrop(smallest=0.05, flip=False), mean=0.0, std=1.0)
    slopes = []
    for batch in TrainingBatches(bundle, bundle.train, Loading(3)).epoch(0, 1):
        row = batch.input[:, 0, 4] * 255
        slopes += (row[:, -1] - row[:, 0]).tolist()
    assert (
        min(slopes) > 30 and max(slopes) < 230 and np.std(slopes) > 10
    )  # parts of the width, each stretched to all of it


@pytest.mark.parametrize("limit", [0, 4])
@pytest.mark.parametrize("data", [b"", b"no image", None])
def test_a_broken_image_is_named(tmp_path, limit, data):
    root = image_folder(tmp_path)
    for number, name in enumerate(("owl", "cat", "dog")):
        path = root / name / "0.png"
        path.write_bytes(path.read_bytes()[:150] if data is None else data)
        if number:
            path.with_name("0.png").unlink()
    bad = root / "owl" / "0.png"
    with pytest.raises(UserError, match=f"cannot read the image {bad}") as raised:
        bundle = load(root, size=8, in_memory_limit=limit, mean=0.5, std=0.5, test=2)
        list(TrainingBatches(bundle, bundle.train, Loading(9)).epoch(0, 1))
        list(EvaluationBatches(bundle, bundle.test, Loading(9)))
    said = {
        b"": "the file is empty; mend",
        b"no image": "it is none that Pillow reads; mend",
        None: "mend or remove it",
    }
    assert said[data] in str(raised.value) and "<" not in str(raised.value)


def test_a_truncated_jpeg_is_named(tmp_path):
    path = tmp_path / "half.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, quality=95)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(UserError, match=f"cannot read the image {path}"):
        decode.decode(str(path), 3)


def empty_class(root: Path) -> None:
    (root / "cow").mkdir()


def only_one(root: Path) -> None:
    for name in ("cat", "dog"):
        (root / name).rename(root.parent / name)


def no_classes(root: Path) -> None:
    for name in ("cat", "dog", "owl"):
        (root / name).rename(root.parent / name)


def other_size(root: Path) -> None:
    Image.new("RGB", (9, 9)).save(root / "owl" / "9.png")


def unknown_class(root: Path) -> None:
    image_folder(root / "train")
    image_folder(root / "test")
    (root / "test" / "owl").rename(root / "test" / "cow")


@pytest.mark.parametrize(
    ("change", "keys", "words"),
    [
        (None, {}, r"dataset.root = .*: must be a folder of class folders. There is no folder .*/birds"),
        (empty_class, {}, r"dataset.root: no images in .*/birds/cow"),
        (only_one, {}, r"birds holds one class folder only \(owl\)"),
        (no_classes, {}, r"birds holds no class folders"),
        (
            other_size,
            {},
            r"dataset.size = null: .* differ in size: .*cat/[01].png has 12x12 .*9x9",
        ),
        (unknown_class, {}, r"test/cow is a class that is not in the training set"),
        (image_folder, {"resize": 10}, "dataset.size = null: must be a number of .* because dataset.resize is set"),
        (
            image_folder,
            {"size": 10, "resize": 8},
            r"dataset.size = 10: must be 4 or more, and at most dataset.resize, 8",
        ),
        (image_folder, {"in_memory_limit": 0}, "dataset.size = null: must be .* because 12 images exceed"),
        (image_folder, {"in_memory_limit": -1}, "dataset.in_memory_limit = -1: must be "),
        (image_folder, {"test": 0}, "dataset.test = 0.0: must be above 0"),
        (image_folder, {"test": 12}, "dataset.test = 12.*: must be below 12, to leave"),
        (
            lambda root: image_folder(root, size=(9, 8)),
            {},
            r"dataset.size = null: must be .* because images are not square \(9x8\)",
        ),
    ],
)
def test_what_cannot_be(tmp_path, change, keys, words):
    root = tmp_path / "birds"
    if change is not None:
        image_folder(root)
        change(root)
    with pytest.raises(UserError, match=words):
        load(root, **keys)


def test_no_root():
    with pytest.raises(UserError, match=r"dataset.root = null: must be the folder that holds the class folders"):
        load_bundle("folder", "kdbench.data.readers.imagefolder.imagefolder", None, "cache")


@pytest.mark.parametrize(("width", "height"), [(500, 375), (375, 500), (33, 32), (4000, 7)])
def test_a_crop_of_a_file_is_the_one_that_was_drawn_to_the_last_pixel(width, height):
    """Boxes of a batch are drawn at once, and each is placed by arithmetic of the same 32 bits as the tensors'."""
    crop, view = ResizedCrop(), torch.randint(2**40, (2000,), generator=torch.Generator().manual_seed(0))
    left, top, wide, high, flips = (part.tolist() for part in crop.box(view, width / height))
    drawn = crop.drawn(view).numpy()
    for i, got in enumerate(box(one, width, height) for one in drawn):
        w, h = max(1, round(wide[i] * width)), max(1, round(high[i] * height))
        assert got == (min(round(left[i] * width), width - w), min(round(top[i] * height), height - h), w, h)
    assert (drawn[:, 4] < 0.5).tolist() == flips
    assert torch.equal(crop.drawn(view[7:8]), crop.drawn(view)[7:8])  # alone as among others
