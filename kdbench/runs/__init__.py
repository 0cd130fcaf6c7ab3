"""What one run is: its recipe, its stages, its folder, its teacher, and its life from start to result.

In a notebook the package is also what one expects of its name: `kdbench.runs("outputs/runs")` is `kdbench.read_runs`.
"""

from __future__ import annotations

import sys
from types import ModuleType


class _Runs(ModuleType):
    def __call__(self, *words: object, **options: object) -> object:
        return sys.modules["kdbench"].read_runs(*words, **options)


sys.modules[__name__].__class__ = _Runs
