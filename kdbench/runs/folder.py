"""A run folder: what lies in it, and how a network is read back from it."""

from __future__ import annotations

import functools
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
import yaml
from torch import Tensor, nn

from kdbench.data.tokenise import TOKENIZER
from kdbench.engine.checkpoint import BEST, CHECKPOINT, STUDENT
from kdbench.errors import UserError, read_from
from kdbench.files import read_object, write_atomically, write_json
from kdbench.models.base import needed
from kdbench.models.interface import Interface
from kdbench.models.weights import load_into, read_safetensors, weight_hash
from kdbench.results.predictions import PREDICTIONS
from kdbench.results.read import LATENCY
from kdbench.results.result import RESULT, is_finished, read_result
from kdbench.results.status import FAILURE, START
from kdbench.types import CorpusInfo, ImageInfo, Info

if TYPE_CHECKING:
    from kdbench.data.bundle import Bundle
    from kdbench.runs.recipe import Catalogue, NetworkSpec

NETWORK = "network.json"
LOSS = "loss.safetensors"  # what a loss learned, where another stage goes on from it
EXPORT = "export"  # files of the student for other programs
_TEXTS = ("config.yaml", "metrics.jsonl", "epsilon.json")
_OURS = (RESULT, NETWORK, TOKENIZER, CHECKPOINT, BEST, STUDENT, LOSS, PREDICTIONS, LATENCY, START, FAILURE, *_TEXTS)


def clear(folder: Path) -> None:
    """Remove what a run wrote, and nothing else; result.json first, so that a kill leaves an unfinished run."""
    for name in _OURS:
        (folder / name).unlink(missing_ok=True)
    for events in folder.glob("events.out.tfevents.*"):
        events.unlink()
    for made in ("stages", EXPORT):
        shutil.rmtree(folder / made, ignore_errors=True)


def save_network(folder: Path, spec: NetworkSpec, data: Bundle, average: bool = False) -> None:
    """network.json: all that is needed to build the folder's network again, without the command line that made it, and
    to use it: what its inputs and logits mean. `average`: its weights are a moving average of the trained ones. Beside
    it the tokenizer.json of texts."""
    about = {"name": spec.name, "config": dict(spec.config), "info": _sizes(data.info)}
    write_json(folder / NETWORK, about | _use_of(data, average))
    if data.tokeniser is not None:
        write_json(folder / TOKENIZER, data.tokeniser.kept())


def _sizes(info: Info) -> dict[str, int]:
    """What of an info is kept: its numbers. The words of a text are its classes, which are kept anyway."""
    return {name: value for name, value in info._asdict().items() if isinstance(value, int)}


def about_weights(spec: NetworkSpec, data: Bundle, average: bool = False) -> dict[str, object]:
    """What the header of a file of weights holds: the file alone says how its network is to be used."""
    return {"network": spec.name, **_use_of(data, average)}


def _use_of(data: Bundle, average: bool) -> dict[str, object]:
    return {**interface_of(data).kept(), "entry": "ema" if average else "model"}


def interface_of(data: Bundle) -> Interface:
    """What data give a network, and what they ask of it."""
    size = data.info.image_size if isinstance(data.info, ImageInfo) else None
    kept = (data.name, tuple(data.classes), tuple(data.mean), tuple(data.std))
    return Interface(*kept, size, data.resize, data.vocabulary or None, columns=data.columns or None)


def save_config(folder: Path, tree: Mapping[str, object]) -> None:
    """config.yaml: the whole resolved configuration."""
    text = yaml.safe_dump(_plain(tree), sort_keys=False)
    write_atomically(folder / "config.yaml", lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_config(folder: Path, *parts: str) -> dict[str, Any]:
    """A run's config.yaml. Raises UserError naming the file if it cannot be read or one of `parts` is no mapping."""
    path = folder / "config.yaml"
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Whole)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not a readable configuration ({type(error).__name__}: {reason})") from error
    lacking = [part for part in parts if not isinstance(tree, dict) or not isinstance(tree.get(part), dict)]
    if lacking:
        raise UserError(f"{path}: damaged: it lacks {', '.join(lacking)}")
    return tree


