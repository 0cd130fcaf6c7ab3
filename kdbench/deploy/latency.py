"""Latency and size of a student: how long one answer takes on this machine, and what it costs to keep."""

from __future__ import annotations

import importlib.util
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

from kdbench.deploy.export import Runner, read_back, write_onnx
from kdbench.deploy.student import Student
from kdbench.models.base import count_parameters, flops
from kdbench.runs.folder import EXPORT

_WARM_UP = 0.2  # of the seconds: the first calls choose kernels and grow memory


class Latency(NamedTuple):
    """How long one call takes."""

    way: str  # "torch", "onnxruntime", or an exported file's name
    batch: int  # inputs a call
    milliseconds: float  # the median of a call
    spread: tuple[float, float]  # its 10th and 90th percentile
    calls: int

    @property
    def rate(self) -> float:
        """Inputs a second."""
        return 1000 * self.batch / self.milliseconds


class Size(NamedTuple):
    """What a network is made of."""

    parameters: int
    bytes: int  # of its weights as they are kept
    flops: int  # of one input


def size_of(student: Student) -> Size:
    state = student.network.state_dict().values()
    kept = sum(value.numel() * value.element_size() for value in state)
    return Size(count_parameters(student.network), kept, flops(student.network, student.info))


def latencies(student: Student, batches: list[int], seconds: float) -> list[Latency]:
    """Every way that this machine has, at each batch size, timed for `seconds` each: torch, onnxruntime where it is
    installed, and the ONNX files that were exported before. With the threads that each takes by itself."""
    with tempfile.TemporaryDirectory(prefix="kdbench-latency-") as scratch:
        ways = _ways(student, Path(scratch))
        return [_timed(name, run, student.example(size), seconds) for name, run in ways.items() for size in batches]


def _ways(student: Student, scratch: Path) -> dict[str, Runner]:
    ways: dict[str, Runner] = {"torch": student.portable()}
    if importlib.util.find_spec("onnxruntime") is None or importlib.util.find_spec("onnxscript") is None:
        return ways
    plain = scratch / "network.onnx"
    write_onnx(student, plain)
    files = {
        "onnxruntime": plain,
        **{path.name: path for path in sorted((student.folder / EXPORT).glob("*.int8.onnx"))},
    }
    runners = {name: read_back(path) for name, path in files.items()}
    return ways | {name: run for name, run in runners.items() if run is not None}


def _timed(way: str, run: Runner, inputs: torch.Tensor, seconds: float) -> Latency:
    taken: list[float] = []
    with torch.inference_mode():
        warm = time.perf_counter() + _WARM_UP * seconds
        run(inputs)
        while time.perf_counter() < warm:
            run(inputs)
        end = time.perf_counter() + seconds
        while len(taken) < 3 or time.perf_counter() < end:
            begun = time.perf_counter()
            run(inputs)
            taken.append(1000 * (time.perf_counter() - begun))
    low, *_, high = statistics.quantiles(taken, n=10)
    return Latency(way, len(inputs), statistics.median(taken), (low, high), len(taken))
