"""The machine's roofline, measured: how fast it copies memory and multiplies matrices."""

from __future__ import annotations

import os
import platform
import sys
from typing import NamedTuple

import torch

from kdbench.bench.timing import best_of
from kdbench.engine.device import Placement


class Roofline(NamedTuple):
    """`bandwidth` in bytes a second, read and written; `rate` in floating-point operations a second at `dtype`."""

    bandwidth: float
    rate: float
    dtype: str

    def floor(self, flops: float, moved: float) -> float:
        """The least seconds for so many operations and so many bytes."""
        return max(flops / self.rate, moved / self.bandwidth)


def measure_roofline(placement: Placement, small: bool = False) -> Roofline:
    """The best of a few copies of a block many times the caches, and of a few square matrix products of random numbers.

    Takes half a second on a CPU. `small` measures next to nothing (for tests).
    """
    device, dtype = placement.device, placement.dtype
    on_cpu = device.type == "cpu"
    words = 1 << (16 if small else 26 if on_cpu else 29)  # of 4 bytes
    source = torch.ones(words, device=device)
    target = torch.empty_like(source)
    copy = best_of(lambda: target.copy_(source), placement.wait, 5)
    side = 64 if small else 2048 if on_cpu else 8192
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    with torch.no_grad():
        product = best_of(lambda: a @ b, placement.wait, 5)
    return Roofline(2 * 4 * words / copy, 2 * side**3 / product, placement.precision)


def peak_memory(placement: Placement) -> int:
    """Bytes: of the device since its statistics were last reset, or of this process so far where there is none."""
    if placement.device.type == "cuda":
        return torch.cuda.max_memory_allocated(placement.device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def describe(placement: Placement) -> dict[str, object]:
    """What the figures depend on."""
    device = placement.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "device": device.type,
        "name": name,
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "precision": placement.precision,
        "channels_last": placement.channels_last,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = {line.partition(":")[2].strip() for line in file if line.startswith("model name")}
    except OSError:
        return platform.processor() or platform.machine()
    return ", ".join(sorted(names)) or platform.machine()
