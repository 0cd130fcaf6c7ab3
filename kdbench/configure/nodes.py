"""A node of the configuration as what it is for: an object of its `_target_`, or a dataclass of options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from omegaconf import OmegaConf

from kdbench.arguments import bind, call, fit, fit_arguments, is_own, keys, locate, run

T = TypeVar("T")
Node = Mapping[str, object]
FEATURES = "features"  # of a network of the user's own: layers by the name of the feature that they give


def check_node(node: Node, target: Callable[..., T], prefix: str) -> T:
    """Call `target` (a dataclass of options, or any callable) with the node's keys, after checking them against it.

    Raises UserError: an unknown key (with the nearest one), a value of the wrong type, a key without a value, or what
    the constructor itself refuses; the message starts with the key as the user types it (`prefix.key`).
    """
    return call(target, _options(contents(node)), prefix)


def fit_node(node: Node, target: Callable[..., Any], prefix: str) -> dict[str, object]:
    """The node's keys as arguments of `target`, converted to its annotations; UserError for what does not fit."""
    return fit_arguments(target, _options(node), prefix)


def construct(node: Node, prefix: str, **given: Any) -> Any:
    """Build the object that a `_target_` node describes, and the nodes inside it; `given` are kdbench's own arguments.

    Raises UserError as `check_node` does, and if the target cannot be imported.
    """
    node = contents(node)
    target = locate(node.get("_target_"), f"{prefix}._target_")
    arguments = bind(target, _options(node), prefix, given)
    return run(target, {key: _build(value, f"{prefix}.{key}") for key, value in arguments.items()}, prefix)


def contents(node: Node) -> dict[str, object]:
    """A node as plain containers, whether it comes as such or as OmegaConf's."""
    plain = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    return {str(key): value for key, value in plain.items()}  # type: ignore[union-attr]


def own_options(node: Node, network: Any) -> tuple[dict[str, object], dict[str, str]]:
    """The keys of a network's node that its constructor reads, `_target_` with them, and the layers that it names as
    features: only of a network of the user's own, whose constructor has no `features` itself."""
    if not is_own(network) or FEATURES in keys(network):
        return dict(node), {}
    layers = fit(node.get(FEATURES) or {}, dict[str, str], FEATURES)
    return {key: value for key, value in node.items() if key != FEATURES}, layers


def _options(node: Node) -> dict[str, object]:
    return {key: value for key, value in node.items() if key != "_target_"}


def _build(value: Any, prefix: str) -> Any:
    if isinstance(value, dict) and "_target_" in value:
        return construct(value, prefix)
    if isinstance(value, dict):
        return {key: _build(item, f"{prefix}.{key}") for key, item in value.items()}
    if isinstance(value, list):
        return [_build(item, f"{prefix}[{i}]") for i, item in enumerate(value)]
    return value
