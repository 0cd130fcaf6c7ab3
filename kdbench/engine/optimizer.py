"""Optimizers by name: torch's SGD and AdamW, those that keep terms apart, and all others from timm."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn

from kdbench.arguments import refuse_foreign
from kdbench.engine.apart import APART
from kdbench.engine.options import OptimizerOptions
from kdbench.errors import UserError
from kdbench.models.adopt import Adopted
from kdbench.types import OptimizerState

OWN = "own"  # in no_decay: what the network itself names
_TORCH = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW, "adam": torch.optim.Adam}


def make_optimizer(
    options: OptimizerOptions, modules: Iterable[nn.Module], on_device: bool = False
) -> torch.optim.Optimizer:
    """An optimizer over all trainable parameters of `modules`.

    With `decay_1d` false, parameters of fewer than two dimensions (batch-norm, biases) get no weight decay; nor do
    those that `no_decay` names. `layer_decay` scales the learning rate down towards the input (`lr_scale` of a group).
    `on_device`: the learning rate is a float32 tensor on the device, which a CUDA graph can read anew in every step;
    on a GPU also where nothing is recorded, so that both ways compute with the same number.
    Raises UserError for an unknown name or an argument that the optimizer does not take.
    """
    modules = list(modules)
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    groups = _groups(modules, options)
    extra: dict[str, object] = {k: v for k, v in _given(options).items() if v is not None} | dict(options.options)
    _refuse_unknown(options, extra)
    try:
        if options.name in _TORCH:
            # One fused kernel a step for all tensors; CPU and CUDA have it, other devices fall back to foreach.
            extra["fused"] = all(p.device.type in ("cpu", "cuda") for p in parameters)
            if on_device and options.name != "sgd":
                extra["capturable"] = True
            lr = torch.tensor(options.lr, device=parameters[0].device) if on_device else options.lr
            made = _TORCH[options.name](groups, lr=lr, **extra)
            made._warned_capturable_if_run_uncaptured = True  # steps before a recording, and instead of one, are right
            return made
        if options.name in APART:
            return APART[options.name](groups, lr=options.lr, **extra)
        return _from_timm(options, groups, extra)
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        if options.options:
            raise UserError("options", options.options, f"what {options.name} takes: {error}") from error
        raise UserError("name", options.name, f"an optimizer that takes these options: {error}") from error


def load_state(optimizer: torch.optim.Optimizer, state: OptimizerState) -> None:
    """Go on from an optimizer's state dict, also that of a run on another device or of steps that were not recorded.

    How this optimizer runs stays as it is: the checkpoint's learning rate may be a plain number, which a recorded step
    would never change again.
    """
    groups = [
        {**saved, **{key: own[key] for key in ("lr", "capturable", "fused", "foreach") if key in own}}
        for saved, own in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict({**state, "param_groups": groups})


def lr_setter(optimizer: torch.optim.Optimizer) -> Callable[[float | Tensor], object]:
    """What sets the learning rate of all groups: in place where it is a tensor, which a graph reads anew each time.

    A group's `lr_scale` multiplies it. A tensor may be given where the rates are tensors. To be made again after
    `load_state`, which replaces the groups' values.
    """
    groups = optimizer.param_groups
    scales = [group.get("lr_scale", 1.0) for group in groups]
    lr = groups[0]["lr"]
    if isinstance(lr, torch.Tensor):
        shared = {scale: lr.to(groups[0]["params"][0].device, copy=True) for scale in scales}
        for group, scale in zip(groups, scales):
            group["lr"] = shared[scale]

        def fill(value: float | Tensor) -> None:
            for scale, held in shared.items():
                held.copy_(value) if isinstance(value, Tensor) else held.fill_(value)
                if scale != 1.0:  # in float32, wherever the rate comes from
                    held.mul_(scale)

        return fill

    def assign(value: float | Tensor) -> None:
        for group, scale in zip(groups, scales):
            group["lr"] = value * scale

    return assign


def _given(options: OptimizerOptions) -> dict[str, object]:
    betas = tuple(options.betas) if options.betas is not None else None
    return {"momentum": options.momentum, "nesterov": options.nesterov, "betas": betas, "eps": options.eps}


def _groups(modules: Sequence[nn.Module], options: OptimizerOptions) -> list[dict[str, object]]:
    """Parameters by (share of the learning rate, whether weight decay spares them), those that decay first."""
    scales = _layer_scales(modules, options.layer_decay)
    own = {name for module in modules for name in _spared_by_network(module)} if OWN in options.no_decay else set()
    patterns = [name for name in options.no_decay if name != OWN]
    grouped: dict[tuple[float, bool], list[nn.Parameter]] = {}
    met: set[str] = set()
    for name, parameter in (named for module in modules for named in module.named_parameters()):
        if not parameter.requires_grad:
            continue
        matched = {pattern for pattern in patterns if fnmatch(name, f"*{pattern}*")}
        met |= matched
        spared = bool(matched) or name in own or (not options.decay_1d and parameter.ndim <= 1)
        grouped.setdefault((scales.get(parameter, 1.0), spared), []).append(parameter)
    for pattern in (pattern for pattern in patterns if pattern not in met):
        raise UserError("no_decay", options.no_decay, f"names of parameters: no name holds {pattern!r}")
    keys = sorted(grouped, key=lambda key: key[1])
    groups = [{"params": grouped[key], "weight_decay": 0.0 if key[1] else options.weight_decay} for key in keys]
    return [{**group, "lr_scale": key[0]} if scales else group for group, key in zip(groups, keys)]


def _spared_by_network(module: nn.Module) -> Iterator[str]:
    """Names of what a network itself says should not decay (timm: position embeddings, class tokens)."""
    for place, part in _of_libraries(module):
        named: Any = getattr(part, "no_weight_decay", None)
        if callable(named):
            yield from (f"{place}.{name}".lstrip(".") for name in named())


def _of_libraries(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules by their places; in the place of an adopted network the library's own, which has its methods."""
    for place, part in module.named_modules():
        yield place, part.net if isinstance(part, Adopted) else part


