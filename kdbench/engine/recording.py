"""A step's device work, recorded once and replayed: what a recording is, and what cannot be one."""

from __future__ import annotations

import contextlib
import gc
import io
import pickle
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from kdbench.errors import UserError


class Recording(Protocol):
    """A function's device work, recorded when this is made."""

    def replay(self) -> None: ...


class CudaRecording:
    """torch.cuda.CUDAGraph of a function without arguments, with a memory pool and a stream of its own.

    Its memory and its cuBLAS workspaces die with it: both are cleared around the capture, since a workspace that was
    allocated in one capture would be used by the next one that has the same stream, after the memory is gone.
    Raises what the function raises, or what torch says of a capture that broke otherwise.
    """

    def __init__(self, function: Callable[[], object], device: torch.device) -> None:
        self.graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
        stream, pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        raised: list[BaseException] = []
        torch._C._cuda_clearCublasWorkspaces()
        try:
            # thread_local: another thread (checkpoint writer, pinning) may call CUDA meanwhile.
            with (
                torch.cuda.device(device),
                warnings.catch_warnings(),
                uncollected(),
                torch.cuda.graph(self.graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
            ):
                warnings.filterwarnings("error", "The CUDA Graph is empty")
                try:
                    function()
                except BaseException as error:
                    raised.append(error)
                    raise
        except BaseException as error:
            torch.cuda.set_stream(here)  # torch leaves the capture's stream current
            if raised and error is not raised[0]:  # the end of a broken capture raises its own, of unjoined streams
                raise raised[0] from error
            raise
        finally:
            torch._C._cuda_clearCublasWorkspaces()

    def replay(self) -> None:
        self.graph.replay()


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """A block in which Python's collector rests: what it frees, another training's graph, say, may call CUDA in a way
    that breaks a capture."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def recording(function: Callable[[], object], device: torch.device) -> Recording:
    """A function's work, recorded."""
    return CudaRecording(function, device)


class Counting(TorchFunctionMode):
    """A block in which ones that are added to some counters are added at its end, to all at once.

    Every batch norm counts its batches: 21 kernels a step of resnet20, and one in here. What reads a counter within the
    block (a moving average) finds it as it should be. For a recording alone: it costs the host a look at every call.
    """

    def __init__(self, counters: Iterable[Tensor]) -> None:
        super().__init__()
        self._counters = {id(counter): counter for counter in counters}
        self._added: Counter[int] = Counter()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.add_ and id(args[0]) in self._counters and args[1:] == (1,):
            self._added[id(args[0])] += 1
            return args[0]
        if any(id(leaf) in self._added for leaf in tree_leaves((args, kwargs))):
            self._add()
        return func(*args, **(kwargs or {}))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        super().__exit__(kind, error, at)
        if self._added and error is None:
            self._add()

    def _add(self) -> None:
        torch._foreach_add_([self._counters[key] for key in self._added], [*self._added.values()])
        self._added.clear()


@contextlib.contextmanager
def host_waits(device: torch.device, watched: bool) -> Iterator[list[str]]:
    """What in the block makes the host wait for the GPU; nothing is stopped by it. Empty where it is not `watched`."""
    seen: list[str] = []
    if not watched or device.type != "cuda":
        yield seen
        return
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")  # which says of itself that it is a prototype
        try:
            yield seen
        finally:
            torch.cuda.set_sync_debug_mode(before)
    seen += [str(one.message).splitlines()[0] for one in caught if "called a synchroniz" in str(one.message)]


@contextlib.contextmanager
def changes(module: nn.Module, watched: bool) -> Iterator[list[str]]:
    """What the block changes that no recording would: attributes of a network and its parts that are not on the device
    (a counter, a mean that is put in the place of an older one), and the random numbers of Python and numpy. Empty
    where it is not `watched`. Costs a pickle of those attributes twice.
    """
    changed: list[str] = []
    if not watched:
        yield changed
        return
    alive: list[object] = []  # so that none of what comes later has its id
    before = _beside(module, alive)
    yield changed
    after = _beside(module, alive)
    changed += [name for name in after if after[name] != before.get(name)]


_TORCHS = frozenset(vars(nn.Module()))


def _beside(module: nn.Module, alive: list[object]) -> dict[str, object]:
    """By dotted name what a module's parts keep besides weights, buffers and hooks, and the host's random numbers."""
    found = {
        f"{path}.{name}".lstrip("."): _value(value, alive)
        for path, part in module.named_modules()
        for name, value in vars(part).items()
        if name not in _TORCHS
    }
    drawn = {"Python's random numbers": random.getstate(), "numpy's random numbers": np.random.get_state()}
    return found | {name: _value(state, alive) for name, state in drawn.items()}


def _value(value: object, alive: list[object]) -> object:
    file = io.BytesIO()
    try:
        _Same(file, alive).dump(value)
    except Exception:  # whatever pickle raises: a lock, an object of another library
        alive.append(value)
        return id(value)
    return file.getvalue()


class _Same(pickle.Pickler):
    """Pickles values; tensors, networks and functions by their being the same ones."""

    def __init__(self, file: io.BytesIO, alive: list[object]) -> None:
        super().__init__(file)
        self._alive = alive

    def persistent_id(self, value: object) -> int | None:
        if isinstance(value, (Tensor, nn.Module)) or (callable(value) and not isinstance(value, type)):
            self._alive.append(value)
            return id(value)
        return None


def drawn_on_host(before: Sequence[Tensor], after: Sequence[Tensor]) -> bool:
    """Whether the CPU's random numbers moved on between two states of a learner that is on a GPU."""
    return len(before) > 1 and not torch.equal(before[0], after[0])


def unrecorded(error: Exception, students: int) -> UserError:
    """That a step cannot be recorded, why, and what to type. torch is not fit to go on after a capture that broke."""
    reason = (str(error) or type(error).__name__).splitlines()[0]
    short = isinstance(error, torch.OutOfMemoryError) and students > 1
    ways = f"{'hydra.launcher.max_members=<fewer> or ' if short else ''}trainer.cuda_graph=off"
    said = (
        f"trainer.cuda_graph: the step cannot be recorded ({reason}). {ways} continues the training from its checkpoint"
    )
    return UserError(said)


def side_stream(device: torch.device) -> torch.cuda.Stream | None:
    """A stream for one branch of a recording. torch has 32 of them, in turn: more branches share some, and wait."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None
