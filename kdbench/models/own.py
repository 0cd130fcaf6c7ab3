"""Networks of one's own as kdbench's: any nn.Module that returns logits, with features read off layers by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kdbench.errors import UserError, in_your_code, nearest, require
from kdbench.models.adopt import Adopted, first_line
from kdbench.models.base import evaluating
from kdbench.types import CorpusInfo, ImageInfo, Info, Outputs, TokenInfo


class Observed:
    """Reads logits and features off a plain network in one pass, by hooks that stand for one call. Stateless.

    layers: the feature's name by the path of the layer whose output it is. last: the linear layer whose input is
    "pooled"; "" for none.
    """

    def __init__(self, layers: Mapping[str, str], last: str) -> None:
        self.layers, self.last = dict(layers), last

    def __call__(self, net: Any, inputs: Tensor) -> Outputs:
        kept: dict[str, Tensor] = {}
        hooks = [
            net.get_submodule(layer).register_forward_hook(_keeping(kept, name)) for name, layer in self.layers.items()
        ]
        if self.last and "pooled" not in self.layers:
            hooks.append(net.get_submodule(self.last).register_forward_pre_hook(_keeping_input(kept)))
        try:
            logits = logits_of(net(inputs))
        finally:
            for hook in hooks:
                hook.remove()
        assert logits is not None
        return Outputs(logits, kept)


def adopted(network: nn.Module, layers: Mapping[str, str], info: Info, key: str) -> nn.Module:
    """A network of one's own as one that returns Outputs; one that does so, and names no layers, stays as it is.

    It is tried on two inputs in evaluation mode: nothing in it changes, and no random number is drawn. Parameters keep
    their names. layers: features by name, e.g. {stage1: layer1}; "pooled" is what the last linear layer reads, if
    its output are the logits. Raises UserError below `key` for a network that cannot take the data, that returns
    something else than logits [B, classes], and for a layer that it does not have.
    """
    for name, layer in layers.items():
        _refuse_layer(network, name, layer, f"{key}.features.{name}")
    kind = f"{type(network).__module__}.{type(network).__qualname__}"
    found, last = _tried(network, info, key, kind)
    logits = logits_of(found)
    allowed = "a network that returns logits [batch, classes], or kdbench.types.Outputs"
    if logits is None:
        raise UserError(f"{key}._target_", kind, allowed, f"It returns {_kind_of(found)}")
    count, shape = info.num_classes, list(logits.shape)
    rows = info.predicted if isinstance(info, CorpusInfo) else 1  # of an input
    fits = shape == [2 * rows, count] or (shape[-1:] == [count] and isinstance(info, TokenInfo))
    hint = f"For two inputs it returns {shape}; its constructor may take num_classes"
    if not fits:
        batch = "batch" if rows == 1 else f"batch x {rows}"
        raise UserError(f"{key}._target_", kind, f"a network that returns [{batch}, {count}] for this dataset", hint)
    if isinstance(found, Outputs) and not layers:
        return network
    size = info.image_size if isinstance(info, ImageInfo) else 0
    return Adopted(network, Observed(layers, last), last, size)


def logits_of(found: Any) -> Tensor | None:
    """The logits in what a network returned: a tensor, or what has them under this name. None for anything else."""
    if isinstance(found, Mapping):
        found = found.get("logits")
    found = getattr(found, "logits", found)
    return found if isinstance(found, Tensor) else None


def _tried(network: nn.Module, info: Info, key: str, kind: str) -> tuple[Any, str]:
    """What it returns for two inputs, and the path of the linear layer that made the logits, if one did."""
    made: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if inputs and isinstance(inputs[0], Tensor) and inputs[0].dim() == 2:
                made[name] = output

        return hook

    hooks = [
        module.register_forward_hook(keep(name))
        for name, module in network.named_modules()
        if type(module) is nn.Linear
    ]
    try:
        with torch.random.fork_rng(devices=[]), evaluating(network), torch.no_grad():
            found = network(_two(info, network))
    except NotImplementedError:
        raise
    except Exception as error:  # whatever somebody's own code raises for a shape that it cannot take
        raise UserError(f"{key}._target_", kind, f"a network that takes {info}", f"It raises {_said(error)}") from error
    finally:
        for one in hooks:
            one.remove()
    logits = logits_of(found)
    return found, next((name for name, output in made.items() if output is logits), "")


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}{in_your_code(error)}"


def _two(info: Info, network: nn.Module) -> Tensor:
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    if isinstance(info, ImageInfo):
        return torch.zeros(2, info.in_channels, info.image_size, info.image_size, device=device)
    if isinstance(info, TokenInfo):
        return torch.ones(2, info.length, dtype=torch.int64, device=device)
    if isinstance(info, CorpusInfo):
        return torch.ones(2, info.context + info.predicted, dtype=torch.int64, device=device)
    return torch.zeros(2, info.dimensions, device=device)


def _keeping(kept: dict[str, Tensor], name: str) -> Callable[..., None]:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        found = output[0] if isinstance(output, (tuple, list)) and output else output
        if isinstance(found, Tensor):
            kept[name] = found

    return hook


def _keeping_input(kept: dict[str, Tensor]) -> Callable[..., None]:
    def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
        kept["pooled"] = inputs[0]

    return hook


def _refuse_layer(network: nn.Module, name: str, layer: Any, key: str) -> None:
    paths = [path for path, _ in network.named_modules() if path]
    if layer not in paths:
        raise UserError(key, layer, f"a layer of {type(network).__name__}", nearest(str(layer), paths))
    require(name.isidentifier() or name.endswith(".pre"), key, name, "a name such as stage1, stage1.pre or pooled")


def _kind_of(found: Any) -> str:
    if isinstance(found, (tuple, list)):
        return f"a {type(found).__name__} of {len(found)}"
    return f"a {type(found).__name__}"
