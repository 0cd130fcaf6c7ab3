"""Files that are whole or not there: everything a run writes goes through here."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kdbench.errors import UserError


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it into place.

    A process killed at any moment leaves the old file or the new one, never a half.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=1, sort_keys=False, allow_nan=True) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> Any:
    """Raises UserError naming the file if it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not a readable JSON file ({error})") from error


def save_weights(path: Path, network: nn.Module, about: dict[str, str]) -> None:
    """A network's weights as safetensors; `about` is kept in the file's header."""
    save_state(path, network.state_dict(), about)


def save_state(path: Path, weights: Mapping[str, Tensor], about: dict[str, str]) -> None:
    """A state dict as safetensors."""
    # contiguous: safetensors refuses channels_last strides; clone: tied tensors must not share memory.
    state = {k: v.detach().to("cpu").clone(memory_format=torch.contiguous_format) for k, v in weights.items()}
    write_atomically(path, lambda temporary: save_file(state, temporary, metadata=about))


def load_weights(path: Path) -> dict[str, Tensor]:
    return load_file(path)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    write_atomically(path, lambda temporary: torch.save(state, temporary))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint on the CPU. Raises UserError if the file cannot be read."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (
        Exception
    ) as error:  # torch.load raises whatever its unpickler meets: RuntimeError, EOFError, UnpicklingError, ...
        raise UserError(
            f"{path}: not a readable checkpoint ({type(error).__name__}). Delete it, or use force=true."
        ) from error
