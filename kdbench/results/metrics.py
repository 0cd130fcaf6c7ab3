"""Metrics and tasks: what a number of a run is called, its unit, which way is better. The only list of them.

A new metric is an entry here, and the function that computes it in `engine/metrics.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple


class Metric(NamedTuple):
    name: str  # the last part of a figure's name: "top1" of "val/top1"
    unit: str  # "%": a share, which files hold as a fraction and people read in percent
    better: Literal[1, -1]  # 1: more is better
    words: str = ""  # how a title calls it, where that is not its name

    @property
    def scale(self) -> int:
        """From the numbers in files to those that people read."""
        return 100 if self.unit == "%" else 1

    @property
    def digits(self) -> int:
        return {"%": 2, "ppl": 2, "s": 0, "J": 0, "bytes": 0, "FLOPs": 0, "epochs": 0}.get(self.unit, 4)

    def number(self, value: float | None) -> str:
        """A value without its unit: "91.23"; "-" for none."""
        return "-" if value is None else f"{self.scale * value:.{self.digits}f}"

    def text(self, value: float | None) -> str:
        """A value with its unit, if that is percent: "91.23 %"."""
        return f"{self.number(value)} %" if self.unit == "%" and value is not None else self.number(value)


_ALL = (
    Metric("top1", "%", 1, "top-1"),
    Metric("top5", "%", 1, "top-5"),
    Metric("f1", "%", 1, "F1"),  # of the second of two classes
    Metric("mcc", "", 1, "MCC"),  # Matthews correlation, of two classes
    Metric("ppl", "ppl", -1, "perplexity"),  # exp of the nll a token
    Metric("nll", "nats", -1),
    Metric("knn", "%", 1, "k-NN"),  # the classes that the nearest embeddings vote for
    Metric("linear", "%", 1, "linear probe"),
    Metric("cosine", "", 1),  # similarity to the teacher's embeddings
    Metric("ece", "", -1),
    Metric("agreement", "%", 1),  # with the teacher's answers
    Metric("teacher_kl", "nats", -1),
    Metric("posterior_l2", "", -1),  # how far the predicted probabilities are from the true ones, where they are known
    Metric("clean_top1", "%", 1),  # against the true labels, where the training labels are noisy
    Metric("loss", "", -1),
    Metric("teacher_top1", "%", 1),
    Metric("logit_distance", "", -1),
    Metric("logit_shift", "", -1),
    Metric("tld", "", 1),
    Metric("teacher_tld", "", 1),
    Metric("feature_norm", "", 1),
    Metric("teacher_feature_norm", "", 1),
    Metric("seconds", "s", -1),
    Metric("cpu_seconds", "s", -1),
    Metric("gpu_seconds", "s", -1),
    Metric("energy", "J", -1),
    Metric("memory", "bytes", -1),
    Metric("gpu_memory", "bytes", -1),
    Metric("flops", "FLOPs", -1),
    Metric("latency", "s", -1),
    Metric("images_per_second", "images/s", 1),
    Metric("epoch", "epochs", -1),
)
METRICS = {metric.name: metric for metric in _ALL}


class Task(NamedTuple):
    """What networks are asked to do, and how they are judged. A dataset says its task."""

    name: str
    metrics: tuple[Metric, ...]  # of a network on a labelled set
    primary: Metric  # what chooses an epoch, and puts settings in order
    # The best answer without looking, by the number of samples of each class: of the set, and of the training set.
    chance: Callable[[Sequence[int], Sequence[int]], float]
    guess: str  # what that is, where classes are not equally frequent

    def on(self, split: str) -> str:
        """The name of the primary figure: "val/top1"."""
        return f"{split}/{self.primary.name}"

    def primaries(self, values: Mapping[str, float], prefix: str = "") -> dict[str, float | None]:
        """The primary figures among others, under names of their own: "<prefix>/test/top1"."""
        start = f"{prefix}/" if prefix else ""
        return {f"{start}{key}": value for key, value in values.items() if key.endswith(f"/{self.primary.name}")}

    def is_better(self, value: float, other: float) -> bool:
        return self.primary.better * (value - other) > 0

    def judge(
        self, value: float, images: Sequence[int], training: Sequence[int] = ()
    ) -> Literal["chance", "unclear", "better"]:
        """Whether the primary metric over so many images of each class is better than answers without looking.

        Two of these: always the largest class, which has no luck, and a class drawn at random, of which three
        standard deviations (the binomial's; other metrics than shares have none) are luck. A value of more
        than one deviation is unclear where there are too few images to tell: where three are more than ten points.
        """
        if self.primary.better * (value - self.chance(images, training)) <= 1e-6:  # a float32's share may round upwards
            return "chance"
        needed = self.images_to_tell(value, images)
        if needed <= sum(images):
            return "better"
        luck = self._luck(images)
        return "unclear" if luck > 0.1 and value > 1 / len(images) + luck / 3 else "chance"

    def images_to_tell(self, value: float, images: Sequence[int]) -> int:
        """How many images it takes to tell a share from that of a class drawn at random."""
        drawn = 1 / len(images)
        if self.primary.unit != "%":
            return 0
        return math.ceil(9 * drawn * (1 - drawn) / (value - drawn) ** 2)

    def _luck(self, images: Sequence[int]) -> float:
        drawn = 1 / len(images)
        return 3 * math.sqrt(drawn * (1 - drawn) / sum(images))


def _named(*names: str) -> tuple[Metric, ...]:
    return tuple(METRICS[name] for name in names)


def unigram_perplexity(tokens: Sequence[int], training: Sequence[int]) -> float:
    """Of a model that knows how often each token is in the training text (each counted once more) and nothing else,
    on a text with `tokens` of each."""
    whole = sum(training) + len(training)
    nll = sum(count * (math.log(whole) - math.log(seen + 1)) for count, seen in zip(tokens, training, strict=True))
    return math.exp(nll / sum(tokens))


CLASSIFICATION = Task(
    "classification",
    metrics=_named("top1", "top5", "f1", "mcc", "nll", "ece", "agreement", "teacher_kl", "posterior_l2"),
    primary=METRICS["top1"],
    chance=lambda images, training: max(images) / sum(images),
    guess="the share of the largest class",
)
LANGUAGE_MODELLING = Task(
    "language modelling",
    metrics=_named("ppl", "nll", "top1", "top5", "ece", "agreement", "teacher_kl"),
    primary=METRICS["ppl"],
    chance=unigram_perplexity,
    guess="what the frequencies of the training tokens give",
)
EMBEDDING = Task(
    "embedding",
    metrics=_named("knn", "linear", "cosine"),
    primary=METRICS["knn"],
    chance=lambda images, training: max(images) / sum(images),
    guess="the share of the largest class",
)
TASKS = {task.name: task for task in (CLASSIFICATION, LANGUAGE_MODELLING, EMBEDDING)}


def metric_of(name: str, task: Task = CLASSIFICATION) -> Metric:
    """What a figure measures, by its name: "best/val/top1", "train/loss_task". "last" and "best" are the primary
    metric of the task that the run is of.

    A name that is not in the list (a procedure's own number) has no unit, and more of it is better.
    """
    leaf = name.rsplit("/", 1)[-1]
    if leaf in ("last", "best"):
        return task.primary
    if leaf.startswith("loss_"):
        leaf = "loss"
    return METRICS.get(leaf) or Metric(leaf, "", 1)
