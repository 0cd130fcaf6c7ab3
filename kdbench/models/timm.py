"""Any network of timm, with its pretrained weights if wanted."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from kdbench.errors import UserError, require
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
from kdbench.models.base import choose_stages, evaluating
from kdbench.models.distillation_token import with_distillation_token
from kdbench.models.interface import Interface, channels_of
from kdbench.types import Outputs


def timm_model(
    name: str,
    pretrained: bool = False,
    new_head: bool = False,
    options: Mapping[str, object] | None = None,
    upscale: Pixels | None = None,
    embedding: bool = False,
    *,
    num_classes: int,
    in_channels: int = 3,
    image_size: int = 224,
) -> Adopted:
    """A timm network (`timm.list_models()`) for `num_classes` classes, whose state_dict has timm's own keys.

    pretrained: load the published weights; if their head has another number of classes, this is an error unless
    `new_head` asks for a freshly initialised head, which must then be trained. options: further arguments of
    `timm.create_model` (drop_rate, drop_path_rate, pretrained_cfg_overlay={file: ...} for a local file, ...);
    distilled=true gives any ViT a distillation token with a head of its own, also beside published weights. With other
    than three input channels timm sums or repeats the weights of the first convolution. Networks that are made
    for one image size are given `image_size`, or `upscale`: pixels a side that inputs are scaled to first (small
    images for networks of large ones, on the device, so that the data stays small). Features: "stem" where the
    network has five map sizes or more, the last four (or fewer) sizes as "stage1".."stage4", each [B, D, H, W]; four
    evenly spaced blocks where all maps are equally large (ViT); of a ViT also "block1" and "block2", and "tokens", the
    last block's after the final norm; "pooled" [B, D]; "head" and "head_dist", the logits
    [B, C] of the class token and of the distillation token where there is one, whose mean the network's own are (DeiT,
    PiT). Raises UserError for an unknown name, a head that does not fit, weights that do not exist or cannot be
    fetched, and options that the network refuses.
    """
    _check_name(name, options or {})
    if pretrained and not embedding:
        _check_head(name, num_classes, new_head, options or {})
    arguments = {"num_classes": 0 if embedding else num_classes, "in_chans": in_channels, **(options or {})}
    net = _made(name, pretrained, upscale or image_size, arguments)
    if embedding:
        _check_embedding(name, net, num_classes)
    network = Adopted(net, _observer(net), _classifier_name(net), image_size, upscale)
    published = _published(net, in_channels)
    network.published = replace(published, classes=None) if embedding and published else published  # type: ignore[assignment]
    _check_forward(network, name, in_channels)
    return network


def timm_class(
    kind: str,
    options: Mapping[str, object] | None = None,
    upscale: Pixels | None = None,
    *,
    num_classes: int,
    in_channels: int = 3,
    image_size: int = 224,
) -> Adopted:
    """A network of timm by its class, "timm.models.mlp_mixer.MlpMixer", in sizes that no name of timm has.

    options: the class's arguments; a text that begins with "timm." is what it names. Features and errors as
    `timm_model`'s.
    """
    refuse_rates(options or {})
    found = {key: _named(value) for key, value in (options or {}).items()}
    arguments = {"num_classes": num_classes, "in_chans": in_channels, "img_size": upscale or image_size, **found}
    try:
        net = _named(kind)(**arguments)
    except TypeError as error:
        raise refuse_options(kind, found, inspect.signature(_named(kind)).parameters, error) from error
    except (ValueError, AssertionError, RuntimeError) as error:
        raise UserError("options", dict(options or {}), f"what {kind} takes: {first_line(error)}") from error
    network = Adopted(net, _observer(net), _classifier_name(net), image_size, upscale)
    _check_forward(network, kind, in_channels)
    return network


def _named(value: Any) -> Any:
    """What a text "timm.<module>.<name>" names; anything else as it is. Raises UserError for what there is not."""
    if not (isinstance(value, str) and value.startswith("timm.")):
        return value
    module, _, name = value.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError("kind", value, "a class of timm with its module, as timm.models.mlp_mixer.MlpMixer") from error


def _check_name(name: str, options: Mapping[str, object]) -> None:
    if not timm.is_model(name):
        raise UserError("name", name, "a network of timm", nearest(name, timm.list_models()))
    refuse_rates(options)
    token = options.get("distilled", False)
    require(isinstance(token, bool), "options.distilled", token, "true or false")
    dropped = options.get("patch_drop_rate", 0)
    require(dropped == 0, "options.patch_drop_rate", dropped, "0: features are maps of all patches")


def _check_embedding(name: str, net: Any, dimensions: int) -> None:
    size = getattr(net, "head_hidden_size", net.num_features)
    allowed = f"a network whose embedding has {dimensions} dimensions (it has {size})"
    if size != dimensions:
        raise UserError("name", name, allowed, f"dataset.dimensions={size}")


def _check_head(name: str, num_classes: int, new_head: bool, options: Mapping[str, object]) -> None:
    """Refuse a random head in the place of a pretrained one, before anything is downloaded."""
    config = timm.models.get_pretrained_cfg(name)
    overlay: Any = options.get("pretrained_cfg_overlay") or {}
    file = overlay.get("file")
    if file is not None and not Path(file).is_file():
        raise UserError("options.pretrained_cfg_overlay.file", file, "a file of weights")
    if config is None or not (config.has_weights or overlay):
        raise UserError("pretrained", True, f"false: timm has no weights for {name}")
    classes = overlay.get("num_classes", config.num_classes)
    if classes != num_classes and not new_head:
        raise refuse_head(name, classes, num_classes)


def _made(name: str, pretrained: bool, image_size: int, arguments: dict[str, object]) -> nn.Module:
    """timm's network, with a distillation token of ours where `distilled` asks for one that timm does not build."""
    token = arguments.get("distilled")
    if token not in (True, False) or (token and _takes_token(name, pretrained)):
        return _create(name, pretrained, image_size, arguments)
    # Without the word, which a network without a token has never heard of.
    net = _create(name, pretrained, image_size, {key: arguments[key] for key in arguments if key != "distilled"})
    if token and getattr(net, "head_dist", None) is None and with_distillation_token(net) is None:
        raise UserError("options.distilled", True, f"false: {name} is neither a VisionTransformer nor an Eva of timm")
    return net


