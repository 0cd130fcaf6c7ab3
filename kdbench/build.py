"""The only file that turns a configuration into objects: DictConfig -> Recipe of plain factories."""

from __future__ import annotations

import functools
import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from hydra import initialize_config_dir
from hydra.errors import MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError

from kdbench import world
from kdbench.arguments import Trust, accepted, fit_arguments, is_own, keys, locate, trusting
from kdbench.configure import (
    Node,
    check_node,
    composed_here,
    config_folders,
    construct,
    contents,
    counted_in,
    options,
    own_options,
    register,
)
from kdbench.data.augment.mix import make_mix
from kdbench.data.augment.views import Augment, Identity, refuse_no_augment
from kdbench.data.bundle import Bundle
from kdbench.data.stamp import reading
from kdbench.engine.loggers import Logger
from kdbench.engine.optimizer import make_optimizer
from kdbench.engine.options import OptimizerOptions, TrainerOptions
from kdbench.engine.schedule import ScheduleOptions, check_durations
from kdbench.errors import UserError, in_your_code, nearest, require, under
from kdbench.losses.base import DistillationLoss
from kdbench.models.base import refuse_kind
from kdbench.models.own import adopted
from kdbench.paths import CONFIG_DIR
from kdbench.results.result import RunResult, is_finished
from kdbench.runs import fill
from kdbench.runs.fill import Filled, Watch
from kdbench.runs.identity import refuse_other, restamp
from kdbench.runs.origin import SINGLE, origin_of
from kdbench.runs.recipe import (
    TEACHER_KEYS,
    LossSpec,
    NetworkSpec,
    Origin,
    Recipe,
    Record,
    Seeds,
    TeacherSpec,
    flatten,
    section,
)
from kdbench.runs.trial import check_monitor, refuse_pairs
from kdbench.types import Info

log = logging.getLogger(__name__)

T = TypeVar("T")


def refuse_others_folder(recipe: Recipe, out: Path) -> None:
    """Raise a UserError if a run's folder holds another run; the data is read if its files are not as they were."""
    if recipe.force:
        return
    world.agreed(lambda: refuse_other(out, recipe.record.identity, lambda: recipe.data().content))
    if json.dumps(recipe.record.section("dataset")) in _loaded and is_finished(out):
        restamp(out, recipe.data().stamp)


def make_recipe(cfg: DictConfig, overrides: list[str], choices: Mapping[str, str]) -> Recipe:
    """Everything is checked here, before data is read or a network built."""
    tree = plain(cfg)
    kept = {k: v for k, v in choices.items() if "/" not in k and "@" not in k and v is not None}
    found = counted_in(cfg)
    tags = [str(tag) for tag in cfg.tags]
    record = Record(found.hash, kept, tree, list(overrides), tags, found.named, found.code)
    catalogue = ConfigCatalogue(_trust(tree))
    loss = make_loss(choices["loss"], section(tree, "loss"))
    loss.make()  # refuses values out of range now rather than after the teacher is trained
    trainer = check_node(section(tree, "trainer"), TrainerOptions, "trainer")
    teacher = make_teacher(choices["teacher"], section(tree, "teacher"))
    check_monitor(str(cfg.monitor))
    dataset = section(tree, "dataset")
    augment, _ = (make_augment(section(dataset, key), f"dataset.{key}") for key in ("augment", "teacher_augment"))
    mix = make_mix(section(dataset, "mix"))
    recipe = Recipe(
        data=functools.partial(load_data, json.dumps(section(tree, "dataset"))),
        student=make_network(choices["student"], section(tree, "student"), "student"),
        teacher=teacher,
        loss=loss,
        optimizer=make_optimizer_options(section(tree, "optimizer"), "optimizer"),
        schedule=make_schedule(section(tree, "schedule"), "schedule"),
        trainer=trainer,
        seeds=check_node(section(tree, "seeds"), Seeds, "seeds"),
        record=record,
        catalogue=catalogue,
        teachers=Path(str(section(tree, "paths")["teachers"])),
        force=bool(cfg.force),
        logger=make_logger(section(tree, "logger")),
    )
    refuse_pairs(recipe, augment, mix)
    return recipe


def _trust(tree: Mapping[str, object]) -> Trust:
    """What the user's own command names, and where it looks for configurations, may be named in run folders too."""
    if section(tree, "teacher").get("trust"):
        return Trust(None)
    return trusting(*config_folders(), nodes=[tree])


def fill_table(cfg: DictConfig, choices: Mapping[str, str], watch: Watch) -> Filled:
    """Compute what the table of this configuration's teacher lacks. Raises UserError where no table can serve."""
    return fill.fill_table(make_recipe(cfg, [], choices), watch)


def plain(cfg: DictConfig) -> dict[str, object]:
    """The resolved configuration as plain containers."""
    tree = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items() if key != "hydra"}


