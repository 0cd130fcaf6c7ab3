"""Identity of a run: its hash, the folder that is named by all that differs, and what it differs from."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from kdbench.arguments.code import Code, sources
from kdbench.configure.nodes import contents
from kdbench.counted import as_before, counted
from kdbench.paths import CONFIG_DIR

NAMED = ("dataset", "teacher", "student", "loss")  # what a run is first of all
_RUNS = ("teacher.", "procedure.")  # below which a value may name a run


@dataclass(frozen=True)
class Reference:
    config: DictConfig  # the task's configuration, without Hydra's node; not to be changed
    defaults: dict[str, str | None]  # the option of every group when only those of NAMED are chosen
    roots: frozenset[str]  # the keys at the top then

    @functools.cached_property
    def values(self) -> dict[str, object]:
        """The configuration by dotted key."""
        return flat(self.config)

    @functools.cached_property
    def forms(self) -> dict[str, object]:
        """The same as it is written, interpolations as they stand."""
        return flat(self.config, resolve=False)


def group_choices(hydra: Any) -> dict[str, str | None]:
    """The option chosen in each group that belongs to the run's identity. `hydra`: Hydra's node."""
    return {str(group): option for group, option in sorted(hydra.runtime.choices.items()) if _counts(str(group))}


def reference(root: DictConfig) -> Reference:
    """Compose `root`'s choices again without its values. Only inside a Hydra run, whose search path it uses."""
    typed = OmegaConf.to_container(root.hydra.overrides.hydra, resolve=False)
    sources = tuple(o for o in typed or () if str(o).startswith("hydra.searchpath="))  # type: ignore[union-attr]
    searched = tuple(source.path for source in root.hydra.runtime.config_sources)
    chosen = tuple(group_choices(root.hydra).items())
    return _reference(str(root.hydra.job.config_name), chosen, sources, searched)


@functools.lru_cache(maxsize=64)  # composing takes 0.1 s, and the points of a sweep share their choices
def _reference(
    name: str, chosen: tuple[tuple[str, str | None], ...], sources: tuple[str, ...], searched: tuple[str, ...]
) -> Reference:
    named = [f"{group}={option}" for group, option in chosen if group in NAMED and option is not None]
    plain = compose(name, overrides=[*sources, *named], return_hydra_config=True)
    usual = group_choices(plain.hydra)
    wanted = {group: option for group, option in chosen if option is not None}
    known = {*usual}  # and what an option that is added brings with it: the parts of a sum that is part of a sum
    given: dict[str, str] = {}
    while left := wanted.keys() - given.keys():
        given |= {group: wanted[group] for group in wanted if group in left and not _inside_any(group, left)}
        if wanted.keys() - given.keys() - known:
            more = compose(name, overrides=[*sources, *_typed(given, known)], return_hydra_config=True)
            known |= group_choices(more.hydra).keys() - given.keys()
    overrides = _typed(wanted, known)
    roots = frozenset(str(key) for key in plain) - {"hydra"}
    same = usual == dict(chosen)
    config = without_hydra(plain) if same else compose(name, overrides=[*sources, *overrides])
    return Reference(config, usual, roots)


def _typed(chosen: Mapping[str, str], known: Collection[str]) -> list[str]:
    """What is typed to choose options: groups that are not `known` yet are added."""
    return [f"{'' if group in known else '+'}{group}={option}" for group, option in chosen.items()]


def _inside_any(group: str, others: Collection[str]) -> bool:
    """Whether a group's place in the configuration lies within that of another: loss@loss.parts.d.parts.kl in
    loss@loss.parts.d."""
    place = group.partition("@")[2]
    outer = (other.partition("@")[2] for other in others)
    return any(place.startswith(f"{one}.") for one in outer if one)


def without_hydra(cfg: DictConfig) -> DictConfig:
    """A copy without Hydra's own node, free to change."""
    task = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])  # which copies the nodes too
    OmegaConf.set_struct(task, False)
    OmegaConf.set_readonly(task, False)
    return task


def _counts(group: str) -> bool:
    return counted(group) and group != "hydra" and not group.startswith("hydra/")


def config_folders() -> list[Path]:
    """The folders beside kdbench's own in which the running command looks for configurations."""
    if not GlobalHydra.instance().is_initialized():
        return []
    found = GlobalHydra.instance().config_loader().get_search_path().get_path()
    places = [Path(element.path.removeprefix("file://")) for element in found if "pkg://" not in str(element.path)]
    return [place for place in places if place.is_dir() and place.resolve() != Path(CONFIG_DIR).resolve()]


