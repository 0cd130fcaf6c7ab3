"""`python -m kdbench` is `kdbench`."""

from __future__ import annotations

from typing import NoReturn

from kdbench import world
from kdbench.cli import main


def run() -> NoReturn:
    """The command line as a process of its own: `kdbench`."""
    world.end(main())


if __name__ == "__main__":
    run()
