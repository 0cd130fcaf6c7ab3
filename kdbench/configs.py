"""The configurations as a module, for Hydra's `initialize_config_module("kdbench.configs")`.

A wheel holds them as the folder kdbench/configs, which Python takes before a module of the same name. In a checkout
they lie beside the package, and this module stands for that folder.
"""

from importlib.machinery import SourceFileLoader
from pathlib import Path

from kdbench.paths import CONFIG_DIR

__path__ = [CONFIG_DIR]
if __spec__ is not None:
    __spec__.submodule_search_locations = __path__
    __spec__.loader = SourceFileLoader(__name__, str(Path(CONFIG_DIR) / "__init__.py"))  # whose resources are asked for
