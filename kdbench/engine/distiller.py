"""Student and loss as one module from tensors to tensors, so that CUDA graphs can wrap it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor, nn

from kdbench import world
from kdbench.engine import device as placements
from kdbench.engine.device import Placement
from kdbench.engine.options import TrainerOptions
from kdbench.engine.together import Together
from kdbench.errors import UserError
from kdbench.losses.base import DistillationLoss
from kdbench.types import LossTerms, Outputs, StepOutput, Target, counted

LONG = 20_000  # steps: compiling takes about a minute the first time (later runs find it in the compiler's cache)
_WIDTHS = 8  # tokens
NETWORKS = 64  # that may share a forward method in one process, each with a compilation of its own; torch gives up at 8


def _refuse(terms: object, loss: DistillationLoss) -> None:
    """Raise the UserError for what a loss of the user's own returned in place of one number and its parts."""
    found = f"a {type(terms).__name__}"
    if isinstance(terms, LossTerms):
        found = f"terms of shape {list(terms.total.shape)}: a mean over the batch is missing"
    allowed = "a loss whose forward returns self.combine(task=..., distill=...) of 0-dim tensors"
    raise UserError("loss._target_", type(loss).__qualname__, allowed, f"It returned {found}")


class Distiller(nn.Module):
    """One forward pass of a student under its loss.

    A loss's adapters are parameters here, beside the student's: they train with it and stay out of the export.
    """

    def __init__(self, student: nn.Module, loss: DistillationLoss, placement: Placement) -> None:
        super().__init__()
        self.student = student
        self.loss = loss
        self.placement = placement
        self.together = Together(student, loss, placement.device) if world.size() > 1 else None
        self._compiled: Callable[[Tensor], Outputs] | None = None
        self.trims = False  # whether the student is asked without what is padding in a whole batch

    def forward(self, input: Tensor, teacher: Outputs | None, target: Target) -> StepOutput:
        """input [B, ...]; the teacher's outputs are of what counts. The loss runs outside autocast, in float32."""
        network = self._compiled or self.student
        if self.trims:
            input = trimmed(input)
        with self.placement.autocast():
            if self.together is not None:
                outputs = self.together.outputs(network, input, target)
            else:
                apart = self.loss.views > 1 and self.loss.apart
                outputs = by_view(network, input, self.loss.views) if apart else network(input)
        outputs = counted(outputs, target)
        terms = self.loss(outputs, teacher, target)
        if not isinstance(terms, LossTerms) or terms.total.dim():
            _refuse(terms, self.loss)
        return StepOutput(terms, outputs.logits.detach())

    @property
    def compiled(self) -> bool:
        return self._compiled is not None

    def plain(self) -> None:
        """Run the network as it is, compiled no more."""
        self._compiled = None

    def compile_student(self, strict: bool = False) -> None:
        """Let torch.compile fuse the kernels of the network, not of the loss: students of one network under many losses
        share a compilation. `strict`: what cannot be compiled any more raises instead of running plainly.
        """
        torch._dynamo.config.recompile_limit = max(NETWORKS, torch._dynamo.config.recompile_limit)
        torch._dynamo.config.fail_on_recompile_limit_hit = strict
        self._compiled = CompiledForward(self.student)


def may_trim(student: nn.Module, loss: DistillationLoss, options: TrainerOptions, device: torch.device) -> bool:
    """Whether nothing but the last bits changes where a student of token ids is asked without padding.

    Features are compared with those of a teacher that reads the whole width, so losses that need some do without. On a
    GPU, compiled, and among other processes, every batch has the one shape that was recorded.
    """
    plain = device.type == "cpu" and options.compile != "on" and world.size() == 1
    return plain and not loss.needs and bool(getattr(student, "any_length", False))


def trimmed(ids: Tensor) -> Tensor:
    """Token ids [B, L] without the columns behind the longest text, up to a multiple of 8: of few widths memory is used
    again."""
    longest = int((ids != 0).any(0).nonzero().max()) + 1 if ids.any() else 1
    return ids[:, : -(-longest // _WIDTHS) * _WIDTHS].contiguous()


def by_view(network: Callable[[Tensor], Outputs], input: Tensor, views: int) -> Outputs:
    """A network's outputs where each view goes through by itself: batch norm is of one kind of image."""
    parts = [network(part) for part in input.chunk(views)]
    features = {name: torch.cat([part.features[name] for part in parts]) for name in parts[0].features}
    return Outputs(torch.cat([part.logits for part in parts]), features)


class CompiledForward:
    """A network compiled for inputs of the first shape that it sees, and plain for any other: an epoch's last, smaller
    batch is not worth a second compilation."""

    def __init__(self, network: nn.Module) -> None:
        self._plain, self._compiled = network, torch.compile(network, dynamic=False)
        self._shape: torch.Size | None = None

    def __call__(self, input: Tensor) -> Outputs:
        self._shape = self._shape or input.shape
        return (self._compiled if input.shape == self._shape else self._plain)(input)


def wants_compilation(options: TrainerOptions, device: torch.device, steps: int) -> bool:
    """Whether `trainer.compile` asks for it in a training of so many steps.

    A rule and not a stopwatch decides `auto`, because compiled kernels differ in the last digits: the same run must
    give the same numbers again. On CPUs it is off: a step of resnet20 gained 0 to 7 % for 42 s of compilation.
    """
    triton = importlib.util.find_spec("triton") is not None
    pays = placements.PROVEN_COMPILE and device.type == "cuda" and triton and steps >= LONG and world.size() == 1
    return options.compile == "on" or (options.compile == "auto" and pays)
