"""What the rest of kdbench asks of any network: its size, its first and last layer, its cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from kdbench.arguments import accepted, is_own
from kdbench.errors import UserError
from kdbench.types import Info, Outputs

_WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.Embedding)


class MadeWith(nn.Module):
    """A network that keeps numbers beside its weights, for its weight hash: `made_with`, float64.

    They stay on the CPU wherever the network goes, and in their type: MPS has no float64, and nothing computes with
    them.
    """

    made_with: Tensor

    def keep(self, numbers: Sequence[float]) -> None:
        self.register_buffer("made_with", torch.tensor(list(numbers), dtype=torch.float64))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MadeWith:
        made_with = self._buffers.pop("made_with")
        super()._apply(fn, recurse)
        self._buffers["made_with"] = made_with
        return self


Step = tuple[Any, ...]  # a function, and the names of the tensors that it takes


class Staged(nn.Module):
    """A network as a series of steps, which may be entered after any of its `joints`.

    joints: the maps at which it may be cut in two and joined with another network, from shallow to deep, the last one
    before the pooling. rectified: whether those maps went through a ReLU.
    """

    joints: ClassVar[tuple[str, ...]] = ()
    rectified: ClassVar[bool] = True

    def steps(self) -> Mapping[str, Step]:
        """How each feature is made of "input" and of features before it, in order; "logits" come last."""
        raise NotImplementedError

    def forward(self, input: Tensor, enter: str = "input") -> Outputs:
        """input [B, ...], or the map that the joint `enter` would give: then only what follows is computed, and the
        features are those that follow."""
        made = self.between(enter, "logits", input)
        return Outputs(made.pop("logits"), made)

    def between(self, enter: str, last: str, input: Tensor) -> dict[str, Tensor]:
        """What follows the feature `enter`, which is `input`, up to the feature `last`, by name."""
        made, steps = {enter: input}, self.steps()
        names = list(steps)
        for name in names[names.index(enter) + 1 if enter in steps else 0 : names.index(last) + 1]:
            function, *sources = steps[name]
            made[name] = function(*(made[source] for source in sources))
        del made[enter]
        return made


def rectified_stages(
    stages: Sequence[Callable[[Tensor], Tensor]], after: Callable[[Tensor], Tensor] = F.relu
) -> dict[str, Step]:
    """The steps of stages that leave their last ReLU to the network: "stage1.pre" of "stem", "stage1", "stage2.pre",
    ..."""
    steps: dict[str, Step] = {}
    for number, stage in enumerate(stages, start=1):
        steps[f"stage{number}.pre"] = (stage, f"stage{number - 1}" if number > 1 else "stem")
        steps[f"stage{number}"] = (after, f"stage{number}.pre")
    return steps


def pool(map: Tensor) -> Tensor:
    """Mean over the places of a map [B, D, H, W]: [B, D]."""
    return map.mean((2, 3))


def count_parameters(model: nn.Module) -> int:
    """Numbers in all parameters, frozen ones too; buffers (batch-norm statistics) do not count."""
    return sum(parameter.numel() for parameter in model.parameters())


def first_layer_name(model: nn.Module) -> str:
    """Path of the convolution, linear layer or embedding that sees the input: the first one registered.

    Raises UserError if the network has none.
    """
    for name, module in model.named_modules():
        if isinstance(module, _WEIGHTED):
            return name
    raise UserError(f"{type(model).__name__} has neither a convolution, nor a linear layer, nor an embedding")


def last_layer_name(model: nn.Module) -> str:
    """Path of the classifier, the linear layer that makes logits of "pooled": `model.last_layer_name`, if the network
    says so itself, or the last linear layer registered.

    Use it with `model.set_submodule` to share or replace the layer. Raises UserError if there is none.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    name = getattr(model, "last_layer_name", names[-1] if names else "")
    if not name:
        kind = type(getattr(model, "net", model)).__name__
        raise UserError(f"{kind} has no single linear classifier that could be shared or reused")
    return name


def first_layer(model: nn.Module) -> nn.Conv2d | nn.Linear:
    """The layer that sees the input. Raises UserError if the network has none."""
    return model.get_submodule(first_layer_name(model))  # type: ignore[return-value]


def last_layer(model: nn.Module) -> nn.Linear:
    """The classifier, which makes the logits of "pooled". Raises UserError if there is none."""
    return model.get_submodule(last_layer_name(model))  # type: ignore[return-value]


def taken_kinds(network: Callable[..., Any]) -> list[type[Info]]:
    """The kinds of data that a network's constructor or factory takes: those whose fields it has keywords for."""
    return [kind for kind in get_args(Info) if accepted(network, dict.fromkeys(needed(kind))).keys() == {*needed(kind)}]


def needed(kind: type[Info]) -> list[str]:
    """The fields that a network for such data must have keywords for: those without a default."""
    return [name for name in kind._fields if name not in kind._field_defaults]