def _takes_token(name: str, pretrained: bool) -> bool:
    """Whether timm itself builds this network with a distillation token if asked (and has no weights of one then)."""
    return name.startswith("deit_") and "distilled" not in name and not pretrained


def _create(name: str, pretrained: bool, image_size: int, arguments: dict[str, object]) -> nn.Module:
    config = timm.models.get_pretrained_cfg(name)
    attempts = [arguments]
    if config is not None and tuple(config.input_size)[-1] != image_size and "img_size" not in arguments:
        attempts.insert(0, {**arguments, "img_size": image_size})  # refused by networks that take any size
    for attempt in attempts:
        try:
            return timm.create_model(name, pretrained=pretrained, **attempt)
        except TypeError as error:
            if "img_size" in str(error) and attempt is not attempts[-1]:
                continue
            raise refuse_options(name, arguments, _arguments_of(name), error) from error
        except Exception as error:  # downloads, files and impossible sizes fail in as many ways as there are libraries
            raise _failure(name, pretrained, image_size, error) from error
    raise AssertionError("the last attempt returns or raises")


def _arguments_of(name: str) -> list[str]:
    """The arguments of the classes in the module of a network, one of which it is."""
    module = importlib.import_module(timm.models.model_entrypoint(name).__module__)
    classes = [kind for kind in vars(module).values() if isinstance(kind, type) and issubclass(kind, nn.Module)]
    return [key for kind in classes for key in inspect.signature(kind).parameters]


def _failure(name: str, pretrained: bool, image_size: int, error: Exception) -> UserError:
    if not pretrained:
        return refuse_size(name, image_size, error)
    reason = f"{type(error).__name__}: {first_line(error)}"
    said = (
        f"the weights of {name} could not be loaded for {image_size}-pixel images ({reason}); "
        "set options.pretrained_cfg_overlay.file to a local file, or pretrained=false"
    )
    return UserError("pretrained", said=said)


