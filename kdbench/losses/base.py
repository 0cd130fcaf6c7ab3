"""What every distillation loss is: the one base class, and how weighted terms are put together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdbench.arguments import checked
from kdbench.arguments.ranges import NotNegative, above_to, from_to
from kdbench.errors import UserError, require
from kdbench.losses.functional import ramp, real
from kdbench.types import Calibration, LossTerms, Outputs, Parts, Target

Weights = Mapping[str, NotNegative]
Smoothing = Annotated[float, from_to(0, 1)]
Steps = Literal["batch", "epoch"]
# Temperatures. Above it, differences of log-probabilities in float32 have no digits left for tau^2 to bring to light.
Moderate = Annotated[float, above_to(0, 32)]


class Extension(NamedTuple):
    """What a loss makes of the student: a network around it that is trained, kept and used in its place.

    `config`: what makes it, a `_target_` (one that kdbench.arguments.code lists) and its arguments; the student's own
    configuration joins them as JSON under `network`. `weights`: what parameters begin as, by name; `frozen`: paths of
    layers that are not trained. `text`: what is added, in words.
    """

    config: Mapping[str, object]
    text: str
    weights: Mapping[str, Tensor] = {}
    frozen: tuple[str, ...] = ()


class First(NamedTuple):
    """A training before the main one. What the main loss has by the same name goes on from what this loss learned."""

    loss: DistillationLoss
    epochs: int
    lr: float | None = None  # its learning rate; None: the main one's
    student: bool = True  # whether the main training goes on with the student's weights, too
    place: str = ""  # of the loss within the main one, "parts.ft." for one of a sum
    falls: Sequence[float] = ()  # shares of it after which its rate, which is constant otherwise, falls to a tenth


class Seen(Protocol):
    """A teacher's feature over the training set as it is, (values [B, ...], label [B]) a batch at a time; going through
    it costs a pass of the teacher, each time."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """In its order."""
        ...

    def in_turn(self, classes: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The first sample of every class, from 0 on, then the second of every class, ..., as many as the smallest
        class has; samples without a label are left out."""
        ...


# Hooks of subclasses by the names that they had once: one that is overridden by its old name would be passed over.
_RENAMED = {"needs_means": "surveyed", "learn_means": "survey"}


