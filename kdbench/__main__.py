"""`python -m kdbench` is `kdbench`."""

from __future__ import annotations

from kdbench import world
from kdbench.cli import main

if __name__ == "__main__":
    world.end(main())
