"""Reading weights from any checkpoint file, and putting them into a network, strictly."""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import pickle
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from kdbench.errors import UserError, some
from kdbench.models.names import plain_names, published_names
from kdbench.models.recognise import recognise

log = logging.getLogger(__name__)

# Where training programs keep the weights inside a checkpoint, most specific first; then moving averages of them.
_KEYS = ("state_dict", "model_state_dict", "model_state", "student", "model", "net", "network", "weights", "params")
_AVERAGES = (
    "state_dict_ema", "model_ema", "ema_state_dict", "model_ema_state_dict", "ema_model_state_dict", "ema_model",
    "ema_weights", "params_ema", "ema", "averaged_model", "swa_state_dict", "swa_model",
)  # fmt: skip
ABOUT, HASH = "kdbench", "weights"  # a safetensors header's one entry of ours (JSON), and the weights' hash in it
_DEPTH = 3  # mappings in mappings: a pickle may hold itself
_SHOWN = 3  # names of each kind in a message
_SUFFIXES = (".safetensors", ".pth", ".pt", ".tar", ".bin", ".ckpt")  # of files of weights
_MDISTILLER = ("student_best", "best", "student_latest", "latest")  # its checkpoints, which have no suffix
_BOMB = 100_000_000  # bytes that an archive may unpack to, and ten times its size: torch does not compress


class WeightsFile(NamedTuple):
    """What a file of weights holds."""

    state: dict[str, Tensor]
    entry: str | None  # which of a checkpoint's weights these are ("state_dict_ema"); None: the file has no others
    about: dict[str, object]  # what it says of how they were trained: dataset, classes, mean, std, size, resize


def read_weights(path: str | Path, key: str | None = None) -> dict[str, Tensor]:
    """The weights in a file, by parameter name, on the CPU: `read_file` without the rest."""
    return read_file(path, key).state


def read_file(path: str | Path, key: str | None = None) -> WeightsFile:
    """The weights in a file, by parameter name, on the CPU, and what it says of them.

    Reads `.safetensors`, a saved state_dict, and a training checkpoint that holds one under `state_dict`, `model`,
    `net` or the like (RepDistiller, mdistiller, timm, torchvision, kdbench), or only a moving average of one; drops
    `module.` prefixes, and of a distiller's weights keeps the student's. Where a file holds several, a log line says
    which was taken; `key` names one ("state_dict_ema", "a.b" inside of a). Of a folder, its only file of weights.
    Files are data: unpickled with weights_only, plus argparse.Namespace (RepDistiller keeps its options in
    `*_last.pth`) and NumPy numbers. Raises UserError naming the file if it is missing, empty, broken, not a
    checkpoint, unpacks to far more than its size, or holds no weights (no `key`).
    """
    path = file_at(Path(path))
    content, about = _safetensors(path) if path.suffix == ".safetensors" else (_unpickle(path), {})
    entry, state = _chosen(path, content, key)
    return WeightsFile(plain_names(state), entry, about or _options_of(content) or _config_beside(path))


def _options_of(content: Any) -> dict[str, object]:
    """Of the command line that timm's training script keeps in its checkpoints: `--mean` and `--std`, where typed."""
    options = content.get("args") if isinstance(content, Mapping) else None
    options = vars(options) if isinstance(options, argparse.Namespace) else options
    if not isinstance(options, Mapping) or not (options.get("mean") and options.get("std")):
        return {}
    return {"mean": options["mean"], "std": options["std"]}


def _config_beside(path: Path) -> dict[str, object]:
    """Of the config.json that timm's networks have beside their weights on the Hugging Face hub: `pretrained_cfg`."""
    try:
        tree = json.loads(path.with_name("config.json").read_bytes())
    except (OSError, ValueError, RecursionError):  # anybody's file may have this name
        return {}
    config = tree.get("pretrained_cfg") if isinstance(tree, dict) else None
    if not isinstance(config, dict) or not config.get("mean"):
        return {}
    return {"mean": config["mean"], "std": config.get("std"), "classes": config.get("label_names")}