_loaded: dict[str, Bundle] = {}  # of the last two datasets that this process has read
_KEPT = 2


def keeps_data(recipe: Recipe) -> bool:
    """Whether its data are read already, or can be without another run's being forgotten."""
    return json.dumps(recipe.record.section("dataset")) in _loaded or len(_loaded) < _KEPT


def load_data(dataset: str) -> Bundle:
    """The data of a dataset node (as JSON), read once for all runs of this process that use it while it is the same."""
    with world.after_first():  # downloads, and what is decoded once
        return _load_data(dataset)


def _load_data(dataset: str) -> Bundle:
    known = _loaded.pop(dataset, None)
    if known is None or (known.stamp is not None and not known.stamp.holds()):
        node = json.loads(dataset)
        with reading(node.get("root"), node.get("cache")) as stamped:
            made = _made(node, "dataset", Bundle)
        known = replace(made, stamp=stamped())
    _loaded[dataset] = known
    for old in list(_loaded)[:-_KEPT]:
        del _loaded[old]
    return known


def _made(node: Node, key: str, kind: type[T], **given: Any) -> T:
    """What a node's `_target_` makes of it. Raises UserError if that is not of its kind."""
    made = construct(node, key, **given)
    allowed = f"the path of what makes a {kind.__module__}.{kind.__qualname__}; this makes a {type(made).__name__}"
    require(isinstance(made, kind), f"{key}._target_", node.get("_target_"), allowed)
    return made


def make_augment(node: Node | None, key: str) -> Augment:
    """An augmentation; none is the identity. Raises UserError for what is no augmentation."""
    if not node:
        return Identity()
    made = construct(node, key)
    allowed = "the path of an augmentation (kdbench.data.augment.views.Augment)"
    refuse_no_augment(made, f"{key}._target_", node.get("_target_"), allowed)
    return made


def dataset_node(node: Node, overrides: list[str]) -> Node:
    """A dataset's plain node after overrides; a `dataset=<name>` replaces it, a key changes it."""
    for override in overrides:
        key, _, value = override.partition("=")
        if key == "dataset":
            register()
            with initialize_config_dir(CONFIG_DIR, version_base="1.3"):
                node = ConfigCatalogue(trusting()).node("dataset", value)
            continue
        changed = OmegaConf.create({"dataset": node})
        OmegaConf.set_struct(changed, True)
        try:
            OmegaConf.update(changed, key, yaml.safe_load(value))
        except (ConfigKeyError, ConfigAttributeError) as error:
            raise UserError(f"{key}: {nearest(key, flatten({'dataset': node}), 'no such key. Nearest: {}')}") from error
        node = section(plain(changed), "dataset")
    return node


def make_network(choice: str, node: Mapping[str, object], prefix: str) -> NetworkSpec:
    """A network's factory. A `name` key (timm, torchvision) names it better than the choice of the group."""
    config, name = dict(node), str(node.get("name") or choice)

    def make(info: Info) -> Any:
        network = locate(config.get("_target_"), f"{prefix}._target_")
        refuse_kind(network, prefix, name, info)
        if not is_own(network):
            return _made(config, prefix, torch.nn.Module, **accepted(network, info._asdict()))
        options, layers = own_options(config, network)
        try:
            return adopted(_built(network, options, prefix, info), layers, info, prefix)
        except (UserError, NotImplementedError):
            if torch.empty(0).device.type != "meta":  # torch 2.7 has no other way to ask for it
                raise
        with torch.device("cpu"):  # somebody's own code may do what has no form on the meta device
            return adopted(_built(network, options, prefix, info), layers, info, prefix)

    return NetworkSpec(name, config, make)


def _built(network: Callable[..., Any], options: Node, prefix: str, info: Info) -> torch.nn.Module:
    """A network of the user's own. One that takes any keyword (**kwargs) may pass them on to what knows the classes
    alone. Raises UserError for whatever its constructor raises."""
    fields = accepted(network, info._asdict())
    least = {name: value for name, value in fields.items() if name in keys(network) or name == "num_classes"}
    for given in (fields, least):
        try:
            return _made(options, prefix, torch.nn.Module, **given)
        except (UserError, NotImplementedError):
            raise
        except Exception as error:
            if given is fields and fields != least and isinstance(error, TypeError):
                continue
            said = f"It raises {type(error).__name__}: {error}{in_your_code(error)}"
            raise UserError(f"{prefix}._target_", options["_target_"], "a network that can be built", said) from error
    raise AssertionError("the last attempt returns or raises")


def make_loss(choice: str, node: Mapping[str, object], key: str = "loss") -> LossSpec:
    config = dict(node)
    return LossSpec(choice, config, lambda: _made(config, key, DistillationLoss), key)


