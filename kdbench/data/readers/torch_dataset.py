"""Any map-style torch Dataset, read once into memory: pictures as uint8, vectors as float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kdbench.arguments import call, keys, locate
from kdbench.arguments.ranges import Amount, Text, within
from kdbench.data.bundle import Source
from kdbench.data.pixels import WHITE, as_seen
from kdbench.data.resize import centred
from kdbench.data.sampling import count_of, order_keys, stratified
from kdbench.errors import UserError, require

Side = Annotated[int, within(4, 10_000)]
# What the part of a set is called in the constructors of torchvision's datasets, and for each part its value.
_PARTS: dict[str, dict[str, object]] = {
    "train": {"train": True, "test": False},
    "split": {"train": "train", "test": "test"},
}
_ITEM = "a (picture, label) or (vector, label) pair"


class _Read(NamedTuple):
    """A part as it was read."""

    inputs: Tensor
    labels: list[Any]
    classes: Sequence[str] | None  # as the Dataset names them


def torch_dataset(
    source: Text | None = None,
    arguments: Mapping[str, object] | None = None,
    test: Amount = 0.2,
    size: Side | None = None,
    channels: Literal[1, 3] | None = None,
) -> Source:
    """What `source` (a dotted path) makes: a class or function whose result has a length and gives (input, label).

    With a parameter `train` (true, false) or `split` ("train", "test") it is called for both parts, as torchvision's
    are; otherwise once, and a stratified share `test` (or that many) becomes the test set, always the same. An input is
    a PIL image, uint8 pixels (array [H, W] or [H, W, C], tensor [C, H, W]), float pixels in [0, 1] (tensor [C, H, W]),
    or a vector of numbers; a label is a whole number or a class name. size: pixels a side, as in dataset=imagefolder.
    Augmentation and normalisation are kdbench's. Raises UserError for what is none of these.
    """
    if source is None:
        raise UserError("dataset.source", source, "the dotted path of a torch Dataset, e.g. mydata.MyData")
    made = locate(source, "dataset.source")
    part = next((name for name in _PARTS if name in keys(made)), None)
    calls = [{part: _PARTS[part][one]} for one in ("train", "test")] if part else [{}]
    reading = _Reading(source, size, channels)
    parts = [reading.all(_called(made, arguments or {}, given)) for given in calls]
    names, labels = _numbered(parts)
    if part:
        return Source(names, parts[0].inputs, labels[0], parts[1].inputs, labels[1])
    held = _held_out(labels[0], test)
    return Source(names, parts[0].inputs[~held], labels[0][~held], parts[0].inputs[held], labels[0][held])


def _called(made: Callable[..., Any], arguments: Mapping[str, object], given: dict[str, object]) -> Any:
    found = call(made, arguments, "dataset.arguments", given)
    path = f"{made.__module__}.{made.__qualname__}"
    fits = hasattr(found, "__len__") and hasattr(found, "__getitem__")
    require(fits, "dataset.source", path, "a map-style Dataset: one with __len__ and __getitem__")
    require(len(found) > 0, "dataset.source", path, "a Dataset with samples: this one has none")
    return found


class _Reading(NamedTuple):
    """How items become samples."""

    source: str
    size: int | None
    channels: int | None

    def all(self, dataset: Any) -> _Read:
        inputs: list[Tensor] = []
        labels: list[Any] = []
        for i in range(len(dataset)):
            item = dataset[i]
            if not isinstance(item, (tuple, list)) or len(item) != 2:
                raise UserError("dataset.source", self.source, f"a Dataset of {_ITEM}s; item {i} is {_kind(item)}")
            inputs.append(self.one(item[0], i))
            labels.append(_label(item[1], i, self.source))
            if inputs[-1].shape != inputs[0].shape:
                both = f"item 0 {list(inputs[0].shape)}, item {i} {list(inputs[-1].shape)}"
                raise UserError("dataset.size", self.size, f"a number of pixels, because items differ in shape: {both}")
        classes = getattr(dataset, "classes", None)
        return _Read(torch.stack(inputs), labels, classes if isinstance(classes, (list, tuple)) else None)

    def one(self, given: Any, place: int) -> Tensor:
        """uint8 [C, H, W] or float32 [D]."""
        if isinstance(given, Image.Image) or (
            isinstance(given, np.ndarray) and given.dtype == np.uint8 and given.ndim > 1
        ):
            image = given if isinstance(given, Image.Image) else Image.fromarray(given.squeeze())
            gray = image.mode in ("1", "L", "I", "I;16", "F")
            seen, _ = as_seen(image, self.channels or (1 if gray else 3), WHITE, None)
            return self.fitted(torch.from_numpy(np.array(seen)).reshape(seen.height, seen.width, -1).permute(2, 0, 1))
        numbers = _tensor(given, place, self.source)
        if numbers.dim() <= 1:
            return numbers.float().reshape(-1)
        if numbers.dtype == torch.uint8 and numbers.dim() in (2, 3):
            return self.fitted(numbers.reshape(-1, *numbers.shape[-2:]))
        fits = numbers.is_floating_point() and numbers.dim() in (2, 3) and numbers.min() >= 0 and numbers.max() <= 1
        allowed = "a Dataset of PIL images, uint8 pixels, floats in [0, 1], or vectors: without normalisation"
        what = f"{numbers.dtype} {list(numbers.shape)} from {numbers.min():g} to {numbers.max():g}"
        require(bool(fits), "dataset.source", f"{self.source}, item {place}: {what}", allowed)
        return self.fitted((numbers * 255).round().to(torch.uint8).reshape(-1, *numbers.shape[-2:]))

    def fitted(self, pixels: Tensor) -> Tensor:
        return pixels if self.size is None else centred(pixels, self.size, self.size)


def _tensor(given: Any, place: int, source: str) -> Tensor:
    try:
        return torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            "dataset.source", source, f"a Dataset of {_ITEM}s; item {place} holds {_kind(given)}"
        ) from error


def _label(given: Any, place: int, source: str) -> int | str:
    value: Any = given.item() if isinstance(given, (Tensor, np.generic)) and np.ndim(given) == 0 else given
    fits = isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool) and value >= 0)
    allowed = f"a Dataset whose labels are whole numbers from 0 or names; item {place} has {value!r}"
    require(fits, "dataset.source", source, allowed)
    return value


def _numbered(parts: Sequence[_Read]) -> tuple[tuple[str, ...], list[Tensor]]:
    """Class names in order, and each part's labels as their numbers."""
    found = {label for part in parts for label in part.labels}
    if all(isinstance(label, str) for label in found):
        names = tuple(sorted(map(str, found)))
        places: dict[Any, int] = {name: i for i, name in enumerate(names)}
    else:
        require(not any(isinstance(one, str) for one in found), "dataset.source", sorted(map(str, found))[:5],
                "a Dataset whose labels are all numbers or all names")  # fmt: skip
        count = max(int(label) for label in found) + 1
        given = parts[0].classes
        names = tuple(map(str, given if given is not None and len(given) >= count else range(count)))
        places = {i: i for i in range(len(names))}
    require(len(names) > 1, "dataset.source", names, "a Dataset of two classes or more")
    return names, [torch.tensor([places[label] for label in part.labels]) for part in parts]


def _held_out(labels: Tensor, test: float) -> Tensor:
    count = count_of(test, len(labels), "dataset.test", whole=False)
    require(count > 0, "dataset.test", test, "above 0 for a Dataset that has no test part")
    rows = stratified(labels, count, order_keys(len(labels), 0, "torch_dataset test"), leave=1)
    require(len(rows) == count, "dataset.test", test, f"at most {len(rows)}: each class keeps a sample")
    held = torch.zeros(len(labels), dtype=torch.bool)
    held[rows] = True
    return held


def _kind(thing: Any) -> str:
    return f"a {type(thing).__name__}"
