"""World: the processes that torchrun started for one training. The only file that knows ranks.

All of them run the same program and take the same steps; each has its rows of every batch (`own`). What depends on
files is asked by the first of them for all (`agreed`, `after_first`), and the first one writes. A process by itself is
the whole world: nothing here costs it anything, and torch is not loaded for it.
"""

from __future__ import annotations

import atexit
import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from kdbench.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

# A process may wait for as long as the first one reads data or waits for another's teacher. That one has ended is known
# at once: its connections close.
PATIENCE = timedelta(days=7)
_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass
class _World:
    rank: int = 0
    size: int = 1
    store: Any = None  # of texts that all processes see, also when the first one has ended
    apart: bool = False  # whether this process acts without the others for now


_world = _World()


class Lost(UserError):
    """Another process of this training has ended."""


def join() -> None:
    """Meet the other processes that torchrun started; nothing to do for one alone."""
    if _world.size > 1 or not all(os.environ.get(name) for name in _NEEDED) or int(os.environ["WORLD_SIZE"]) < 2:
        return
    import torch
    import torch.distributed as dist

    with _linked():
        _world.store, _world.rank, _world.size = next(dist.rendezvous("env://", timeout=timedelta(minutes=5)))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
        dist.init_process_group(backend, None, PATIENCE, _world.size, _world.rank, _world.store)


def end(code: int) -> NoReturn:
    """End this process. One of several runs what waits for its end and goes at once: where the interpreter ends as
    usual, threads of gloo abort it now and then (37 of 160 short trials with torch 2.14, whether or not the group was
    destroyed: "terminate called without an active exception"), and torchrun takes finished work for failed."""
    if _world.size == 1:
        sys.exit(code)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # a pipe that nobody reads, a stream that is closed
            stream.flush()
    os._exit(code)


def size() -> int:
    return _world.size


def first() -> bool:
    """Whether this process writes and speaks."""
    return _world.rank == 0


def local() -> int:
    """The number of this process on its machine: that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", _world.rank))


def refuse_several(key: str, value: object, why: str) -> None:
    """Raise a UserError for what is not made for several processes."""
    if _world.size > 1:
        raise UserError(key, value, f"another with the {_world.size} processes of torchrun: {why}")


def shares(rows: int) -> list[tuple[int, int]]:
    """Which rows of a batch each process has: first and one after the last, by rank; sizes differ by one at most."""
    return [(rank * rows // _world.size, (rank + 1) * rows // _world.size) for rank in range(_world.size)]


def seed(common: int) -> int:
    """A seed of this process's own."""
    return (common * 1_000_003 + _world.rank + 1) % 2**63


def own(rows: int) -> tuple[int, int]:
    """This process's rows of a batch."""
    return shares(rows)[_world.rank]


def agreed(ask: Callable[[], T]) -> T:
    """What the first process finds, or raises, for all: whether a file is there, whose lock it is, what is written."""
    if _world.size == 1 or _world.apart:
        return ask()
    found: tuple[Any, Exception | None] = (None, None)
    if first():
        try:
            with _apart():
                found = (ask(), None)
        except Exception as error:  # whatever it is, the others must not go on without the first
            found = (None, error)
    value, failure = _told(found)
    if failure is not None:
        raise failure
    return value


@contextmanager
def after_first() -> Iterator[None]:
    """A block that the first process goes through before all others: what it makes (a cache, a download) they find.

    What it raises they raise too.
    """
    if _world.size == 1 or _world.apart:
        yield
        return
    if not first():
        failure = _told((None, None))[1]
        if failure is not None:
            raise failure
    try:
        with _apart():
            yield
    except Exception as error:
        if first():
            _told((None, error))
        raise
    if first():
        _told((None, None))


def gather(part: Tensor, sizes: Sequence[int]) -> Tensor:
    """The rows of all processes [sum of sizes, ...], of which this one gives `part` [its size, ...]."""
    import torch
    import torch.distributed as dist

    most = max(sizes)
    whole = part.contiguous()
    if len(part) < most:
        whole = torch.cat([whole, whole.new_zeros(most - len(part), *part.shape[1:])])
    found = [torch.empty_like(whole) for _ in sizes]
    with _linked():
        dist.all_gather(found, whole)
    return torch.cat([one[:count] for one, count in zip(found, sizes, strict=True)])


def add_up(values: Tensor) -> None:
    """Sum a tensor over all processes, in place; the same to the last bit on each."""
    import torch.distributed as dist

    with _linked():
        dist.all_reduce(values)


def is_new(text: str) -> bool:
    """Whether no other process has said this: a message that all have is printed once."""
    if _world.store is None:
        return True
    try:
        return int(_world.store.add(f"kdbench/said/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{text}", 1)) == 1
    except Exception:  # whoever holds the store has ended: better twice than not at all
        return True


@contextmanager
def _apart() -> Iterator[None]:
    before, _world.apart = _world.apart, True
    try:
        yield
    finally:
        _world.apart = before


def _told(found: tuple[Any, Exception | None]) -> tuple[Any, Exception | None]:
    """What the first process says, on all."""
    import torch.distributed as dist

    if first() and not _portable(found):
        found = (None, RuntimeError(f"{type(found[1]).__name__}: {found[1]}"))
    box = [found]
    with _linked():
        dist.broadcast_object_list(box, src=0)
    return found if first() else box[0]


def _portable(found: object) -> bool:
    import pickle

    try:
        pickle.loads(pickle.dumps(found))
    except Exception:  # an exception that cannot be made from its arguments, for one
        return False
    return True


@contextmanager
def _linked() -> Iterator[None]:
    """Let a connection that breaks say what has happened."""
    try:
        yield
    except RuntimeError as error:  # gloo's, NCCL's and the store's errors
        raise Lost(
            f"another process of this training has ended, or cannot be reached ({socket.gethostname()}, process "
            f"{_world.rank + 1} of {_world.size}). The same command goes on from the last complete epoch."
        ) from error
