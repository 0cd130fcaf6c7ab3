"""Any classification network of torchvision, with its pretrained weights if wanted."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchvision import models

from kdbench.errors import UserError
from kdbench.models.adopt import (
    Adopted,
    Pixels,
    first_line,
    nearest,
    refuse_head,
    refuse_options,
    refuse_rates,
    refuse_size,
)
from kdbench.models.base import choose_stages, first_layer_name, forward_on_meta
from kdbench.models.interface import Interface, channels_of
from kdbench.types import Outputs

_HEADS = ("classifier", "heads", "head", "fc")


def torchvision_model(
    name: str,
    pretrained: bool = False,
    new_head: bool = False,
    options: Mapping[str, object] | None = None,
    upscale: Pixels | None = None,
    *,
    num_classes: int,
    in_channels: int = 3,
    image_size: int = 224,
) -> Adopted:
    """A classification network of torchvision for `num_classes` classes, whose state_dict has torchvision's own keys.

    pretrained: load the default published weights; if they are for another number of classes, this is an error unless
    `new_head` asks for a freshly initialised classifier, which must then be trained. options: further arguments of
    torchvision's constructor (dropout, stochastic_depth_prob, ...). upscale: pixels a side that inputs are scaled to
    first. With one input channel the pretrained first convolution gets the sum of its weights over the colours: the
    same as feeding the image three times. Auxiliary heads (GoogLeNet, Inception) are left off. Features: the last four
    map sizes are "stage1".."stage4", the one before is "stem"; four evenly spaced blocks where all maps are equally
    large (ViT); "pooled" [B, D], absent where no linear layer makes the logits (SqueezeNet). Raises UserError for an
    unknown name, a head that does not fit, weights that cannot be fetched or used, and options or image sizes that the
    network refuses.
    """
    _check_name(name)
    refuse_rates(options or {})
    seen = upscale or image_size
    arguments = {**_size_arguments(name, seen), **(options or {})}
    if pretrained:
        net = _load(name, num_classes, new_head, seen, arguments)
    else:
        net = _build(name, seen, {**arguments, "num_classes": num_classes})
    if in_channels != 3:
        _replace_first(net, name, in_channels, pretrained)
    classifier = _classifier_name(net)
    # 224 pixels: large enough that each map size differs from the next, whatever the images are.
    taps = _tap(net, in_channels, seen if name.startswith("maxvit_") else 224, classifier)
    network = Adopted(net, taps, classifier, image_size, upscale)
    network.published = _published(name, in_channels)  # type: ignore[assignment]
    _check_forward(network, name, in_channels)
    return network


class Taps:
    """Runs a network whose modules were given hooks that leave their tensors in `seen`.

    The hooks know only the dictionary: a copied network gets its own, and a classifier that is lent to another network
    leaves nothing behind but one tensor in a dictionary that is emptied at the next call.
    """

    def __init__(self, channels_last: frozenset[str]) -> None:
        self.seen: dict[str, Tensor] = {}
        self.channels_last = channels_last  # maps that torchvision keeps as [B, H, W, D] (Swin)

    def __call__(self, net: nn.Module, image: Tensor) -> Outputs:
        self.seen.clear()
        logits = net(image)
        features = {name: self._as_map(name, value) for name, value in self.seen.items()}
        self.seen.clear()
        return Outputs(logits, features)

    def _as_map(self, name: str, value: Tensor) -> Tensor:
        if value.dim() == 3:  # [B, 1 + H * W, D]: tokens after a class token (ViT)
            side = int((value.shape[1] - 1) ** 0.5)
            return value[:, 1:].transpose(1, 2).unflatten(2, (side, side))
        return value.permute(0, 3, 1, 2) if name in self.channels_last else value


class Keep:
    """A forward hook that leaves a module's output, or its input, in a dictionary."""

    def __init__(self, seen: dict[str, Tensor], name: str, what: Literal["output", "input"]) -> None:
        self.seen = seen
        self.name = name
        self.what = what

    def __call__(self, _module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self.seen[self.name] = output if self.what == "output" else args[0]


def _check_name(name: str) -> None:
    known = models.list_models(module=models)
    if name not in known:
        raise UserError("name", name, "a classification network of torchvision", nearest(name, known))


def _size_arguments(name: str, image_size: int) -> dict[str, object]:
    """What the networks that are made for one image size, and those with auxiliary heads, want to be told."""
    if name.startswith("vit_"):
        return {"image_size": image_size}
    if name.startswith("maxvit_"):
        return {"input_size": (image_size, image_size)}
    return {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}


def _build(name: str, image_size: int, arguments: dict[str, object]) -> nn.Module:
    try:
        return models.get_model(name, **arguments)
    except TypeError as error:
        known = inspect.signature(models.get_model_builder(name)).parameters
        raise refuse_options(name, arguments, known, error) from error
    except Exception as error:  # downloads, files and impossible sizes fail in as many ways as there are libraries
        raise _failure(name, image_size, "weights" in arguments, error) from error


def _failure(name: str, image_size: int, pretrained: bool, error: Exception) -> UserError:
    if not pretrained:
        return refuse_size(name, image_size, error)
    reason = f"{type(error).__name__}: {first_line(error)}"
    said = (
        f"the weights of {name} could not be loaded ({reason}); "
        f"put their file into {torch.hub.get_dir()}/checkpoints, or set pretrained=false"
    )
    return UserError("pretrained", said=said)


def _load(name: str, num_classes: int, new_head: bool, image_size: int, arguments: dict[str, object]) -> nn.Module:
    """The network with its published weights. Refuses a head that does not fit before anything is downloaded."""
    weights = models.get_model_weights(name).DEFAULT  # type: ignore[attr-defined]
    classes = len(weights.meta["categories"])
    if classes != num_classes and not new_head:
        raise refuse_head(name, classes, num_classes)
    if "image_size" in arguments and weights.transforms().crop_size[0] != image_size:
        size = weights.transforms().crop_size[0]
        allowed = (
            f"false: the weights of {name} are for {size}-pixel images, the dataset has {image_size} pixels "
            "(timm resizes position embeddings)"
        )
        raise UserError("pretrained", True, allowed)
    for fixed in ("aux_logits", "init_weights"):  # set by the weights; torchvision refuses another value
        arguments.pop(fixed, None)
    net: Any = _build(name, image_size, {**arguments, "weights": weights})
    if name == "inception_v3":
        net.aux_logits, net.AuxLogits = False, None
    if classes != num_classes:
        _replace_head(net, num_classes)
    return net


def _published(name: str, in_channels: int) -> Interface:
    """What torchvision says that its weights were trained with."""
    weights = models.get_model_weights(name).DEFAULT  # type: ignore[attr-defined]
    seen, names = weights.transforms(), tuple(weights.meta["categories"])
    mean, std = channels_of(seen.mean, in_channels), channels_of(seen.std, in_channels)
    return Interface(str(weights), names, mean, std, seen.crop_size[0], seen.resize_size[0], published=True)


def _replace_head(net: nn.Module, num_classes: int) -> None:
    layers = [(path, module) for path, module in net.named_modules() if path.split(".")[0] in _HEADS]
    path, old = [(path, module) for path, module in layers if isinstance(module, (nn.Linear, nn.Conv2d))][-1]
    if isinstance(old, nn.Linear):
        net.set_submodule(path, nn.Linear(old.in_features, num_classes))
    else:
        net.set_submodule(path, nn.Conv2d(old.in_channels, num_classes, old.kernel_size))  # type: ignore[arg-type]


def _replace_first(net: nn.Module, name: str, in_channels: int, pretrained: bool) -> None:
    """Give the first convolution another number of input channels."""
    path = first_layer_name(net)
    old = net.get_submodule(path)
    assert isinstance(old, nn.Conv2d)
    if pretrained and in_channels != 1:
        raise UserError("pretrained", True, f"false for images of {in_channels} channels: {name}'s weights are for 3")
    same: Any = {"kernel_size": old.kernel_size, "stride": old.stride, "padding": old.padding}
    new = nn.Conv2d(in_channels, old.out_channels, bias=old.bias is not None, **same)
    with torch.no_grad():
        if pretrained:
            new.weight.copy_(old.weight.sum(1, keepdim=True))
        else:
            new.weight.normal_().mul_(old.weight.std())
        if new.bias is not None and old.bias is not None:
            new.bias.copy_(old.bias)
    net.set_submodule(path, new)


def _tap(net: nn.Module, in_channels: int, size: int, classifier: str) -> Taps:
    """Hook the modules that give the stages, and the classifier's input, after one pass on shapes alone."""
    stages = _stages(net, in_channels, size)
    taps = Taps(frozenset(name for name, (_, shape) in stages.items() if _is_channels_last(shape)))
    for name, (path, _) in stages.items():
        net.get_submodule(path).register_forward_hook(Keep(taps.seen, name, "output"))
    if classifier:
        net.get_submodule(classifier).register_forward_hook(Keep(taps.seen, "pooled", "input"))
    return taps


def _stages(net: nn.Module, in_channels: int, size: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Feature name -> path of the module that gives it, and its shape."""
    if isinstance(net, models.VisionTransformer):
        blocks = net.encoder.layers.named_children()
        shapes: list[tuple[str, tuple[int, ...]]] = [(f"encoder.layers.{name}", (1, 1, 1)) for name, _ in blocks]
    else:
        shapes = _shapes(net, in_channels, size)
    names, indices = choose_stages([_side(shape) for _, shape in shapes])
    return {name: shapes[index] for name, index in zip(names, indices)}


def _shapes(net: nn.Module, in_channels: int, size: int) -> list[tuple[str, tuple[int, ...]]]:
    """Path and output shape of the top modules that return a map larger than one pixel, in forward order."""
    seen: list[tuple[str, tuple[int, ...]]] = []
    handles = []
    for path, module in net.named_modules():
        if path and _is_top(net, path) and not isinstance(module, nn.AdaptiveAvgPool2d):
            record = lambda _m, _a, out, path=path: seen.append((path, tuple(out.shape)))  # noqa: E731
            handles.append(module.register_forward_hook(record))
    try:
        forward_on_meta(net, torch.empty(1, in_channels, size, size))
    finally:
        for handle in handles:
            handle.remove()
    return [(path, shape) for path, shape in seen if len(shape) == 4 and _side(shape) > 1]


def _is_top(net: nn.Module, path: str) -> bool:
    parent, _, _ = path.rpartition(".")
    if path.split(".")[0] in _HEADS:
        return False
    return not parent or ("." not in parent and isinstance(net.get_submodule(parent), (nn.Sequential, nn.ModuleList)))


def _is_channels_last(shape: tuple[int, ...]) -> bool:
    return len(shape) == 4 and shape[1] == shape[2] != shape[3]


def _side(shape: tuple[int, ...]) -> int:
    return shape[1] if _is_channels_last(shape) else shape[2]


def _classifier_name(net: nn.Module) -> str:
    """Path of the last linear layer, "" if a convolution makes the logits (SqueezeNet)."""
    linear = [path for path, module in net.named_modules() if isinstance(module, nn.Linear)]
    names = [path for path in linear if path.split(".")[0] in _HEADS]
    return names[-1] if names else ""


def _check_forward(network: Adopted, name: str, in_channels: int) -> None:
    try:
        forward_on_meta(network, torch.empty(1, in_channels, network.image_size, network.image_size))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise refuse_size(name, network.image_size, error) from error
