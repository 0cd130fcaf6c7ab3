"""A whole training step, or a teacher's forward pass, as one CUDA graph: one launch instead of hundreds.

The small networks of the field keep a GPU busy for a microsecond or two a kernel, less than launching it costs. A
graph is recorded once for each shape of its inputs and replayed on static copies of them; it runs the same kernels as
the eager step, so the numbers are the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from kdbench.engine import device as placement
from kdbench.engine.options import OptimizerOptions, TrainerOptions, require
from kdbench.errors import UserError
from kdbench.types import Outputs

log = logging.getLogger(__name__)

WARM_UP = 3  # eager steps before a recording: lazily made buffers (momentum, cuDNN handles) must exist by then
GRAPHED_OPTIMIZERS = ("sgd", "adam", "adamw")  # torch's own; most of timm's count their steps in Python


class Recording(Protocol):
    """A function's device work, recorded when this is made; every replay overwrites what it returned, `output`."""

    output: Any

    def replay(self) -> None: ...


Record = Callable[[Callable[[], Any]], Recording]


class CudaRecording:
    """torch.cuda.CUDAGraph of a function without arguments.

    The recordings of a stream share a pool of memory: they replay one after the other, and what outlives a replay was
    made during the warm-up, outside of the pool. Recordings that replay side by side are of different streams.
    """

    pools: ClassVar[dict[int, Any]] = {}

    def __init__(self, function: Callable[[], Any]) -> None:
        stream = torch.cuda.current_stream().cuda_stream
        if stream not in self.pools:
            self.pools[stream] = torch.cuda.graph_pool_handle()
        self.graph = torch.cuda.CUDAGraph()
        # thread_local: another thread (checkpoint writer, pinning) may call CUDA meanwhile.
        with torch.cuda.graph(self.graph, pool=self.pools[stream], capture_error_mode="thread_local"):
            self.output = function()

    def replay(self) -> None:
        self.graph.replay()


class Graphed:
    """A function of tensors (nested in tuples and dicts) that is replayed once it has run often enough.

    For every new combination of shapes the first `WARM_UP` calls run eagerly, the next one is recorded. `function` must
    do the same device work in every call and change no Python state: what it counts it must count on the device. A
    function that cannot be recorded runs eagerly, with a warning, unless `strict`: then UserError. `what` names it.
    """

    def __init__(self, function: Callable[..., Any], record: Record, strict: bool, what: str) -> None:
        self._function, self._record, self._strict, self._what = function, record, strict, what
        self._calls: dict[Hashable, int] = {}
        self._recorded: dict[Hashable, tuple[list[Tensor], Recording]] = {}
        self._eager = False

    def __call__(self, *args: Any) -> Any:
        leaves, spec = tree_flatten(args)
        key = tuple((leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        if self._eager:
            return self._function(*args)
        if key not in self._recorded:
            self._calls[key] = self._calls.get(key, 0) + 1
            if self._calls[key] <= WARM_UP:
                return _aside(lambda: self._function(*args))
            if not self._try(key, leaves, spec):
                return self._function(*args)
        inputs, recording = self._recorded[key]
        for static, leaf in zip(inputs, _tensors(leaves), strict=True):
            static.copy_(leaf)
        recording.replay()
        return tree_map_only(Tensor, torch.clone, recording.output)  # the next replay overwrites the original

    def _try(self, key: Hashable, leaves: Sequence[Any], spec: Any) -> bool:
        static = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        try:
            recording = self._record(lambda: self._function(*tree_unflatten(static, spec)))
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            if self._strict:
                raise UserError(f"trainer.cuda_graph = on: {self._what} cannot be recorded ({reason})") from error
            log.warning("%s cannot be recorded as a CUDA graph (%s); it runs step by step", self._what, reason)
            self._eager = True
            return False
        self._recorded[key] = (_tensors(static), recording)
        return True


def wants_graph(options: TrainerOptions, device: torch.device, optimizer: OptimizerOptions) -> bool:
    """Whether a student's step is to be recorded. Raises UserError where `on` cannot be had."""
    fits = optimizer.name in GRAPHED_OPTIMIZERS
    if options.cuda_graph == "on":
        recording(device)
        known = ", ".join(GRAPHED_OPTIMIZERS)
        require(fits, "trainer.cuda_graph", "on", f"auto or off unless optimizer.name is one of {known}")
        return True
    return options.cuda_graph == "auto" and placement.PROVEN_ON_CUDA and device.type == "cuda" and fits


def graphed(step: Callable[..., Any], options: TrainerOptions, device: torch.device) -> Callable[..., Any]:
    """A student's step, recorded when it has run often enough."""
    return Graphed(step, recording(device), options.cuda_graph == "on", "the step")


def graphed_teacher(
    options: TrainerOptions, device: torch.device
) -> Callable[[nn.Module], Callable[[Tensor], Outputs]]:
    """What makes of a frozen network its recorded forward pass where that is to be had; elsewhere it is left alone."""
    wanted = options.cuda_graph == "on" or (options.cuda_graph == "auto" and placement.PROVEN_ON_CUDA)
    if not wanted or device.type != "cuda":
        return lambda network: network
    return lambda network: Graphed(network, recording(device), strict=False, what="the teacher")


def recording(device: torch.device) -> Record:
    """What records a device's work. Raises UserError where nothing does."""
    require(device.type == "cuda", "trainer.cuda_graph", "on", f"auto or off: this run is on {device.type}")
    return CudaRecording


def _tensors(leaves: Sequence[Any]) -> list[Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _aside(call: Callable[[], Any]) -> Any:
    """Run on a side stream, as PyTorch asks of what is to be recorded later; plainly where there is no CUDA in use."""
    if not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return call()
    side, here = torch.cuda.Stream(), torch.cuda.current_stream()
    side.wait_stream(here)
    with torch.cuda.stream(side):
        result = call()
    here.wait_stream(side)
    return result
