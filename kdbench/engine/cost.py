"""Cost of a training beside its figures: processor and GPU seconds, and energy where it can be read.

Counted over the epochs' steps, evaluation left out, as `seconds` is; students side by side share it equally.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import torch

_RAPL = Path("/sys/class/powercap")  # counters of the processors' energy, where they may be read

Counted = dict[str, float]


def counters(device: torch.device) -> Counted:
    """What has been spent so far, by name: cpu_seconds of this process and all its threads, gpu_seconds (of a clock),
    energy in joules of the processors and the GPU, whoever uses them; absent where the machine does not tell."""
    now = {"cpu_seconds": time.process_time()}
    if device.type == "cuda":
        now["gpu_seconds"] = time.perf_counter()
    read = [*_processors(), *_gpu(device)]
    with suppress(OSError, ValueError, RuntimeError):
        if read:
            now["energy"] = sum(one() for one in read)
    return now


def spent(before: Counted, after: Counted, students: int) -> Counted:
    """A student's share of what was spent between two readings. A counter that began anew says nothing."""
    return {name: (after[name] - value) / students for name, value in before.items() if after.get(name, -1.0) >= value}


def added(so_far: Mapping[str, float] | None, more: Counted) -> Counted:
    """Both together; of what one of them does not know nothing is known. None: nothing was spent yet."""
    return dict(more) if so_far is None else {name: so_far[name] + more[name] for name in more if name in so_far}


@functools.cache
def _processors() -> list[Callable[[], float]]:
    files = [path / "energy_uj" for path in _RAPL.glob("intel-rapl:*") if path.name.count(":") == 1]
    return [functools.partial(_joules, path) for path in files if os.access(path, os.R_OK)]


def _joules(path: Path) -> float:
    return int(path.read_text()) / 1e6


@functools.cache
def _gpu(device: torch.device) -> list[Callable[[], float]]:
    """NVIDIA's own counter, if its Python module is there."""
    if device.type != "cuda":
        return []
    with suppress(Exception):  # no module, no driver, a card without a counter: each an error of its own
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        return [lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000]
    return []
