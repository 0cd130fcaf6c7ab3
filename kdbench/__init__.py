"""kdbench: knowledge distillation experiments from composable configs.

In Python: kdbench.train, sweep, load, read_runs and compose (kdbench.api). They are imported when they are asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdbench.api import compose, load, read_runs, sweep, train

__version__ = "0.1.0"
__all__ = ["__version__", "compose", "load", "read_runs", "sweep", "train"]


def __getattr__(name: str) -> Any:
    if name == "runs":  # the package of that name, which may be called
        return importlib.import_module("kdbench.runs")
    if name not in __all__:
        raise AttributeError(f"module kdbench has no attribute {name}")
    from kdbench import api  # loads Hydra

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