def load_into(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Copy `state` into the model, strictly: every name and shape must fit, under this or another published naming.

    Raises UserError naming `source`, the first names and shapes that do not fit, and the network that they would fit.
    """
    expected = model.state_dict()
    renamed = published_names(state, expected)
    problems = _problems(renamed, expected)
    if problems:
        hint = _hint(model, state, renamed)
        raise UserError(f"{source}: these are not the weights of this network: {'; '.join(problems)}{hint}")
    model.load_state_dict(renamed, strict=True)


def weight_hash(state: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) of names, types, shapes and bytes; the order of the names does not matter."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name}:{value.dtype}:{tuple(value.shape)};".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data if value.numel() else b"")
    return digest.hexdigest()


def file_at(path: Path) -> Path:
    """The file of weights at a path, itself or the only one in the folder, as far as can be told without reading it."""
    if path.is_dir():
        path = _in_folder(path)
    if not path.is_file():
        raise UserError(f"{path}: {'no file' if path.exists() else 'no such file'}")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty")
    with path.open("rb") as file:
        if file.read(40).startswith(b"version https://git-lfs"):
            raise UserError(f"{path}: a Git LFS pointer, not the weights themselves; run `git lfs pull`")
    return path


def _in_folder(folder: Path) -> Path:
    """The only file of weights in a folder (mdistiller's, say). Raises UserError where it is a run's, has none, or
    more."""
    own = folder / "student.safetensors"
    if own.is_file():
        raise UserError(f"{folder}: a folder, not a file of weights; its weights are in {own}")
    files, below = (_weights(folder.glob(pattern)) for pattern in ("*", "*/*"))
    if len(files) != 1:
        shown = files or below
        where = "has" if files else "has none, its folders have"
        names = some((file.relative_to(folder) for file in shown), _SHOWN)
        found = f"; it {where} {len(shown)}: {names}" if shown else ""
        raise UserError(f"{folder}: a folder, not a file of weights{found}")
    log.info("weights %s: read from %s", folder, files[0].name)
    return files[0]


def _weights(paths: Iterable[Path]) -> list[Path]:
    named = (path for path in sorted(paths) if path.suffix in _SUFFIXES or path.name in _MDISTILLER)
    return [path for path in named if path.is_file()]


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file. Raises UserError naming it if it is broken or, where it carries one, not of its hash."""
    return _safetensors(path)[0]


def _safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, object]]:
    """The tensors, and our own entry of the header."""
    try:
        state = load_file(path)
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get(ABOUT, "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from error
    wanted = about.get(HASH) if isinstance(about, dict) else None
    if wanted is not None and wanted != weight_hash(state):
        raise UserError(f"{path}: damaged: the weights in it are not those that were written (their hash differs)")
    return state, about if isinstance(about, dict) else {}


def read_about(path: Path) -> dict[str, object]:
    """Our own entry of the header of a safetensors file; {} without one, and for what is no such file."""
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get(ABOUT, "{}"))
    except (SafetensorError, OSError, ValueError):
        return {}
    return about if isinstance(about, dict) else {}


def damaged_records(path: Path) -> tuple[int, int]:
    """How many records of a zip archive (what torch.save writes) differ from their checksums, and how many there are.

    Costs one pass over the file: 45 ms for 100 MB, where torch.load takes 200. Raises BadZipFile.
    """
    with zipfile.ZipFile(path) as archive:
        names = [info for info in archive.infolist() if info.file_size]
        return sum(not _is_whole(archive, info) for info in names), len(names)


