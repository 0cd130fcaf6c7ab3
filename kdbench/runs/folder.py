"""A run folder: what lies in it, and how a network is read back from it."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import yaml
from torch import Tensor, nn

from kdbench.engine.checkpoint import BEST, CHECKPOINT, STUDENT, load_weights
from kdbench.errors import UserError
from kdbench.files import read_json, write_atomically, write_json
from kdbench.models.weights import load_into
from kdbench.results.result import RESULT
from kdbench.types import ImageInfo, Info

if TYPE_CHECKING:
    from kdbench.data.bundle import Bundle
    from kdbench.runs.recipe import Catalogue, NetworkSpec

NETWORK = "network.json"
_OURS = (RESULT, NETWORK, CHECKPOINT, BEST, STUDENT, "run.json", "config.yaml", "metrics.jsonl")


def clear(folder: Path) -> None:
    """Remove what a run wrote, and nothing else; result.json first, so that a kill leaves an unfinished run."""
    for name in _OURS:
        (folder / name).unlink(missing_ok=True)
    for events in folder.glob("events.out.tfevents.*"):
        events.unlink()
    shutil.rmtree(folder / "stages", ignore_errors=True)


def save_network(folder: Path, spec: NetworkSpec, data: Bundle) -> None:
    """network.json: all that is needed to build the folder's network again, without the command line that made it."""
    config = dict(spec.config)
    about = {
        "name": spec.name,
        "config": config,
        "info": data.info._asdict(),
        "classes": list(data.classes),
        "dataset": data.name,
    }
    write_json(folder / NETWORK, about)


def save_config(folder: Path, tree: Mapping[str, Any]) -> None:
    """config.yaml: the whole resolved configuration."""
    text = yaml.safe_dump(_plain(tree), sort_keys=False)
    write_atomically(folder / "config.yaml", lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def spec_of_run(folder: Path, catalogue: Catalogue) -> tuple[NetworkSpec, Info]:
    """The network of a run folder, and the data it is for. Raises UserError if the folder is none of a run."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run folder")
    if not (folder / NETWORK).exists():
        raise UserError(f"{folder}: not a run folder of kdbench (it has no {NETWORK})")
    about = read_json(folder / NETWORK)
    config = dict(about["config"])
    if "pretrained" in config:  # its weights come from this folder
        config |= {"pretrained": False}
    return catalogue.network_from(about["name"], config), read_info(about["info"])


def network_of_run(folder: Path, catalogue: Catalogue, weights: str = STUDENT) -> tuple[NetworkSpec, nn.Module, Info]:
    """The finished student of a run folder. Raises UserError if the folder holds none."""
    spec, info = spec_of_run(folder, catalogue)
    if not (folder / weights).exists():
        raise UserError(
            f"{folder}: the run is not finished (it has no {weights}). The command that started it continues it."
        )
    network = spec.make(info)
    load_into(network, _read(folder / weights), str(folder / weights))
    return spec, network, info


def read_info(kept: Mapping[str, int] | Sequence[int]) -> Info:
    """What a network was built for, as network.json has it; a list is of images, from before there was other data."""
    if not isinstance(kept, Mapping):
        return ImageInfo(*kept)
    return next(kind(**kept) for kind in get_args(Info) if set(kind._fields) == set(kept))


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_weights(path)
    except Exception as error:  # safetensors raises its own errors for a broken header, OSError for a broken disk
        raise UserError(f"{path}: not a readable weights file ({error})") from error


def describe_versions() -> dict[str, str]:
    """What the figures of a run may depend on."""
    names = ("kdbench", "torch", "torchvision", "timm", "numpy", "hydra-core")
    found = {name: metadata.version(name) for name in names if _installed(name)}
    return {
        "kdbench": found.get("kdbench", "unknown"),
        **found,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True
