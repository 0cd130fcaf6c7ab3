"""Made-up results of runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def result(top1: float, **changes: Any) -> dict[str, Any]:
    """A result.json; changes: config keys with __ for dots, or choices=, teacher=, last=, best= updates."""
    teacher = {"name": "resnet20", "weights": "aa", "test/top1": 0.97}
    whole = {
        "choices": {"dataset": "digits", "teacher": "resnet20", "student": "resnet8", "loss": "kl"},
        "config": {"loss._target_": "k.KL", "loss.tau": 4, "seed": 0, "seeds.init": 0, "paths.data": "data"}
        | {"dataset.root": "data", "schedule.epochs": 30, "schedule.lr": 0.1, "optimizer.lr": 0.1, "force": False},
        "teacher": teacher,
        "student": {"name": "resnet8"},
        "last": {"epoch": 30, "test/top1": top1, "test/agreement": 0.9, "test/nll": 0.25},
        "best": {"epoch": 27, "val/top1": 0.95, "test/top1": top1 - 0.01},
        "images": {"train": 1294, "test": 360},
        "seconds": 12.0,
    }
    for name, value in changes.items():
        if name in ("choices", "teacher", "last", "best", "images"):
            whole[name] = None if value is None else {**whole[name], **value}
        else:
            whole["config"] |= {name.replace("__", "."): value}
            whole["config"] |= {"seeds.init": value} if name == "seed" else {}
    return whole


def language_result(ppl: float, **changes: Any) -> dict[str, Any]:
    """The same of a language model: its primary metric is perplexity, of which less is better."""
    last, teacher = {"test/ppl": ppl, "test/top1": ppl / 1000}, {"test/ppl": 60.0}
    made = result(0.3, last=last, teacher=teacher, best={"val/ppl": ppl - 1, "test/ppl": ppl + 1}, **changes)
    return {**made, "task": "language modelling"}


def write(folder: Path, content: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("seed: 0\n")
    (folder / "result.json").write_text(json.dumps(content))
