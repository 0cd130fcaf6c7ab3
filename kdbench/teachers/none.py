"""No teacher: `teacher=none`."""

from __future__ import annotations

from kdbench.types import Batch, Teacher


class NoTeacher(Teacher):
    """Says nothing of any batch, so that a training without a teacher needs no loop of its own."""

    def __call__(self, batch: Batch) -> None:
        return None
