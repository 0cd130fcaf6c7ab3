"""Folding batch norms into the convolutions before them, which makes a frozen teacher cheaper at the same numbers, and
linear layers that say the same of a row wherever it stands in its batch."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kdbench.models.base import first_layer

_PLAIN_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_PLAIN_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)  # exactly these: subclasses may change their weight before they use it


def fold_batchnorm(model: nn.Module, inputs: Tensor | None = None) -> nn.Module:
    """An eval-mode copy of `model` with every batch norm that directly follows a convolution folded into it.

    Same outputs up to float rounding (the arithmetic is done in float64). Left alone: a batch norm whose input is
    used elsewhere too or is itself a feature (pre-activation networks), or does not come from a convolution. What
    follows what is observed in one forward pass of `inputs` [1, ...] (default: a blank image of the model's own
    size, or of 32 pixels); a model that cannot run them is returned as an unfolded copy.
    """
    folded = copy.deepcopy(model).eval()
    if any(isinstance(module, _BatchNorm) for module in folded.modules()):
        for conv, norm in _foldable(folded, inputs):
            old: Any = folded.get_submodule(norm)
            _absorb(folded.get_submodule(conv), old)
            folded.set_submodule(norm, _remainder(old))
    return folded


class _Aligned(nn.Linear):
    """A linear layer whose rows begin at multiples of 16 bytes, filled up with zeros."""

    def forward(self, x: Tensor) -> Tensor:
        missing = (0, -self.in_features % 8)
        return nn.functional.linear(nn.functional.pad(x, missing), nn.functional.pad(self.weight, missing), self.bias)


def align_rows(model: nn.Module) -> nn.Module:
    """`model` itself, its linear layers changed so that the last bit of an answer depends on its own row alone.

    Where rows do not begin at multiples of 16 bytes and outputs are few (30 inputs and 3 classes, say), a CPU's matrix
    product adds up some of them in another order, by where in the batch they stand: a table would hold other numbers
    than the live teacher says. Layers with a multiple of four inputs have no such rows and stay as they are.
    """
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and layer.in_features % 4:
            aligned = _Aligned(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
            aligned.weight, aligned.bias = layer.weight, layer.bias
            model.set_submodule(name, aligned)
    return model


class _Uses(TorchDispatchMode):
    """Counts, for every tensor, the operations that read it. Keeps all tensors alive, so that no id is given twice."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[int] = Counter()
        self.alive: list[object] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        leaves = tree_leaves((args, kwargs))
        self.count.update(id(leaf) for leaf in leaves if isinstance(leaf, Tensor))
        out = func(*args, **(kwargs or {}))
        self.alive.append((leaves, out))
        return out


class _Trace:
    """Which tensor each convolution made and each batch norm read, and what the batch norm alone did with it."""

    def __init__(self) -> None:
        self.uses = _Uses()
        self.made: dict[int, list[str]] = {}  # tensor -> convolutions that returned it
        self.read: dict[str, list[tuple[int, int]]] = {}  # batch norm -> (tensor, its uses before the call)
        self.own: Counter[int] = Counter()  # tensor -> uses within a batch norm

    def watch(self, name: str, module: nn.Module) -> list[torch.utils.hooks.RemovableHandle]:
        if type(module) in _PLAIN_CONVS:
            return [module.register_forward_hook(lambda _m, _a, out: self.made.setdefault(id(out), []).append(name))]
        if isinstance(module, _BatchNorm):
            return [
                module.register_forward_pre_hook(lambda _m, args: self._enter(name, args[0])),
                module.register_forward_hook(lambda _m, args, _o: self._leave(name, args[0])),
            ]
        return []

    def _enter(self, name: str, x: Tensor) -> None:
        self.read.setdefault(name, []).append((id(x), self.uses.count[id(x)]))

    def _leave(self, name: str, x: Tensor) -> None:
        self.own[id(x)] += self.uses.count[id(x)] - self.read[name][-1][1]

    def pairs(self, outputs: set[int]) -> list[tuple[str, str]]:
        calls = Counter(name for names in self.made.values() for name in names)
        found = []
        for norm, reads in self.read.items():
            tensor = reads[0][0]
            makers = self.made.get(tensor, [])
            once = len(reads) == 1 and len(makers) == 1 and calls[makers[0]] == 1
            if once and tensor not in outputs and self.uses.count[tensor] == self.own[tensor]:
                found.append((makers[0], norm))
        return found


def _foldable(model: nn.Module, inputs: Tensor | None) -> list[tuple[str, str]]:
    """Paths of (convolution, batch norm) pairs where the batch norm is the only reader of the convolution's output."""
    trace = _Trace()
    handles = [handle for name, module in model.named_modules() for handle in trace.watch(name, module)]
    try:
        inputs = _blank(model) if inputs is None else inputs.to(next(model.parameters()).device)
        with torch.no_grad(), trace.uses:
            outputs = model(inputs)
    except Exception:  # a foreign network may fail in any way on made-up data; folding is an optimisation, not a duty
        return []
    finally:
        for handle in handles:
            handle.remove()
    pairs = trace.pairs({id(leaf) for leaf in tree_leaves(outputs)})
    return [(conv, norm) for conv, norm in pairs if _fits(model.get_submodule(conv), model.get_submodule(norm))]


def _blank(model: nn.Module) -> Tensor:
    entry, size = first_layer(model), int(getattr(model, "image_size", 32))
    return entry.weight.new_zeros(1, entry.in_channels if isinstance(entry, nn.Conv2d) else 3, size, size)


def _fits(conv: Any, norm: Any) -> bool:
    known = type(norm) in _PLAIN_NORMS or type(norm).__name__ == "BatchNormAct2d"
    return known and norm.running_var is not None and norm.num_features == conv.out_channels


def _absorb(conv: Any, norm: Any) -> None:
    """w' = w * gamma / std, b' = (b - mean) * gamma / std + beta, in float64, on the CPU: MPS has no float64."""
    scale = (_exact(norm.running_var) + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * _exact(norm.weight)
    shift = -_exact(norm.running_mean) * scale
    if norm.bias is not None:
        shift = shift + _exact(norm.bias)
    weight = conv.weight.detach()
    if conv.bias is not None:
        shift = shift + _exact(conv.bias) * scale
    scaled = _exact(weight) * scale.reshape(-1, *[1] * (weight.dim() - 1))
    conv.weight = nn.Parameter(scaled.to(weight), requires_grad=conv.weight.requires_grad)
    conv.bias = nn.Parameter(shift.to(weight), requires_grad=conv.weight.requires_grad)


def _exact(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().double()


def _remainder(norm: Any) -> nn.Module:
    """What is left of a folded batch norm: nothing, or the activation that timm keeps in the same module."""
    if type(norm) in _PLAIN_NORMS:
        return nn.Identity()
    return nn.Sequential(norm.drop, norm.act).eval()
