"""Where the configurations lie: in the package once installed from a wheel, beside it in a checkout."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_PLACES = (_PACKAGE / "configs", _PACKAGE.parent / "configs")
CONFIG_DIR = str(next((place for place in _PLACES if (place / "train.yaml").is_file()), _PLACES[0]))
