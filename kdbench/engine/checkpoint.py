"""Weights and checkpoints as files that are whole or not there and carry their own hash, written in the background."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypedDict

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from kdbench.engine.ahead import dense
from kdbench.errors import UserError
from kdbench.files import write_atomically
from kdbench.models.weights import ABOUT, HASH, damaged_records, read_safetensors, weight_hash
from kdbench.types import OptimizerState, TeacherState

CHECKPOINT, BEST, STUDENT = "checkpoint.pt", "best.safetensors", "student.safetensors"
WAITING = 8  # writes that may wait: bounds the memory of their copies
SMALL = 2**18  # numbers of a tensor that is copied with others: what is put side by side takes a GPU's memory, too
PUT_OFF = 10.0  # seconds of training that a kill may cost where checkpoint_every is auto, or a longer epoch


def snapshot(state: Any) -> Any:
    """A copy on the CPU of nested containers of tensors; the training may go on changing the original.

    A GPU's small tensors of one type are put side by side there and come in one copy, and all are waited for once: a
    training's state is some hundred tensors.
    """
    found, spec = tree_flatten(state)
    together: dict[tuple[torch.device, torch.dtype, int], list[int]] = {}
    for place, leaf in enumerate(found):
        if not isinstance(leaf, Tensor):
            continue
        if leaf.device.type == "cuda":
            key = (leaf.device, leaf.dtype, -1 if leaf.numel() <= SMALL else place)
            together.setdefault(key, []).append(place)
        else:
            found[place] = leaf.detach().to("cpu", copy=True)
    for places in together.values():
        for place, copied in zip(places, _side_by_side([found[place].detach() for place in places]), strict=True):
            found[place] = copied
    for device in {device for device, *_ in together}:
        torch.cuda.synchronize(device)
    return tree_unflatten(found, spec)


def _side_by_side(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of one type and GPU, each with its own shape and strides, in one memory of the CPU; not waited for."""
    found = [*map(dense, tensors)]
    rows = [tensor.as_strided((tensor.numel(),), (1,)) for tensor in found]
    flat = torch.cat(rows) if len(rows) > 1 else rows[0]
    there = torch.empty(len(flat), dtype=flat.dtype, pin_memory=True).copy_(flat, non_blocking=True)
    parts = there.split([tensor.numel() for tensor in found])
    return [part.as_strided(one.shape, one.stride()) for part, one in zip(parts, found, strict=True)]


class Writer:
    """One background thread that runs writes in the order they are given, so that a later file never precedes one it
    speaks of. Leaving the `with` block waits for all of them, also for those put off, also when an exception leaves it.

    Every write is atomic in itself (files.write_atomically), so a process killed at any moment leaves whole files.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._thread = ThreadPoolExecutor(1, "kdbench-writer")
        self._pending: deque[Future[None]] = deque()
        self._put_off: dict[Path, Callable[[], None]] = {}
        self._clock, self._caught_up = clock, clock()

    def add(self, write: Callable[[], None]) -> None:
        """Queue a write. Raises what an earlier one raised (a full disk), one call late."""
        while self._pending and (self._pending[0].done() or len(self._pending) >= WAITING):
            self._pending.popleft().result()
        self._pending.append(self._thread.submit(write))

    def put_off(self, path: Path, write: Callable[[], None]) -> None:
        """Keep a file's write for later, in the place of an older one: a fast training would write all the time."""
        later = {other: kept for other, kept in self._put_off.items() if other != path}
        self._put_off = {**later, path: write}  # at once: a Ctrl-C in between would lose both

    def catch_up(self) -> None:
        """Queue what was put off, if that was last done `PUT_OFF` seconds ago. Raises as `add`."""
        if self._clock() - self._caught_up >= PUT_OFF:
            self._caught_up = self._clock()
            while self._put_off:
                path, write = next(iter(self._put_off.items()))
                self.add(write)  # may wait: what stops the training meanwhile must not lose it
                del self._put_off[path]

    def flush(self) -> None:
        """Until every file is written."""
        while self._pending:
            self._pending.popleft().result()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pending += [self._thread.submit(write) for write in self._put_off.values()]
        self._thread.shutdown(wait=True)
        if error is None:
            self.flush()


class LearnerState(TypedDict):
    """All that a bit-exact continuation of a student needs; random states are functions of (seed, epoch)."""

    distiller: Mapping[str, Tensor]  # weights of the student and of its loss
    optimizer: OptimizerState
    scaler: dict[str, float]
    average: Mapping[str, Tensor] | None  # weights of the moving average
    steps_done: int


