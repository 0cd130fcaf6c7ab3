"""Interface of a trained network: what its inputs and its logits mean. Kept with its weights, compared by name.

A network sees images through the mean and standard deviation that it was trained with, and its logits are of classes
in the order that it was trained with. `adapt` makes it fit data that have others, exactly. A network that comes with
published weights has their interface as its attribute `published`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdbench.errors import UserError, some
from kdbench.models.base import last_layer
from kdbench.types import Outputs, Parts

_NUMBERED = re.compile(r"(?:class[ _-]?)?0*(\d+)", re.IGNORECASE)  # what data are named that have no names of classes
_SHOWN = 3  # names in a message


@dataclass(frozen=True)
class Interface:
    """What a network was trained with, or what data are; None: not known. Plain values, so `kept` of it is JSON.

    mean and std: of a channel of pixel / 255, or of a vector's dimension; () for token ids. `published`: names that
    are a library's own way to name the classes, which data may name otherwise.
    """

    dataset: str = ""
    classes: tuple[str, ...] | None = None  # in the order of the logits
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    size: int | None = None  # pixels a side
    resize: int | None = None  # pixels of the shorter side before the middle is cut out
    vocabulary: str | None = None  # what token ids mean: the tokeniser's name
    columns: tuple[str, ...] | None = None  # a table's inputs by name, in order, before neighbours are joined to them
    published: bool = False

    def kept(self) -> dict[str, object]:
        """As network.json and the header of a safetensors file hold it; those of images say nothing of tokens, those
        of all but tables nothing of columns."""
        left_out = {"published"} | {key for key in ("vocabulary", "columns") if not getattr(self, key)}
        return {key: value for key, value in asdict(self).items() if key not in left_out}

    @classmethod
    def read(cls, about: Mapping[str, object], source: str) -> Interface:
        """What was kept; what older files lack is not known. Raises UserError naming `source` for what is damaged."""
        classes, columns, mean, std = (_listed(about, key, source) for key in ("classes", "columns", "mean", "std"))
        for key, names in (("classes", classes), ("columns", columns)):
            _refuse(not all(isinstance(name, str) for name in names or ()), source, key)
        _refuse(not all(map(_is_finite, (*(mean or ()), *(std or ())))), source, "mean or std")
        _refuse(len(mean or ()) != len(std or ()) or min(std or (1,)) <= 0, source, "std")
        size, resize = (
            value if isinstance(value := about.get(key), int) and value is not True else None
            for key in ("size", "resize")
        )
        vocabulary = about.get("vocabulary")
        if not isinstance(vocabulary, str | None):
            raise _damaged(source, "vocabulary")
        return cls(str(about.get("dataset") or ""), classes, mean, std, size, resize, vocabulary, columns)


class Adapted(nn.Module):
    """A network behind other data's inputs and labels: it sees input * scale + shift, and answers with its logits in
    the order of the data's classes.

    The change of normalisation is linear, so it is that of the pixels themselves, whatever they went through (padding,
    mixing); it costs two passes over the inputs. Where classes are left out, the softmax is the network's own
    distribution given that the class is one of those that are there.
    """

    normalise: Tensor | None
    order: Tensor | None

    def __init__(self, network: nn.Module, normalise: Tensor | None, order: Sequence[int] | None) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("normalise", normalise)  # [2, C]: scale and shift of each channel or dimension
        self.register_buffer("order", None if order is None else torch.tensor(list(order)))

    @property
    def joints(self) -> tuple[str, ...]:
        """Those of the network."""
        return getattr(self.network, "joints", ())

    @property
    def rectified(self) -> bool:
        """As the network's."""
        return bool(getattr(self.network, "rectified", True))

    def forward(self, inputs: Tensor, **enter: str) -> Outputs:
        """inputs [B, C, ...] as the data are normalised, or the map of a joint to `enter` -> logits [B, classes of the
        data], the network's features."""
        if self.normalise is not None and not enter:
            ones = [1] * (inputs.dim() - 2)
            scale, shift = self.normalise.to(inputs.dtype).view(2, 1, -1, *ones)
            inputs = inputs * scale + shift
        outputs = self.network(inputs, **enter)
        if self.order is None:
            return outputs
        return Outputs(outputs.logits.index_select(1, self.order), outputs.features)

    def extra_repr(self) -> str:
        """Whole, since a table of logits is keyed by it."""
        parts = {name: value.tolist() for name, value in self.named_buffers(recurse=False)}
        return ", ".join(f"{name}={value}" for name, value in parts.items())


def adapt(network: nn.Module, own: Interface, data: Interface, key: str, value: object) -> tuple[nn.Module, list[str]]:
    """The network for these data, and in words what was done or is not known; the same object if nothing was to do.

    Raises UserError for classes that the network does not know, naming them and the key whose value the network is, and
    for token ids and columns of a table that mean something else.
    """
    if own.vocabulary and data.vocabulary and own.vocabulary != data.vocabulary:
        raise UserError(
            key,
            value,
            f"a network that reads the token ids of dataset {data.dataset} ({data.vocabulary})",
            hint=f"It was trained with others ({own.vocabulary}); dataset.teacher_tokenizer gives them, and of running "
            "text dataset.tokenizer",
        )
    _refuse_other_columns(own, data, key, value)
    order, said = class_order(own, data, key, value)
    normalise = None
    if data.mean and own.mean is None:
        said.append(
            f"the mean and std that it was trained with are not known; those of dataset {data.dataset} are used"
        )
    elif data.mean and own.std and (own.mean, own.std) != (data.mean, data.std):
        normalise = _change(own, data)
        said.append(f"sees inputs with the mean and std that it was trained with ({_normalisation(own, data)})")
    if own.size and data.size and own.size != data.size:
        said.append(f"was trained with {own.size} pixels a side, dataset {data.dataset} has {data.size}")
    same = normalise is None and order is None
    return network if same else Adapted(network, normalise, order), said


