"""The learning rate's course as a plain list: one factor a step, known before the training starts."""

from __future__ import annotations

import math

from kdbench.engine.options import Duration, ScheduleOptions, require


def to_steps(duration: Duration, key: str, steps_per_epoch: int, total: int) -> int:
    """Steps of a duration given in epochs (5, 2.5, "5 epochs"), percent of the training ("10%") or steps ("500 steps").

    Raises UserError naming `key` if the text is none of these or the number is negative.
    """
    text = str(duration).strip().lower()
    number, unit = text, "epochs"
    for suffix, name in (
        ("%", "percent"),
        ("steps", "steps"),
        ("step", "steps"),
        ("epochs", "epochs"),
        ("epoch", "epochs"),
    ):
        if text.endswith(suffix):
            number, unit = text.removesuffix(suffix).strip(), name
            break
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    require(math.isfinite(value) and value >= 0, key, duration, 'a duration: epochs (5), "10%" or "500 steps"')
    scale = {"percent": total / 100, "steps": 1.0, "epochs": float(steps_per_epoch)}[unit]
    return round(value * scale)


def lr_factors(options: ScheduleOptions, steps_per_epoch: int) -> list[float]:
    """The factor on the peak learning rate at every step of the training, `epochs * steps_per_epoch` of them.

    A linear rise over the warm-up reaches the peak at its last step; the shape runs over what follows, `cycles` times.
    Milestones count from the start of the training and act from the first step after them.
    """
    total = options.epochs * steps_per_epoch
    warmup = to_steps(options.warmup, "schedule.warmup", steps_per_epoch, total)
    require(
        warmup <= total, "schedule.warmup", options.warmup, f"no longer than the training ({options.epochs} epochs)"
    )
    marks = [to_steps(m, "schedule.milestones", steps_per_epoch, total) for m in options.milestones]
    rise = [(step + 1) / warmup for step in range(warmup)]
    return rise + [_shape(options, step, warmup, total, marks) for step in range(warmup, total)]


def _shape(options: ScheduleOptions, step: int, warmup: int, total: int, marks: list[int]) -> float:
    if options.shape == "constant":
        return 1.0
    if options.shape == "step":
        return options.gamma ** sum(step >= mark for mark in marks)
    cycle = math.ceil((total - warmup) / options.cycles)
    done = ((step - warmup) % cycle) / cycle
    fall = 0.5 * (1 + math.cos(math.pi * done)) if options.shape == "cosine" else 1 - done
    return options.floor + (1 - options.floor) * fall
