"""`python -m kdbench` is `kdbench`."""

from __future__ import annotations

import sys

from kdbench.cli import main

if __name__ == "__main__":
    sys.exit(main())
