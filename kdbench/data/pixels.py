"""Pixels of an opened image as a person sees them: turned upright, on a ground, in 8 bits a channel."""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterable
from functools import lru_cache
from types import ModuleType
from typing import IO, Any, NamedTuple

import numpy as np
from PIL import Image, ImageColor

from kdbench.errors import UserError

log = logging.getLogger("kdbench")
RGB = tuple[int, int, int]
WHITE: RGB = (255, 255, 255)
# Marks of a file: it was laid on a ground; its deep pixels use a sixteenth of their range, in gray or in colour.
TRANSPARENT, DIM, DIM_COLOUR = 1, 2, 4
# What Pillow raises for damaged files, format by format.
BROKEN = (
    OSError, EOFError, ValueError, SyntaxError, RuntimeError, LookupError, TypeError, ArithmeticError, struct.error,
    Image.DecompressionBombError,
)  # fmt: skip
_ORIENTATION = 0x0112  # of EXIF: which way up the camera was held
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # of TIFF
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Marked(NamedTuple):
    """How many images of a set have which mark."""

    transparent: int = 0
    dim: int = 0
    dim_colour: int = 0

    @classmethod
    def of(cls, marks: Iterable[int]) -> Marked:
        listed = list(marks)
        return cls(*(sum(bool(mark & kind) for mark in listed) for kind in (TRANSPARENT, DIM, DIM_COLOUR)))

    def tell(self, name: str, images: str, background: RGB) -> None:
        """Say once what was done to the images of a set. images: "60 images"."""
        if self.transparent:
            colour = "white" if background == WHITE else f"rgb{background}"
            log.warning(
                "%s: %s of %s are transparent in parts: laid on %s (dataset.background)",
                name, f"{self.transparent:,}", images, colour,
            )  # fmt: skip
        if self.dim:
            log.warning(
                "%s: %s of %s have 16 bits a pixel and use less than a sixteenth of them: they are almost black. "
                "dataset.value_range=[black,white] says what they use (12 bits: [0,4095])",
                name, f"{self.dim:,}", images,
            )  # fmt: skip
        if self.dim_colour:
            log.warning(
                "%s: %s of %s are in colours of 16 bits, of which the upper 8 are read, and use less than a sixteenth "
                "of their range: they are almost black, and in 16 steps at most. Convert them to 8 bits a colour",
                name, f"{self.dim_colour:,}", images,
            )  # fmt: skip


def ground(background: str) -> RGB:
    """A colour's name ("white") or "#rrggbb" as numbers. Raises UserError."""
    try:
        return ImageColor.getrgb(str(background))[:3]
    except ValueError as error:
        raise UserError("dataset.background", background, 'a colour: white, "#808080"') from error


def span(value_range: Any) -> tuple[float, float] | None:
    """dataset.value_range as (black, white). Raises UserError."""
    if value_range is None:
        return None
    numbers = [float(value) for value in value_range]
    if len(numbers) != 2 or not np.isfinite(numbers).all() or numbers[0] >= numbers[1]:
        raise UserError("dataset.value_range", list(value_range), "[black, white], two numbers that rise")
    return numbers[0], numbers[1]


def as_seen(
    opened: Image.Image, channels: int, background: RGB, value_range: tuple[float, float] | None
) -> tuple[Image.Image, int]:
    """An opened file as an image of mode L (channels 1) or RGB (3), and its marks.

    Raises UserError for pixels whose format says no range, and what Pillow raises for broken files.
    """
    _refuse_signed_bytes(opened)
    deep_colour = _upper_bytes(opened)
    if deep_colour and value_range is not None:
        raise UserError("its colours have 16 bits, which dataset.value_range cannot scale: convert it to 8 bits")
    opened.load()  # before the orientation: some formats turn themselves, and PNG may keep its EXIF behind the pixels
    image, marks, mode = opened, 0, "L" if channels == 1 else "RGB"
    if opened.mode.startswith("I") or opened.mode == "F":
        image, marks = _eight_bits(opened, background, value_range)
    elif opened.has_transparency_data:
        rgba = opened.convert("RGBA")
        if rgba.getchannel("A").histogram()[255] < rgba.width * rgba.height:
            image = Image.new("RGBA", rgba.size, (*background, 255))
            image.alpha_composite(rgba)
            marks = TRANSPARENT
    if deep_colour and max(high for _, high in opened.convert("RGB").getextrema()) < 16:  # type: ignore[misc, operator]
        marks |= DIM_COLOUR
    turn = _TURNS.get(_orientation(opened))
    image = image if image.mode == mode else image.convert(mode)
    return (image if turn is None else image.transpose(turn)), marks