class _Whole(yaml.SafeLoader):
    """YAML without what kdbench does not write: aliases (400 bytes of a stranger's are a billion values), and keys that
    are there twice, of which the last one would count."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(
                f"line {self.peek_event().start_mark.line + 1}: an alias, which kdbench does not write"
            )
        return super().compose_node(parent, index)

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.YAMLError(f"line {key.start_mark.line + 1}: the key {key.value} is there twice")
            seen.add(str(key.value))
        return node


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
    name, config, info = _described(folder / NETWORK)
    with read_from(folder / NETWORK):
        return catalogue.network_from(name, config, str(folder / NETWORK)), info


def network_of_run(folder: Path, catalogue: Catalogue, weights: str = STUDENT) -> tuple[NetworkSpec, nn.Module, Info]:
    """The finished student of a run folder. Raises UserError if the folder holds none, or another one's weights."""
    spec, info = spec_of_run(folder, catalogue)
    if not (folder / weights).exists():
        raise UserError(
            f"{folder}: the run is not finished (it has no {weights}). The command that started it continues it."
        )
    state = read_safetensors(folder / weights)
    if weights == STUDENT:
        _check_weights(folder, state)
    with read_from(folder / NETWORK):
        _refuse_larger(spec, info, sum(value.numel() for value in state.values()))
        network = spec.make(info)
    load_into(network, state, str(folder / weights))
    return spec, network, info


def _refuse_larger(spec: NetworkSpec, info: Info, numbers: int) -> None:
    """Raise a UserError for a network of far more parameters than its weights have numbers, before it takes memory:
    a few digits of a stranger's file are gigabytes otherwise. It is built without memory for that, in a millisecond,
    and what cannot be (a network that reads its own values) is left to the real one to say."""
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            wanted = sum(value.numel() for value in spec.make(info).parameters())
    except Exception as error:
        if "overflow" in str(error).lower():  # torch has no type of error for it
            raise UserError("damaged: a network of more parameters than can be counted") from error
        return
    if wanted > 2 * numbers:
        raise UserError(f"damaged: a network of {wanted:,} parameters, of which its weights have {numbers:,}")


def _described(path: Path) -> tuple[str, dict[str, object], Info]:
    """Name, configuration and data of the network that a network.json speaks of. Raises UserError naming the file."""
    about = read_object(path)
    name, config, info = about.get("name"), about.get("config"), read_info(about.get("info"))
    words = about.get("classes")
    if isinstance(info, CorpusInfo) and isinstance(words, list):
        info = info._replace(words=tuple(map(str, words)))
    if not isinstance(name, str) or not isinstance(config, dict) or info is None:
        raise UserError(f"{path}: damaged: it must hold a network's name, config and info (the sizes of its data)")
    if "pretrained" in config:  # its weights come from this folder
        config |= {"pretrained": False}
    if isinstance(config.get("options"), dict):
        config["options"] = {key: value for key, value in config["options"].items() if key != "checkpoint_path"}
    return name, config, info


def read_info(kept: Any) -> Info | None:
    """What a network was built for, as network.json has it; a list is of images, from before there was other data.

    None for what is no such thing.
    """
    fields = dict(zip(ImageInfo._fields, kept)) if isinstance(kept, list) and len(kept) == 3 else kept
    if not isinstance(fields, dict) or not all(type(size) is int and size > 0 for size in fields.values()):
        return None
    return next((kind(**fields) for kind in get_args(Info) if set(needed(kind)) == set(fields)), None)


def _check_weights(folder: Path, state: Mapping[str, Tensor]) -> None:
    """Raise a UserError if the student is not the one that the folder's result is of. Costs a hash of the weights."""
    wanted = read_result(folder).student.weights if is_finished(folder) else ""
    if wanted and weight_hash(state) != wanted:
        raise UserError(f"{folder / STUDENT}: these are not the weights that {RESULT} is of (their hash differs)")


def describe_machine(device: torch.device) -> dict[str, object]:
    """Where a run was trained, and what it took there: host, processor, GPU, and the most memory so far in bytes."""
    gpu = device.type == "cuda"
    return {
        "host": platform.node(),
        "system": platform.platform(terse=True),
        "processor": _processor(),
        "cores": os.cpu_count() or 0,
        "gpu": torch.cuda.get_device_name(device) if gpu else None,
        "peak_memory": _peak_memory(),
        "peak_gpu_memory": torch.cuda.max_memory_allocated(device) if gpu else None,
    }


def _processor() -> str:
    """The CPU's name as Linux knows it; what Python knows elsewhere."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _peak_memory() -> int | None:
    """The largest resident set of this process so far; None where the system does not say (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


@functools.cache
def describe_git() -> dict[str, object] | None:
    """The commit that the current folder's repository is at, and whether files that it knows differ from it; None
    where there is no repository or no git. Asked once a process: 10 ms."""
    try:
        commit = _git("rev-parse", "HEAD")
        return {"commit": commit, "changed": bool(_git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*words: str) -> str:
    command = ["git", "-c", "core.fsmonitor=false", *words]  # a repository's configuration may name a program to run
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=5, check=True)
    return done.stdout.strip()


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