def parts_of(network: nn.Module) -> Parts:
    """Layers of a trained network for losses to read; a classifier in the order of the data's classes."""
    own = plain(network)
    known: Any = getattr(own, "norms_before_relu", dict)
    norms = known()
    try:
        classifier = last_layer(own)
    except UserError:
        return Parts(None, norms, network)
    order = network.order if isinstance(network, Adapted) else None
    if order is not None:
        chosen = nn.Linear(classifier.in_features, len(order), classifier.bias is not None, classifier.weight.device)
        state = {name: value[order].clone() for name, value in classifier.state_dict().items()}
        chosen.load_state_dict(state)
        classifier = chosen.requires_grad_(False)
    return Parts(classifier, norms, network)


def plain(network: nn.Module) -> nn.Module:
    """The trained network itself, behind whatever adapts it."""
    return network.network if isinstance(network, Adapted) else network


def channels_of(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """A mean or std of colour images for images of other channels: their average, since the weights are summed."""
    values = tuple(map(float, values))
    return values if len(values) == channels else (sum(values) / len(values),) * channels


def _change(own: Interface, data: Interface) -> Tensor:
    """Scale and shift [2, C] from inputs normalised as the data's to inputs normalised as the network's."""
    dimensions = len(data.mean or ())
    lists = (channels_of(values or (), dimensions) for values in (data.mean, data.std, own.mean, own.std))
    mean, std, own_mean, own_std = (torch.tensor(values, dtype=torch.float64) for values in lists)
    return torch.stack((std / own_std, (mean - own_mean) / own_std)).float()


def class_order(own: Interface, data: Interface, key: str, value: object) -> tuple[list[int] | None, list[str]]:
    """For each class of the data its place among the network's (None: the same places), and what to say of it.

    Same names in another order are matched; of a network for more classes those of the data are taken. Where one of
    the two has only numbers for names nothing can be compared, and places count. Raises UserError for other names.
    """
    names, wanted = own.classes, data.classes
    if not names or not wanted or names == wanted:
        return None, []
    unique, alike = len(set(names)) == len(names), len(names) == len(wanted)
    missing = [name for name in wanted if name not in set(names)]
    if unique and not missing:
        order = [names.index(name) for name in wanted]
        if alike:
            return order, [f"its classes are in another order; matched by name to those of dataset {data.dataset}"]
        left = [name for name in names if name not in set(wanted)]
        return order, [
            f"answers without {len(left)} of its classes that dataset {data.dataset} has not ({some(left, _SHOWN)})"
        ]
    places, numbers = ([test(given) for given in (names, wanted)] for test in (_are_places, _are_numbers))
    shown = some(names, _SHOWN)
    if alike and (own.published or all(places)):
        return None, []
    if alike and (not unique or (any(places) and not all(numbers))):
        return None, [f"its classes ({shown}) are matched by place, not by name, to those of {data.dataset}"]
    allowed = f"a network that knows the classes of dataset {data.dataset}"
    raise UserError(key, value, allowed, hint=f"It has {len(names)} classes ({shown}), and not {some(missing, _SHOWN)}")


def _refuse_other_columns(own: Interface, data: Interface, key: str, value: object) -> None:
    """Raise UserError for a table whose columns are others, or in another order: each weight is of one column."""
    if not own.columns or not data.columns or own.columns == data.columns:
        return
    place = next((i for i, pair in enumerate(zip(own.columns, data.columns)) if pair[0] != pair[1]), 0)
    differs = f"input {place} of the network is {own.columns[place]}, of dataset {data.dataset} {data.columns[place]}"
    allowed = f"a network that was trained on the columns of dataset {data.dataset}, in their order"
    raise UserError(key, value, allowed, hint=f"{differs}; dataset.keys.inputs lists columns in an order")


def _are_numbers(names: Sequence[str]) -> bool:
    """Whether all names are numbers: "3", "03", "class 3"."""
    return all(map(_NUMBERED.fullmatch, names))


def _are_places(names: Sequence[str]) -> bool:
    """Whether the names say nothing but the classes' places: "0", "1", ... or "class 0", "class 1", ..."""
    found = map(_NUMBERED.fullmatch, names)
    return all(match is not None and int(match[1]) == place for place, match in enumerate(found))


def _normalisation(own: Interface, data: Interface) -> str:
    mine, theirs = ((given.mean or (), given.std or ()) for given in (own, data))
    if len(mine[0]) > _SHOWN:
        return f"{len(mine[0])} dimensions"
    return f"{_numbers(*mine)}; {data.dataset} has {_numbers(*theirs)}"


def _numbers(mean: Sequence[float], std: Sequence[float]) -> str:
    return ", ".join(
        f"{name} {' '.join(f'{v:.4g}' for v in values)}" for name, values in (("mean", mean), ("std", std))
    )


def _listed(about: Mapping[str, object], key: str, source: str) -> tuple[Any, ...] | None:
    found = about.get(key)
    if not isinstance(found, list | tuple | None):
        raise _damaged(source, key)
    return None if found is None else tuple(found)


def _refuse(damaged: bool, source: str, key: str) -> None:
    if damaged:
        raise _damaged(source, key)


def _damaged(source: str, key: str) -> UserError:
    return UserError(f"{source}: damaged: its {key} is not what a network could be trained with")


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
