"""Layers that losses put between the features of two networks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from kdbench.errors import UserError
from kdbench.types import Outputs, Parts


class BatchNorm(nn.BatchNorm2d):
    """Batch norm of maps [B, D, H, W] or vectors [B, D]. One value a channel (an epoch's last batch of one image), of
    which there is no variance, is normalised by what the batches before it were."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.numel() == x.shape[1]:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        return super().forward(x)

    def _check_input_dim(self, input: Tensor) -> None:
        pass


def connector(inputs: int, outputs: int, relu: bool = True, kaiming: bool = False) -> nn.Sequential:
    """1x1 convolution without bias, batch norm and ReLU, from one number of channels to another; `kaiming`: the
    convolution begins with a standard deviation of sqrt(2 / outputs)."""
    convolution = nn.Conv2d(inputs, outputs, 1, bias=False)
    if kaiming:
        nn.init.normal_(convolution.weight, std=math.sqrt(2 / outputs))
    return nn.Sequential(convolution, BatchNorm(outputs), *([nn.ReLU()] if relu else []))


def classifier_of(parts: Parts | None, loss: str, who: str = "teacher") -> nn.Linear:
    """The linear layer that makes a network's logits of "pooled". Raises UserError if there is none."""
    if parts is None or parts.classifier is None:
        raise UserError("loss", loss, f"another here: it reads the {who}'s classifier, and there is no single one")
    return parts.classifier


def known_classifiers(found: Sequence[nn.Linear], loss: str) -> None:
    """Raises UserError if a loss was not shown the layers of its networks, which some procedures do not do."""
    if not found:
        raise UserError("loss", loss, "another with this procedure, in which classifiers are not known")


def known_networks(loss: str, student: Parts, teacher: Parts | None) -> tuple[nn.Module, nn.Module]:
    """The two networks, to be entered at their joints. Raises UserError for one that cannot be."""
    found = []
    for who, network in (("student", student.network), ("teacher", teacher.network if teacher else None)):
        if network is None or not getattr(network, "joints", ()):
            kind = type(network).__name__ if network is not None else "not known"
            allowed = f"another here: it enters networks in their middle, which the {who} ({kind}) does not allow"
            raise UserError("loss", loss, allowed)
        found.append(network)
    return found[0], found[1]


def last_stage(outputs: Outputs) -> str:
    """The name of the deepest stage's feature, "" if there is none."""
    stages = [name for name in outputs.features if name.startswith("stage") and not name.endswith(".pre")]
    return max(stages, key=lambda stage: (len(stage), stage), default="")


def pooled_map(outputs: Outputs, loss: str, who: str = "teacher") -> str:
    """The name of the map whose mean over places is "pooled": "map", or the last stage. Raises UserError if neither
    is."""
    name = "map" if "map" in outputs.features else last_stage(outputs)
    found, pooled = outputs.features.get(name), outputs.features.get("pooled")
    fits = found is not None and pooled is not None and found.dim() == 4 and found.shape[:2] == pooled.shape
    if fits and not found.is_meta:  # type: ignore[union-attr]
        near = (found.float().mean((2, 3)) - pooled.float()).abs()  # type: ignore[union-attr]
        fits = bool((near <= 0.02 * pooled.float().abs().max()).all())  # type: ignore[union-attr]
    if not fits:
        raise UserError("loss", loss, f"another here: the {who} has no map that its classifier reads the mean of")
    return name
