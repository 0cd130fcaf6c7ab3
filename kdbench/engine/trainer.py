"""The training loop: epochs of steps, then evaluation, log and checkpoint. There is no other loop in kdbench."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from kdbench.engine.checkpoint import load_checkpoint, save_checkpoint, save_state
from kdbench.engine.evaluate import evaluate
from kdbench.engine.lanes import InTurn, Lanes, Work, make_lanes
from kdbench.engine.learner import Learner
from kdbench.engine.log import RunLog
from kdbench.engine.options import TrainerOptions
from kdbench.engine.progress import ProgressView
from kdbench.engine.writer import Writer, snapshot
from kdbench.errors import UserError
from kdbench.types import Batch, Epochs, Outputs, Teacher

CHECKPOINT, BEST, STUDENT = "checkpoint.pt", "best.safetensors", "student.safetensors"


class Diverged(UserError):
    """A loss became NaN or infinite."""


@dataclass
class Member:
    """A learner and the run folder that it fills."""

    learner: Learner
    folder: Path
    log: RunLog
    sets: Mapping[str, Iterable[Batch]]  # "val" (if any) and "test"
    reference: Mapping[str, Tensor]  # the teacher's logits on each of them; empty without a teacher
    trainer: TrainerOptions
    epochs: int  # of the whole schedule
    about: dict[str, str] = field(default_factory=dict)  # kept in the header of the weight files
    teacher: Teacher | None = None  # what it has become is kept with the student, for it may learn too
    epochs_done: int = 0
    seconds: float = 0.0
    last: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] | None = None
    failure: Exception | None = None

    def end_epoch(self, epoch: int, images: int, seconds: float, writer: Writer) -> dict[str, float]:
        """Read the meters, evaluate, log and checkpoint; `epoch` counts from 0. Raises Diverged."""
        means, bad = self.learner.meters.read()
        if bad is not None:
            raise _diverged(self, epoch, bad)
        lr = self.learner.optimizer.param_groups[0]["lr"]
        values = {f"train/{k}": v for k, v in means.items()} | {"lr": float(lr), "images_per_second": images / seconds}
        values["step"] = float(self.learner.steps_done)
        if (epoch + 1) % self.trainer.evaluate_every == 0 or epoch + 1 == self.epochs:
            values |= self.evaluate()
        self.epochs_done, self.seconds = epoch + 1, self.seconds + seconds
        self.last = {"epoch": float(epoch + 1), **values}
        self._keep_best(writer)
        self.log.write(epoch + 1, values)
        if (epoch + 1) % self.trainer.checkpoint_every == 0 or epoch + 1 == self.epochs:
            state = snapshot(self.state())
            writer.add(lambda: save_checkpoint(self.folder / CHECKPOINT, state))
        return values

    def evaluate(self) -> dict[str, float]:
        values: dict[str, float] = {}
        for name, batches in self.sets.items():
            measured = evaluate(self.learner.network, batches, self.reference.get(name))
            values |= {f"{name}/{k}": v for k, v in measured.items()}
        return values

    def _keep_best(self, writer: Writer) -> None:
        """The best epoch by validation accuracy; the test set is never looked at to choose."""
        score = self.last.get("val/top1")
        if score is not None and (self.best is None or score > self.best["val/top1"]):
            self.best = dict(self.last)
            weights = snapshot(self.learner.network.state_dict())
            writer.add(lambda: save_state(self.folder / BEST, weights, self.about))

    def state(self) -> dict[str, Any]:
        kept = {"epochs_done": self.epochs_done, "seconds": self.seconds, "last": self.last, "best": self.best}
        teacher = {"teacher": self.teacher.state()} if self.teacher else {}
        return {**kept, **teacher, "learner": self.learner.state()}

    def restore(self, state: dict[str, Any]) -> None:
        self.epochs_done, self.seconds = state["epochs_done"], state["seconds"]
        self.last, self.best = state["last"], state["best"]
        self.learner.restore(state["learner"])
        if self.teacher:
            self.teacher.restore(state["teacher"])


def resume_epoch(folder: Path) -> tuple[int, dict[str, Any] | None]:
    """The number of whole epochs in a run folder's checkpoint, and the checkpoint."""
    if not (folder / CHECKPOINT).exists():
        return 0, None
    state = load_checkpoint(folder / CHECKPOINT)
    return state["epochs_done"], state


def fit(members: Sequence[Member], batches: Epochs, teacher: Teacher, until: int, view: ProgressView) -> None:
    """Train members side by side up to epoch `until`: one batch, one teacher pass, a step of each.

    A member that fails (its loss diverges, say) is left out from then on and carries its `failure`; the others go on.
    """
    first = min(member.epochs_done for member in members)
    lanes = make_lanes(members[0].trainer, members[0].learner.distiller.placement.device, len(members))
    epochs = members[0].epochs
    with Writer() as writer:
        for epoch in range(first, until):
            active = [m for m in members if m.failure is None and m.epochs_done == epoch]
            if active:
                _train_epoch(active, batches, teacher, epoch, epochs, view, writer, lanes)


def _train_epoch(
    members: Sequence[Member], batches: Epochs, teacher: Teacher, epoch: int, epochs: int, view: ProgressView,
    writer: Writer, lanes: Lanes | InTurn,
) -> None:  # fmt: skip
    for member in members:
        member.learner.begin_epoch(epoch)
    begin = time.perf_counter()
    images = run_steps(members, batches.epoch(epoch, epochs), teacher, view.advance, lanes)
    seconds = time.perf_counter() - begin
    values: dict[str, float] = {}
    for member in (member for member in members if member.failure is None):
        try:
            values = member.end_epoch(epoch, images, seconds, writer)
        except Exception as failure:  # Diverged, or what its own evaluation raised; the caller reports it
            member.failure = failure
    view.epoch(epoch + 1, epochs, values)


class Trainee(Protocol):
    """Who takes part in a step."""

    learner: Learner
    failure: Exception | None


def run_steps(
    members: Sequence[Trainee], stream: Iterable[Batch], teacher: Teacher, advance: Callable[[], None],
    lanes: Lanes | InTurn | None = None,
) -> int:  # fmt: skip
    """A step of every member for every batch of `stream`; the number of images seen.

    `advance` is called after each batch. Returns when the device has done all of it.
    """
    lanes = lanes or InTurn()
    members[0].learner.enter()
    # Alone, a learner owns the global random state; learners that take turns swap theirs in and out.
    steps = [member.learner.step if len(members) == 1 else _in_turn(member) for member in members]
    images = 0
    for batch in stream:
        answer = teacher(batch)
        lanes.run([Work(m.learner, partial(step, batch, answer)) for m, step in zip(members, steps, strict=True)])
        images += len(batch.input)
        advance()
    members[0].learner.distiller.placement.wait()  # once an epoch, so that images per second are of work done
    return images


def _in_turn(member: Trainee) -> Callable[[Batch, Outputs | None], None]:
    """A member's step among others: what stops it (its loss, its memory) does not stop them."""

    def step(batch: Batch, teacher: Outputs | None) -> None:
        if member.failure is None:
            try:
                member.learner.step_in_turn(batch, teacher)
            except Exception as failure:
                member.failure = failure

    return step


def _diverged(member: Member, epoch: int, bad: int) -> Diverged:
    step = epoch * member.learner.steps_per_epoch + bad
    return Diverged(
        f"the loss is not a finite number from step {step + 1} on (epoch {epoch + 1}, step {bad + 1} of the epoch), in "
        f"{member.folder}. Try a smaller optimizer.lr, a longer schedule.warmup, or trainer.clip=1."
    )
