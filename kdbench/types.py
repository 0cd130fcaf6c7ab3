"""The vocabulary: what flows between data, networks, losses, teachers and the training engine (torch only)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypedDict

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ANSWER = "answer"  # a feature that a teacher's outputs may have: the largest of the logits, int64 [N]
MEMBERS = "members"  # the feature of an ensemble that losses over several teachers read: the members' logits [B, K, C]


class Outputs(NamedTuple):
    """What every network returns."""

    # [N, C] raw, no temperature. N predictions: one an input, or of a language model those of all positions in a row,
    # N = B T. Its features are [B T, D] too, so that every loss sees rows.
    logits: Tensor
    features: dict[
        str, Tensor
    ]  # "stem", "stage1", "stage1.pre" (before its ReLU), ... [B, D, H, W]; "pooled" [B, D], what the last layer reads


class Parts(NamedTuple):
    """What a loss may know of a network besides its outputs: itself and layers of its own, live."""

    classifier: nn.Linear | None  # makes the logits of "pooled"; None: no single linear layer does
    norms: Mapping[str, nn.Module]  # the batch norm that makes a map, by its name, where networks say which
    network: nn.Module | None = None  # the whole of it


class Target(NamedTuple):
    """What a loss may know about a batch besides the two networks' outputs."""

    label: Tensor  # [N] int64, or [N, C] float (mixed or soft labels); -1 where a sample has no label
    row: Tensor  # [N] int64 row of the original training set (of a text: the token); -1 for a sample of another set
    progress: Tensor  # 0-dim float32 in [0, 1]: how much of the training is done
    counted: Tensor | None = None  # [K] int64 the rows of the logits that count, and label and row are of; None: all


def counted(outputs: Outputs, target: Target) -> Outputs:
    """What of a network's outputs counts: the rows [K] that label and row of the target are of."""
    if target.counted is None:
        return outputs
    whole = len(outputs.logits)
    pairs = outputs.features.items()
    features = {key: v.index_select(0, target.counted) if len(v) == whole else v for key, v in pairs}
    return outputs._replace(logits=outputs.logits.index_select(0, target.counted), features=features)


class Batch(NamedTuple):
    """One training batch, on the device."""

    # Augmented and normalised: images float [B, C, H, W], vectors float [B, D], or token ids int64 [B, L] (0: padding).
    input: Tensor
    view: Tensor  # [B] int64 which augmentation each sample got: what makes an exact teacher table possible
    target: Target
    whole: Target | tuple[()] = ()  # of the rows of all processes, where there are several (kdbench.world)


class LossTerms(NamedTuple):
    """What a loss returns."""

    total: Tensor  # 0-dim float32, the only thing that is back-propagated
    parts: dict[str, Tensor]  # unweighted 0-dim terms by name, for curves
    weighted: Mapping[str, Tensor] = {}  # what total is the sum of, by name, for optimizers that keep terms apart


class StepOutput(NamedTuple):
    """What one forward pass of a student under its loss returns."""

    terms: LossTerms
    logits: Tensor  # [N, C] the student's, of what counts


class Calibration(NamedTuple):
    """What a loss found out about a teacher before training, and chose its own coefficients by."""

    name: str  # "epsilon": the file stem (epsilon.json) and the prefix in TensorBoard
    record: dict[str, object]  # what was chosen, and how; plain JSON values
    table: list[dict[str, object]]  # one row a candidate, best first
    figures: Mapping[str, Figure]


class ImageInfo(NamedTuple):
    """What a network must know of images to be built for them."""

    num_classes: int
    in_channels: int
    image_size: int  # pixels a side

    @property
    def samples(self) -> str:
        """What they are counted in."""
        return "images"

    def __str__(self) -> str:
        return (
            f"{self.num_classes} classes of images with {self.in_channels} channels and {self.image_size} pixels a side"
        )

    def example(self, n: int, device: torch.device | str = "cpu", shape: Sequence[int] | None = None) -> Tensor:
        """n random images uint8 [n, C, H, W], always the same. `shape`: [C, H, W], where they are not square."""
        shape = shape or (self.in_channels, self.image_size, self.image_size)
        return torch.randint(256, (n, *shape), generator=_generator(), dtype=torch.uint8).to(device)


