"""Hydra's loader, with four rules of kdbench's own.

1. What an experiment says of a group counts only for the option that it chose: `experiment=kim2021_kl loss=ce` is the
   experiment with plain cross-entropy, not with KL's weights in it.
2. What a debug option says is for every experiment: its data stand in for the experiment's, of which the classes left
   out and the wrong labels stay, a procedure takes those of its keys that it has, and it brings no teacher where there
   is to be none.
3. A key that takes text keeps the text that was typed: 2024_01 is no number there.
4. A text that begins with ~/ lies in the home folder.
"""

from __future__ import annotations

import functools
import os
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import hydra._internal.defaults_list
import hydra._internal.hydra
import omegaconf.base
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository, ConfigRepository
from hydra._internal.defaults_list import Overrides
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.default_element import GroupDefault, InputDefault, ResultDefault
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.plugins.config_source import ConfigResult
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf

from kdbench.configure.text import in_quotes
from kdbench.errors import UserError
from kdbench.paths import are_configs

_every_choice = hydra._internal.defaults_list._create_interpolation_map
_parsed = functools.lru_cache(maxsize=1024)(omegaconf.base.parse)
KEPT = 100  # points of a sweep that are held between their check and their run
LAID_OVER = ("experiment", "debug")  # groups whose options are meant to be laid over each other
OWN_DATA = ". debug=short has an experiment's own data"
STAYS = ("dataset.transfer", "dataset.noise")  # of an experiment's dataset where a debug option's stands in for it


def install() -> None:
    """Let Hydra compose with the rules above. Other programs' configurations are composed as ever."""
    hydra._internal.hydra.ConfigLoaderImpl = Loader  # type: ignore[misc]
    hydra._internal.defaults_list._create_interpolation_map = _choices_to_name
    omegaconf.base.parse = _parsed  # type: ignore[attr-defined] # an interpolation's grammar, read each time it is asked


def _choices_to_name(overrides: Overrides, defaults_list: list[InputDefault], self_added: bool) -> DictConfig:
    """The choices that ${...} in a defaults list may name. Hydra collects them for every file, a quarter of the time
    that composing takes; here they are for the lists that have one."""
    if any(one.is_interpolation() or "${" in (getattr(one, "group", None) or "") for one in defaults_list):
        return _every_choice(overrides, defaults_list, self_added)
    return DictConfig({})


def _refuse_empty(overrides: list[str], cfg: DictConfig) -> None:
    """`loss.parts={}` leaves all parts where they are: Hydra lays a mapping over the one that stands there. Raises
    UserError."""
    for one in OverridesParser.create().parse_overrides(overrides):
        if one.is_sweep_override() or one.is_delete() or one.value() != {}:
            continue
        key = one.get_key_element().lstrip("+")
        left = OmegaConf.select(cfg, key)
        if OmegaConf.is_dict(left) and left:
            names = ", ".join(map(str, left))
            allowed = "a mapping with keys: it is laid over the one that stands there, and nothing would change"
            raise UserError(key, "{}", allowed, f"It holds {names}; ~{key}.{next(iter(left))} takes one out")


def together(group: str) -> str:
    """How several options of a group are had in one run, as the end of a sentence; "" if they are not."""
    return "; several in one run are loss=sum (kdbench explain loss.parts)" if group == "loss" else ""


