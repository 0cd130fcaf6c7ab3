"""Reading weights from any checkpoint file, and putting them into a network, strictly."""

from __future__ import annotations

import argparse
import hashlib
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from kdbench.errors import UserError
from kdbench.models.names import published_names
from kdbench.models.recognise import recognise

# Where training programs keep the weights inside a checkpoint, most specific first.
_KEYS = ("state_dict", "model_state_dict", "model_state", "student", "model", "net", "network", "weights", "params")
_WRAPPERS = ("module.", "_orig_mod.")  # DataParallel, torch.compile: never a part of a network's own names
_SHOWN = 3  # names of each kind in a message


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The weights in a file, by parameter name, on the CPU.

    Reads `.safetensors`, a saved state_dict, and a training checkpoint that holds one under `state_dict`, `model`,
    `net` or the like (RepDistiller, mdistiller, timm, kdbench); drops `module.` prefixes, and of a distiller's
    weights keeps the student's. Files are data: unpickled with weights_only, plus argparse.Namespace (RepDistiller
    keeps its options in `*_last.pth`) and NumPy numbers. Raises UserError naming the file if it is missing, empty,
    broken, not a checkpoint, or holds no weights.
    """
    path = Path(path)
    _check_file(path)
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _unpickle(path)
    state = _find_state(content)
    if state is None:
        names = f" of {_some(map(str, content))}" if isinstance(content, Mapping) else ""
        raise UserError(
            f"{path}: no weights in it, only a {type(content).__name__}{names}; "
            f"expected a state_dict or one under {', '.join(_KEYS)}"
        )
    return _plain_names(state)


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


def _check_file(path: Path) -> None:
    if path.is_dir():
        inside = path / "student.safetensors"
        hint = f"; its weights are in {inside}" if inside.is_file() else ""
        raise UserError(f"{path}: a folder, not a file of weights{hint}")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty")
    with path.open("rb") as file:
        if file.read(40).startswith(b"version https://git-lfs"):
            raise UserError(f"{path}: a Git LFS pointer, not the weights themselves; run `git lfs pull`")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from error


def _unpickle(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(_harmless()):
            return torch.load(path, map_location="cpu", weights_only=True)
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


def _find_state(content: Any) -> Mapping[str, Tensor] | None:
    """The state_dict in a checkpoint's content: itself, or under one of the usual keys."""
    if not isinstance(content, Mapping) or not content:
        return None
    if all(isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()):
        return content
    found = (_find_state(content[key]) for key in _KEYS if key in content)
    return next((state for state in found if state is not None), None)


def _plain_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without wrappers' prefixes; of a distiller's weights ("student.", "teacher.", adapters) only the student's."""
    plain = dict(state)
    while (prefix := next((w for w in _WRAPPERS if all(name.startswith(w) for name in plain)), None)) is not None:
        plain = {name[len(prefix) :]: value for name, value in plain.items()}
    students = {name[len("student.") :]: value for name, value in plain.items() if name.startswith("student.")}
    return students or plain


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
    return [f"{len(names)} {label} ({_some(names)})" for label, names in labelled if names]


def _some(names: Any) -> str:
    names = list(names)
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


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
