"""The vocabulary: what flows between data, networks, losses, teachers and the training engine (torch only)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn


class Outputs(NamedTuple):
    """What every network returns."""

    logits: Tensor  # [B, C] raw, no temperature
    features: dict[
        str, Tensor
    ]  # "stem", "stage1", ... [B, D, H, W]; "pooled" [B, D], the input of the last linear layer


class Target(NamedTuple):
    """What a loss may know about a batch besides the two networks' outputs."""

    label: Tensor  # [B] int64, or [B, C] float (mixed or soft labels); -1 where a sample has no label
    row: Tensor  # [B] int64 row of the original training set; -1 for a sample of another set
    progress: Tensor  # 0-dim float32 in [0, 1]: how much of the training is done


class Batch(NamedTuple):
    """One training batch, on the device."""

    # Augmented and normalised: images float [B, C, H, W], vectors float [B, D], or token ids int64 [B, L] (0: padding).
    input: Tensor
    view: Tensor  # [B] int64 which augmentation each sample got: what makes an exact teacher table possible
    target: Target


class LossTerms(NamedTuple):
    """What a loss returns."""

    total: Tensor  # 0-dim float32, the only thing that is back-propagated
    parts: dict[str, Tensor]  # unweighted 0-dim terms by name, for curves


class StepOutput(NamedTuple):
    """What one forward pass of a student under its loss returns."""

    terms: LossTerms
    logits: Tensor  # [B, C] the student's


class Calibration(NamedTuple):
    """What a loss found out about a teacher before training, and chose its own coefficients by."""

    name: str  # "epsilon": the file stem (epsilon.json) and the prefix in TensorBoard
    record: dict[str, Any]  # what was chosen, and how; plain JSON values
    table: list[dict[str, Any]]  # one row a candidate, best first
    figures: dict[str, Any]  # matplotlib figures by name


class ImageInfo(NamedTuple):
    """What a network must know of the data to be built for it."""

    num_classes: int
    in_channels: int
    image_size: int  # pixels a side


class Teacher(Protocol):
    """What answers the students' batches: a live network, a table, the student's own past, ...; interchangeable.

    One that looks at its student or learns as it teaches overrides the last three methods too.
    """

    @abstractmethod
    def __call__(self, batch: Batch) -> Outputs | None:
        """What it says of the batch; None only of `teacher=none`, which says nothing."""

    def attach(self, student: nn.Module) -> None:
        """See a fresh student before its first step; the same object is trained then. Called by the engine."""
        return

    def state(self) -> dict[str, Any]:
        """What it has become after a whole epoch, kept in the students' checkpoints."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Become what `state` returned once, after `attach`."""
        return


class Epochs(Protocol):
    """What the training loop asks of a training set: batches, epoch by epoch (data.batches.TrainingBatches)."""

    size: int  # samples an epoch draws from
    steps: int  # batches in one epoch

    def epoch(self, epoch: int, epochs: int) -> Iterator[Batch]:
        """The batches of one epoch (counted from 0); `epochs` is the length of the training, for `progress`."""
        ...