class _Files(CachingConfigRepository):
    """The files that a composition reads. Each is parsed once a process while it stays the same: half of the time that
    composing takes. Hydra's own copies the whole search path for every composition."""

    parsed: dict[tuple[str, str], tuple[bytes, bytes]] = {}  # by folder and name: what the file holds, and pickled
    laid: dict[object, tuple[list[object], bytes]] = {}  # by the names of files: what they held, and all of it merged

    def __init__(self, search_path: ConfigSearchPath) -> None:
        self.delegate: ConfigRepository = ConfigRepository(search_path)
        self.cache: dict[str, ConfigResult | None] = {}
        self.read: dict[str, bytes] = {}

    def load_config(self, config_path: str) -> ConfigResult | None:
        if config_path not in self.cache:
            self.cache[config_path] = self._load(config_path)
        return self.cache[config_path]

    def merged(self, defaults: Sequence[ResultDefault], merge: Callable[[], tuple[DictConfig, list[str]]]) -> Any:
        """What `merge` makes of these files, remembered while they stay the same: the points of a sweep, and a run and
        what it is compared with, differ in values only. That is half of the time that composing takes."""
        names = tuple((d.config_path, d.parent, d.package, d.is_self, d.primary, d.override_key) for d in defaults)
        held = [part for name in names for part in (self.read.get(name[0] or ""), _stored(name[0]))]
        if not all(map(any, zip(held[::2], held[1::2]))):  # from a source that cannot be asked whether it has changed
            return merge()
        known = self.laid.pop(names, None)
        if known is None or not all(map(_same, known[0], held)):
            made = merge()
            kept = _pickled(made)
            if kept is None:
                return made
            known = held, kept
        self.laid[names] = known  # the last
        if len(self.laid) > KEPT:
            del self.laid[next(iter(self.laid))]
        return pickle.loads(known[1])

    def overridden(self, config_path: str) -> dict[str, str]:
        """The options that a file's defaults list puts in place of others: {group or group@package: option}."""
        loaded = self.load_config(config_path)
        return _overridden(loaded.defaults_list) if loaded is not None else {}

    def leave_alone(self, typed: Sequence[Override]) -> None:
        """Let debug options bring no teacher where the experiment, or the procedure, is to have none."""
        chosen = {one.key_or_group: one.value() for one in typed if not one.is_sweep_override()}
        experiments = _paths("experiment", chosen.get("experiment"))
        procedures = [chosen.get("procedure"), *(self.overridden(path).get("procedure") for path in experiments)]
        files = [*experiments, *_paths("procedure", next(filter(None, procedures), None))]
        wanted = [(key.partition("@")[0], option) for path in files for key, option in self.overridden(path).items()]
        for path in _paths("debug", chosen.get("debug")) if ("teacher", "none") in wanted else ():
            loaded = self.load_config(path)
            if loaded is not None:
                loaded.defaults_list = [one for one in loaded.defaults_list or () if not _brings("teacher", one)]

    def _load(self, config_path: str) -> ConfigResult | None:
        source = self.delegate._find_object_source(config_path, ObjectType.CONFIG)
        if source is None or source.scheme() not in ("file", "pkg"):
            return self.delegate.load_config(config_path)
        key, held = (source.full_path(), config_path), b""  # what Hydra brings itself stays as it is
        if source.scheme() == "file":  # read: times of change are up to two seconds coarse
            with open(os.path.join(source.path, source._normalize_file_name(config_path)), "rb") as file:
                held = file.read()
        if key not in self.parsed or self.parsed[key][0] != held:
            loaded = self.delegate.load_config(config_path)
            assert loaded is not None
            self.parsed[key] = held, pickle.dumps(loaded)
        self.read[config_path] = self.parsed[key][1]
        return pickle.loads(self.parsed[key][1])  # composing changes it; a deep copy takes five times as long


