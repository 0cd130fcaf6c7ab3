"""Where and in which precision a training runs."""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
from torch import nn

from kdbench.engine.memory import keep_freed_memory
from kdbench.engine.options import TrainerOptions
from kdbench.errors import UserError


class Placement(NamedTuple):
    """The device, the networks' compute type and their memory layout. Losses are always float32."""

    device: torch.device
    dtype: torch.dtype
    channels_last: bool

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context in which networks run: bfloat16 matrix products, or nothing at all."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def put(self, module: nn.Module) -> nn.Module:
        """Move a network to the device in its memory layout."""
        module = module.to(self.device)
        return module.to(memory_format=torch.channels_last) if self.channels_last else module

    def cast(self, network: nn.Module) -> nn.Module:
        """Keep the weights of a frozen network's convolutions and linear layers in the compute type, in place.

        The same numbers: autocast would cast them, but anew in every call.
        """
        for module in network.modules():
            if type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear):
                module.to(self.dtype)
        return network

    def wait(self) -> None:
        """Until the device has done all that was asked of it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()

    @property
    def precision(self) -> str:
        return "bf16" if self.dtype == torch.bfloat16 else "fp32"


def place(options: TrainerOptions) -> Placement:
    """Resolve `auto`. Raises UserError if the named device or precision is not to be had here."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = named_device(options.device)
    if device.type == "cpu":
        keep_freed_memory()
    bf16 = options.precision == "bf16" or (options.precision == "auto" and _has_fast_bf16(device))
    if bf16 and device.type == "mps":
        raise UserError("trainer.precision = bf16: must be fp32 on MPS")
    channels_last = device.type != "mps" if options.channels_last == "auto" else bool(options.channels_last)
    return Placement(device, torch.bfloat16 if bf16 else torch.float32, channels_last)


def named_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"trainer.device = {name}: must be auto, cpu, cuda, cuda:<number> or mps") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"trainer.device = {name}: torch sees {torch.cuda.device_count()} CUDA devices here")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("trainer.device = mps: torch sees no MPS device here")
    return device


def _has_fast_bf16(device: torch.device) -> bool:
    # Only on GPUs of compute capability 8 and up. On a CPU the small networks of the field gain little, and fp32
    # keeps runs on different machines comparable.
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
