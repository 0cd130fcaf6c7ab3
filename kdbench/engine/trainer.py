"""Training over epochs: after each one the students are measured, logged and kept."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from kdbench.engine.checkpoint import Checkpoints, MemberState, Writer
from kdbench.engine.cost import added, counters, spent
from kdbench.engine.device import own_stream
from kdbench.engine.evaluate import Evaluator
from kdbench.engine.learner import Learner
from kdbench.engine.log import ProgressView, RunLog
from kdbench.engine.loop import cohort_graph, train_epoch
from kdbench.errors import UserError
from kdbench.losses.base import DistillationLoss
from kdbench.results.metrics import CLASSIFICATION, Task
from kdbench.types import Epochs, Teacher


def remedies(loss: DistillationLoss) -> str:
    """What to type for a student that its loss ruins."""
    heavy = "".join(f" a smaller loss.{key} ({weight:g})," for key, weight in loss.heavy.items())
    return f"Try a smaller optimizer.lr,{heavy} a longer schedule.warmup, or trainer.clip=1."


class Diverged(UserError):
    """A loss became NaN or infinite."""


@dataclass
class Member:
    """A learner, who measures it, where its figures and checkpoints go, and how far it has come."""

    learner: Learner
    evaluator: Evaluator
    checkpoints: Checkpoints
    log: RunLog
    epochs: int  # of the whole schedule
    task: Task = CLASSIFICATION  # whose primary metric chooses the best epoch
    teacher: Teacher | None = None  # what it has become is kept with the student, for it may learn too
    epochs_done: int = 0
    seconds: float = 0.0
    cost: dict[str, float] | None = None  # kdbench.engine.cost; None: nothing yet
    last: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] | None = None

    def end_epoch(self, epoch: int, images: int, seconds: float, writer: Writer) -> dict[str, float]:
        """Read the meters, evaluate, log and checkpoint; `epoch` counts from 0. Raises Diverged."""
        learner, last_one = self.learner, epoch + 1 == self.epochs
        means, bad = learner.meters.read()
        if bad is not None:
            raise _diverged(self, epoch, bad)
        values = {f"train/{k}": v for k, v in means.items()}
        values |= {"lr": float(learner.optimizer.param_groups[0]["lr"]), "images_per_second": images / seconds}
        values["step"] = float(learner.steps_done)
        values |= self.evaluator.after(epoch, learner.network, always=last_one)
        if last_one:
            self._refuse_ruined(epoch, values)
        self.epochs_done, self.seconds = epoch + 1, self.seconds + seconds
        self.last = {"epoch": float(epoch + 1), **values}
        if self._is_best():
            self.best = dict(self.last)
            self.checkpoints.keep_best(learner.network, writer)
        self.log.write(epoch + 1, values)
        self.checkpoints.after(epoch, self.state, writer, always=last_one)
        return values

    def _refuse_ruined(self, epoch: int, values: dict[str, float]) -> None:
        """Raise Diverged for a network that its last step ruined: no later loss tells, and NaN has some accuracy."""
        lost = [key.split("/") for key in values if key.endswith(("/nll", "/knn")) and math.isnan(values[key])]
        for split, name in lost:
            if name == "knn" or not math.isnan(values.get(f"{split}/top1", math.nan)):  # NaN where nothing is labelled
                what = f"what the network says of the {split} set is not a number after epoch {epoch + 1}"
                raise Diverged(f"{what}, in {self.checkpoints.folder}. {remedies(self.learner.distiller.loss)}")

    def _is_best(self) -> bool:
        """By the primary metric on the validation set; the test set is never looked at to choose."""
        key = self.task.on("val")
        score = self.last.get(key)
        return score is not None and (self.best is None or self.task.is_better(score, self.best[key]))

    def state(self) -> MemberState:
        kept: MemberState = {
            "epochs_done": self.epochs_done, "seconds": self.seconds, "last": self.last, "best": self.best,
            "rows": list(self.log.sums), "cost": self.cost, "learner": self.learner.state(),
        }  # fmt: skip
        if self.teacher:
            kept["teacher"] = self.teacher.state()
        return kept

    def restore(self, state: MemberState) -> None:
        self.epochs_done, self.seconds = state["epochs_done"], state["seconds"]
        self.last, self.best, self.cost = state["last"], state["best"], state.get("cost", {})
        self.learner.restore(state["learner"])
        if self.teacher:
            self.teacher.restore(state["teacher"])


def fit(members: Sequence[Member], batches: Epochs, teacher: Teacher, until: int, view: ProgressView) -> None:
    """Train members side by side up to epoch `until`: one batch, one teacher pass, a step of each.

    A member that fails (its loss diverges, say) is left out from then on and its learner carries the `failure`; the
    others go on.
    """
    placement, epochs = members[0].learner.distiller.placement, members[0].epochs
    graph = cohort_graph([member.learner for member in members], placement.device)
    with own_stream(placement.device), Writer() as writer:
        for epoch in range(min(member.epochs_done for member in members), until):
            active = [m for m in members if m.learner.failure is None and m.epochs_done == epoch]
            for member in active:
                member.learner.begin_epoch(epoch)
            if active:
                begin, stream = time.perf_counter(), batches.epoch(epoch, epochs)
                before = counters(placement.device)
                images = train_epoch([m.learner for m in active], stream, teacher, view.advance, graph)
                cost = spent(before, counters(placement.device), len(active))
                for member in active:
                    member.cost = added(member.cost, cost)
                view.epoch(epoch + 1, epochs, _end_epoch(active, epoch, images, time.perf_counter() - begin, writer))
                writer.catch_up()


def _end_epoch(members: Sequence[Member], epoch: int, images: int, seconds: float, writer: Writer) -> dict[str, float]:
    """Of all that have not failed; the figures of the last one."""
    values: dict[str, float] = {}
    for member in (member for member in members if member.learner.failure is None):
        try:
            values = member.end_epoch(epoch, images, seconds, writer)
        except Exception as failure:  # Diverged, or what its own evaluation raised; the caller reports it
            member.learner.fail(failure)
    return values


def _diverged(member: Member, epoch: int, bad: int) -> Diverged:
    step = epoch * member.learner.meters.steps + bad
    return Diverged(
        f"the loss is not a finite number from step {step + 1} on (epoch {epoch + 1}, step {bad + 1} of the epoch), in "
        f"{member.checkpoints.folder}. {remedies(member.learner.distiller.loss)}"
    )