class Loader(ConfigLoaderImpl):
    """Hydra's loader with kdbench's rules, wherever its configurations are on the search path."""

    def __init__(self, config_search_path: ConfigSearchPath) -> None:
        super().__init__(config_search_path)
        self.ours = any(are_configs(element.path or "") for element in config_search_path.get_path())
        self.left_out: dict[tuple[str, ...], str] = {}  # keys in one text, by what was typed
        self._choices: dict[str, tuple[str, str]] = {}  # of the composition at work: option and package of each group
        self._dropped: list[str] = []
        self._stand_in = False  # whether the dataset is a debug option's
        self._asked: tuple[str | None, list[str], DictConfig] | None = None  # what the mode was read from
        self._points: dict[tuple[str, ...], DictConfig] = {}  # of a sweep, checked and not yet run

    def load_configuration(
        self,
        config_name: str | None,
        overrides: list[str],
        run_mode: RunMode,
        from_shell: bool = True,
        validate_sweep_overrides: bool = True,
    ) -> DictConfig:
        """A command line is composed once: Hydra asks without validation first, to find `hydra.mode`, and adds that."""
        asked, self._asked = self._asked, None
        if not self.ours:
            return super().load_configuration(config_name, overrides, run_mode, from_shell, validate_sweep_overrides)
        if not validate_sweep_overrides:
            cfg = self._composed(config_name, overrides, RunMode.RUN, from_shell, False)  # raises for a missing option
            self._asked = config_name, list(overrides), cfg
            return cfg
        if asked is None or config_name != asked[0] or overrides != [*asked[1], f"hydra.mode={run_mode.name}"]:
            return self._composed(config_name, overrides, run_mode, from_shell, True)
        parsed = OverridesParser.create(config_loader=self).parse_overrides(overrides)
        self.validate_sweep_overrides_legal(parsed, run_mode, from_shell)
        asked[2].hydra.mode = run_mode
        asked[2].hydra.overrides.hydra.append(overrides[-1])
        return asked[2]

    def _composed(
        self, config_name: str | None, overrides: list[str], run_mode: RunMode, from_shell: bool, validate: bool
    ) -> DictConfig:
        self._refuse_several(overrides)
        rest = (run_mode, from_shell, validate)
        cfg = super().load_configuration(config_name, overrides, *rest)
        as_typed = [in_quotes(word, cfg) for word in overrides]
        if as_typed != overrides:
            cfg = super().load_configuration(config_name, as_typed, *rest)
        _refuse_empty(overrides, cfg)
        own = OWN_DATA if self._dropped and self._stand_in else ""
        self.left_out[tuple(_lines(cfg.hydra.overrides.task))] = ", ".join(self._dropped) + own
        _find_home(cfg)
        return cfg

    def _refuse_several(self, overrides: list[str]) -> None:
        """`loss=[kl,js]` would be JS with what keys of KL it does not say itself: Hydra lays the options over each
        other. Raises UserError."""
        for one in OverridesParser.create().parse_overrides(overrides):
            group = one.key_or_group
            if one.is_sweep_override() or group in LAID_OVER or not isinstance(one.value(), (list, dict)):
                continue
            if self.repository.group_exists(group):
                key, typed = one.get_key_element().lstrip("+"), str(one.input_line).partition("=")[2]
                raise UserError(key, typed, f"one option, or several of a sweep (-m {key}=a,b){together(group)}")

    def keep(self, words: Sequence[str], cfg: DictConfig) -> None:
        """Hold a sweep's point, composed and checked, until its turn comes. Half a megabyte each: no more than KEPT."""
        if len(self._points) < KEPT:
            OmegaConf.set_readonly(cfg.hydra, False)
            self._points[tuple(words)] = cfg

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        kept = self._points.pop(tuple(sweep_overrides), None)
        return super().load_sweep_config(master_config, sweep_overrides) if kept is None else kept

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_points": {}}  # a launcher's other processes compose their own point

    def _parse_overrides_and_create_caching_repo(
        self, config_name: str | None, overrides: list[str]
    ) -> tuple[list[Override], CachingConfigRepository]:
        parsed, files = OverridesParser.create().parse_overrides(overrides), _Files(self.config_search_path)
        self._process_config_searchpath(config_name, parsed, files)
        files.leave_alone(parsed)
        return parsed, files

    def _compose_config_from_defaults_list(self, defaults: list[ResultDefault], repo: Any) -> DictConfig:
        self._choices = {}
        for one in defaults:
            group, _, option = str(one.config_path).rpartition("/")
            package = one.package or ""
            if one.is_self and group:  # an option with a defaults list of its own stands there by itself
                self._choices[group if package == group.replace("/", ".") else f"{group}@{package}"] = option, package
            elif one.override_key:
                self._choices[one.override_key] = option, package
        self._dropped = []
        debugs = [str(one.config_path) for one in defaults if str(one.config_path).startswith("debug/")]
        data = {repo.overridden(path).get("dataset") for path in debugs}
        self._stand_in = bool(data & {self._choices.get("dataset", ("", ""))[0]})
        lay = super()._compose_config_from_defaults_list
        if not self.ours:
            return lay(defaults, repo)
        cfg, self._dropped = repo.merged(defaults, lambda: (lay(defaults, repo), self._dropped))
        return cfg

    def _load_single_config(self, default: ResultDefault, repo: Any) -> Any:
        loaded = super()._load_single_config(default, repo)
        kind = str(default.config_path).partition("/")[0]
        if not (self.ours and kind in LAID_OVER and not default.package and isinstance(loaded.config, DictConfig)):
            return loaded
        wanted = _overridden(loaded.defaults_list)
        if kind == "debug":  # what it says of a network or a teacher is meant for any
            wanted = {key: option for key, option in wanted.items() if key == "dataset"}
            self._cut(loaded.config, repo)
        if wanted:
            kept = STAYS if self._stand_in else ()
            self._dropped += _drop(loaded.config, self._strange(wanted), self._packages(), kept)
        return loaded

    def _cut(self, debug: DictConfig, repo: Any) -> None:
        """Take what the chosen procedure does not have out of a debug option."""
        procedure = repo.load_config(f"procedure/{self._choices.get('procedure', ('',))[0]}")
        for key in set(debug.get("procedure") or ()) - set(procedure.config if procedure else ()):
            _remove(debug, f"procedure.{key}")

    def _strange(self, wanted: Mapping[str, str]) -> set[str]:
        """The packages of groups for which another option counts than the file wants."""
        strange = {key.replace("/", ".") for key in wanted.keys() - self._choices.keys() if "@" not in key}
        for key, (option, package) in self._choices.items():
            if wanted.get(key, wanted.get(key.partition("@")[0], option)) != option:  # teacher.schedule is a schedule
                strange.add(package)
        return strange

    def _packages(self) -> set[str]:
        return {package for _, package in self._choices.values() if package}