class DistillationLoss(nn.Module):
    """A loss over a student's and a teacher's outputs.

    A subclass states what it needs, its exact formula, and computes named terms. Everything is computed in float32
    whatever the precision of the networks (float64 stays); the teacher's outputs carry no gradient.

    `needs` names the teacher's features that it reads (and the student's, unless `student_needs` says otherwise), from
    `setup` on; an empty tuple means that a table of teacher logits may serve it. `weights` are the coefficients of the
    terms; `weights.task` multiplies the label's cross-entropy and `weights.distill` the teacher's term (papers disagree
    on what a bare alpha multiplies).
    """

    needs: tuple[str, ...] = ()  # features read; an instance may set its own
    views: int = 1  # of each image, one after the other in a batch
    apart: ClassVar[bool] = True  # whether each view goes through the student by itself, or all as one batch
    train_rows: int | None = None  # rows of the training set (target.row lies below it); known before `setup`
    epochs: int | None = None  # of the training; known before `setup`
    batch_size: int | None = None  # of the training, but for an epoch's last batch; known before `setup`
    steps: Steps = "batch"  # what a warm-up rises by
    of_embeddings: ClassVar[bool] = False  # its logits are embeddings, of data without classes
    uses_teacher: ClassVar[bool] = True  # False: may train with `teacher=none`
    extends: ClassVar[bool] = False  # True: has an `extension`
    needs_one_class: bool = False  # of each sample: labels that are mixed (mixup, cutmix) are refused
    terms: ClassVar[tuple[str, ...]] = ()  # what `weights` may name; (): anything
    paper: ClassVar[str] = ""  # "Zhao et al. 2022, decoupled KL", for `kdbench list loss`

    def __init_subclass__(cls, **options: Any) -> None:
        """Values out of the ranges of a loss's own annotations are refused, whoever builds it; so are hooks by the
        names that they had in earlier versions."""
        super().__init_subclass__(**options)
        for old in filter(partial(hasattr, cls), _RENAMED):
            said = f"this hook is called {_RENAMED[old]} now; by its old name nothing calls it"
            raise UserError(f"{cls.__qualname__}.{old}", said=said)
        if "__init__" in cls.__dict__:
            checked(cls)

    @checked
    def __init__(self, weights: Weights, label_smoothing: Smoothing = 0.0) -> None:
        super().__init__()
        self.weights = dict(weights)
        for name in self.weights.keys() - set(self.terms or self.weights):
            allowed = f"left out: this loss has the terms {', '.join(self.terms)}"
            raise UserError(f"weights.{name}", self.weights[name], allowed)
        nothing = bool(self.terms) and all(self.weights.get(term, 1.0) == 0.0 for term in self.terms)
        require(not nothing, "weights", self.weights, "above 0 for one of them: nothing to train on")
        self.label_smoothing = label_smoothing

    @property
    def student_needs(self) -> tuple[str, ...]:
        """The student's features that it reads, if they are others than the teacher's."""
        return self.needs

    @property
    def least_classes(self) -> int:
        """With fewer classes it gives no gradient, whatever the networks say."""
        return 1

    @property
    def heavy(self) -> dict[str, float]:
        """Weights above 1 of what is no label's term, by key: what may be too much at a given rate."""
        return {f"weights.{name}": w for name, w in self.weights.items() if w > 1 and name != "task"}

    @property
    def formula(self) -> str:
        """The exact formula with its numbers, for the log and result.json."""
        raise NotImplementedError

    @property
    def first_training(self) -> First | None:
        """The training that comes before the main one, if there is one."""
        return None

    def attach(self, student: Parts, teacher: Parts | None) -> None:
        """Look at layers of the two networks, before all else, for what their outputs do not say: weights.

        The student's are those that are trained; what is kept of a network goes into a tuple, since a module would be
        owned a second time by the loss. teacher None: there is none, or it is no network.
        """

    def has_own(self, method: str) -> bool:
        """Whether it does something in a method that does nothing for most losses: attach, extension, setup."""
        return getattr(type(self), method) is not getattr(DistillationLoss, method)

    def extension(self, student: Outputs, teacher: Outputs) -> Extension | None:
        """What the student is extended by, if it is; after `attach`, before `setup`. From shapes alone, but for weights
        of the layers attached."""
        return None

    def setup(self, student: Outputs, teacher: Outputs | None) -> None:
        """Make adapters from real shapes, once, before the optimizer is built. Most losses have none."""

    @property
    def needs_calibration(self) -> bool:
        """Whether `calibrate` must be called before training."""
        return False

    @property
    def least_calibration(self) -> int:
        """Labelled validation samples that `calibrate` takes at least."""
        return 1

    def calibrate(self, teacher_logits: Tensor, label: Tensor) -> Calibration:
        """Choose the loss's own coefficients from the teacher's logits [N, C] on the validation split and its labels
        [N].

        Called once, before training, only if `needs_calibration`; what it chose must be kept in buffers, so that a
        checkpoint carries it. Never sees test data.
        """
        raise NotImplementedError

    @property
    def surveyed(self) -> str:
        """The teacher's feature that `survey` wants to see of every training image; "": none. Its name may be a guess
        until `setup`."""
        return ""

    def survey(self, seen: Seen) -> None:
        """Keep in a buffer what the loss learns of the feature `surveyed`; once, before training, if there is one."""
        raise NotImplementedError

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        raise NotImplementedError

    def task(self, logits: Tensor, label: Tensor) -> Tensor:
        """Mean cross-entropy with the labels, in nats. logits [B, C]; label [B] int64 (-1: left out) or [B, C] float.

        Raises UserError for fewer classes than the loss has a gradient for, whoever calls it.
        """
        classes, name = logits.shape[-1], type(self).__name__
        if classes < self.least_classes:
            allowed = f"another with {classes} classes: it gives no gradient for fewer than {self.least_classes}"
            raise UserError("loss", name, allowed)
        return task_cross_entropy(logits, label, self.label_smoothing)

    def risen(self, progress: Tensor, share: float) -> Tensor:
        """0 -> 1 linearly over the first `share` of the training (0-dim), a batch at a time; with `steps` epoch an
        epoch at a time, from what its end would have on: 1/20 in the first of 20 epochs, as the authors' codes do."""
        return ramp(self.reached(progress), share)

    def reached(self, progress: Tensor) -> Tensor:
        """How much of the training counts as done (0-dim): with `steps` epoch the present epoch as a whole, too."""
        if self.steps == "epoch" and self.epochs:
            # progress is float32: it may fall short of the epoch that it begins by 1e-5 epochs
            return ((progress * self.epochs + 5e-5).floor() + 1) / self.epochs
        return progress

    def combine(self, **parts: Tensor) -> LossTerms:
        """Weighted sum of named terms; a term without a weight counts once. Terms with weight 0 only make curves."""
        weighted = {
            name: self.weights.get(name, 1.0) * part
            for name, part in parts.items()
            if self.weights.get(name, 1.0) != 0.0
        }
        total = sum(weighted.values())
        if not isinstance(total, Tensor):
            raise UserError("weights", self.weights, "above 0 for one of them: nothing to train on")
        return LossTerms(total, {name: part.detach() for name, part in parts.items()}, weighted)

    @property
    def task_text(self) -> str:
        """The label's term as `formula` writes it."""
        return f"CE(y smoothed by {number(self.label_smoothing)}, s)" if self.label_smoothing else "CE(y, s)"

    def written(self, **texts: str) -> str:
        """The weighted sum as text, "0.1 CE(y, s) + 0.9 KL(t || s)"; terms of weight 0 are left out."""
        weighted = [(self.weights.get(name, 1.0), text) for name, text in texts.items()]
        return " + ".join(text if w == 1.0 else f"{number(w)} {text}" for w, text in weighted if w != 0.0)


def number(value: float) -> str:
    """A coefficient as text, without digits that it does not have."""
    return format(value, ".10g")


def task_cross_entropy(logits: Tensor, label: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy in float32 (float64 stays), averaged over the labelled rows; exactly 0 (with a gradient of 0) if
    none is labelled.

    label [B] int64 (-1: no label) or [B, C] float (a row without a positive entry: no label).
    """
    logits = real(logits)
    if label.dtype.is_floating_point:
        label = label.to(logits.dtype).clamp_min(0.0)
        total = F.cross_entropy(logits, label, label_smoothing=label_smoothing, reduction="none")
        labelled = label.sum(1) > 0
        return torch.where(labelled, total, 0.0).sum() / labelled.sum().clamp_min(1)
    total = F.cross_entropy(logits, label, ignore_index=-1, label_smoothing=label_smoothing, reduction="sum")
    # A count on the device, not an `if`: no host sync. clamp: a batch of unlabelled images gives 0, not NaN.
    return total / (label >= 0).sum().clamp_min(1)


def detached(outputs: Outputs | None, loss: str) -> Tensor:
    """The teacher's logits in float32 (float64 stays) without gradient. Raises UserError if there is no teacher."""
    if outputs is None:
        raise UserError(f"loss={loss} needs a teacher: choose one with teacher=<network>")
    return real(outputs.logits.detach())
