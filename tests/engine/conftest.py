import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "losses")]  # `parts` and `tape` of these tests; `losses_parts`: all losses
