"""Where, in which precision and with which kernels a training runs."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import os
import platform
import sys
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kdbench import world
from kdbench.engine.options import DEVICES, OptimizerOptions, TrainerOptions
from kdbench.engine.proof import proven
from kdbench.errors import UserError, require
from kdbench.types import CorpusInfo, Info

log = logging.getLogger(__name__)

# `auto` keeps off what scripts/device_check has not passed on a GPU yet: it was written and tested without one, and
# a training that is fast and wrong is worth nothing. `on` asks for it all the same. The script's page names the flags
# that its results justify. Of recorded steps every machine finds out for itself (kdbench/engine/proof.py).
PROVEN_COMPILE = False  # trainer.compile: fused kernels of the student's network
GRAPHED_OPTIMIZERS = ("sgd", "adam", "adamw")  # torch's own; most of timm's count their steps in Python
AUTO_PRECISION = "bf16"  # of trainer.precision=auto on a GPU that is quick in it: not measured against tf32 yet

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Placement(NamedTuple):
    """The device, the networks' compute type and their memory layout. Losses are always float32."""

    device: torch.device
    dtype: torch.dtype
    channels_last: bool
    tf32: bool = False  # whether float32 products on a GPU keep 10 bits of the mantissa

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context in which networks run: matrix products of 16 bits, or nothing at all."""
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
        """What runs, for result.json: fp32, tf32, bf16 or fp16."""
        names = {dtype: name for name, dtype in _TYPES.items()}
        return names.get(self.dtype, "tf32" if self.tf32 else "fp32")


def place(options: TrainerOptions) -> Placement:
    """Resolve `auto`, and set what torch keeps for the whole process: threads, device, TF32, determinism.

    Raises UserError if the named device or precision is not to be had here.
    """
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = named_device(options.device)
    if device.type == "cpu":
        keep_freed_memory()
    if device.type == "cuda":
        torch.cuda.set_device(device)  # streams and graphs are of the current device, whatever the tensors are on
    precision = _chosen(options.precision, device)
    allowed = {"cpu": ("fp32", "bf16"), "mps": ("fp32",)}.get(device.type, ("fp32", "tf32", "bf16", "fp16"))
    require(precision in allowed, "trainer.precision", precision, f"auto, {' or '.join(allowed)} on {device.type}")
    tf32 = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
    _set_deterministic(options.deterministic)
    channels_last = device.type != "mps" if options.channels_last == "auto" else bool(options.channels_last)
    return Placement(device, _TYPES.get(precision, torch.float32), channels_last, tf32)


def wants_graph(options: TrainerOptions, device: torch.device, optimizer: OptimizerOptions) -> bool:
    """Whether a student's step is to be recorded. Raises UserError where `on` cannot be had."""
    fits, kept = optimizer.name in GRAPHED_OPTIMIZERS, not options.grad_checkpointing
    if options.cuda_graph == "on":
        require(can_record(device), "trainer.cuda_graph", "on", f"auto or off: this run is on {device.type}")
        known = ", ".join(GRAPHED_OPTIMIZERS)
        require(fits, "trainer.cuda_graph", "on", f"auto or off unless optimizer.name is one of {known}")
        # It reads the random state before each block, which torch refuses in a recording.
        require(kept, "trainer.cuda_graph", "on", "auto or off with trainer.grad_checkpointing=true")
        return True
    wanted = options.cuda_graph == "auto" and world.size() == 1
    return wanted and can_record(device) and fits and kept and proven(device)


def can_record(device: torch.device) -> bool:
    return device.type == "cuda"


