"""Claims of papers that held, did not hold, or cannot be told, in the runs of kdbench reproduce."""

from __future__ import annotations

import runpy
import sys

from kdbench.paths import SCRIPTS


def main() -> int:
    sys.argv[0] = "kdbench claims"
    script = runpy.run_path(str(SCRIPTS / "claims.py"))
    return int(script["main"]())
