"""Together: the step of several processes, each with its rows of the batch, as the step of one.

Each process passes its own rows through the networks. What comes out is gathered, and every process computes the loss
of the whole batch: any loss, also one that compares rows with each other or remembers them. Backwards each process goes
on with its own rows, so that the gradients of the student add up to those of the whole batch. Batch norm takes its
statistics from the whole batch. So the numbers are those of one process, but for the order in which sums are added up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from kdbench import world
from kdbench.errors import UserError
from kdbench.losses.base import DistillationLoss
from kdbench.types import Outputs, Target

T = TypeVar("T")


class Together:
    """A student whose batches several processes share."""

    def __init__(self, student: nn.Module, loss: DistillationLoss, device: torch.device) -> None:
        self.student, self.loss, self.device = student, loss, device
        self.begin_epoch(0)

    def begin_epoch(self, seed: int) -> None:
        self.random = OwnRandom(seed, self.device)

    def outputs(self, network: Callable[[Tensor], Outputs], input: Tensor, target: Target) -> Outputs:
        """What the network returns of the whole batch: `input` is this process's rows, `target` that of all."""
        with self.random, WholeBatchNorm() if self.student.training else nullcontext():
            found = network(input)
        return whole(only(found, self.loss.student_needs), len(target.row))

    def add_gradients(self) -> None:
        """Sum the gradients of the student's rows over all processes; those of the loss are of the whole batch."""
        alike = [parameter.grad for parameter in self.loss.parameters() if parameter.grad is not None]
        for gradient in alike:
            gradient.div_(world.size())
        grads = [parameter.grad for parameter in self.student.parameters() if parameter.grad is not None] + alike
        for dtype in dict.fromkeys(gradient.dtype for gradient in grads):
            same = [gradient for gradient in grads if gradient.dtype == dtype]
            flat = torch.cat([gradient.reshape(-1) for gradient in same])
            world.add_up(flat)
            for gradient, part in zip(same, flat.split([gradient.numel() for gradient in same]), strict=True):
                gradient.copy_(part.view_as(gradient))


def whole(found: T, rows: int) -> T:
    """What was computed of this process's rows, as tensors in a container, of the whole batch of `rows`; with gradient.

    Raises UserError for a tensor that has no first dimension of rows.
    """
    return tree_map_only(Tensor, lambda part: _whole(part, rows), found)


def only(outputs: T, needs: Iterable[str]) -> T:
    """Without the features that nobody asked for."""
    if not isinstance(outputs, Outputs):  # several networks' outputs
        return outputs
    return outputs._replace(features={key: outputs.features[key] for key in needs if key in outputs.features})


def _whole(part: Tensor, rows: int) -> Tensor:
    first, last = world.own(rows)
    each, rest = divmod(len(part), last - first) if part.ndim else (0, 1)  # a text has a row for each position
    if rest:
        said = f"what is computed of {last - first} rows has shape {list(part.shape)}, no part of a batch"
        raise UserError("torchrun", said=said)
    return _Rows.apply(part, rows, each)


class _Rows(torch.autograd.Function):
    """Rows of all processes; backwards those of this one, since each computes the whole loss."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, rows: int, each: int) -> Tensor:
        ctx.rows = slice(*(each * place for place in world.own(rows)))
        return world.gather(part, [each * (last - first) for first, last in world.shares(rows)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return gradient[ctx.rows], None, None


class _Summed(torch.autograd.Function):
    """A sum over all processes; backwards too, since each uses it."""

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        total = part.clone()
        world.add_up(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        total = gradient.contiguous().clone()
        world.add_up(total)
        return total


class WholeBatchNorm(TorchFunctionMode):
    """A block in which batch norm in training takes mean and variance over the rows of all processes.

    Whatever calls it: torch's own layers, timm's, a function. Two sums a layer forwards and two backwards.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not F.batch_norm:
            return func(*args, **(kwargs or {}))
        return batch_norm(*args, **(kwargs or {}))


def batch_norm(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
    bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """F.batch_norm over the rows of all processes: input [B, C, ...] of this one."""
    if not training:
        return F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    values = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
    others = [0, *range(2, values.ndim)]
    count = values.new_full((1,), values.numel() // values.shape[1])
    sums = _Summed.apply(torch.cat([values.sum(others), count]))
    total, mean = sums[-1], sums[:-1] / sums[-1]
    shape = [1, -1, *[1] * (values.ndim - 2)]
    centred = values - mean.view(shape)
    variance = _Summed.apply(centred.square().sum(others)) / total
    with torch.no_grad():
        for running, found in ((running_mean, mean), (running_var, variance * (total / (total - 1)))):
            if running is not None:
                running.lerp_(found.to(running.dtype), momentum)
    made = centred * (variance + eps).rsqrt().view(shape)
    if weight is not None:
        made = made * weight.view(shape)
    if bias is not None:
        made = made + bias.view(shape)
    return made.to(input.dtype)


class OwnRandom:
    """A block that draws random numbers of this process's own, as its rows are (dropout); the others' stay alike."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.device = device
        before = self._states()
        torch.manual_seed(world.seed(seed))
        self.here = self._states()
        self._set(before)

    def _states(self) -> list[Tensor]:
        cuda = [torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else []
        return [torch.get_rng_state(), *cuda]

    def _set(self, states: Sequence[Tensor]) -> None:
        torch.set_rng_state(states[0])
        if len(states) > 1:
            torch.cuda.set_rng_state(states[1], self.device)

    def __enter__(self) -> None:
        self.there = self._states()
        self._set(self.here)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.here = self._states()
        self._set(self.there)
