import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # for `tables_parts`, which these tests share
