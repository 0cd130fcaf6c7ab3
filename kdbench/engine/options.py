"""The plain numbers that an experiment's optimizer, schedule and trainer are made of, each checked once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from kdbench.errors import UserError

Duration = int | float | str  # epochs (5, 2.5), a share of the training ("10%"), or steps ("500 steps")


def require(ok: bool, key: str, value: object, allowed: str) -> None:
    """Raise a UserError that names the key, the value and what is allowed, unless `ok`."""
    if not ok:
        raise UserError(f"{key} = {value}: must be {allowed}")


@dataclass(frozen=True)
class OptimizerOptions:
    """What `configs/optimizer` sets. `name` is torch's sgd or adamw, or any optimizer of timm."""

    name: str
    lr: float
    weight_decay: float = 0.0
    momentum: float | None = None
    nesterov: bool | None = None
    betas: list[float] | None = None
    eps: float | None = None
    decay_1d: bool = True  # whether batch-norm and bias parameters decay too
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(0 <= self.lr < float("inf"), "optimizer.lr", self.lr, "a finite number >= 0")
        require(0 <= self.weight_decay < 1, "optimizer.weight_decay", self.weight_decay, "in [0, 1)")
        require(self.momentum is None or 0 <= self.momentum < 1, "optimizer.momentum", self.momentum, "in [0, 1)")
        betas_fit = self.betas is None or (len(self.betas) >= 2 and all(0 <= b < 1 for b in self.betas))
        require(betas_fit, "optimizer.betas", self.betas, "two numbers in [0, 1)")
        require(self.eps is None or self.eps > 0, "optimizer.eps", self.eps, "above 0")


@dataclass(frozen=True)
class ScheduleOptions:
    """What `configs/schedule` sets: how long, how many images a step, and the course of the learning rate."""

    epochs: int
    batch_size: int
    lr: float = 0.1
    weight_decay: float = 0.0
    nesterov: bool = False
    shape: Literal["cosine", "step", "constant", "linear"] = "constant"
    warmup: int | float | str = 0
    floor: float = 0.0
    milestones: list[int | float | str] = field(default_factory=list)
    gamma: float = 0.1
    cycles: int = 1  # restarts of the shape after the warm-up (SGDR, snapshot ensembles)

    def __post_init__(self) -> None:
        require(self.epochs >= 1, "schedule.epochs", self.epochs, "at least 1")
        require(
            self.batch_size >= 2, "schedule.batch_size", self.batch_size, "at least 2 (batch-norm needs two images)"
        )
        shapes = ("cosine", "step", "constant", "linear")
        require(self.shape in shapes, "schedule.shape", self.shape, f"one of {', '.join(shapes)}")
        require(0 <= self.floor <= 1, "schedule.floor", self.floor, "in [0, 1], a fraction of the peak")
        require(0 < self.gamma <= 1, "schedule.gamma", self.gamma, "in (0, 1]")
        require(self.cycles >= 1, "schedule.cycles", self.cycles, "at least 1")


@dataclass(frozen=True)
class TrainerOptions:
    """What `configs/trainer` sets: how the training runs."""

    device: str = "auto"
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    channels_last: bool | Literal["auto"] = "auto"
    cuda_graph: Literal["auto", "on", "off"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
    deterministic: bool = False
    threads: int | None = None
    clip: float | None = None
    ema: float | None = None
    limit_steps: int | None = None
    drop_last: bool = False
    eval_batch_size: int = 500
    evaluate_every: int = 1
    checkpoint_every: int = 1
    progress: Literal["auto", "bar", "plain", "none"] = "auto"

    def __post_init__(self) -> None:
        names = ("auto", "fp32", "tf32", "bf16", "fp16")
        require(self.precision in names, "trainer.precision", self.precision, f"one of {', '.join(names)}")
        for key in ("cuda_graph", "compile"):
            value = getattr(self, key)
            require(value in ("auto", "on", "off"), f"trainer.{key}", value, "auto, on or off")
        require(self.threads is None or self.threads >= 1, "trainer.threads", self.threads, "null or at least 1")
        require(self.clip is None or self.clip > 0, "trainer.clip", self.clip, "null or above 0")
        require(self.ema is None or 0 < self.ema < 1, "trainer.ema", self.ema, "null or in (0, 1), e.g. 0.999")
        for key in ("limit_steps", "eval_batch_size", "evaluate_every", "checkpoint_every"):
            value = getattr(self, key)
            require(value is None or value >= 1, f"trainer.{key}", value, "at least 1")
