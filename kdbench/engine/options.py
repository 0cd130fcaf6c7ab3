"""The plain numbers that an experiment's optimizer, schedule and trainer are made of, each checked once."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

from kdbench.arguments import checked
from kdbench.arguments.ranges import (
    Count,
    Inside,
    Momentum,
    NotNegative,
    Positive,
    Range,
    Share,
    Text,
    above_to,
    at_least,
    listed,
    within,
)


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


DEVICES = "auto, cpu, cuda, cuda:<number> or mps"
Device = Annotated[str, Range(DEVICES, lambda name: bool(re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", name)))]


@checked
@dataclass(frozen=True)
class OptimizerOptions:
    """What `configs/optimizer` sets. `name` is torch's sgd or adamw, or any optimizer of timm."""

    name: str
    lr: NotNegative
    weight_decay: Momentum = 0.0
    momentum: Momentum | None = None
    nesterov: bool | None = None
    betas: Annotated[list[Momentum], listed(2, "two numbers in [0, 1)")] | None = None
    eps: Positive | None = None
    decay_1d: bool = True  # whether batch-norm and bias parameters decay too
    options: dict[str, object] = field(default_factory=dict)
    layer_decay: Annotated[float, above_to(0, 1)] | None = None  # of the learning rate, from a layer to the one below
    no_decay: list[Text] = field(default_factory=list)  # parts of names of parameters that never decay


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


@checked
@dataclass(frozen=True)
class TrainerOptions:
    """What `configs/trainer` sets: how the training runs."""

    device: Device = "auto"
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    channels_last: bool | Literal["auto"] = "auto"
    cuda_graph: Literal["auto", "on", "off"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
    deterministic: bool = False
    grad_checkpointing: bool = False  # compute activations anew in the backward pass instead of keeping them
    threads: Count | None = None
    clip: Positive | None = None
    ema: Inside | None = None
    limit_steps: Count | None = None
    drop_last: bool = False
    accumulate: Annotated[int, within(1, 4096)] = 1  # parts of a batch whose gradients are added up
    eval_batch_size: Count | Literal["auto"] = "auto"
    evaluate_every: Count = 1
    checkpoint_every: Count = 1
    progress: Literal["auto", "bar", "plain", "none"] = "auto"
