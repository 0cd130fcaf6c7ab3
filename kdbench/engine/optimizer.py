"""Optimizers by name: torch's SGD and AdamW, and all others from timm."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from kdbench.engine.options import OptimizerOptions
from kdbench.errors import UserError

_TORCH = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW, "adam": torch.optim.Adam}


def make_optimizer(
    options: OptimizerOptions, modules: Iterable[nn.Module], on_device: bool = False
) -> torch.optim.Optimizer:
    """An optimizer over all trainable parameters of `modules`.

    With `decay_1d` false, parameters of fewer than two dimensions (batch-norm, biases) get no weight decay.
    `on_device`: the learning rate is a float32 tensor on the device, which a CUDA graph can read anew in every step;
    on a GPU also where nothing is recorded, so that both ways compute with the same number.
    Raises UserError for an unknown name or arguments that the optimizer does not take.
    """
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    groups = _groups(parameters, options)
    extra: dict[str, Any] = {k: v for k, v in _given(options).items() if v is not None} | dict(options.options)
    try:
        if options.name in _TORCH:
            # One fused kernel a step for all tensors; CPU and CUDA have it, other devices fall back to foreach.
            extra["fused"] = all(p.device.type in ("cpu", "cuda") for p in parameters)
            if on_device and options.name != "sgd":
                extra["capturable"] = True
            lr = torch.tensor(options.lr, device=parameters[0].device) if on_device else options.lr
            return _TORCH[options.name](groups, lr=lr, **extra)
        return _from_timm(options, groups, extra)
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        if options.options:
            raise UserError("options", options.options, f"what {options.name} takes: {error}") from error
        raise UserError("name", options.name, f"an optimizer that takes these options: {error}") from error


def load_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Go on from an optimizer's state dict, also that of a run on another device or of steps that were not recorded.

    How this optimizer runs stays as it is: the checkpoint's learning rate may be a plain number, which a recorded step
    would never change again.
    """
    groups = [
        {**saved, **{key: own[key] for key in ("lr", "capturable", "fused", "foreach") if key in own}}
        for saved, own in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict({**state, "param_groups": groups})


def lr_setter(optimizer: torch.optim.Optimizer) -> Callable[[float], object]:
    """What sets the learning rate of all groups: in place where it is a tensor, which a graph reads anew each time.

    To be made again after `load_state`, which replaces the groups' values.
    """
    groups = optimizer.param_groups
    lr = groups[0]["lr"]
    if isinstance(lr, torch.Tensor):
        shared = lr.to(groups[0]["params"][0].device)
        for group in groups:
            group["lr"] = shared
        return shared.fill_

    def assign(value: float) -> None:
        for group in groups:
            group["lr"] = value

    return assign


def _given(options: OptimizerOptions) -> dict[str, Any]:
    betas = tuple(options.betas) if options.betas is not None else None
    return {"momentum": options.momentum, "nesterov": options.nesterov, "betas": betas, "eps": options.eps}


def _groups(parameters: list[nn.Parameter], options: OptimizerOptions) -> list[dict[str, Any]]:
    if options.decay_1d:
        return [{"params": parameters, "weight_decay": options.weight_decay}]
    decayed = [p for p in parameters if p.ndim > 1]
    plain = [p for p in parameters if p.ndim <= 1]
    groups = [(decayed, options.weight_decay), (plain, 0.0)]
    return [{"params": params, "weight_decay": decay} for params, decay in groups if params]


def _from_timm(options: OptimizerOptions, groups: list[dict[str, Any]], extra: dict[str, Any]) -> torch.optim.Optimizer:
    from timm.optim import create_optimizer_v2, list_optimizers  # imported when asked for: timm takes a second

    known = [str(name) for name in list_optimizers()]
    if options.name not in known:
        names = sorted({*_TORCH, *known})
        near = difflib.get_close_matches(options.name, names, n=5) or [*_TORCH, "lamb", "lion", "muon"]
        raise UserError("name", options.name, "sgd, adamw, adam or an optimizer of timm", f"Nearest: {', '.join(near)}")
    return create_optimizer_v2(groups, opt=options.name, lr=options.lr, weight_decay=options.weight_decay, **extra)
