"""Which of kdbench's networks a file of weights belongs to, told by names and shapes."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from kdbench.models.base import first_layer_name, last_layer_name
from kdbench.models.names import comparable, namings
from kdbench.paths import CONFIG_DIR

_SHAPE = {"num_classes": 2, "in_channels": 3, "image_size": 32}


def identify(state: Mapping[str, Tensor]) -> str | None:
    """ "resnet56 with 10 classes" for weights that fit that network of configs/student; None if none fits.

    Builds every network on the meta device (no memory, about a second in all): for error messages only.
    """
    known = namings(state)
    for name, network in _networks():
        renamed = known.get(comparable(network.state_dict()))
        classes = None if renamed is None else _classes_if_fits(renamed, network)
        if classes is not None:
            return f"{name}{classes} classes"
    return None


def _networks() -> Iterator[tuple[str, nn.Module]]:
    for path in sorted((Path(CONFIG_DIR) / "student").glob("*.yaml")):
        arguments: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
        target = arguments.pop("_target_")
        if "name" in arguments:  # a whole library: which of its networks?
            continue
        module, _, attribute = target.rpartition(".")
        factory = getattr(importlib.import_module(module), attribute)
        with torch.device("meta"):
            yield f"{path.stem} with ", factory(**arguments, **_SHAPE)
            if arguments.get("shortcut") == "B":
                yield f"{path.stem} with shortcut=A and ", factory(**{**arguments, "shortcut": "A"}, **_SHAPE)


def _classes_if_fits(state: Mapping[str, Tensor], network: nn.Module) -> int | None:
    """The class count of `state` if all of its other shapes are the network's, whatever its input channels."""
    first, last = f"{first_layer_name(network)}.weight", f"{last_layer_name(network)}.weight"
    free = {first, last, last.removesuffix("weight") + "bias"}
    expected = network.state_dict()
    if any(state[k].shape != expected[k].shape for k in comparable(expected) if k not in free):
        return None
    same_width = state[first].shape[:1] == expected[first].shape[:1]
    return len(state[last]) if same_width and state[last].dim() == 2 else None
