"""Is a composed configuration one that kdbench can run? Asked first; what Hydra lets through stops here."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_type_hints

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    InterpolationKeyError,
    InterpolationToMissingValueError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from kdbench.arguments import fit, fit_arguments, keys, locate, parameters, unknown_key
from kdbench.arguments.ranges import Seed, Text
from kdbench.configure.naming import flat, reference, without_hydra
from kdbench.configure.nodes import fit_node, own_options
from kdbench.configure.options import options
from kdbench.errors import UserError, require, show
from kdbench.paths import CONFIG_DIR

# Nodes that are plain options, by the dataclass that reads them (imported when a run starts, not before).
# What others refer to comes first: optimizer.lr is schedule.lr, and the fault is named where it was typed.
OPTIONS = {
    "schedule": "kdbench.engine.schedule.ScheduleOptions",
    "optimizer": "kdbench.engine.options.OptimizerOptions",
    "trainer": "kdbench.engine.options.TrainerOptions",
    "seeds": "kdbench.runs.recipe.Seeds",
    "teacher.schedule": "kdbench.engine.schedule.ScheduleOptions",
    "teacher.optimizer": "kdbench.engine.options.OptimizerOptions",
}
# Options of a dataset by what reads them, and what kdbench gives that beside them.
PARTS = {
    "mix": ("kdbench.data.augment.mix.mixing", ()),
    "noise": ("kdbench.data.noise.wrong_labels", ("labels", "names")),
    "transfer": ("kdbench.data.transfer.Transfer", ()),
}
COHORT = "hydra_plugins.kdbench_cohort.CohortLauncher"
TEACHER, ORIGIN = "kdbench.runs.recipe.TeacherSpec", "kdbench.runs.origin.origin_of"


@dataclass
class RunOptions:
    """The keys of train.yaml that belong to no group."""

    seed: Seed
    force: bool
    name: Text | None
    tags: list[str]
    monitor: Text
    paths: dict[str, Text]


def check(cfg: DictConfig, root: DictConfig | None = None) -> None:
    """Raise a UserError for the first thing in a composed configuration that cannot be right.

    Unknown and removed keys, missing values, interpolations that lead nowhere, `_target_`s that cannot be imported, and
    values that do not fit the annotation of the argument they go to. `root` is a configuration with Hydra's node
    (default: the running job's); without any, only nodes with a signature are searched for unknown keys.
    """
    if root is None and HydraConfig.initialized():
        root = HydraConfig.instance().cfg  # type: ignore[assignment]
    tree = resolved(cfg)
    if root is not None:
        usual = reference(root)
        for key in tree.keys() - usual.roots:
            raise unknown_key(key, usual.roots, "")
        ordinary = OmegaConf.to_container(usual.config, resolve=False)
        assert isinstance(ordinary, dict)
        _compare(tree, {str(key): value for key, value in ordinary.items()}, "")
        _refuse_idle_rates(tree, usual.config)
        _check_launcher(root)
    for name, annotation in get_type_hints(RunOptions, include_extras=True).items():
        if name in tree:
            _refuse_span(name, tree[name])
            fit(tree[name], annotation, name)
    for key, target in OPTIONS.items():
        options = _select(tree, key)
        if options is not None:
            fit_node(options, locate(target), key)
    for key, node in _targets(tree, ""):
        if key == "teacher":
            _check_teacher(node)
        else:
            target = locate(node["_target_"], _join(key, "_target_"))
            fit_node(own_options(node, target)[0] if key == "student" else node, target, key)
        if key == "dataset":
            _check_dataset(node)


RATES = ("lr", "weight_decay", "nesterov")  # what a schedule brings for the optimizers that take it from there


def _refuse_idle_rates(tree: Mapping[str, object], usual: DictConfig) -> None:
    """Raise the UserError for a schedule's rate that was set and that the optimizer, having its own, never reads."""
    for place in ("", "teacher."):
        schedule, optimizer = (_select(tree, f"{place}{part}") or {} for part in ("schedule", "optimizer"))
        for name in RATES:
            key, own = f"{place}schedule.{name}", f"{place}optimizer.{name}"
            value, counts = schedule.get(name), optimizer.get(name, schedule.get(name))
            if show(value) != show(counts) and value != OmegaConf.select(usual, key, default=value):
                typed = f"typed as {own}={show(value)}, since the optimizer ({optimizer.get('name')})"
                raise UserError(key, value, f"{typed} takes none from the schedule: its own is {show(counts)}")


def _refuse_span(name: str, value: Any) -> None:
    """Raise the UserError for seeds written as 0..3, 0-3 or 0:3."""
    span = re.fullmatch(r"(\d+)(?:\.\.|-|:)(\d+)", value) if isinstance(value, str) and name == "seed" else None
    if span is not None:
        raise UserError(name, value, "a whole number", f"For several runs: -m 'seed=range({span[1]},{span[2]})'")


def resolved(cfg: DictConfig) -> dict[str, object]:
    """The task's configuration as plain containers. UserError for a missing value or an interpolation that fails."""
    task = without_hydra(cfg) if "hydra" in cfg else cfg  # copying takes as long as all the rest
    try:
        tree = OmegaConf.to_container(task, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise UserError(f"{error.full_key}: needs a value") from error
    except OmegaConfBaseException as error:
        _refuse_options(task)
        raise UserError(unresolved(task, error)) from error
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items()}


_HYDRAS = re.compile(r"^hydra\.(?!run|sweep)|\$\{kd\.")  # that follow from what is typed elsewhere


def unresolved(cfg: DictConfig, error: OmegaConfBaseException) -> str:
    """Which key's interpolation leads nowhere, as it was typed, and why: that of the key that others only refer to."""
    typed, failed = flat(cfg, resolve=False), dict[str, OmegaConfBaseException]()
    for name in (name for name, raw in typed.items() if "${" in str(raw) and not _HYDRAS.search(f"{name}={raw}")):
        try:
            OmegaConf.select(cfg, name)
        except InterpolationToMissingValueError:  # of Hydra's, which knows its run's folder later
            continue
        except OmegaConfBaseException as found:
            failed[name] = found
    own = (name for name in failed if failed.keys().isdisjoint(re.findall(r"\$\{([\w.]+)\}", str(typed[name]))))
    key = next(own, str(error.full_key))
    error = failed.get(key, error)
    reason = str(error.msg or error).splitlines()[0]
    if isinstance(error, InterpolationKeyError):
        reason = "it refers to a key that the configuration does not have"
    reason = reason.partition("raised while resolving interpolation: ")[2].strip("'\"") or reason
    return f"{key} = {typed.get(key, '')}: {reason}"


def _refuse_options(task: DictConfig) -> None:
    """Raise the UserError for options that others refer to (optimizer.lr is schedule.lr) and that are not as they
    should be: it says more than that they cannot be referred to."""
    for key, target in OPTIONS.items():
        node = OmegaConf.select(task, key, throw_on_resolution_failure=False)
        if isinstance(node, DictConfig):
            typed = OmegaConf.to_container(node, resolve=False)
            assert isinstance(typed, dict)
            fit_node({str(k): v for k, v in typed.items() if "${" not in str(v)}, locate(target), key)
        elif node is not None:
            raise UserError(key, node, f"a mapping with keys of kdbench list {key.split('.')[-1]}")


def _compare(node: Mapping[str, object], usual: Mapping[str, object], prefix: str) -> None:
    """Refuse keys that the chosen options do not bring, and keys that they bring but are gone.

    A mapping that an option leaves empty ({}) takes any key, and so do `options`, which are arguments of another
    library's function; nodes that are read by a signature are checked by it.
    """
    signature = "_target_" in node or prefix in OPTIONS
    if "_target_" in node and node["_target_"] != usual.get("_target_"):
        return  # another class was typed in: its own signature decides
    if "_target_" in usual and "_target_" not in node:  # ~teacher leaves the parts that other groups bring
        raise UserError(f"{prefix}: was removed, but a run needs one (kdbench list {prefix.split('.')[0]})")
    for key in node.keys() - usual.keys():
        if not signature and usual:
            raise unknown_key(_join(prefix, key), usual, prefix)
    for key, ordinary in usual.items():
        full_key = _join(prefix, key)
        if key not in node:
            instead = f"give it a value instead of ~{full_key}"
            if prefix.endswith(".parts"):  # of a sum of losses
                instead = f"{prefix.removesuffix('parts')}weights.{key}=0 leaves it out"
            raise UserError(f"{full_key}: was removed, but a run needs it; {instead}")
        if isinstance(ordinary, dict):
            own = node[key]
            if not isinstance(own, dict):
                keys = ", ".join(ordinary)
                group = full_key.replace(".", "/")
                known = options(group, [Path(CONFIG_DIR)])
                hint = f". Did you mean {group}={own}?" if str(own) in known else ""
                raise UserError(f"{full_key} = {show(own)}: must be a mapping with the keys {keys}{hint}")
            if key == "weights" and isinstance(parts := node.get("parts"), dict):  # of a sum: one that was added too
                ordinary = ordinary | {name: 1.0 for name in parts if name in own}
            if key != "options":
                _compare(own, ordinary, full_key)


def _check_launcher(root: DictConfig) -> None:
    """Hydra checks a launcher's options by type; their ranges stand in its signature."""
    node = OmegaConf.to_container(root.hydra.get("launcher") or OmegaConf.create(), resolve=True)
    if isinstance(node, dict) and node.get("_target_") == COHORT:
        fit_node({str(key): value for key, value in node.items()}, locate(COHORT), "hydra.launcher")


def _check_teacher(node: Mapping[str, object]) -> None:
    """A teacher's node holds its network's keys and, beside them, the teacher's own."""
    known = {**parameters(locate(TEACHER)), **parameters(locate(ORIGIN))}
    own = {name: p.annotation for name, p in known.items() if name not in ("origin", "network")}
    for key, annotation in own.items():
        if key in node and not (key in ("optimizer", "schedule") and isinstance(node[key], dict)):
            fit(node[key], annotation, f"teacher.{key}")
    network = {key: value for key, value in node.items() if key not in own}
    target = locate(node["_target_"], "teacher._target_")
    fit_node(own_options(network, target)[0], target, "teacher")


def _check_dataset(node: Mapping[str, object]) -> None:
    """A dataset's node holds what its reader wants beside kdbench's own keys, and parts that functions read."""
    own = keys(locate(node["_target_"]))
    if isinstance(noise := node.get("noise"), dict):
        fit(noise.get("for", "both"), Literal["both", "teacher", "student"], "dataset.noise.for")
    for name in ("augment", "teacher_augment"):
        part = node.get(name)
        fits = part is None or (isinstance(part, dict) and "_target_" in part)
        require(fits, f"dataset.{name}", part, "null or the _target_ of an augmentation")
    for name, (target, given) in PARTS.items():
        if isinstance(part := node.get(name), dict):
            options = {key: value for key, value in part.items() if (name, key) != ("noise", "for")}
            fit_arguments(locate(target), options, f"dataset.{name}", given)
    if "reader" in own and isinstance(node.get("reader"), str):
        options = {key: value for key, value in node.items() if key not in own and key != "_target_"}
        given = ("root", "cache", "download", "channels")
        fit_arguments(locate(node["reader"], "dataset.reader"), options, "dataset", given, own)


def _targets(node: Any, key: str) -> Iterator[tuple[str, dict[str, object]]]:
    """Every node with a `_target_`, with its key, outer ones first."""
    if isinstance(node, dict):
        if node.get("_target_") is not None:
            yield key, node
        for name, value in node.items():
            yield from _targets(value, _join(key, name))
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from _targets(value, f"{key}[{i}]")


def _select(tree: Mapping[str, object], key: str) -> dict[str, object] | None:
    node: Any = tree
    for name in key.split("."):
        node = node.get(name) if isinstance(node, dict) else None
    return node if isinstance(node, dict) else None


def _join(prefix: str, key: str) -> str:
    return f"{prefix}.{key}" if prefix else str(key)
