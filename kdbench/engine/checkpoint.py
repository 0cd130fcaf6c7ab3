"""Weights and checkpoints as files that are whole or not there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kdbench.engine.writer import Writer, snapshot
from kdbench.errors import UserError
from kdbench.files import write_atomically

CHECKPOINT, BEST, STUDENT = "checkpoint.pt", "best.safetensors", "student.safetensors"


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


@dataclass(frozen=True)
class Checkpoints:
    """The folder that a training is continued from, and its best weights, written in the background."""

    folder: Path
    every: int = 1
    about: Mapping[str, str] = field(default_factory=dict)  # kept in the header of the weights file

    def after(self, epoch: int, state: Callable[[], dict[str, Any]], writer: Writer, always: bool = False) -> None:
        """Keep the state where that is due after this epoch (counted from 0), or `always`."""
        if always or (epoch + 1) % self.every == 0:
            kept = snapshot(state())
            writer.add(lambda: save_checkpoint(self.folder / CHECKPOINT, kept))

    def keep_best(self, network: nn.Module, writer: Writer) -> None:
        weights = snapshot(network.state_dict())
        writer.add(lambda: save_state(self.folder / BEST, weights, dict(self.about)))


def resume_epoch(folder: Path) -> tuple[int, dict[str, Any] | None]:
    """The number of whole epochs in a run folder's checkpoint, and the checkpoint."""
    if not (folder / CHECKPOINT).exists():
        return 0, None
    state = load_checkpoint(folder / CHECKPOINT)
    return state["epochs_done"], state
