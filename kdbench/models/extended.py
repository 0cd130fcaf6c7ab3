"""A student with what a loss adds to it for good: networks made of a network and further layers."""

from __future__ import annotations

import json
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from kdbench.arguments import accepted, call, locate
from kdbench.models.base import Staged, last_layer, last_layer_name
from kdbench.types import Outputs


def from_json(network: str, key: str, pretrained: bool = False, **info: Any) -> nn.Module:
    """A network from its configuration as JSON; `pretrained`: with its published weights, if it says that it has them.

    info: what networks must know of the data. Raises UserError naming `key` for a network that there is not.
    """
    config = json.loads(network)
    config |= {"pretrained": bool(config["pretrained"]) and pretrained} if "pretrained" in config else {}
    made = locate(config.pop("_target_"), f"{key}._target_")
    return call(made, config, key, accepted(made, info))


class Reused(nn.Module):
    """A student that answers with its teacher's classifier: logits = W mean over places of p(f) + b, f its map `layer`,
    p three convolutions (1x1, 3x3, 1x1) with batch norm and ReLU (Chen et al. 2022, SimKD).

    Its own classifier is left out. `inputs`: channels of f; `outputs`: what the classifier reads; `size`: places a side
    that p sees at most (f is averaged down to them); `factor`: the middle convolutions are so many times narrower than
    `outputs`. Features: the student's own, p(f) [B, outputs, H, W] as "projected" and "map", and its mean "pooled".
    """

    last_layer_name = "classifier"

    def __init__(
        self, network: nn.Module, layer: str, inputs: int, outputs: int, size: int, factor: int, num_classes: int
    ) -> None:
        super().__init__()
        self.layer, self.size = layer, size
        if hasattr(network, "image_size"):
            self.image_size = network.image_size
        network.set_submodule(last_layer_name(network), nn.Identity())
        self.network = network
        middle = max(1, outputs // factor)
        self.projector = nn.Sequential(
            nn.Conv2d(inputs, middle, 1, bias=False), nn.BatchNorm2d(middle), nn.ReLU(),
            nn.Conv2d(middle, middle, 3, padding=1, bias=False), nn.BatchNorm2d(middle), nn.ReLU(),
            nn.Conv2d(middle, outputs, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
        )  # fmt: skip
        self.classifier = nn.Linear(outputs, num_classes)

    def forward(self, input: Tensor) -> Outputs:
        """input [B, ...] -> logits [B, num_classes]."""
        features = self.network(input).features
        seen = features[self.layer]
        if seen.shape[2] > self.size:
            seen = F.adaptive_avg_pool2d(seen, self.size)
        projected = self.projector(seen)
        features = {**features, "projected": projected, "map": projected, "pooled": projected.mean((2, 3))}
        return Outputs(self.classifier(features["pooled"]), features)


class Expanded(nn.Module):
    """A student whose map f of the name `layer` becomes f + c(e(f)), e a 1x1 convolution to `copies` times `outputs`
    channels and c one back, both with batch norm and linear (Liu et al. 2023, NORM).

    f is the map whose mean the classifier reads, so that e and c may be merged into the classifier afterwards; or,
    where the network is a series of steps (Staged), any: its later steps see the new map. Features: the student's own
    up to f, e(f) as "projected", what later steps make, the map that the classifier reads the mean of as "map" (the new
    one, if no step makes another) and its mean as "pooled".
    """

    def __init__(self, network: nn.Module, layer: str, inputs: int, outputs: int, copies: int) -> None:
        super().__init__()
        self.network, self.layer = network, layer
        self.last_layer_name = f"network.{last_layer_name(network)}"
        if hasattr(network, "image_size"):
            self.image_size = network.image_size
        wide = copies * outputs
        self.expand = nn.Sequential(nn.Conv2d(inputs, wide, 1, bias=False), nn.BatchNorm2d(wide))
        self.contract = nn.Sequential(nn.Conv2d(wide, inputs, 1, bias=False), nn.BatchNorm2d(inputs))

    def forward(self, input: Tensor) -> Outputs:
        """input [B, ...] -> logits [B, num_classes]."""
        network = self.network if isinstance(self.network, Staged) else None
        features = network.between("input", self.layer, input) if network else self.network(input).features
        projected = self.expand(features[self.layer])
        whole = features[self.layer] + self.contract(projected)
        features = {**features, "projected": projected, "map": whole, "pooled": whole.mean((2, 3))}
        if network is None:
            return Outputs(last_layer(self)(features["pooled"]), features)
        later = network(whole, enter=self.layer)
        return Outputs(later.logits, features | later.features)


def expanded(
    network: str, layer: str, inputs: int, outputs: int, copies: int, pretrained: bool = False, **info: Any
) -> Expanded:
    """A student extended by a wider map; `network`: its own configuration as JSON."""
    return Expanded(from_json(network, "student.network", pretrained, **info), layer, inputs, outputs, copies)


def reused(
    network: str,
    layer: str,
    inputs: int,
    outputs: int,
    size: int,
    factor: int,
    pretrained: bool = False,
    **info: Any,
) -> Reused:
    """A student extended by a projector and a classifier; `network`: its own configuration as JSON."""
    inner = from_json(network, "student.network", pretrained, **info)
    return Reused(inner, layer, inputs, outputs, size, factor, info["num_classes"])
