"""Several processes of one training, as torchrun starts them, forked from this one, which has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

from torch.distributed import TCPStore

_stores: list[TCPStore] = []  # of processes that may still be at work: torchrun's own process holds it, too


def start(function: Callable[[], object], processes: int = 2, strangers: bool = False) -> list[BaseProcess]:
    """Begin `function` in so many processes that know of each other, or are strangers; what they print lies in
    rank0.txt, ..."""
    fork = multiprocessing.get_context("fork")
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    work = [(function, rank, 1 if strangers else processes, store.port) for rank in range(processes)]
    begun = [fork.Process(target=_main, args=args, daemon=True) for args in work]
    _stores.append(store)
    for process in begun:
        process.start()
    return begun


def finish(begun: list[BaseProcess], seconds: float = 300) -> list[tuple[int | None, str]]:
    """Exit codes and what was printed. A process that has not ended by then (long, since a busy machine is slow)
    counts as hanging: None."""
    ended = []
    for rank, process in enumerate(begun):
        process.join(seconds)
        code = process.exitcode
        if code is None:
            process.kill()
        ended.append((code, Path(f"rank{rank}.txt").read_text(encoding="utf-8")))
    return ended


def run(function: Callable[[], object], processes: int = 2) -> list[str]:
    """What the processes print. Raises AssertionError with it if one of them fails."""
    ended = finish(start(function, processes))
    assert [code for code, _ in ended] == [0] * processes, "\n".join(text for _, text in ended)
    return [text for _, text in ended]


def _main(function: Callable[[], object], rank: int, size: int, port: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    sys.stdout = sys.stderr = open(f"rank{rank}.txt", "w", encoding="utf-8", buffering=1)  # noqa: SIM115
    code = 1
    try:
        code = int(function() or 0)  # type: ignore[call-overload]
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)  # not pytest's own end