@lru_cache(maxsize=1)
def jpeg_decoder() -> ModuleType | None:
    """simplejpeg, imported for the first JPEG; None where it is not installed: Pillow decodes to the same pixels."""
    try:
        import simplejpeg
    except ImportError:  # a machine without a wheel of it
        return None
    return simplejpeg  # type: ignore[no-any-return]


def plain_jpeg(opened: Image.Image, file: IO[bytes], channels: int) -> np.ndarray | None:
    """uint8 [H, W, channels] of an upright JPEG in gray (channels 1) or RGB (3), as Pillow gives it, in two thirds of
    its time: the same library decodes, without Pillow's four bytes a pixel and the copy out of them.

    None for any other image, and for one that is not quite whole: what is to be said of it is Pillow's to say.
    """
    mode = "L" if channels == 1 else "RGB"
    decoder = jpeg_decoder()
    if decoder is None or opened.format != "JPEG" or opened.mode != mode or _orientation(opened) != 1:
        return None
    file.seek(0)
    try:
        return decoder.decode_jpeg(file.read(), "GRAY" if channels == 1 else "RGB")  # type: ignore[no-any-return]
    except ValueError:
        return None


def _upper_bytes(image: Image.Image) -> bool:
    """Whether Pillow takes the upper 8 of 16 bits a channel, without a word: of colours, and of gray with alpha."""
    raw = [tile[3] if isinstance(tile[3], tuple) else (tile[3],) for tile in getattr(image, "tile", ())]
    deep = any(isinstance(word, str) and ";16" in word for words in raw for word in words)
    return deep and not image.mode.startswith("I")


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except BROKEN:  # EXIF that cannot be read turns nothing; the pixels are whole
        return 1


def _eight_bits(
    image: Image.Image, background: RGB, value_range: tuple[float, float] | None
) -> tuple[Image.Image, int]:
    """Gray of more than 8 bits as gray of 8: the range becomes 0 to 255 (for 16 bits: divided by 257), rounded."""
    values = np.asarray(image).astype(np.float64)
    low, high = value_range or _range_of(image, values)
    if np.isnan(values).any():
        raise ValueError("it holds pixels that are no numbers")
    if _tag(image, _PHOTOMETRIC) == 0:  # WhiteIsZero: of 8 bits Pillow turns it round itself
        values = low + high - values
    pixels = np.rint((values.clip(low, high) - low) * (255 / (high - low))).astype(np.uint8)
    dim = value_range is None and values.max() < (low + high) / 16
    marks, clear = DIM if dim else 0, image.info.get("transparency")
    if isinstance(clear, int) and (values == clear).any():
        pixels[values == clear] = np.asarray(Image.new("RGB", (1, 1), background).convert("L"))[0, 0]
        marks |= TRANSPARENT
    return Image.fromarray(pixels), marks


def _tag(image: Image.Image, number: int, default: int = 1) -> int:
    """A number of a TIFF's header, the first if there is one for each channel; `default` for other files."""
    value = getattr(image, "tag_v2", {}).get(number, default)
    return int(value[0] if isinstance(value, tuple) else value)


def _refuse_signed_bytes(image: Image.Image) -> None:
    """Raises UserError for a TIFF of signed 8-bit numbers, which Pillow takes for unsigned ones."""
    if _tag(image, _SAMPLE_FORMAT) == 2 and _tag(image, _BITS, 8) == 8:
        raise UserError("its pixels are signed 8-bit numbers, without a black and a white: convert it")


def _range_of(image: Image.Image, values: np.ndarray) -> tuple[float, float]:
    """The range that the file's format says: 16 bits, or what TIFF says. Raises UserError where it says none."""
    bits = _tag(image, _BITS, 16)
    if image.mode.startswith("I;16") and 8 < bits <= 16:
        return 0.0, 2.0**bits - 1
    if image.mode == "I" and image.format in ("PNG", "PPM"):  # older Pillow's way to hold 16 bits
        return 0.0, 65535.0
    kind = "floating-point" if image.mode == "F" else "32-bit"
    finite = values[np.isfinite(values)]
    seen = f"{finite.min():g} to {finite.max():g}" if finite.size else "no number"
    raise UserError(
        f"its {kind} pixels ({seen}) have no range that the format says: set dataset.value_range=[black,white], the "
        "same for all images"
    )