_FIRST = ("loss", "student", "schedule", "optimizer", "procedure", "seed", "seeds", "teacher", "dataset")


def flat(cfg: DictConfig | Mapping[str, object], resolve: bool = True) -> dict[str, object]:
    """The configuration as {dotted key: scalar}. Lists of scalars become text ("[30,60]"), empty mappings "{}"."""
    tree = OmegaConf.to_container(cfg, resolve=resolve) if OmegaConf.is_config(cfg) else cfg
    found: dict[str, object] = {}
    _flatten(tree, "", found)
    return found


class Counted(NamedTuple):
    """What of a configuration makes a run another run."""

    values: dict[str, object]  # by dotted key; where things are kept is left out
    named: dict[str, str]  # what the files and runs hold that values name, by key
    code: Code  # of the user's own that it names

    @property
    def hash(self) -> str:
        """sha256 (64 hex digits). A file or a run counts by what it holds, wherever it lies."""
        tree: dict[str, object] = {**self.values, **self.named}
        tree |= {f"<code> {name}": modules for name, modules in self.code.items()}
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def counted_in(cfg: DictConfig) -> Counted:
    """What counts of a resolved configuration, without the keys that change no result."""
    return _counted_of(without_hydra(cfg))


def _counted_of(task: DictConfig) -> Counted:
    """The same of a copy, whose paths are changed."""
    if "paths" in task:
        for key in task.paths:
            task.paths[key] = f"<{key}>"  # a dataset's folder, say, may lie anywhere
    tree = contents(task)
    values = {key: _plain_number(value) for key, value in _counted(flat(tree)).items()}
    named = {key: held for key, value in values.items() if (held := _held(value, key.startswith(_RUNS))) != value}
    used = {key: node for key, node in tree.items() if counted(key)}
    own = _named_options([used.get("teacher"), used.get("procedure")])
    named |= {path: _hashed(text.encode()) for path, text in own.items()}
    return Counted(values, named, sources([used, *map(yaml.safe_load, own.values())]))


def config_hash(cfg: DictConfig) -> str:
    """`Counted.hash` of a configuration."""
    return counted_in(cfg).hash


def run_name(root: DictConfig) -> str:
    """The resolver kd.run: <dataset>/<teacher>-<student>-<loss>[,key=value...]-<hash8>, from the configuration alone.

    `root` is the whole configuration with its hydra node. Never raises (Hydra asks for the folder before the job is
    run and could not go on to the next one): a configuration that cannot be resolved is refused by the job itself.
    """
    try:
        task = without_hydra(root)
        chosen = group_choices(root.hydra)
        changed = _changed(task, chosen, reference(root))
        digest = _counted_of(task).hash
    except Exception:  # of any kind: the job's own check says what is wrong
        return "refused/" + hashlib.sha256(OmegaConf.to_yaml(without_hydra(root)).encode()).hexdigest()[:8]
    names = {group: _slug(chosen.get(group) or "none") for group in NAMED}
    parts = names | {group: _slug(network_name(names[group], root.get(group))) for group in ("teacher", "student")}
    label = f"{_slug(str(root.name))}-" if root.get("name") else ""
    networks = f"{parts['teacher']}-{parts['student']}-{parts['loss']}"
    return f"{parts['dataset']}/{label}{networks}{_differences(changed)}-{digest[:8]}"


def network_name(choice: str, node: Mapping[str, object] | None) -> str:
    """What a network is called: by the library's name of it where it has one, a teacher of a run by that run."""
    node = node or {}
    with suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
        if node.get("run"):
            return str(json.loads(Path(str(node["run"]), "network.json").read_bytes())["name"])
    return str(node.get("name") or choice)


def _differences(changed: Mapping[str, object]) -> str:
    """What differs, as ",key=value..." of at most 80 characters; the hash speaks for what does not fit."""
    found = ""
    for key in sorted(changed, key=_rank):
        entry = _slug(f",{key}={changed[key]}")
        found += entry if len(found + entry) <= 80 else ""
    return found


def _rank(key: str) -> tuple[int, str]:
    """What sweeps are usually over comes first."""
    group = key.split(".")[0]
    return (_FIRST.index(group) if group in _FIRST else len(_FIRST), key)


