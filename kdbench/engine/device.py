"""Where and in which precision a training runs."""

from __future__ import annotations

import contextlib
import types
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kdbench.engine.memory import keep_freed_memory
from kdbench.engine.options import TrainerOptions
from kdbench.errors import UserError

# `auto` keeps CUDA graphs and compilation off until scripts/device_check.py has passed on a GPU: they were written and
# tested without one, and a training that is fast and wrong is worth nothing. `on` asks for them all the same.
PROVEN_ON_CUDA = False


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
        for part in filter(self._stays_float32, module.modules()):
            # On the object, not the class: names and shapes of the weights stay, and so do copies of the network.
            part.forward = types.MethodType(_in_float32, part)  # type: ignore[assignment]
        return module.to(memory_format=torch.channels_last) if self.channels_last else module

    def cast(self, network: nn.Module) -> nn.Module:
        """Keep the weights of a frozen network's convolutions and linear layers in the compute type, in place.

        The same numbers: autocast would cast them, but anew in every call.
        """
        for module in network.modules():
            if type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear) and not self._stays_float32(module):
                module.to(self.dtype)
        return network

    def _stays_float32(self, module: nn.Module) -> bool:
        """Whether it is a depthwise convolution on a CPU under bfloat16, for which oneDNN has no quick gradient.

        A step of mobilenetv2_half took 1.9 times as long as in float32, and takes as long with this; shufflenetv2 went
        from 1.4 times as long to 0.8.
        """
        low = self.device.type == "cpu" and self.dtype == torch.bfloat16
        return low and isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1

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


def native_bf16() -> bool:
    """Whether this CPU multiplies matrices of bfloat16 in hardware (AVX512-BF16 or AMX)."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in checks)


def _in_float32(self: nn.Conv2d, image: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return self._conv_forward(image.float(), self.weight, self.bias)


def _has_fast_bf16(device: torch.device) -> bool:
    # Only on GPUs of compute capability 8 and up. On a CPU the small networks of the field gain little, and fp32
    # keeps runs on different machines comparable.
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
