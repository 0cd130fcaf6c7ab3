"""Table or live teacher: what `teacher.table=auto` weighs."""

from __future__ import annotations

import ctypes
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdbench.files import in_bytes

WORTH = 0.02  # of this run's teacher passes: a table that saves less is not begun
SHARE = 0.05  # of a step's arithmetic: a cheaper teacher is not worth the disk
_SIZES = [(name, ctypes.c_uint64) for name in ("total", "free", "pages", "page", "virtuals", "virtual", "extended")]
UNKNOWN = 4 * 1000**3  # bytes of memory that are free where no system call says
DISK, MEMORY = 0.25, 0.5  # shares of what is free that a full table may take


@dataclass(frozen=True)
class Costs:
    """What a run would ask of its teacher, and what a table of the answers takes."""

    epochs: int  # still to train
    images: int  # an epoch
    views: int  # of an image
    filled: float  # share of the table that is there already
    size: int  # bytes of the full table
    teacher: int  # FLOPs of a forward pass
    students: int  # FLOPs of a forward pass, of all that train side by side
    disk: int  # free bytes where the table lies
    memory: int  # free bytes

    @property
    def asked(self) -> int:
        return self.epochs * self.images

    @property
    def computed(self) -> float:
        """Teacher passes that a run with a table needs, if epochs draw views uniformly: no more than live."""
        different = self.images * self.views * (1 - (1 - 1 / self.views) ** self.epochs)
        return different * (1 - self.filled)

    @property
    def saved(self) -> float:
        """The share of this run's teacher passes that the table saves; later runs save up to all of them."""
        return max(0.0, 1 - self.computed / self.asked) if self.asked else 0.0  # rounding may leave less than 0

    @property
    def share(self) -> float:
        """The teacher's share of a step's arithmetic: one pass, where a student takes three."""
        return self.teacher / max(self.teacher + 3 * self.students, 1)


def choose(costs: Costs) -> tuple[bool, str]:
    """Whether a table pays, and why (or why not) in words."""
    size = f"{in_bytes(costs.size)} when full"
    if costs.size > DISK * costs.disk:
        return False, f"a table takes {size}, more than a quarter of the {in_bytes(costs.disk)} free on the disk"
    if costs.size > MEMORY * costs.memory:
        return False, f"a table takes {size}, more than half of the {in_bytes(costs.memory)} of free memory"
    if costs.share < SHARE:
        return False, f"the teacher is only {100 * costs.share:.0f} % of a step"
    if costs.saved < WORTH:
        plan = f"{costs.epochs} epochs meet {costs.views} views an image"
        return False, f"{plan}, so a table would save {100 * costs.saved:.1f} % of the teacher's passes"
    there = f", {100 * costs.filled:.0f} % there already" if costs.filled else ""
    gain = f"saves about {100 * costs.saved:.0f} % of this run's teacher passes and up to all of later runs'"
    return True, f"{gain}; {size}{there}"


def free_disk(folder: Path) -> int:
    """Free bytes where `folder` is or would be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def free_memory() -> int:
    """Bytes of main memory that programs could still use (Linux, Windows), or all there is (macOS)."""
    for ask in (_linux, _windows, _posix):
        with suppress(AttributeError, OSError, StopIteration, ValueError, IndexError):
            return ask()
    return UNKNOWN


def _linux() -> int:
    with open("/proc/meminfo", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))


def _windows() -> int:
    class Status(ctypes.Structure):  # MEMORYSTATUSEX
        _fields_ = [("length", ctypes.c_uint32), ("load", ctypes.c_uint32), *_SIZES]

    status = Status(length=ctypes.sizeof(Status))
    windll: Any = ctypes.windll  # type: ignore[attr-defined, unused-ignore]
    if not windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
        raise OSError("no memory status")
    return int(status.free)


def _posix() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