class VectorInfo(NamedTuple):
    """What a network must know of vectors."""

    num_classes: int
    dimensions: int

    @property
    def samples(self) -> str:
        """What they are counted in."""
        return "vectors"

    def __str__(self) -> str:
        return f"{self.num_classes} classes of vectors with {self.dimensions} dimensions"

    def example(self, n: int, device: torch.device | str = "cpu", shape: Sequence[int] | None = None) -> Tensor:
        """n random vectors float32 [n, D], always the same."""
        return torch.randn((n, *(shape or (self.dimensions,))), generator=_generator()).to(device)


class TokenInfo(NamedTuple):
    """What a network must know of token sequences."""

    num_classes: int
    vocab_size: int  # ids are in [0, vocab_size); 0 is padding
    length: int  # tokens of the longest sequence

    @property
    def samples(self) -> str:
        """What they are counted in."""
        return "texts"

    def __str__(self) -> str:
        return f"{self.num_classes} classes of token sequences from {self.vocab_size} up to {self.length} long"

    def example(self, n: int, device: torch.device | str = "cpu", shape: Sequence[int] | None = None) -> Tensor:
        """n random sequences int64 [n, L] without padding, always the same."""
        return torch.randint(1, self.vocab_size, (n, *(shape or (self.length,))), generator=_generator()).to(device)


class CorpusInfo(NamedTuple):
    """What a language model must know of a text: it reads context + predicted tokens, and predicts the next one after
    each of the last `predicted`."""

    num_classes: int  # tokens of the vocabulary; 0 is padding, which is never predicted
    context: int
    predicted: int
    words: tuple[str, ...] = ()  # how the tokens are written, for networks that ask for it

    @property
    def samples(self) -> str:
        """What they are counted in."""
        return "tokens"

    def __str__(self) -> str:
        return f"text of {self.num_classes} tokens in blocks of {self.context} + {self.predicted}"

    def example(self, n: int, device: torch.device | str = "cpu", shape: Sequence[int] | None = None) -> Tensor:
        """n random blocks int64 [n, context + predicted] without padding, always the same."""
        size = (n, *(shape or (self.context + self.predicted,)))
        return torch.randint(1, self.num_classes, size, generator=_generator()).to(device)


# An Info's fields are keywords of a network's constructor, so a network's signature says what data it takes; one with a
# default is handed to those that ask for it. `example` makes inputs as a dataset holds them, before augmentation and
# normalisation.
Info = ImageInfo | VectorInfo | TokenInfo | CorpusInfo


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


class OptimizerState(TypedDict):
    """What an optimizer's `state_dict` holds."""

    state: dict[int, dict[str, Tensor]]
    param_groups: list[dict[str, object]]


class TeacherState(TypedDict, total=False):
    """What a teacher that learns, or follows its student, has become; empty for all others."""

    network: Mapping[str, Tensor]  # its weights
    optimizer: OptimizerState
    steps: int


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

    def state(self) -> TeacherState:
        """What it has become after a whole epoch, kept in the students' checkpoints."""
        return {}

    def restore(self, state: TeacherState) -> None:
        """Become what `state` returned once, after `attach`."""
        return


class Epochs(Protocol):
    """What the training loop asks of a training set: batches, epoch by epoch (data.batches.TrainingBatches)."""

    size: int  # samples an epoch draws from
    steps: int  # batches in one epoch

    def epoch(self, epoch: int, epochs: int) -> Iterator[Batch]:
        """The batches of one epoch (counted from 0); `epochs` is the length of the training, for `progress`."""
        ...
