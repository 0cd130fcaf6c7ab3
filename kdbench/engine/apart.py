"""Optimizers that keep the gradients of a loss's terms apart: each has its own momentum, or yields to the label's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kdbench import world
from kdbench.engine.options import OptimizerOptions, TrainerOptions
from kdbench.errors import UserError, require
from kdbench.losses.base import DistillationLoss

Gradients = list[Tensor | None]


class ApartOptimizer(torch.optim.Optimizer):
    """An optimizer that makes the backward pass itself, of each of its `streams` alone.

    A stream is a term of the loss by its name in `LossTerms.weighted`; the last one takes all terms that no other is
    named after. The first is the label's, "task". Costs a backward pass for each stream after the first.
    """

    streams: ClassVar[tuple[str, ...]] = ("task", "distill")
    clips: ClassVar[bool] = False  # whether what it leaves in `grad` is the gradient of its step

    def backward(self, weighted: Mapping[str, Tensor]) -> None:
        """Take the gradients of a loss's weighted terms. Raises UserError for a loss that does not tell them."""
        require(bool(weighted), "optimizer.name", type(self).__name__.lower(), "sgd: the loss does not name its terms")
        self.take({name: self._gradients(total, weighted) for name, total in self._sums(weighted).items()})

    def take(self, found: Mapping[str, Gradients]) -> None:
        """Gradients of all parameters, in their order, by stream."""
        raise NotImplementedError

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _sums(self, weighted: Mapping[str, Tensor]) -> dict[str, Tensor]:
        sums: dict[str, Tensor] = {}
        for name, term in weighted.items():
            stream = name if name in self.streams else self.streams[-1]
            sums[stream] = sums[stream] + term if stream in sums else term
        return {name: total for name, total in sums.items() if total.requires_grad}

    def _gradients(self, total: Tensor, weighted: Mapping[str, Tensor]) -> Gradients:
        several = len(weighted) > 1  # the graph is shared; it goes with the terms
        return list(torch.autograd.grad(total, self.parameters(), retain_graph=several, allow_unused=True))


class _Momenta(ApartOptimizer):
    """SGD with a momentum for each stream: that of SGD and the stream's own `deltas`.

    A parameter that one stream alone reaches (an adapter) has the streams' mean momentum. Weight decay is a part of the
    gradient of the stream `decays`, or of the first that reaches the parameter.
    """

    decays: ClassVar[str] = "task"

    def __init__(
        self, params: Iterable[Any], lr: float, momentum: float, weight_decay: float, deltas: Sequence[float]
    ) -> None:
        momenta = [momentum + delta for delta in deltas]
        fits = all(0 <= value < 1 for value in momenta)
        require(fits, "options", list(deltas), f"shifts that leave the momenta in [0, 1), not {momenta}")
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momenta": momenta})
        self.found: Mapping[str, Gradients] = {}

    def take(self, found: Mapping[str, Gradients]) -> None:
        self.found = found

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update from the gradients that were taken: the streams one after the other, each its own momentum."""
        start = 0
        for group in self.param_groups:
            stop = start + len(group["params"])
            found = {name: gradients[start:stop] for name, gradients in self.found.items()}
            for place, name in enumerate(self.streams):
                if name in found:
                    self._move(group, place, found)
            start = stop
        self.found = {}

    def _move(self, group: Mapping[str, Any], place: int, found: Mapping[str, Gradients]) -> None:
        """The parameters of a group along one stream."""
        name, mean = self.streams[place], sum(group["momenta"]) / len(group["momenta"])
        for number, parameter in enumerate(group["params"]):
            gradient = found[name][number]
            if gradient is None:
                continue
            reaching = [stream for stream in self.streams if stream in found and found[stream][number] is not None]
            state, key = self.state[parameter], f"momentum_{name}"
            decaying = name == (self.decays if self.decays in reaching else reaching[0])
            # An adapter's first step is without, as in the authors' code.
            spared = key not in state and reaching == [name] and name not in ("task", self.decays)
            if group["weight_decay"] and decaying and not spared:
                gradient = gradient.add(parameter, alpha=group["weight_decay"])
            momentum = group["momenta"][place] if len(reaching) > 1 else mean
            state[key] = state[key].mul_(momentum).add_(gradient) if key in state else gradient.clone()
            parameter.add_(state[key], alpha=-group["lr"])


class DOT(_Momenta):
    """Distillation-oriented trainer (Zhao et al. 2023): momentum - delta for the label's gradient, + delta for the
    distillation's (the authors: 0.075 on CIFAR-100, 0.09 on ImageNet)."""

    def __init__(
        self, params: Iterable[Any], lr: float, momentum: float = 0.9, weight_decay: float = 0.0, delta: float = 0.075
    ) -> None:
        super().__init__(params, lr, momentum, weight_decay, (-delta, delta))


