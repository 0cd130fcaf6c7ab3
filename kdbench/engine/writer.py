"""Files written off the training's critical path: in order, in the background, from copies."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

WAITING = 8  # writes that may wait: bounds the memory of their copies


def snapshot(state: Any) -> Any:
    """A copy on the CPU of nested containers of tensors; the training may go on changing the original.

    Of a GPU's tensors all copies are begun before the one wait for them: a training's state is some hundred tensors.
    """
    devices: set[torch.device] = set()

    def copied(tensor: Tensor) -> Tensor:
        if tensor.device.type != "cuda":
            return tensor.detach().to("cpu", copy=True)
        devices.add(tensor.device)
        there = torch.empty_like(tensor, device="cpu", pin_memory=True, requires_grad=False)
        return there.copy_(tensor.detach(), non_blocking=True)

    found = tree_map_only(Tensor, copied, state)
    for device in devices:
        torch.cuda.synchronize(device)
    return found


class Writer:
    """One background thread that runs writes in the order they are given, so that a later file never precedes one it
    speaks of. Leaving the `with` block waits for all of them, also when an exception leaves it.

    Every write is atomic in itself (checkpoint.write_atomically), so a process killed at any moment leaves whole files.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "kdbench-writer")
        self._pending: deque[Future[None]] = deque()

    def add(self, write: Callable[[], None]) -> None:
        """Queue a write. Raises what an earlier one raised (a full disk), one call late."""
        while self._pending and (self._pending[0].done() or len(self._pending) >= WAITING):
            self._pending.popleft().result()
        self._pending.append(self._thread.submit(write))

    def flush(self) -> None:
        """Until every file is written."""
        while self._pending:
            self._pending.popleft().result()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._thread.shutdown(wait=True)
        if error is None:
            self.flush()
