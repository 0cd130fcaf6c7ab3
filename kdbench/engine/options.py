"""The plain numbers that an experiment's optimizer and trainer are made of, each checked once."""

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
    Text,
    above_to,
    listed,
    within,
)

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
    checkpoint_every: Count | Literal["auto"] = "auto"
    progress: Literal["auto", "bar", "plain", "none"] = "auto"
