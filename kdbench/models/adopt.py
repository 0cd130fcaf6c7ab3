"""A network of another library as one of kdbench's: same parameter names as there, outputs as here."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any

import torch.nn.functional as F
from torch import Tensor, nn

from kdbench.arguments.ranges import within
from kdbench.errors import UserError, require
from kdbench.types import Outputs

Pixels = Annotated[int, within(1, 4096)]


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
        upscale: int | None = None,  # pixels a side that inputs are scaled to before the network sees them
    ) -> None:
        super().__init__()
        for part in ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules"):
            setattr(self, part, getattr(net, part))
        self._net = (net,)  # in a tuple: not registered a second time
        self.observe = observe
        self.last_layer_name = last_layer_name
        self.image_size, self.upscale = image_size, upscale
        self.training = net.training
        self._version = getattr(net, "_version", 1)  # goes into state_dict's metadata; MNASNet reads it

    @property
    def net(self) -> nn.Module:
        """The other library's network itself."""
        return self._net[0]

    def forward(self, image: Tensor) -> Outputs:
        return self.observe(self._net[0], self.scaled(image))

    def scaled(self, image: Tensor) -> Tensor:
        """What the other library's network gets for images [B, C, H, W]."""
        if self.upscale is None:
            return image
        return F.interpolate(image, (self.upscale, self.upscale), mode="bicubic", align_corners=False)

    def train(self, mode: bool = True) -> Adopted:
        self._net[0].train(mode)  # some networks ask their own flag; their children are ours
        self.training = mode
        return self


def without_classifier(network: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state without the classifier that the library's network would have, where this one was built without."""
    config = getattr(getattr(network, "net", None), "pretrained_cfg", None) or {}
    names = config.get("classifier") or ()
    starts = tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))
    kept = network.state_dict()
    return {name: value for name, value in state.items() if name in kept or not (starts and name.startswith(starts))}


def checkpoint_gradients(network: nn.Module) -> None:
    """Let a network compute its activations anew in the backward pass, block by block, instead of keeping them.

    Chen et al. 2016; the library's own way, so the numbers are the same. Raises UserError for a network without one,
    and for one with batch norm, whose running statistics would move twice a step.
    """
    switch = getattr(getattr(network, "net", network), "set_grad_checkpointing", None)
    allowed = "false: this student has no such way (networks of timm do)"
    if any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in network.modules()):
        switch, allowed = None, "false: batch norm would see every batch twice"
    if switch is None:
        raise UserError("trainer.grad_checkpointing", True, allowed)
    try:
        switch(True)
    except (AssertionError, NotImplementedError) as error:  # what timm's say that cannot
        raise UserError("trainer.grad_checkpointing", True, f"false with this student: {first_line(error)}") from error


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence with the known names that look like an unknown one."""
    near = difflib.get_close_matches(name, list(known), n=4, cutoff=0.5)
    return f"Near: {', '.join(near)}" if near else ""


def refuse_head(name: str, classes: int, num_classes: int) -> UserError:
    """The error for a pretrained network whose classifier does not fit the data."""
    allowed = (
        f"false, or new_head=true, which puts a random classifier, to be trained, in place of that of {name}: it is "
        f"for {classes} classes, the dataset has {num_classes}"
    )
    return UserError("pretrained", True, allowed)


def refuse_size(name: str, image_size: int, error: Exception) -> UserError:
    """The error for a network that cannot run images of the data's size."""
    return UserError("name", name, f"a network that can run {image_size}-pixel images: {first_line(error)}")


def refuse_rates(options: Mapping[str, object]) -> None:
    """Raise a UserError for a rate of dropout or of dropped layers outside [0, 1), which libraries refuse in a training
    step alone."""
    for name, value in options.items():
        if (
            re.search(r"drop|stochastic_depth", name)
            and isinstance(value, (int, float))
            and not isinstance(value, bool)
        ):
            require(0 <= value < 1, f"options.{name}", value, "in [0, 1)")


def refuse_options(name: str, options: Mapping[str, object], known: Iterable[str], error: TypeError) -> UserError:
    """The error for options that a library's network does not take; the one that it has never heard of, by its key."""
    unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    if unknown is not None and unknown[1] in options:
        key = unknown[1]
        return UserError(
            f"options.{key}", options[key], f"left out: {name} has no such argument", nearest(key, dict.fromkeys(known))
        )
    return UserError("options", said=f"they do not fit {name}: {first_line(error)}")


def first_line(error: Exception) -> str:
    """A foreign library's message, short enough for one of ours."""
    return str(error).strip().split("\n")[0] or type(error).__name__