def make_teacher(choice: str, node: Mapping[str, object]) -> TeacherSpec | None:
    """Split the flat teacher node into the network's keys and the teacher's own."""
    if node.get("_target_") is None:
        _refuse_single(choice, node)
        return None
    own: dict[str, Any] = {key: value for key, value in node.items() if key in TEACHER_KEYS}
    own["optimizer"] = make_optimizer_options(section(node, "optimizer"), "teacher.optimizer")
    own["schedule"] = make_schedule(section(node, "schedule"), "teacher.schedule")
    spec = TeacherSpec(make_origin(choice, node), **own)
    epochs = spec.schedule.epochs
    require((spec.stop_epoch or 1) <= epochs, "teacher.stop_epoch", spec.stop_epoch, f"in 1..{epochs}")
    return spec


def make_origin(choice: str, node: Mapping[str, object]) -> Origin:
    """Where the teacher of a node comes from: what its `_target_` says if that is an origin, or else its network."""
    own = {key: value for key, value in node.items() if key not in {*TEACHER_KEYS, *SINGLE}}
    checkpoint, key, run = (None if node.get(name) is None else str(node[name]) for name in SINGLE[:3])
    finetune = bool(node.get("finetune"))
    if finetune and own.get("pretrained"):
        own["new_head"] = True  # where the published one does not fit
    if not hasattr(locate(node["_target_"], "teacher._target_"), "obtain"):
        return origin_of(make_network(choice, own, "teacher"), checkpoint, run, key, finetune)
    _refuse_single(choice, node)
    return construct(own, "teacher")


def _refuse_single(choice: str, node: Mapping[str, object]) -> None:
    """Raise a UserError for where a single network comes from, with a teacher that is none."""
    for name in SINGLE:
        allowed = f"{'false' if name == 'finetune' else 'null'} with teacher={choice}"
        require(node.get(name) in (None, False), f"teacher.{name}", node.get(name), allowed)


def make_optimizer_options(node: Mapping[str, object], prefix: str) -> OptimizerOptions:
    """An optimizer's options, tried on one parameter: an unknown name or argument shows before any work."""
    options = check_node(node, OptimizerOptions, prefix)
    with under(prefix):
        make_optimizer(replace(options, layer_decay=None, no_decay=[]), [torch.nn.Linear(1, 1)])
    return options


def make_schedule(node: Mapping[str, object], prefix: str) -> ScheduleOptions:
    """A schedule whose durations fit its length; how many steps an epoch has is not known yet, and does not matter."""
    options = check_node(node, ScheduleOptions, prefix)
    with under(prefix):
        check_durations(options)
    return options


def make_logger(node: Node) -> Callable[[], Logger] | None:
    """A service's logger, one for each run; none for logger=tensorboard. Raises UserError for one not installed."""
    if node.get("_target_") is None:
        return None
    construct(node, "logger")
    return lambda: construct(node, "logger")


def make_procedure(node: DictConfig) -> Callable[[Recipe, Path], RunResult]:
    """The procedure's function with its own options bound."""
    options = contents(node)
    target = options.pop("_target_")
    function = locate(target, "procedure._target_")
    given = ("recipe", "out")
    fits = keys(function).issuperset(given)
    require(fits, "procedure._target_", target, "a procedure: a function of a recipe, a folder `out`, and options")
    return functools.partial(function, **fit_arguments(function, options, "procedure", given))


class ConfigCatalogue:
    """Networks and losses by the names of their YAML files; networks from run folders as far as `trust` goes."""

    def __init__(self, trust: Trust) -> None:
        self.trust = trust
        self._nodes: dict[tuple[str, str], Node] = {}  # composing takes 0.15 s, and an ensemble asks often

    def network(self, name: str, options: Mapping[str, object] | None = None, key: str = "student") -> NetworkSpec:
        return make_network(name, {**self.node("student", name, key), **(options or {})}, key)

    def network_from(self, name: str, config: Mapping[str, object], source: str = "") -> NetworkSpec:
        self.trust.check(config, source or name)
        return make_network(name, config, "student")

    def loss(self, name: str, options: Mapping[str, object] | None = None, key: str = "loss") -> LossSpec:
        return make_loss(name, {**self.node("loss", name, key), **(options or {})}, key)

    def node(self, group: str, name: str, key: str = "") -> Node:
        """The configuration of one option of a group. Raises UserError naming `key` if there is none of this name."""
        if (group, name) not in self._nodes:
            self._nodes[group, name] = self._compose(group, name, key or group)
        return self._nodes[group, name]

    def _compose(self, group: str, name: str, key: str) -> Node:
        hint = nearest(name, options(group, [Path(CONFIG_DIR), *config_folders()]))
        unknown = UserError(key, name, f"a name that kdbench list {group} shows", hint)
        if not re.fullmatch(r"[\w.+/-]+", name):
            raise unknown
        try:
            node = composed_here([f"{group}={name}"]).get(group)
        except (MissingConfigException, ValueError) as error:  # Hydra reads some names as numbers
            raise unknown from error
        if node is None:  # "null", as Hydra reads it
            raise unknown
        return contents(node)