class DeepKD(_Momenta):
    """Three momenta (Huang et al. 2025, DeepKD): of the label's gradient, of that of the labelled class against the
    others (tckd), and of that among the others (nckd), for `loss=deepkd`."""

    streams: ClassVar[tuple[str, ...]] = ("task", "nckd", "tckd")
    decays: ClassVar[str] = "tckd"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        task: float = 0.075,
        tckd: float = -0.075,
        nckd: float = 0.05,
    ) -> None:
        super().__init__(params, lr, momentum, weight_decay, (task, nckd, tckd))


class AlignedSGD(ApartOptimizer, torch.optim.SGD):
    """SGD on the sum of the terms' gradients, without what of the distillation's points against the label's: where
    <g, g_task> < 0 over all parameters, g - <g, g_task> g_task / |g_task|^2 in the place of g (Yang et al. 2024, DHKD;
    the projection of Yu et al. 2020)."""

    clips: ClassVar[bool] = True

    def take(self, found: Mapping[str, Gradients]) -> None:
        task = found.get("task", [])
        for name, gradients in found.items():
            if name != "task" and task:
                found = {**found, name: _aligned(gradients, task)}
        for number, parameter in enumerate(self.parameters()):
            parts = [gradients[number] for gradients in found.values()]
            there = [part for part in parts if part is not None]
            parameter.grad = torch.stack(there).sum(0) if there else None


def _aligned(gradients: Gradients, task: Gradients) -> Gradients:
    """Gradients without their part against the task's, as one vector over all parameters."""
    pairs = [(g, t) for g, t in zip(gradients, task, strict=True) if g is not None and t is not None]
    if not pairs:
        return gradients
    along = torch.stack([(g * t).sum() for g, t in pairs]).sum()
    size = torch.stack([t.square().sum() for t in task if t is not None]).sum()
    share = torch.where(along < 0, along / size.clamp_min(1e-30), torch.zeros_like(along))
    zeros = [torch.zeros_like(t) if g is None and t is not None else g for g, t in zip(gradients, task, strict=True)]
    return [g if g is None or t is None else g - share * t for g, t in zip(zeros, task, strict=True)]


APART: Mapping[str, type[Any]] = {"dot": DOT, "deepkd": DeepKD, "aligned_sgd": AlignedSGD}


def refuse_apart(options: OptimizerOptions, trainer: TrainerOptions, loss: DistillationLoss, name: str) -> None:
    """Raise the UserError for an optimizer that keeps terms apart where that cannot be."""
    kind: type[ApartOptimizer] = APART[options.name]
    said = f"optimizer.name={options.name} keeps gradients apart"
    require(trainer.precision != "fp16", "trainer.precision", "fp16", f"fp32 or bf16: {said}, and scales none")
    require(trainer.clip is None or kind.clips, "trainer.clip", trainer.clip, f"null: {said}, and has no one norm")
    require(trainer.compile != "on", "trainer.compile", "on", f"auto or off: {said}, in several backward passes")
    require(trainer.accumulate == 1, "trainer.accumulate", trainer.accumulate, f"1: {said}, of whole batches")
    require(world.size() == 1, "optimizer.name", options.name, "sgd or another that adds terms up, under torchrun")
    missing = [stream for stream in kind.streams if stream not in ("task", "distill") and stream not in loss.terms]
    if missing and set(loss.terms) - {"task"}:
        raise UserError("loss", name, f"one with the terms {', '.join(kind.streams)}, since {said}: loss=deepkd")