def _layer_scales(modules: Sequence[nn.Module], layer_decay: float | None) -> dict[nn.Parameter, float]:
    """What multiplies the learning rate of each parameter: layer_decay ** (layers above it), by timm's grouping.

    Bao et al. 2022 (BEiT). Raises UserError for a network without such a grouping.
    """
    if layer_decay is None:
        return {}
    found = [part for module in modules for _, part in _of_libraries(module) if hasattr(part, "group_matcher")]
    if not found:
        raise UserError("layer_decay", layer_decay, "null, or a number for a network of timm, which knows its layers")
    from timm.optim import param_groups_layer_decay  # imported when asked for: timm takes a second

    groups = param_groups_layer_decay(found[0], layer_decay=layer_decay)
    return {parameter: group["lr_scale"] for group in groups for parameter in group["params"]}


def _from_timm(
    options: OptimizerOptions, groups: list[dict[str, object]], extra: Mapping[str, object]
) -> torch.optim.Optimizer:
    from timm.optim import create_optimizer_v2  # imported when asked for: timm takes a second

    return create_optimizer_v2(groups, opt=options.name, lr=options.lr, weight_decay=options.weight_decay, **extra)


def _refuse_unknown(options: OptimizerOptions, typed: Mapping[str, object]) -> None:
    """Raise a UserError for an argument that the optimizer does not take, naming those that it takes."""
    try:
        refuse_foreign(_class_of(options.name), typed, options.name, ("params", "lr", "weight_decay"))
    except UserError as error:
        if error.key in options.options:
            error.move_under("options")
        raise


def _class_of(name: str) -> Callable[..., torch.optim.Optimizer]:
    own = _TORCH.get(name) or APART.get(name)
    if own is not None:
        return own
    from timm.optim import get_optimizer_class, list_optimizers

    known = [str(one) for one in list_optimizers()]
    if name not in known:
        names = sorted({*_TORCH, *APART, *known})
        near = difflib.get_close_matches(name, names, n=5) or [*_TORCH, "lamb", "lion", "muon"]
        raise UserError("name", name, "sgd, adamw, adam or an optimizer of timm", f"Nearest: {', '.join(near)}")
    try:
        return get_optimizer_class(name, bind_defaults=False)
    except (AssertionError, ImportError, RuntimeError) as error:  # of a library that is not there, or of a GPU
        raise UserError("name", name, f"an optimizer that can be had here: {error}") from error
