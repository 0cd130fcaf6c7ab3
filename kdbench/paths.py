"""Where configurations and scripts lie: in the package once installed from a wheel, beside it in a checkout."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_PLACES = (_PACKAGE / "configs", _PACKAGE.parent / "configs")
CONFIG_DIR = str(next((place for place in _PLACES if (place / "train.yaml").is_file()), _PLACES[0]))

SCRIPTS = (_PACKAGE / "scripts") if (_PACKAGE / "scripts").is_dir() else _PACKAGE.parent / "scripts"


def are_configs(entry: str) -> bool:
    """Whether an entry of Hydra's search path is this folder, as a path or as the module kdbench.configs."""
    return entry == "pkg://kdbench.configs" or Path(entry.removeprefix("file://")) == Path(CONFIG_DIR)
