"""Adapting a trained network to data that it was not trained on: its own normalisation, its classes by name."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from kdbench.data.bundle import Bundle, Split
from kdbench.engine.checkpoint import STUDENT
from kdbench.errors import UserError, show
from kdbench.files import read_object
from kdbench.models.interface import Interface, adapt, channels_of
from kdbench.models.weights import read_about
from kdbench.runs.folder import NETWORK, interface_of, read_info
from kdbench.types import CorpusInfo, Info, TokenInfo

log = logging.getLogger(__name__)


def interface_of_run(folder: Path) -> Interface:
    """What a run's network was trained with. Folders of the first edition know the classes alone."""
    path = folder / NETWORK
    about = read_object(path)
    own, info = Interface.read(about, str(path)), read_info(about.get("info"))
    if info is None or (own.classes is not None and len(own.classes) != info.num_classes):
        raise UserError(f"{path}: damaged: it does not name the classes that its network has")
    _refuse_edited(path, about, read_about(folder / STUDENT))
    return own


def _refuse_edited(path: Path, about: Mapping[str, object], written: Mapping[str, object]) -> None:
    """Raise a UserError if a network.json says something else than the header of the weights, which has it too."""
    for key in ("classes", "columns", "mean", "std", "size", "resize"):
        if key in written and key in about and written[key] != about[key]:
            raise UserError(
                f"{path}: its {key} ({show(about[key])}) is not what the network was trained with as {STUDENT} has "
                f"it ({show(written[key])}): put it back as it was"
            )


def fitted(
    network: nn.Module, own: Interface, data: Bundle, key: str, value: object, info: Info | None = None
) -> nn.Module:
    """A network that was trained with `own` for these data; one log line says what had to be done for that.

    `info`: what it was built for, where that may be other data. Raises UserError naming the key that it comes from.
    """
    if info is not None and not _takes(info, own, data):
        allowed = f"trained on data like {data.name}, {data.info}; its network is for {info}"
        raise UserError(key, str(value), allowed)
    adapted, said = _adapted(network, own, data, key, value)
    if said:
        log.warning("%s = %s: %s", key, value, "; ".join(said))
    return adapted


def as_trained(network: nn.Module, info: Info, folder: Path, data: Bundle) -> tuple[nn.Module, Bundle]:
    """A run's network for these data, and the data normalised as the run's were; a log line says what differs.

    So its figures on the run's own data are those of the run to the last bit, and a shift of other data is not
    measured away. Raises UserError for other classes, and for inputs of another size.
    """
    own = interface_of_run(folder)
    if data.reading is not None and data.reading.tokeniser.name == own.vocabulary:  # it was the teacher
        data = data.read_by_teacher()
    if own.vocabulary and data.vocabulary and own.vocabulary != data.vocabulary:
        raise UserError("dataset.tokenizer", data.vocabulary, f"{folder}, whose network reads {own.vocabulary}")
    if isinstance(info, TokenInfo) and isinstance(data.info, TokenInfo) and data.info.length < info.length:
        data = _padded(data, info.length)
    if _sizes(info) != _sizes(data.info) or not _takes(info, own, data):
        raise UserError("dataset", f"{data.name}, {data.info}", f"like the run's: {info}")
    said = _adapted(network, own, data, "run", folder)[1]
    if said:
        log.warning("%s: %s", folder, "; ".join(said))
    if data.mean and own.mean and own.std:
        mean, std = (channels_of(values, len(data.mean)) for values in (own.mean, own.std))
        data = replace(data, mean=mean, std=std)
    return _adapted(network, own, data, "run", folder)[0], data


def _padded(data: Bundle, length: int) -> Bundle:
    """Texts with padding behind them up to what a network was made for; its answers do not depend on it."""

    def padded(split: Split) -> Split:
        assert isinstance(split.inputs, Tensor)
        return replace(split, inputs=F.pad(split.inputs, (0, length - split.inputs.shape[1])))

    val = None if data.val is None else padded(data.val)
    return replace(data, train=padded(data.train), transfer=padded(data.transfer), val=val, test=padded(data.test))


def _adapted(network: nn.Module, own: Interface, data: Bundle, key: str, value: object) -> tuple[nn.Module, list[str]]:
    return adapt(network, own, interface_of(data), key, value)


def _takes(info: Info, own: Interface, data: Bundle) -> bool:
    """Whether a network for `info` takes these inputs; images and texts may differ in size, classes with names too.
    Blocks of running text may not: a network is made for so many predictions."""
    counts = own.classes is not None or info.num_classes == data.info.num_classes
    if type(info) is not type(data.info):
        return False
    same = _sizes(info) == _sizes(data.info) if isinstance(info, CorpusInfo) else info[1] == data.info[1]
    return same and counts


def _sizes(info: Info) -> list[int]:
    """Of what it reads; what the classes and words are is compared by name."""
    return [size for size in info[1:] if isinstance(size, int)]
