"""Any map-style torch Dataset: how items become samples, and what is said of one that cannot be read."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from kdbench.data.readers.torch_dataset import torch_dataset
from kdbench.errors import UserError

PIXELS = (np.arange(6 * 5 * 3) % 251).astype(np.uint8).reshape(6, 5, 3)


class Listed:
    def __init__(self, kind: str = "pil", count: int = 10) -> None:
        self.kind, self.count = kind, count

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        pixels = np.roll(PIXELS, i, axis=0)
        made = {
            "pil": Image.fromarray(pixels), "array": pixels, "bytes": torch.from_numpy(pixels).permute(2, 0, 1),
            "floats": torch.from_numpy(pixels).permute(2, 0, 1) / 255, "gray": Image.fromarray(pixels[..., 0]),
            "vector": np.arange(4) + i, "normalised": torch.randn(3, 4, 4) * 3,
        }  # fmt: skip
        return made.get(self.kind, self.kind), i % 2


class Named(Listed):
    def __getitem__(self, i):
        return super().__getitem__(i)[0], ("dog", "cat")[i % 2]


class Parts(Listed):
    classes = ["a", "b"]

    def __init__(self, split: str) -> None:
        super().__init__("pil", 8 if split == "train" else 4)


class Growing(Listed):
    def __getitem__(self, i):
        return Image.new("RGB", (8 + i, 8 + i)), i % 2


class Triple(Listed):
    def __getitem__(self, i):
        return 1, 2, 3


def path(kind: type) -> str:
    return f"{__name__}.{kind.__name__}"


@pytest.mark.parametrize("kind", ["pil", "array", "bytes", "floats"])
def test_the_same_pictures_in_every_form(kind):
    source = torch_dataset(path(Listed), {"kind": kind})
    both = torch.cat([source.inputs, source.test_inputs])
    assert both.dtype == torch.uint8 and both.shape == (10, 3, 6, 5)
    wanted = {np.roll(PIXELS, i, axis=0).transpose(2, 0, 1).tobytes() for i in range(10)}
    assert {one.numpy().tobytes() for one in both} == wanted
    assert source.classes == ("0", "1") and len(source.test_labels) == 2


def test_vectors_gray_pictures_names_parts_and_sizes():
    assert torch_dataset(path(Listed), {"kind": "vector"}).inputs.shape == (8, 4)
    assert torch_dataset(path(Listed), {"kind": "gray"}).inputs.shape == (8, 1, 6, 5)
    assert torch_dataset(path(Listed), {"kind": "gray"}, channels=3).inputs.shape[1] == 3
    named = torch_dataset(path(Named))
    assert named.classes == ("cat", "dog") and set(named.labels.tolist()) == {0, 1}
    parts = torch_dataset(path(Parts))
    assert (len(parts.labels), len(parts.test_labels), parts.classes) == (8, 4, ("a", "b"))
    assert torch_dataset(path(Growing), size=6).inputs.shape[1:] == (3, 6, 6)


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        (Growing, {}, "dataset.size = null: must be a number of pixels, because items differ in shape"),
        (Triple, {}, "item 0 is a tuple"),
        (Listed, {"kind": "normalised"}, "without normalisation"),
        (Listed, {"kind": "words"}, "item 0 holds a str"),
        (Listed, {"count": 0}, "with samples"),
        (Listed, {"cuont": 3}, "dataset.arguments.cuont.* Did you mean dataset.arguments.count"),
        (Exception, {}, "a map-style Dataset"),
    ],
)
def test_what_cannot_be_read_is_named(kind, options, said):
    with pytest.raises(UserError, match=said):
        torch_dataset(path(kind) if kind is not Exception else "fractions.Fraction", options)
