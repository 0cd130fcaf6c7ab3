import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "runs")]  # for `tables_parts`, and for `shell`: the command line