def _set_deterministic(wanted: bool) -> None:
    """Kernels that add up in one order on a GPU; what has none is warned about by torch, by name."""
    if wanted or torch.are_deterministic_algorithms_enabled():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(wanted, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing reads it
    torch.backends.cudnn.deterministic = wanted


@contextlib.contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """A block whose work on a GPU is in a stream of its own: autograd remembers the stream of a training's first steps,
    and one that is to be recorded may not be the default stream."""
    if device.type != "cuda":
        yield
        return
    here, own = torch.cuda.current_stream(device), _stream(device)
    own.wait_stream(here)
    with torch.cuda.stream(own):
        yield
    here.wait_stream(own)


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all trainings of the process: memory that torch keeps for a stream serves the next training, too."""
    return torch.cuda.Stream(device)


@functools.cache
def keep_freed_memory() -> bool:
    """Let glibc keep freed memory for the next allocation; whether it does.

    By default it hands every activation back to the kernel, which zeroes its pages again in the next step: 4,000 page
    faults in a step of resnet8 at batch 64, 10 to 17 % of its time on one thread. Costs no memory at the peak, but the
    process stays as large as it was there.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    # Older versions refuse a threshold above 32 MiB.
    served = mallopt(_MMAP_THRESHOLD, 1 << 30) or mallopt(_MMAP_THRESHOLD, 32 << 20)
    return bool(served and mallopt(_TRIM_THRESHOLD, 2**31 - 1))


def evaluation_batch(options: TrainerOptions, device: torch.device, info: Info) -> int:
    """Samples a batch in evaluation. On a GPU small batches of small inputs are launches and little else; 2,500 images
    of 32x32 take 0.1 GB in resnet20."""
    if options.eval_batch_size != "auto":
        return options.eval_batch_size
    if isinstance(info, CorpusInfo):  # 8 MB of logits
        return min(500, max(1, 2**21 // (info.predicted * info.num_classes)))
    small = info.example(1).numel() <= 3 * 64**2
    return 2500 if device.type == "cuda" and small else 500


def named_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError("trainer.device", name, DEVICES) from error
    require(device.type in ("cpu", "cuda", "mps"), "trainer.device", name, DEVICES)
    if device.type == "cuda":
        count, index = torch.cuda.device_count(), device.index or 0
        if world.size() > 1:
            require(device.index is None, "trainer.device", name, "auto, cuda or cpu with torchrun: each its own GPU")
            index = world.local()
        require(index < count, "trainer.device", f"cuda:{index}", f"another: torch sees {count} CUDA devices here")
        device = torch.device("cuda", index)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("trainer.device", name, "another: torch sees no MPS device here")
    return device


def _in_float32(self: nn.Conv2d, image: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return self._conv_forward(image.float(), self.weight, self.bias)


def _chosen(precision: str, device: torch.device) -> str:
    """What `auto` stands for on a device; on a GPU it is said, and so is a bf16 that a processor has to imitate.

    On a CPU fp32 keeps runs on different machines comparable, and where bfloat16 is imitated a step of resnet20 took 2
    (oneDNN held to AVX512-VNNI) to 10 times (AVX2) as long as in float32. GPUs below compute capability 8 have neither
    bfloat16 nor TF32, and MPS is used in float32 alone.
    """
    native = _has_bf16(device)
    if precision == "auto":
        precision = AUTO_PRECISION if device.type == "cuda" and native else "fp32"
        if device.type != "cpu":
            lacking = "" if native or device.type != "cuda" else ", which has no bfloat16 of its own"
            _say_once(logging.INFO, f"trainer.precision=auto is {precision} on {_name(device)}{lacking}")
    elif precision == "bf16" and not native:
        said = f"trainer.precision=bf16: {_name(device)} has no bfloat16 of its own, float32 may well be quicker"
        _say_once(logging.WARNING, said)
    return precision


def _has_bf16(device: torch.device) -> bool:
    """Whether matrix products of bfloat16 are the hardware's own. Of processors that are not x86 nobody is asked."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu" or platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    asked = (getattr(torch.cpu, f"_is_{name}_supported", lambda: True) for name in ("avx512_bf16", "amx_tile"))
    return any(ask() for ask in asked)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"this {device.type}"


@functools.cache
def _say_once(level: int, text: str) -> None:
    """Once a process: networks are placed for every training, and for what is measured before it."""
    log.log(level, "%s", text)


def allows_tf32(backend: Any) -> bool:
    """Whether torch.backends.cudnn or .cuda.matmul uses TF32. torch tells by this flag until somebody sets its newer
    ones, and from then on raises."""
    try:
        return bool(backend.allow_tf32)
    except RuntimeError:
        return bool(getattr(backend, "conv", backend).fp32_precision == "tf32")
