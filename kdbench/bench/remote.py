"""A contender in a process of its own: what it does to its memory, threads and workers stays there."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from types import TracebackType

from kdbench.bench.timing import Contender
from kdbench.errors import UserError


class Remote:
    """A command that prints "ready" and then, for every line "<steps>" on its stdin, the seconds that they took.

    Raises UserError, with the last lines that it wrote, if the command ends instead of answering.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self.command = " ".join(command)
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._until("ready")

    def __call__(self, steps: int) -> float:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(f"{steps}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            self._ended()
        return float(self._until(""))

    def _until(self, start: str) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(start) and (start or _is_number(line)):
                return line
        return self._ended()

    def _ended(self) -> str:
        raise UserError(f"{self.command}: ended (exit code {self.process.wait()}) instead of timing steps")

    def __enter__(self) -> Remote:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def serve(contender: Contender) -> None:
    """The other end: answer every line "<steps>" on stdin with the seconds that they took, on stdout."""
    print("ready", flush=True)
    for line in sys.stdin:
        print(contender(int(line)), flush=True)


def _is_number(line: str) -> bool:
    try:
        float(line)
    except ValueError:
        return False
    return True
