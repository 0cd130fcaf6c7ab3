"""Claims of papers that held, did not hold, or cannot be told, in the runs of kdbench reproduce."""

from __future__ import annotations

import runpy
import sys

from kdbench.paths import SCRIPTS


def main() -> int:
    sys.argv[0] = "kdbench claims"
    runpy.run_path(str(SCRIPTS / "claims.py"), run_name="__main__")
    return 0
