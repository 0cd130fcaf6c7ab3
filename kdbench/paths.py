"""Where configurations and scripts lie: in the package once installed from a wheel, beside it in a checkout."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_PLACES = (_PACKAGE / "configs", _PACKAGE.parent / "configs")
CONFIG_DIR = str(next((place for place in _PLACES if (place / "train.yaml").is_file()), _PLACES[0]))

_INSTALLED = (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}")
_SYSTEM = tuple(f"{sysconfig.get_path(name)}{os.sep}" for name in ("stdlib", "platstdlib"))

SCRIPTS = (_PACKAGE / "scripts") if (_PACKAGE / "scripts").is_dir() else _PACKAGE.parent / "scripts"


def are_configs(entry: str) -> bool:
    """Whether an entry of Hydra's search path is this folder, as a path or as the module kdbench.configs."""
    return entry == "pkg://kdbench.configs" or Path(entry.removeprefix("file://")) == Path(CONFIG_DIR)


def is_installed(path: str) -> bool:
    """Whether a source file is of an installed package."""
    return any(place in path for place in _INSTALLED)


def is_pythons(path: str) -> bool:
    """Whether a source file is of Python's own library."""
    return not is_installed(path) and path.startswith(_SYSTEM)


def is_yours(path: str) -> bool:
    """Whether a source file is the user's: not kdbench's, not installed, and not Python's."""
    ours = f"{_PACKAGE}{os.sep}"
    return os.path.isfile(path) and not (is_installed(path) or is_pythons(path) or path.startswith(ours))
