"""Initial weights of the CIFAR networks, as the field's training recipes assume them."""

from __future__ import annotations

from typing import Literal

from torch import nn

LinearRule = Literal["default", "zero_bias", "small"]


def initialise(network: nn.Module, linear: LinearRule) -> None:
    """Set convolutions to N(0, 2 / (kernel area * output channels)), batch norms to identity, in place.

    `linear`: "default" keeps PyTorch's; "zero_bias" zeroes the bias only (wide ResNet, DenseNet); "small" is N(0, 0.01)
    with zero bias (VGG, MobileNetV2). Source: He et al. 2015 (fan-out mode); the rules for linear layers are those of
    RepDistiller and mdistiller, whose published accuracies depend on them.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            _initialise_linear(module, linear)


def _initialise_linear(module: nn.Linear, rule: LinearRule) -> None:
    if rule == "small":
        nn.init.normal_(module.weight, 0.0, 0.01)
    if rule != "default":
        nn.init.zeros_(module.bias)
