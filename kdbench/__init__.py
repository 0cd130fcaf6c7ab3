"""kdbench: knowledge distillation experiments from composable configs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from omegaconf import DictConfig

__version__ = "0.1.0"


def compose(words: Sequence[str] = ()) -> DictConfig:
    """The configuration that `kdbench train WORDS` runs with, e.g. compose(["loss=dkd", "teacher=resnet20"]).

    Raises what Hydra raises for words that do not fit.
    """
    from kdbench.configure import compose  # Hydra is loaded when something is composed

    return compose(words)