def kind_words(kind: type[Info]) -> str:
    """ "image data (in_channels, image_size)"."""
    word = kind.__name__.removesuffix("Info").lower()
    return f"{word} data ({', '.join(name for name in needed(kind) if name != 'num_classes')})"


def _fits(network: Callable[..., Any], info: Info) -> bool:
    """Whether a constructor takes data of this kind; one of the user's own may leave out what it does not need, but
    not ask for what other kinds have."""
    if not is_own(network):
        return type(info) in taken_kinds(network)
    asked = {kind: accepted(network, dict.fromkeys(_apart(kind))) for kind in get_args(Info)}
    return bool(asked[type(info)]) or not any(asked.values())


def _apart(kind: type[Info]) -> set[str]:
    return {name for name in kind._fields if name != "num_classes"}


def refuse_kind(network: Callable[..., Any], key: str, name: str, info: Info, dataset: str = "the dataset") -> None:
    """Raise the UserError for a network (`key` = `name`) that does not take data of this kind."""
    if not _fits(network, info):
        taken = taken_kinds(network)
        takes = " or ".join(map(kind_words, taken)) or "no data (its constructor has not the keywords of any kind)"
        allowed = f"a network for {kind_words(type(info))}, which {dataset} holds"
        raise UserError(key, name, allowed, hint=f"It takes {takes}")


def example_input(info: Info) -> Tensor:
    """One made-up input [1, ...] as a network gets it: pixels as floats, token ids as they are."""
    example = info.example(1)
    return example.float() if example.dtype == torch.uint8 else example


def sketched(model: nn.Module, info: Info) -> Outputs:
    """The model's outputs for two made-up inputs in eval mode, on its own device: shapes, without memory where it has
    none."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("meta"))
    inputs = info.example(2, device)
    with evaluating(model), torch.no_grad():
        return model(inputs.float() if inputs.dtype == torch.uint8 else inputs)


def flops(model: nn.Module, info: Info) -> int:
    """Floating-point operations of one input's forward pass: two for each multiply-add.

    Convolutions, linear layers and attention count; normalisation, activations and pooling do not. Counted on shapes
    alone (meta device): it costs no arithmetic and leaves the model as it is.
    """
    with FlopCounterMode(display=False) as counter:
        forward_on_meta(model, example_input(info))
    return counter.get_total_flops()


def flops_of(network: nn.Module, info: Info) -> int:
    """FLOPs of a forward pass; two for each parameter where a network cannot be run on shapes alone."""
    try:
        return flops(network, info)
    except Exception:  # what a network does with its numbers (a search, a loop until convergence) may fail without them
        return 2 * count_parameters(network)


def forward_on_meta(model: nn.Module, inputs: Tensor) -> Any:
    """What the model returns for inputs of this shape in eval mode, as shapes without numbers; no arithmetic is done.

    In float32 throughout: some weights may lie in bfloat16, and there is no autocast for shapes.
    """
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    state = {name: torch.empty_like(value, device="meta", dtype=_as_float32(value)) for name, value in state.items()}
    with evaluating(model), torch.no_grad():
        return functional_call(model, state, (inputs.to("meta"),))


def _as_float32(value: Tensor) -> torch.dtype:
    return torch.float32 if value.is_floating_point() else value.dtype


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, each module's own mode afterwards (frozen batch norms stay frozen)."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        model.train(modes[0][1])  # for modules that do more than set the flag
        for module, training in modes:
            module.training = training


LinearRule = Literal["default", "zero_bias", "small"]


def initialise(network: nn.Module, linear: LinearRule) -> None:
    """Set convolutions to N(0, 2 / (kernel area * output channels)), batch norms to identity, in place.

    `linear`: "default" keeps PyTorch's; "zero_bias" zeroes the bias only (wide ResNet, DenseNet); "small" is N(0, 0.01)
    with zero bias (VGG, MobileNetV2). Source: He et al. 2015 (fan-out mode); the rules for linear layers are those of
    RepDistiller and mdistiller, whose published accuracies depend on them.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            _initialise_linear(module, linear)


def _initialise_linear(module: nn.Linear, rule: LinearRule) -> None:
    if rule == "small":
        nn.init.normal_(module.weight, 0.0, 0.01)
    if rule != "default":
        nn.init.zeros_(module.bias)


def choose_stages(sizes: list[int]) -> tuple[list[str], list[int]]:
    """Which maps, given in forward order by size, become "stem" and "stage1".."stage4": the last map of each size.

    With one size only (ViT), four or fewer evenly spaced maps. More than five sizes: the earliest are left out.
    """
    last_of_size = [i for i, size in enumerate(sizes) if i + 1 == len(sizes) or sizes[i + 1] != size]
    if len(last_of_size) == 1:
        count = min(4, len(sizes))
        last_of_size = [(part + 1) * len(sizes) // count - 1 for part in range(count)]
    stages = last_of_size[-4:]
    names = [f"stage{number}" for number in range(1, len(stages) + 1)]
    if len(last_of_size) > 4:
        return ["stem", *names], [last_of_size[-5], *stages]
    return names, stages
