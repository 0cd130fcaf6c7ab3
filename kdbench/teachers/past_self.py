"""A student as its own teacher: its weights of the epoch before, or their moving average."""

from __future__ import annotations

import copy

import torch
from torch import nn

from kdbench.teachers.live import Context, freeze
from kdbench.types import Batch, Outputs, Teacher, TeacherState


class PastSelf(Teacher):
    """Answers by an earlier state of a student in training, in evaluation mode.

    `decay` None: the weights that the student had at the end of the epoch before (Kim et al. 2021, PS-KD); in the first
    epoch those it starts with. A number: their exponential moving average over steps (Tarvainen and Valpola 2017).
    `steps`: in an epoch, counted here because a batch does not say. Costs one more forward pass a step.
    """

    def __init__(self, steps: int, context: Context, decay: float | None = None) -> None:
        self.steps, self.context, self.decay = steps, context, decay
        self._calls = 0

    def attach(self, student: nn.Module) -> None:
        self.student = student
        self.past = freeze(copy.deepcopy(student))

    def __call__(self, batch: Batch) -> Outputs:
        self._follow()
        with torch.no_grad(), self.context():
            return self.past(batch.input)

    @torch.no_grad()
    def _follow(self) -> None:
        at_start, self._calls = self._calls == 0, (self._calls + 1) % self.steps
        if at_start:
            self.past.to(next(self.student.parameters()).device)
        if self.decay is None and not at_start:
            return
        keep = 0.0 if self.decay is None else self.decay
        mine, theirs = self.past.state_dict(), self.student.state_dict()
        pairs = [(mine[name], value.to(mine[name].device)) for name, value in theirs.items()]
        averaged = [pair for pair in pairs if keep and pair[0].is_floating_point()]
        copied = [pair for pair in pairs if not (keep and pair[0].is_floating_point())]
        # All tensors at once: on a GPU each by itself would be a kernel.
        if averaged:
            torch._foreach_lerp_([a for a, _ in averaged], [b for _, b in averaged], 1 - keep)
        if copied:
            torch._foreach_copy_([a for a, _ in copied], [b for _, b in copied])

    def state(self) -> TeacherState:
        """After a whole epoch, what is not in the student itself."""
        return {} if self.decay is None else {"network": self.past.state_dict()}

    def restore(self, state: TeacherState) -> None:
        self._calls = 0
        if self.decay is not None:
            self.past.load_state_dict(state.get("network", state))  # the first edition kept the weights alone