def _published(net: Any, in_channels: int) -> Interface | None:
    """What timm says that its weights were trained with; None if it has none for this network."""
    config = dict(net.pretrained_cfg or {})
    if not config.get("mean"):
        return None
    mean, std = (channels_of(config[key], in_channels) for key in ("mean", "std"))
    names = config.get("label_names") or _imagenet_names(net, config)
    size = config["input_size"][-1] if config.get("input_size") else None
    return Interface(name_of(config), tuple(names) if names else None, mean, std, size, published=True)


def name_of(config: Mapping[str, str | None]) -> str:
    """ "resnet18.a1_in1k"."""
    return ".".join(filter(None, (config.get("architecture"), config.get("tag"))))


def _imagenet_names(net: Any, config: Mapping[str, object]) -> list[str] | None:
    """The WordNet ids of the classes of a network that was trained on a part of ImageNet; they name its folders."""
    subset = timm.data.infer_imagenet_subset({**config, "num_classes": config.get("num_classes", 0)})
    return timm.data.ImageNetInfo(subset).label_names() if subset else None


class Stages:
    """Reads logits and features off a timm network in one pass. Stateless; `indices` are those of feature_info."""

    def __init__(self, names: list[str], indices: list[int], linear: bool, distilled: bool, tokens: bool) -> None:
        self.names = names
        self.indices = indices
        self.tokens = tokens  # whether it is a ViT, whose last tokens after the final norm are a feature, too
        self.linear = linear  # whether the classifier is one linear layer on the pooled features
        self.distilled = distilled  # whether a second one is on a distillation token

    def __call__(self, net: Any, image: Tensor) -> Outputs:
        read = sorted(set(self.indices))
        last, maps = net.forward_intermediates(image, indices=read)
        features = {name: maps[read.index(index)] for name, index in zip(self.names, self.indices)}
        if self.tokens:
            features["tokens"] = last[:, net.num_prefix_tokens :].mT.unflatten(2, maps[-1].shape[2:])
        pooled = net.forward_head(last, pre_logits=True)
        if isinstance(pooled, Tensor):  # CrossViT has one vector a branch: not a feature that a loss could read
            features["pooled"] = pooled.flatten(1)
        if not self.distilled:
            return Outputs(net.get_classifier()(pooled) if self.linear else net.forward_head(last), features)
        head, head_dist = _both_heads(net, last)
        return Outputs((head + head_dist) / 2, {**features, "head": head, "head_dist": head_dist})


def _both_heads(net: Any, last: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of the class token and of the distillation token, which timm gives apart in training alone."""
    mode, net.training, net.distilled_training = net.training, True, True
    try:
        return net.forward_head(last)
    finally:
        net.training, net.distilled_training = mode, False


def _observer(net: Any) -> Stages:
    sizes = [entry["reduction"] for entry in getattr(net.feature_info, "info", net.feature_info)]
    names, indices = choose_stages(sizes)
    distilled = hasattr(net, "set_distilled_training") and getattr(net, "head_dist", None) is not None
    tokens = isinstance(net, (VisionTransformer, Eva)) and len(sizes) > 1
    if tokens:
        names, indices = ["block1", "block2", *names], [0, 1, *indices]
    return Stages(names, indices, isinstance(net.get_classifier(), nn.Linear), distilled, tokens)


def _check_forward(network: Adopted, name: str, in_channels: int) -> None:
    """Run one image: the size must be possible, and the parts must give the logits of timm's own forward.

    Costs two forward passes of one image. VOLO, whose forward adds auxiliary heads, is refused here.
    """
    size = network.image_size
    image = torch.linspace(-1, 1, in_channels * size * size).reshape(1, in_channels, size, size)
    image = image.to(next(network.parameters()))
    try:
        with evaluating(network), torch.no_grad():
            logits, expected = network(image).logits, network.net(network.scaled(image))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise refuse_size(name, size, error) from error
    if not logits.is_meta and not torch.allclose(logits, expected, rtol=1e-3, atol=1e-4):
        raise UserError("name", name, "a network with one classifier on its features, and no other heads beside it")


def _classifier_name(net: Any) -> str:
    classifier = net.get_classifier()
    if not isinstance(classifier, nn.Linear):
        return ""
    return next(name for name, module in net.named_modules() if module is classifier)
