"""What the last bit of a teacher's logits depends on: the key of a table."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from kdbench.arguments.code import code_of
from kdbench.data.batches import TrainingBatches
from kdbench.data.bundle import Bundle
from kdbench.tables.file import Shape
from kdbench.teachers.live import LiveTeacher
from kdbench.types import Outputs


def table_key(
    live: LiveTeacher, weights: str, data: Bundle, batches: TrainingBatches, precision: str
) -> tuple[dict[str, object], Shape]:
    """The key of a teacher's table for the views of `batches`, as plain values, and the table's shape.

    On a CPU `numbers`, the hash of what the teacher answers to a fixed probe, stands for everything that is not named:
    torch and its libraries, the instruction set, the number of threads, the code of the networks and of the
    augmentation. On a GPU a library may choose another kernel each time, so there its version and the code count.
    Costs one chunk through the teacher.
    """
    assert batches.views is not None
    images, answer = probe(live, data, batches)
    key = {
        "weights": weights,
        "network": _sha(repr(live.network)),
        "images": data.fingerprint,
        "augment": repr(batches.augment),
        "mean": _listed(data.mean),
        "std": _listed(data.std),
        "precision": precision,
        "layout": list(images.stride()),
        "chunk": live.chunk,
        **_arithmetic(live.network, answer.logits),
    }
    own = _own_code([*live.network.modules(), batches.augment]) if torch.device(batches.device).type != "cpu" else {}
    key |= {"own code": own} if own else {}  # keys without any stay as they were
    return key, Shape(data.num_rows, batches.views, answer.logits.shape[1], answer.logits.dtype)


def key_name(key: Mapping[str, object]) -> str:
    """16 hex digits: what the table's file is called."""
    return _sha(json.dumps(key, sort_keys=True))[:16]


def probe(live: LiveTeacher, data: Bundle, batches: TrainingBatches) -> tuple[Tensor, Outputs]:
    """One chunk of fixed random inputs in views from all over the enumeration, normalised, and the teacher's answer."""
    inputs = data.info.example(live.chunk, batches.device, data.train.inputs.shape[1:])
    view = torch.arange(live.chunk) * 7919 % (batches.views or 1)  # a prime: no two alike where there are more views
    prepared = batches.normalise(batches.augment(inputs, view.to(batches.device)))
    return prepared, live.outputs(prepared)


def _arithmetic(network: nn.Module, logits: Tensor) -> dict[str, object]:
    """What the answers' last bits depend on: on a CPU the answers to the probe themselves, on a GPU its name, libraries
    and the networks' code."""
    device = logits.device
    if device.type == "cpu":
        return {"device": "cpu", "numbers": _sha(logits.contiguous().view(torch.uint8).numpy().tobytes())}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    libraries = [torch.__version__, torch.backends.cudnn.version() if device.type == "cuda" else None]
    return {"device": name, "libraries": libraries, "code": _code(network)}


def _code(network: nn.Module) -> str:
    """A hash of the source files of all classes that a network is made of, torch's own left out."""
    classes = {type(module) for module in network.modules()}
    sources = {inspect.getsourcefile(one) for one in classes if not one.__module__.startswith("torch.")}
    texts = []
    for source in sorted(filter(None, sources)):
        with open(source, "rb") as file:
            texts.append(file.read())
    return _sha(b"\0".join(texts))


def _own_code(parts: Iterable[object]) -> dict[str, str]:
    """Digests of the user's own modules that the parts come from, and that these import."""
    found: dict[str, str] = {}
    for kind in {type(part) for part in parts}:
        found |= code_of(kind)
    return dict(sorted(found.items()))


def _listed(numbers: Sequence[float]) -> list[float] | str:
    """Few numbers as they are; those of vectors with many dimensions as a hash, since a key's place is limited."""
    return list(numbers) if len(numbers) <= 64 else _sha(repr(list(numbers)))


def _sha(value: str | bytes) -> str:
    return hashlib.sha256(value.encode() if isinstance(value, str) else value).hexdigest()