def _changed(task: DictConfig, chosen: Mapping[str, str | None], plain: Reference) -> dict[str, object]:
    """What differs from the defaults: other choices of groups, then values set by hand or by an experiment."""
    changed: dict[str, object] = {}
    for group, option in chosen.items():
        usual = chosen.get(group.partition("@")[0]) if "@" in group else plain.defaults.get(group)
        if group not in NAMED and option != usual:
            changed[group] = option
    forms = flat(task, resolve=False)
    for key, value in sorted(_counted(flat(task)).items()):
        form = plain.forms.get(key)
        interpolated = isinstance(form, str) and "${" in form
        same = value == plain.values.get(key, ...) or (interpolated and forms.get(key) == form)
        if not same and not (interpolated and _follows(task, key, form)):
            changed[key] = _plain_number(value)
    return changed


def _counted(values: Mapping[str, object]) -> dict[str, object]:
    """What belongs to a run's identity; without a teacher none of the keys that say how one is had and used, and none
    that came later at the value that changes nothing."""
    lonely = values.get("teacher._target_") is None
    unused = {key for key in values if lonely and key.startswith("teacher.") and key != "teacher._target_"}
    return as_before({key: value for key, value in values.items() if counted(key) and key not in unused})


def _follows(task: DictConfig, key: str, usual_form: object) -> bool:
    """Whether a value is what its usual interpolation (seeds.init: ${seed}) gives anyway: nothing new."""
    trial = copy.deepcopy(task)
    OmegaConf.update(trial, key, usual_form)
    return bool(OmegaConf.select(trial, key) == OmegaConf.select(task, key))


def _flatten(node: Any, prefix: str, found: dict[str, object]) -> None:
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            _flatten(value, f"{prefix}.{key}" if prefix else str(key), found)
    elif isinstance(node, (list, tuple)) and any(isinstance(item, (Mapping, list, tuple)) for item in node):
        for i, item in enumerate(node):
            _flatten(item, f"{prefix}.{i}", found)
    elif isinstance(node, (Mapping, list, tuple)):
        found[prefix] = json.dumps(node, separators=(",", ":"))
    else:
        found[prefix] = node


def _plain_number(value: Any) -> Any:
    """4.0 and 4 are the same value."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _named_options(nodes: Any) -> dict[str, str]:
    """The user's own networks and losses that values name (an ensemble's members, a procedure's steps): their YAML."""
    words = set(_words(nodes))
    files = [file for place in config_folders() for file in sorted(place.glob("*/*.yaml"))]
    used = [file for file in files if file.stem in words and file.parent.name in ("student", "loss")]
    return {f"{file.parent.name}/{file.stem}": file.read_text(encoding="utf-8") for file in used}


def _words(node: Any) -> Iterator[str]:
    if isinstance(node, Mapping):
        node = [*node.values()]
    if isinstance(node, list):
        for item in node:
            yield from _words(item)
    elif isinstance(node, str):
        yield node


def _held(value: Any, run: bool) -> Any:
    """What a file or a finished run holds that a value names, or a list of them; other values as they are."""
    if not isinstance(value, str):
        return value
    if value.startswith("[") and '"' in value:
        with suppress(ValueError):
            items = json.loads(value)
            held = [_held(item, run) for item in items]
            return value if held == items else json.dumps(held)
    weights = _weights_of_run(value) if run else None
    if weights is not None or not _names_a_file(value):
        return value if weights is None else f"weights {weights}"
    about = os.stat(value)
    return _digest(value, about.st_size, about.st_mtime_ns)


def _weights_of_run(folder: str) -> str | None:
    """The hash of the student of a finished run, by its result."""
    try:
        with open(os.path.join(folder, "result.json"), "rb") as file:
            return str(json.load(file)["student"]["weights"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def _names_a_file(text: str) -> bool:
    try:
        return os.path.isfile(text)
    except ValueError:  # a null character, say
        return False


@functools.cache
def _digest(path: str, size: int, changed: int) -> str:
    """Read once for each state of the file: a run's identity is asked for several times."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for part in iter(lambda: file.read(1 << 20), b""):
            digest.update(part)
    return f"sha256 {digest.hexdigest()}"


def _hashed(text: bytes) -> str:
    return f"sha256 {hashlib.sha256(text).hexdigest()}"


def _slug(text: str) -> str:
    return re.sub(r"[^\w.=,+-]", "", text.replace("/", ".").replace("@", "."), flags=re.ASCII)
