"""A teacher that learns from how its student does on labelled images (Pham et al. 2021, meta pseudo labels)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdbench.teachers.live import Context
from kdbench.types import Batch, Epochs, OptimizerState, Outputs, Teacher, TeacherState

PEAK = 50.0  # a pseudo-label as logits: exp(-50) is the probability of each other class


class _Pending(NamedTuple):
    """A step of the student whose effect is not known yet."""

    logits: Tensor  # [B, C] of the teacher, with gradient
    label: Tensor  # [B] what it told the student
    labelled: Batch
    before: Tensor  # the student's loss on `labelled` before it learnt that


class MetaTeacher(Teacher):
    """Answers each batch with hard pseudo-labels; when asked again it has seen their effect, and learns from that.

    The teacher's loss of a step is h CE(pseudo-labels, t(unlabelled)) + supervised CE(y, t(labelled)), where h is how
    much that step of the student lowered its own loss on the labelled batch: the first-order form of the paper's
    eta <grad CE(y, s'), grad CE(pseudo-labels, s)>, derived in its appendix A. h is measured in evaluation mode.
    Pseudo-labels are drawn from the teacher's prediction, as in the paper, or are its most likely class.

    A student's step costs two more of its forward passes, and two forward and two backward passes of the teacher. What
    is random is a function of (seed, step), so that a resumed training replays it.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        labelled: Epochs,
        context: Context,
        seed: int,
        sample: bool = True,
        supervised: float = 1.0,
    ) -> None:
        self.network = network.requires_grad_(True).train()
        self.optimizer, self.labelled, self.context = optimizer, labelled, context
        self.seed, self.sample, self.supervised = seed, sample, supervised
        self.steps = 0
        self._pending: _Pending | None = None
        self._stream: Iterator[Batch] | None = None

    def attach(self, student: nn.Module) -> None:
        self.student = student

    def __call__(self, batch: Batch) -> Outputs:
        self.learn()
        if self._stream is None:
            self._stream = _endless(self.labelled, self.steps)
        with torch.random.fork_rng(_devices(batch.input)):
            torch.manual_seed((self.seed * 1_000_003 + self.steps) % 2**63)
            with self.context():
                logits = self.network(batch.input).logits
            logits = logits.float()
            label = torch.multinomial(logits.detach().softmax(1), 1)[:, 0] if self.sample else logits.argmax(1)
        labelled = next(self._stream)
        self._pending = _Pending(logits, label, labelled, self._student_loss(labelled))
        self.steps += 1
        return Outputs(F.one_hot(label, logits.shape[1]) * PEAK, {})

    def learn(self) -> None:
        """Learn from what the student made of the last answer, if it was not done yet."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        feedback = pending.before - self._student_loss(pending.labelled)
        with torch.random.fork_rng(_devices(pending.logits)):
            torch.manual_seed((self.seed * 1_000_003 - self.steps) % 2**63)
            with self.context():
                answer = self.network(pending.labelled.input).logits
        loss = feedback * F.cross_entropy(pending.logits, pending.label)
        loss = loss + self.supervised * F.cross_entropy(answer.float(), pending.labelled.target.label)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()

    def _student_loss(self, batch: Batch) -> Tensor:
        training = self.student.training
        self.student.eval()
        with torch.no_grad(), self.context():
            logits = self.student(batch.input).logits
        self.student.train(training)
        return F.cross_entropy(logits.float(), batch.target.label)

    def state(self) -> TeacherState:
        """Of a teacher that has learnt from all that it said."""
        self.learn()
        return {
            "network": self.network.state_dict(),
            "optimizer": cast(OptimizerState, self.optimizer.state_dict()),
            "steps": self.steps,
        }

    def restore(self, state: TeacherState) -> None:
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(dict(state["optimizer"]))
        self.steps, self._pending, self._stream = state["steps"], None, None


def _endless(batches: Epochs, skip: int) -> Iterator[Batch]:
    """The batches of epoch after epoch, without the first `skip`."""
    first, skip = divmod(skip, batches.steps)
    for epoch in itertools.count(first):
        yield from itertools.islice(batches.epoch(epoch, epoch + 1), skip, None)
        skip = 0


def _devices(tensor: Tensor) -> list[torch.device]:
    return [tensor.device] if tensor.device.type == "cuda" else []
