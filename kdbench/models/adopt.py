"""A network of another library as one of kdbench's: same parameter names as there, outputs as here."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from kdbench.types import Outputs


class Adopted(nn.Module):
    """Runs `net` through `observe(net, image) -> Outputs`, and owns its parts under their own names.

    The dictionaries of parameters, buffers and children are net's own, shared, so `state_dict` has no prefix:
    published weights load strictly and exported ones load in the other library. `net` is not a child itself. A deep
    copy copies the dictionaries once, so it stays one network.
    """

    def __init__(
        self,
        net: nn.Module,
        observe: Callable[[Any, Tensor], Outputs],
        last_layer_name: str,  # "": there is no single linear classifier
        image_size: int,
    ) -> None:
        super().__init__()
        for part in ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules"):
            setattr(self, part, getattr(net, part))
        self._net = (net,)  # in a tuple: not registered a second time
        self.observe = observe
        self.last_layer_name = last_layer_name
        self.image_size = image_size
        self.training = net.training
        self._version = getattr(net, "_version", 1)  # goes into state_dict's metadata; MNASNet reads it

    @property
    def net(self) -> nn.Module:
        """The other library's network itself."""
        return self._net[0]

    def forward(self, image: Tensor) -> Outputs:
        return self.observe(self._net[0], image)

    def train(self, mode: bool = True) -> Adopted:
        self._net[0].train(mode)  # some networks ask their own flag; their children are ours
        self.training = mode
        return self


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the known ones that look like it."""
    near = difflib.get_close_matches(name, known, n=4, cutoff=0.5)
    return f"; near: {', '.join(near)}" if near else ""


def head_refusal(name: str, classes: int, num_classes: int) -> str:
    """Why a pretrained network is refused whose classifier does not fit the data."""
    return (
        f"pretrained weights of {name} are for {classes} classes, the dataset has {num_classes}: set new_head=true to "
        "replace the classifier by a random one (it must then be trained), or pretrained=false"
    )


def first_line(error: Exception) -> str:
    """A foreign library's message, short enough for one of ours."""
    return str(error).strip().split("\n")[0] or type(error).__name__