class _NotInAll(TypedDict, total=False):
    """What some checkpoints lack (a base of its own, since Python 3.10 has no NotRequired)."""

    rows: list[int]  # checksums of the rows of metrics.jsonl; the first edition kept none
    cost: dict[str, float] | None  # kdbench.engine.cost
    teacher: TeacherState


class MemberState(_NotInAll):
    """What checkpoint.pt holds: a student, how far it has come, and what its teacher has become with it."""

    epochs_done: int
    seconds: float
    last: dict[str, float]
    best: dict[str, float] | None
    learner: LearnerState


def save_weights(path: Path, network: nn.Module, about: Mapping[str, object]) -> None:
    """A network's weights as safetensors; `about` is kept in the file's header."""
    save_state(path, network.state_dict(), about)


def save_state(path: Path, weights: Mapping[str, Tensor], about: Mapping[str, object]) -> None:
    """A state dict as safetensors, with its hash in the header: the same weights and `about` are the same bytes.

    One entry of metadata: safetensors writes several in a random order. The bytes are made in memory and written here:
    its own writer makes files that only their owner may read.
    """
    # contiguous: safetensors refuses channels_last strides; clone: tied tensors must not share memory.
    state = {k: v.detach().to("cpu").clone(memory_format=torch.contiguous_format) for k, v in weights.items()}
    metadata = {ABOUT: json.dumps({**about, HASH: weight_hash(state)}, sort_keys=True)}
    write_atomically(path, lambda temporary: temporary.write_bytes(save(state, metadata)))


def save_checkpoint(path: Path, state: MemberState) -> None:
    """As a file that carries a checksum of every tensor."""

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:  # through a file of Python's, whose errors are the system's own
            try:
                torch.save(state, file)
            except RuntimeError as error:  # torch ends the archive all the same, and complains of that instead
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise

    write_atomically(path, write)


def load_checkpoint(path: Path) -> MemberState:
    """A checkpoint on the CPU. Raises UserError if the file cannot be read or is not what was written."""
    try:
        wrong, _ = damaged_records(path)
        if wrong:
            raise ValueError(f"{wrong} of its parts differ from their checksum")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever its unpickler meets: RuntimeError, EOFError, ...
        reason = str(error) if isinstance(error, ValueError) else type(error).__name__
        raise UserError(f"{path}: not a readable checkpoint ({reason}). Delete it, or use force=true.") from error


@dataclass(frozen=True)
class Checkpoints:
    """The folder that a training is continued from, and its best weights, written in the background.

    `every`: epochs between checkpoints; with `auto` each epoch's is put off until the writer catches up.
    """

    folder: Path
    every: int | Literal["auto"] = "auto"
    about: Mapping[str, object] = field(default_factory=dict)  # kept in the header of the weights file

    def after(self, epoch: int, state: Callable[[], MemberState], writer: Writer, always: bool = False) -> None:
        """Keep the state where that is due after this epoch (counted from 0), or `always`."""
        if self.every == "auto" or always or (epoch + 1) % self.every == 0:
            path, kept = self.folder / CHECKPOINT, snapshot(state())
            self._write(path, lambda: save_checkpoint(path, kept), writer)

    def keep_best(self, network: nn.Module, writer: Writer) -> None:
        path, weights = self.folder / BEST, snapshot(network.state_dict())
        self._write(path, lambda: save_state(path, weights, dict(self.about)), writer)

    def _write(self, path: Path, write: Callable[[], None], writer: Writer) -> None:
        if self.every == "auto":
            writer.put_off(path, write)
        else:
            writer.add(write)


def resume_epoch(folder: Path) -> tuple[int, MemberState | None]:
    """The number of whole epochs in a run folder's checkpoint, and the checkpoint.

    Raises UserError for one that is damaged, and for damaged weights of the best epoch, which the run would keep.
    """
    if not (folder / CHECKPOINT).exists():
        return 0, None
    state = load_checkpoint(folder / CHECKPOINT)
    if (folder / BEST).exists():
        try:
            read_safetensors(folder / BEST)
        except UserError as error:
            ways = "Delete it (the run then goes on without the weights of its best epoch so far), or use force=true"
            raise UserError(f"{error}. {ways}.") from error
    return state["epochs_done"], state