def _same(one: object, other: object) -> bool:
    """Whether two files, or stored nodes, hold the same: kdbench.compose leaves a copy of all that is stored behind."""
    return one is other or (_pickled(one) or b"one") == (_pickled(other) or b"other")


def _pickled(value: object) -> bytes | None:
    """None for what holds a class whose module was loaded again since, as Hydra loads its plugins."""
    try:
        return pickle.dumps(value)
    except (pickle.PicklingError, AttributeError, TypeError):
        return None


def _stored(name: str | None) -> object:
    """What a program has stored under a file's name: options without a file, or a schema of one."""
    return ConfigStore.instance()._open(f"{name}.yaml")


def _lines(words: ListConfig) -> list[str]:
    """The words as they were typed: what looks like an interpolation in them is text."""
    return [str(word) for word in OmegaConf.to_container(words, resolve=False) or ()]


def _overridden(defaults: Sequence[Any] | None) -> dict[str, str]:
    """The options that a file's defaults list puts in place of others: {group or group@package: option}."""
    groups = [one for one in defaults or () if isinstance(one, GroupDefault) and one.override]
    found = {}
    for one in groups:
        if isinstance(one.value, str) and one.group is not None:
            name = one.group.lstrip("/")
            found[f"{name}@{one.package}" if one.package else name] = one.value
    return found


def _paths(group: str, options: Any) -> list[str]:
    """The files of one option of a group, or of a list of them."""
    names = [options] if isinstance(options, str) else options if isinstance(options, list) else []
    return [f"{group}/{name}" for name in names]


def _brings(group: str, default: Any) -> bool:
    """Whether an entry of a defaults list puts another option in place of a group's."""
    own = isinstance(default, GroupDefault) and default.override and not default.package
    return own and str(default.group).lstrip("/") == group


def _drop(cfg: DictConfig, strange: set[str], packages: set[str], kept: Sequence[str]) -> list[str]:
    """Take the values of the strange packages out, but not those of other groups inside them, and none below the keys
    `kept`; the keys taken out."""
    dropped = []
    for key in list(_leaves(cfg)):
        owner = max((p for p in packages | strange if key == p or key.startswith(f"{p}.")), key=len, default="")
        if owner in strange and not key.startswith(tuple(f"{one}." for one in kept)):
            _remove(cfg, key)
            dropped.append(key)
    return dropped


def _remove(cfg: DictConfig, key: str) -> None:
    """Take a key out, and every mapping that this leaves empty: {} laid over a null would be a value."""
    node, _, name = key.rpartition(".")
    parent = OmegaConf.select(cfg, node) if node else cfg
    del parent[name]
    if node and not len(parent):
        _remove(cfg, node)


def _leaves(cfg: DictConfig, prefix: str = "") -> Iterator[str]:
    """The dotted keys of all values, as they are written; {} is one."""
    for name in map(str, cfg):
        key, node = f"{prefix}{name}", cfg._get_node(name)
        if isinstance(node, DictConfig) and not node._is_none() and not node._is_interpolation() and len(node):
            yield from _leaves(node, f"{key}.")
        else:
            yield key


def _find_home(cfg: DictConfig | ListConfig) -> None:
    """Write the home folder's path in place of ~ at the beginning of a text."""
    keys = range(len(cfg)) if isinstance(cfg, ListConfig) else list(cfg)
    for key in keys:
        node = cfg._get_node(key)
        if isinstance(node, (DictConfig, ListConfig)):
            if not (node._is_none() or node._is_interpolation() or node._is_missing()):
                _find_home(node)
        elif node is not None and isinstance(node._value(), str) and node._value().startswith("~/"):  # type: ignore[union-attr]
            node._set_value(os.path.expanduser(node._value()))  # type: ignore[union-attr]
