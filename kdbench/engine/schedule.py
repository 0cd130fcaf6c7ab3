"""The learning rate's course as a plain list: one factor a step, known before the training starts."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

from kdbench.arguments import checked
from kdbench.arguments.ranges import Count, Momentum, NotNegative, Range, Share, above_to, at_least, within
from kdbench.errors import require


def amount(duration: object) -> tuple[float, str]:
    """A duration's number and its unit: epochs (5, 2.5, "5 epochs"), percent ("10%") or steps ("500 steps").

    The number is NaN where the text is none of these.
    """
    number, unit = str(duration).strip().lower(), "epochs"
    units = {"%": "percent", "steps": "steps", "step": "steps", "epochs": "epochs", "epoch": "epochs"}
    for suffix, name in units.items():
        if number.endswith(suffix):
            number, unit = number.removesuffix(suffix).strip(), name
            break
    try:
        return float(number), unit
    except ValueError:
        return float("nan"), unit


MOST_EPOCHS = 100_000
Epochs = Annotated[int, within(1, MOST_EPOCHS)]

Duration = Annotated[
    int | float | str,
    Range('a duration: epochs (5), "10%" or "500 steps"', lambda value: 0 <= amount(value)[0] <= 1e9),
]


@checked
@dataclass(frozen=True)
class ScheduleOptions:
    """What `configs/schedule` sets: how long, how many images a step, and the course of the learning rate."""

    epochs: Epochs
    batch_size: Annotated[int, at_least(2)]  # batch-norm needs two images
    lr: NotNegative = 0.1
    weight_decay: Momentum = 0.0
    nesterov: bool = False
    shape: Literal["cosine", "step", "constant", "linear"] = "constant"
    warmup: Duration = 0
    floor: Share = 0.0  # a fraction of the peak
    milestones: list[Duration] = field(default_factory=list)
    gamma: Annotated[float, above_to(0, 1)] = 0.1
    warmup_from: Share = 0.0  # what the warm-up starts from, a fraction of the peak
    warmup_overlaps: bool = False  # the shape starts with the training, and the warm-up hides its beginning
    per: Literal["step", "epoch"] = "step"  # how long a learning rate stays
    repeats: Count = 1  # views of a sample shown in a row, in an epoch of the same length
    cycles: Count = 1  # restarts of the shape after the warm-up (SGDR, snapshot ensembles)


def to_steps(duration: Duration, steps_per_epoch: int, total: int) -> int:
    """Steps of a duration: in epochs (5, 2.5, "5 epochs"), percent of the training ("10%") or steps ("500 steps")."""
    value, unit = amount(duration)
    scale = {"percent": total / 100, "steps": 1.0, "epochs": float(steps_per_epoch)}[unit]
    return round(value * scale)


def check_durations(options: ScheduleOptions, steps_per_epoch: int = 10**6) -> None:
    """Refuse a warm-up longer than the training, without listing its steps.

    As long as it is not known how many steps an epoch has, one given in steps passes.
    """
    total = options.epochs * steps_per_epoch
    warmup = to_steps(options.warmup, steps_per_epoch, total)
    require(warmup <= total, "warmup", options.warmup, f"no longer than the training ({options.epochs} epochs)")


def lr_factors(options: ScheduleOptions, steps_per_epoch: int) -> list[float]:
    """The factor on the peak learning rate at every step of the training, `epochs * steps_per_epoch` of them.

    A linear rise over the warm-up reaches the peak at its last step; the shape runs over what follows, `cycles` times.
    Milestones count from the start of the training and act from the first step after them. With `per` epoch a step
    has the factor of its epoch's first step, and the rise starts at `warmup_from` and reaches the peak with the first
    epoch after it; with `warmup_overlaps` the shape runs over the whole training: timm's schedulers.
    """
    total = options.epochs * steps_per_epoch
    check_durations(options, steps_per_epoch)
    warmup = to_steps(options.warmup, steps_per_epoch, total)
    marks = [to_steps(m, steps_per_epoch, total) for m in options.milestones]
    hidden = 0 if options.warmup_overlaps else warmup
    late = 1 if options.per == "step" else 0
    base = options.warmup_from
    factors = [base + (1 - base) * (step + late) / warmup for step in range(warmup)]
    factors += [_shape(options, step, hidden, total, marks) for step in range(warmup, total)]
    return factors if options.per == "step" else _by_epoch(factors, steps_per_epoch)


def _by_epoch(factors: list[float], steps: int) -> list[float]:
    return [factors[place - place % steps] for place in range(len(factors))]


def _shape(options: ScheduleOptions, step: int, warmup: int, total: int, marks: list[int]) -> float:
    if options.shape == "constant":
        return 1.0
    if options.shape == "step":
        return options.gamma ** sum(step >= mark for mark in marks)
    cycle = math.ceil((total - warmup) / options.cycles)
    done = ((step - warmup) % cycle) / cycle
    fall = 0.5 * (1 + math.cos(math.pi * done)) if options.shape == "cosine" else 1 - done
    return options.floor + (1 - options.floor) * fall
