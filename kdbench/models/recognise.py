"""Which of kdbench's networks a file of weights belongs to, told by names and shapes."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from torch import Tensor, nn

from kdbench.models.base import first_layer_name, last_layer_name, taken_kinds
from kdbench.models.names import comparable, namings
from kdbench.paths import CONFIG_DIR
from kdbench.types import ImageInfo, TokenInfo, VectorInfo

_DATA = (ImageInfo(2, 3, 32), VectorInfo(2, 32), TokenInfo(2, 100, 32))


class _Known(NamedTuple):
    name: str
    shapes: dict[str, torch.Size]
    first: str  # the weights whose shapes depend on the data
    width: int  # the axis of them that does not
    last: str


def recognise(state: Mapping[str, Tensor]) -> str | None:
    """ "resnet56 with 10 classes" for weights that fit that network of configs/student; None if none fits.

    Builds every network on the meta device, once (no memory, a second or two in all): for error messages only.
    """
    namings_of_state = namings(state)
    for known in _known():
        renamed = namings_of_state.get(frozenset(known.shapes))
        classes = None if renamed is None else _classes_if_fits(renamed, known)
        if classes is not None:
            return f"{known.name} {classes} classes"
    return None


@functools.cache
def _known() -> list[_Known]:
    found = []
    for name, network in _networks():
        state = network.state_dict()
        shapes = {key: state[key].shape for key in comparable(state)}
        first, last = first_layer_name(network), last_layer_name(network)
        width = int(isinstance(network.get_submodule(first), nn.Embedding))
        found.append(_Known(name, shapes, f"{first}.weight", width, f"{last}.weight"))
    return found


def _networks() -> Iterator[tuple[str, nn.Module]]:
    for path in sorted((Path(CONFIG_DIR) / "student").glob("*.yaml")):
        arguments: dict[str, object] = yaml.safe_load(path.read_text(encoding="utf-8"))
        target = str(arguments.pop("_target_"))
        if "name" in arguments:  # a whole library: which of its networks?
            continue
        module, _, attribute = target.rpartition(".")
        factory = getattr(importlib.import_module(module), attribute)
        taken = [info._asdict() for info in _DATA if type(info) in taken_kinds(factory)]
        if not taken:  # language models, whose shapes follow from the vocabulary
            continue
        data = taken[0]
        with torch.device("meta"):
            yield f"{path.stem} with", factory(**arguments, **data)
            if arguments.get("shortcut") == "B":
                yield f"{path.stem} with shortcut=A and", factory(**{**arguments, "shortcut": "A"}, **data)


def _classes_if_fits(state: Mapping[str, Tensor], known: _Known) -> int | None:
    """The class count of `state` if all of its other shapes are the network's, whatever its input channels."""
    free = {known.first, known.last, known.last.removesuffix("weight") + "bias"}
    if any(state[key].shape != shape for key, shape in known.shapes.items() if key not in free):
        return None
    same_width = state[known.first].shape[known.width] == known.shapes[known.first][known.width]
    return len(state[known.last]) if same_width and state[known.last].dim() == 2 else None
