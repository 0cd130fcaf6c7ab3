"""Weights and checkpoints as files that are whole or not there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kdbench.errors import UserError
from kdbench.files import write_atomically


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