def _is_whole(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bool:
    try:
        with archive.open(info) as record:
            while record.read(1 << 20):
                pass
    except (zipfile.BadZipFile, zlib.error, EOFError):
        return False
    return True


def _check_archive(path: Path) -> None:
    """Refuse an archive that is damaged or would fill the memory. Some programs write no checksums: all are wrong."""
    if not zipfile.is_zipfile(path):
        return
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(info.file_size for info in archive.infolist())
    if unpacked > 10 * size + _BOMB:
        raise UserError(
            f"{path}: its {size:,} bytes unpack to {unpacked:,}, which no checkpoint of torch does; it is not read"
        )
    wrong, records = damaged_records(path)
    if 0 < wrong < records:
        raise UserError(
            f"{path}: the checkpoint is damaged ({wrong} of its {records} parts differ from their checksum)"
        )


def _unpickle(path: Path) -> Any:
    try:
        _check_archive(path)
        with torch.serialization.safe_globals(_harmless()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # arbitrary bytes make the unpickler fail in arbitrary ways
        raise UserError(f"{path}: {_reason(path, error)}") from error


def _harmless() -> list[Any]:
    """What training programs keep beside the weights: argparse's options, and NumPy numbers under both their names."""
    scalar = np.float64(0).__reduce__()[0]  # numpy.core.multiarray until NumPy 2, then numpy._core.multiarray
    names = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    kinds = {type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64, np.int32, np.bool_)}
    return [argparse.Namespace, *names, np.dtype, *kinds]


def _reason(path: Path, error: Exception) -> str:
    message = str(error)
    if isinstance(error, pickle.UnpicklingError) and "GLOBAL " in message:
        culprit = message.split("GLOBAL ")[-1].split(" ")[0].strip("`'\",.")
        return (
            f"holds Python objects besides tensors ({culprit}), which are not loaded because they could run code; "
            "save the network's state_dict() instead"
        )
    with path.open("rb") as file:
        start = file.read(20)
    if start.startswith((b"PK", b"\x80")):  # a zip archive, or the start of a pickle
        return f"the checkpoint is damaged or incomplete ({type(error).__name__})"
    return f"not a PyTorch checkpoint (it begins with {start!r})"


def _chosen(path: Path, content: Any, key: str | None) -> tuple[str | None, Mapping[str, Tensor]]:
    """The state_dict that `key` names, or the first of those in a checkpoint's content; says what else there is."""
    if key is not None:
        return key, _named(path, content, key)
    if _is_state(content):
        return None, content
    entries = list(_entries(content))
    if not entries:
        names = f" of {some(content, _SHOWN)}" if isinstance(content, Mapping) else ""
        raise UserError(
            f"{path}: no weights in it, only a {type(content).__name__}{names}; "
            f"expected a state_dict or one under {', '.join(_KEYS)}"
        )
    name, state = entries[0]
    others = ", ".join(other for other, _ in entries[1:])
    average = name.rpartition(".")[2] in _AVERAGES
    if others:
        log.info("weights %s: %s taken; the file also has %s (teacher.checkpoint_key)", path, name, others)
    elif average:
        log.info("weights %s: %s taken, a moving average; the file has no other", path, name)
    return name, state


def _named(path: Path, content: Any, key: str) -> Mapping[str, Tensor]:
    """What lies under a key: an entry, or the tensors of a state_dict whose names begin with it."""
    found = content
    for part in [key] if isinstance(content, Mapping) and key in content else key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    state = found if _is_state(found) else next((state for _, state in _entries(found)), None)
    if state is None and (own := next((state for _, state in _entries({"state_dict": content})), None)):
        inner = {name.removeprefix(f"{key}."): value for name, value in own.items() if name.startswith(f"{key}.")}
        state = inner or None
    if state is None:
        known = ", ".join(name for name, _ in _entries(content)) or "none beside the weights themselves"
        raise UserError(f"{path}: has no weights under checkpoint_key = {key}; it has: {known}")
    return state


def _entries(content: Any, prefix: str = "") -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    """Every state_dict under one of the usual keys, with the keys that lead to it, the networks' before averages."""
    if isinstance(content, Mapping) and prefix.count(".") < _DEPTH:
        for key in (*_KEYS, *_AVERAGES):
            found = content.get(key)
            if _is_state(found):
                yield f"{prefix}{key}", found
            else:
                yield from _entries(found, f"{prefix}{key}.")


def _is_state(content: Any) -> TypeGuard[Mapping[str, Tensor]]:
    named = isinstance(content, Mapping) and bool(content)
    return named and all(isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items())


def _problems(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    # Files older than PyTorch 0.4.1 lack the batch counters; load_state_dict starts them at 0.
    missing = [name for name in expected if name not in state and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in state if name not in expected]
    shapes = [
        f"{name} {list(value.shape)} instead of {list(expected[name].shape)}"
        for name, value in state.items()
        if name in expected and value.shape != expected[name].shape
    ]
    labelled = (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
    return [f"{len(names)} {label} ({some(names, _SHOWN)})" for label, names in labelled if names]


def _hint(model: nn.Module, state: Mapping[str, Tensor], renamed: Mapping[str, Tensor]) -> str:
    """What the weights are instead: this network's for another number of classes, or another network's."""
    known = recognise(state)
    hint = f". They fit {known}" if known else ""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    last = f"{names[-1]}.weight" if names else ""
    if last in renamed and renamed[last].dim() == 2:
        given, wanted = len(renamed[last]), len(model.state_dict()[last])
        if given != wanted:
            hint = f". The file's classifier has {given} classes, this network's {wanted}{hint}"
    return hint
