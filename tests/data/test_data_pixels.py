"""Pixels of files as a person sees them: turned upright, laid on a ground, deep gray scaled by its own range."""

from __future__ import annotations

import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from kdbench.data.decode import decode, read_file
from kdbench.data.load import load_bundle
from kdbench.data.pixels import DIM, DIM_COLOUR, TRANSPARENT, WHITE, Marked, ground, jpeg_decoder
from kdbench.errors import UserError, under

BLACK = (0, 0, 0)


def ring(hole: int) -> Image.Image:
    """A black square on a transparent ground, with a hole of so many pixels a side."""
    pixels = np.zeros((12, 12, 4), np.uint8)
    pixels[2:10, 2:10, 3] = 255
    pixels[6 - hole // 2 : 6 + hole // 2, 6 - hole // 2 : 6 + hole // 2, 3] = 0
    return Image.fromarray(pixels)


def palette(image: Image.Image) -> Image.Image:
    """A palette of two colours, both black, the second clear."""
    made = Image.fromarray((np.asarray(image)[..., 3] == 0).astype(np.uint8)).convert("P")
    made.putpalette([0] * 6)
    made.info["transparency"] = 1
    return made


FORMS = {
    "rgba.png": lambda image: image,
    "la.png": lambda image: image.convert("LA"),
    "palette.png": palette,
    "palette.gif": palette,
    "quantized.png": lambda image: image.quantize(4),
    "rgba.webp": lambda image: image,
    "rgba.tif": lambda image: image,
    "rgba.avif": lambda image: image,
    "rgba.jp2": lambda image: image,
    "rgba.tga": lambda image: image,
    "rgba.ico": lambda image: image,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("channels", [1, 3])
def test_transparent_images_are_laid_on_a_ground(form, channels, tmp_path):
    seen = {}
    for hole in (0, 4):
        path = str(tmp_path / f"{hole}{form}")
        options = {"lossless": True} if form.endswith("webp") else {"quality": 100} if form.endswith("avif") else {}
        options |= {"sizes": [(12, 12)]} if form.endswith("ico") else {}
        try:
            FORMS[form](ring(hole)).save(path, **options)
        except (OSError, KeyError) as error:
            pytest.skip(f"Pillow here cannot write it: {error}")
        seen[hole], marks = read_file(path, channels)
        assert marks == TRANSPARENT and seen[hole].shape == (channels, 12, 12)
        white = np.asarray(ring(hole))[..., 3] == 0
        expected = torch.from_numpy(white * 255).expand(channels, -1, -1)
        assert (seen[hole].int() - expected).abs().max() <= 2
        assert decode(path, channels, BLACK).max() <= 2
    assert not torch.equal(seen[0], seen[4])


def test_half_transparent_pixels_are_mixed(tmp_path):
    Image.new("RGBA", (4, 4), (200, 100, 0, 128)).save(tmp_path / "half.png")
    got = decode(str(tmp_path / "half.png"), 3, (0, 0, 255))[:, 0, 0].tolist()
    assert got == pytest.approx([200 * 128 / 255, 100 * 128 / 255, 255 * 127 / 255], abs=1)


def test_an_opaque_alpha_channel_changes_nothing(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    Image.fromarray(noise).convert("RGBA").save(tmp_path / "opaque.png")
    pixels, marks = read_file(str(tmp_path / "opaque.png"), 3)
    assert marks == 0 and torch.equal(pixels, torch.from_numpy(noise).permute(2, 0, 1))


def test_a_clear_colour_of_gray_and_colour_files(tmp_path):
    gray = Image.fromarray(np.array([[10, 20], [10, 30]], np.uint8))
    gray.save(tmp_path / "gray.png", transparency=10)
    assert decode(str(tmp_path / "gray.png"), 1)[0].tolist() == [[255, 20], [255, 30]]
    deep = Image.fromarray(np.array([[2570, 5140], [2570, 65535]], np.uint16))
    deep.save(tmp_path / "deep.png", transparency=2570)
    pixels, marks = read_file(str(tmp_path / "deep.png"), 1)
    assert pixels[0].tolist() == [[255, 20], [255, 255]] and marks & TRANSPARENT


@pytest.mark.parametrize("form", ["jpg", "png", "webp", "tif", "avif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(form, orientation, tmp_path):
    stored = np.zeros((16, 24, 3), np.uint8)
    stored[:8, :8], stored[8:, 12:] = 255, (250, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"phone.{form}"
    try:
        Image.fromarray(stored).save(path, exif=exif, **({"lossless": True} if form == "webp" else {}))
    except (OSError, KeyError) as error:
        pytest.skip(f"Pillow here cannot write it: {error}")
    upright = np.asarray(ImageOps.exif_transpose(Image.fromarray(stored)))
    bare = Image.fromarray(stored)
    bare.getexif()[0x0112] = orientation
    upright = np.asarray(ImageOps.exif_transpose(bare))
    got = decode(str(path), 3).permute(1, 2, 0).numpy()
    assert got.shape == upright.shape and np.abs(got.astype(int) - upright).mean() < 12


def test_damaged_exif_turns_nothing(tmp_path):
    path = tmp_path / "odd.jpg"
    for exif in (
        b"Exif\0\0",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0c",
    ):
        Image.new("RGB", (8, 4), (9, 9, 9)).save(path, exif=exif)
        assert decode(str(path), 3).shape == (3, 4, 8)


@pytest.mark.parametrize("name", ["deep.png", "deep.tif", "deep.pgm", "deep.jp2"])
def test_sixteen_bits_become_eight(name, tmp_path):
    values = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    path = tmp_path / name
    if name.endswith("pgm"):
        path.write_bytes(b"P5 16 16 65535\n" + values.astype(">u2").tobytes())
    else:
        Image.fromarray(values).save(path)
    pixels, marks = read_file(str(path), 1)
    assert torch.equal(pixels.flatten(), torch.arange(256, dtype=torch.uint8)) and marks == 0
    assert torch.equal(decode(str(path), 3), pixels.expand(3, -1, -1))


def plain_tiff(path: Path, values: np.ndarray, white_is_zero: bool = False, signed: bool = False) -> str:
    """An uncompressed gray TIFF with tags that Pillow does not write."""
    data, (height, width) = values.tobytes(), values.shape
    tags = {256: width, 257: height, 258: 8 * values.itemsize, 259: 1, 262: 0 if white_is_zero else 1, 273: 8}
    tags |= {277: 1, 278: height, 279: len(data), 339: 2 if signed else 1}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = b"II*\0" + struct.pack("<I", 8 + len(data))
    path.write_bytes(head + data + struct.pack("<H", len(tags)) + entries + bytes(4))
    return str(path)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_where_zero_is_white_the_image_is_no_negative(kind, tmp_path):
    values = np.arange(256).reshape(16, 16) * (257 if kind is np.uint16 else 1)
    path = plain_tiff(tmp_path / "fax.tif", values.astype(kind), white_is_zero=True)
    assert torch.equal(decode(path, 1).flatten(), torch.arange(256, dtype=torch.uint8).flip(0))


def test_signed_bytes_are_refused(tmp_path):
    path = plain_tiff(tmp_path / "signed.tif", np.arange(-128, 128).reshape(16, 16).astype(np.int8), signed=True)
    with pytest.raises(UserError, match="signed 8-bit numbers"):
        decode(path, 1)


def test_dark_deep_images_are_marked_and_a_range_brightens_them(tmp_path):
    twelve = Image.fromarray((np.arange(64, dtype=np.uint16) * 64).reshape(8, 8))  # 12 bits in a file of 16
    twelve.save(tmp_path / "camera.png")
    pixels, marks = read_file(str(tmp_path / "camera.png"), 1)
    assert marks == DIM and pixels.max() <= 16
    pixels, marks = read_file(str(tmp_path / "camera.png"), 1, value_range=(0, 4095))
    assert marks == 0 and torch.equal(pixels.flatten().int(), (torch.arange(64) * 64 / 4095 * 255).round().int())


def deep_colours(path: Path, values: np.ndarray) -> str:
    """A PNG of 16 bits a channel [H, W, 3 or 4], which Pillow does not write."""
    height, width, channels = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", width, height, 16, 2 if channels == 3 else 6, 0, 0, 0)
    parts = [(b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    chunks = [struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in parts]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    return str(path)


@pytest.mark.parametrize("channels", [3, 4])
def test_dark_deep_colours_are_marked_and_take_no_range(channels, tmp_path, caplog):
    values = np.random.default_rng(0).integers(0, 4096, (6, 8, channels))  # 12 bits in a file of 16
    values[..., 3:] = 65535
    path = deep_colours(tmp_path / "camera.png", values)
    pixels, marks = read_file(path, 3)
    assert marks == DIM_COLOUR and np.array_equal(pixels.permute(1, 2, 0), values[..., :3] >> 8)
    with pytest.raises(UserError, match=r"16 bits, which dataset\.value_range cannot scale"):
        read_file(path, 3, value_range=(0, 4095))
    Marked.of([marks, marks, 0]).tell("photos", "3 images", WHITE)
    assert "photos: 2 of 3 images are in colours of 16 bits, of which the upper 8 are read" in caplog.text
    values[..., :3] <<= 4
    pixels, marks = read_file(deep_colours(tmp_path / "bright.png", values), 3)
    assert marks == 0 and np.array_equal(pixels.permute(1, 2, 0), values[..., :3] >> 8)


@pytest.mark.parametrize("kind", ["float", "int"])
def test_files_without_a_range_need_one(kind, tmp_path):
    values = np.linspace(-1, 3, 64, dtype=np.float32).reshape(8, 8)
    values = values if kind == "float" else (values * 1000).astype(np.int32)
    path = str(tmp_path / "map.tif")
    Image.fromarray(values).save(path)
    seen = {"float": r"floating-point pixels \(-1 to 3\)", "int": r"32-bit pixels \(-1000 to 3000\)"}[kind]
    with pytest.raises(UserError, match=f"{seen} have no range .* dataset.value_range="):
        decode(path, 1)
    black, white = (-1, 3) if kind == "float" else (-1000, 3000)
    got = decode(path, 1, value_range=(black, white))[0].numpy()
    assert np.abs(got - np.linspace(0, 255, 64).reshape(8, 8)).max() < 1
    half = decode(path, 1, value_range=(black, (black + white) / 2))
    assert half.flatten()[-20:].tolist() == [255] * 20  # beyond white is white


def test_no_number_is_refused(tmp_path):
    path = str(tmp_path / "hole.tif")
    Image.fromarray(np.array([[0, np.nan], [1, np.inf]], np.float32)).save(path)
    with pytest.raises(UserError, match=r"hole.tif: it holds pixels that are no numbers"):
        decode(path, 1, value_range=(0, 1))


def photos(tmp_path, count: int = 3):
    """Two classes, of each `count` transparent and as many opaque images."""
    rng = np.random.default_rng(0)
    for name in ("bee", "fly"):
        (tmp_path / "insects" / name).mkdir(parents=True)
        for number in range(2 * count):
            pixels = rng.integers(0, 256, (8, 8, 4), dtype=np.uint8)
            pixels[..., 3] = 255 if number < count else 100
            Image.fromarray(pixels).save(tmp_path / "insects" / name / f"{number}.png")
    return tmp_path / "insects"


def load(root, **keys):
    reader = "kdbench.data.readers.imagefolder.imagefolder"
    with under("dataset"):
        return load_bundle("insects", reader, str(root), "cache", **{"workers": 0, "size": 8} | keys)


@pytest.mark.parametrize("limit", [0, 1])
def test_transparent_images_are_counted_each_time(tmp_path, caplog, limit):
    root = photos(tmp_path)
    for _ in range(2):  # decoded, then from the cache
        caplog.clear()
        load(root, in_memory_limit=limit)
        said = [line for line in caplog.messages if "transparent" in line]
        assert len(said) == 1 and "laid on white (dataset.background)" in said[0]
        assert (" 6 of 12 images" in said[0]) or limit == 0


def test_ground_and_range_are_keys_of_the_dataset(tmp_path):
    root = photos(tmp_path)
    white, black, again = load(root), load(root, background="#000"), load(root)
    assert white.fingerprint == again.fingerprint != black.fingerprint and white.mean[0] > black.mean[0]
    streamed = [load(root, in_memory_limit=0, background=colour).fingerprint for colour in ("white", "black")]
    assert streamed[0] != streamed[1]
    extra = load(root, background="black", transfer={"extra": str(root)}, validation=0)
    assert (
        extra.transfer.inputs[-12:].float().mean()
        < load(root, transfer={"extra": str(root)}).transfer.inputs[-12:].float().mean()
    )
    assert ground("tomato") == (255, 99, 71)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"background": "clear"}, "dataset.background = clear: must be a colour"),
        ({"value_range": [5, 5]}, r"dataset.value_range = \[5.*, 5.*\]: must be \[black, white\]"),
        ({"value_range": [0]}, r"dataset.value_range(\[1\])? = .*: must be"),
        ({"value_range": [0, float("inf")]}, r"dataset.value_range(\[1\])? = .*: must be"),
    ],
)
def test_what_cannot_be(tmp_path, keys, words):
    with pytest.raises(UserError, match=words):
        load(photos(tmp_path, 1), **keys)


def test_pillows_warnings_stay_off_the_terminal(tmp_path):
    image = palette(ring(2))
    image.info["transparency"] = b"\xff\x00"
    image.save(tmp_path / "warns.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode(str(tmp_path / "warns.png"), 3)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    if not hasattr(os, "mkfifo"):
        pytest.skip("no named pipes here")
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(UserError, match=r"pipe.png: it is a pipe, a device or a folder"):
        decode(str(tmp_path / "pipe.png"), 3)


def photo(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Noise over a slope: what chroma is upsampled from differs from pixel to pixel."""
    slope = np.linspace(0, 160, width * height * 3).reshape(height, width, 3)
    noise = np.random.default_rng(width * height).integers(0, 96, (height, width, 3))
    return Image.fromarray((slope + noise).astype(np.uint8)).convert(mode)


JPEGS = {
    **{f"subsampling {kind}": {"subsampling": kind} for kind in ("4:4:4", "4:2:2", "4:2:0", "4:1:1")},
    "progressive": {"progressive": True},
    "quality 5": {"quality": 5},
    "quality 100": {"quality": 100, "optimize": True},
    "restart markers": {"restart_marker_blocks": 2},
    "stored as RGB": {"keep_rgb": True},
    "comment": {"comment": b"no pixels"},
    "EXIF": {"exif": Image.Exif()},
}


@pytest.mark.parametrize("size", [(1, 1), (2, 7), (17, 33), (64, 48), (333, 251)])
@pytest.mark.parametrize("form", JPEGS)
def test_a_plain_jpeg_has_the_pixels_that_pillow_gives_it(form, size, tmp_path, monkeypatch):
    path = tmp_path / "a.jpg"
    for mode, channels in (("RGB", 3), ("L", 1)):
        photo(*size, mode).save(path, "JPEG", **JPEGS[form])
        with Image.open(path) as opened:
            expected = np.array(opened).reshape(size[1], size[0], channels)
        with monkeypatch.context() as patch:
            patch.setattr("kdbench.data.decode.as_seen", None)  # it is not Pillow that decodes here
            assert torch.equal(decode(str(path), channels), torch.from_numpy(expected).permute(2, 0, 1))


def test_other_jpegs_are_left_to_pillow(tmp_path, monkeypatch):
    """Turned ones, those of other colours, and those that are not quite whole."""
    turned = Image.Exif()
    turned[0x0112] = 6
    photo(20, 10).save(tmp_path / "turned.jpg", exif=turned)
    photo(20, 10, "CMYK").save(tmp_path / "cmyk.jpg")
    photo(20, 10, "L").save(tmp_path / "gray.jpg")
    photo(20, 10).save(tmp_path / "whole.jpg")
    whole = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "noise.jpg").write_bytes(whole.replace(b"\xff\xd9", b"\x00\x00\x00\xff\xd9"))
    seen = {name: decode(str(tmp_path / f"{name}.jpg"), 3) for name in ("turned", "cmyk", "gray", "noise")}
    assert seen["turned"].shape == (3, 20, 10) and seen["gray"].shape == (3, 10, 20)
    monkeypatch.setattr("kdbench.data.pixels.jpeg_decoder", lambda: None)  # as where it is not installed
    for name, pixels in seen.items():
        assert torch.equal(decode(str(tmp_path / f"{name}.jpg"), 3), pixels), name


@pytest.mark.parametrize("kept", [0.3, 0.9, 0.999])
def test_a_jpeg_cut_short_is_refused_however_it_is_decoded(kept, tmp_path, monkeypatch):
    path = tmp_path / "cut.jpg"
    photo(200, 100).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    said = set()
    for decoder in (None, jpeg_decoder()):
        monkeypatch.setattr("kdbench.data.pixels.jpeg_decoder", lambda decoder=decoder: decoder)
        with pytest.raises(UserError, match=r"cut\.jpg.*mend or remove it") as raised:
            decode(str(path), 3)
        said.add(str(raised.value))
    assert len(said) == 1


def test_pillow_has_the_last_word_on_jpegs_that_are_cut_short(tmp_path, monkeypatch):
    path = tmp_path / "cut.jpg"
    photo(200, 100).save(path)
    path.write_bytes(path.read_bytes()[:-200])
    monkeypatch.setattr("PIL.ImageFile.LOAD_TRUNCATED_IMAGES", True)
    assert decode(str(path), 3).shape == (3, 100, 200)
