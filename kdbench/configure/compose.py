"""Composing configurations. Before that Hydra must know the teachers derived from the students, and kdbench's
resolvers: `register`."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from kdbench.configure.loader import OWN_DATA, Loader, install
from kdbench.configure.naming import run_name
from kdbench.configure.options import folders, groups, options, summary
from kdbench.errors import UserError
from kdbench.paths import CONFIG_DIR

log = logging.getLogger(__name__)


def register(arguments: Sequence[str] = ()) -> None:
    """Make `teacher=<any student network>` a choice, and ${kd.options:} work. Call it before hydra.main.

    `arguments` are the command line's, for the folders that the user adds with --config-dir. May be called again.
    """
    places = folders(arguments)
    for place in places[1:]:
        _refuse_shadowed(place)
    _derive_teachers(places)
    install()
    OmegaConf.register_new_resolver("kd.options", lambda: overview(places), replace=True)


def prepare() -> None:
    """The same for a program that has typed nothing: what is registered already, with a user's folders, stays."""
    if OmegaConf.has_resolver("kd.options"):
        install()
    else:
        register()


def overview(places: Sequence[Path]) -> str:
    """The groups and their options as indented text, one group a paragraph."""
    return "\n".join(f"{group}: {summary(group, places)}" for group in groups(places))


def _refuse_shadowed(place: Path) -> None:
    """Hydra would silently take kdbench's own file instead of the user's file of the same name."""
    if not place.is_dir():
        raise UserError(f"{place}: there is no such folder (--config-dir, hydra.searchpath)")
    for file in place.glob("*/**/*.yaml"):
        if (Path(CONFIG_DIR) / file.relative_to(place)).exists():
            raise UserError(f"{file}: kdbench has an option of this name itself, which would count; rename yours")


def _derive_teachers(places: Sequence[Path]) -> None:
    """Store teacher/<name> for every student/<name>.yaml: what every teacher has, beside the network's own keys.

    A name that has its own file in a teacher folder is left to that file. `@_here_` puts the keys of both straight
    into the teacher's node, and a plain path (not a group) keeps them from being choices themselves.
    """
    store = ConfigStore.instance()
    derived = [name for name, file in options("teacher", places).items() if file.parent.name == "student"]
    if list(store.repo.get("teacher", ())) == [f"{name}.yaml" for name in derived]:
        return
    store.repo.pop("teacher", None)  # those of an earlier call with other folders
    for name in derived:
        node = {"defaults": ["shared/base@_here_", f"/student/{name}@_here_", "_self_"]}
        store.store(group="teacher", name=name, node=node, provider="kdbench")


def _point(*_unused: str, _root_: DictConfig) -> str:
    """The folder of a sweep's point: where a single run's would be, or, in a sweep folder of the user's, its name."""
    place = _root_.hydra.sweep._get_node("dir")._value()
    name = run_name(_root_)
    return os.path.abspath(os.path.join(_root_.paths.runs, name)) if "${kd.sweep:}" in str(place) else name


def _run(*_unused: str, _root_: DictConfig) -> str:
    return run_name(_root_)


def _sweep() -> str:
    return f"{datetime.now():%Y-%m-%d_%H-%M-%S}-{secrets.token_hex(2)}"


# Here, not in register(): the workers of a launcher (joblib, submitit, ray) get the loader, and with it this package.
OmegaConf.register_new_resolver("kd.run", _run, replace=True)
OmegaConf.register_new_resolver("kd.point", _point, replace=True)
OmegaConf.register_new_resolver("kd.sweep", _sweep, replace=True, use_cache=True)  # one for all points, as Hydra's now


def compose(words: Sequence[str] = (), config_name: str = "train") -> DictConfig:
    """The configuration that `kdbench train WORDS` runs with, e.g. compose(["loss=dkd", "student=resnet8"]).

    For notebooks and scripts; relative paths in it count from the current folder. Raises what Hydra raises for words
    that do not fit, and leaves a Hydra that is initialised already as it is.
    """
    with initialize_config_dir(CONFIG_DIR, version_base="1.3"):
        return hydra_compose(config_name, overrides=list(words))


def composed_here(words: Sequence[str]) -> DictConfig:
    """The same with the folders in which the running command looks, if one runs: outside of one there are no others."""
    if not GlobalHydra.instance().is_initialized():
        return compose(words)
    return hydra_compose("train", overrides=list(words))


def tell_left_out(points: Sequence[Sequence[str]]) -> None:
    """Say once which of an overlay's values do not count in these runs (by what was typed of each), as another option
    was chosen than the overlay's own."""
    loader = GlobalHydra.instance().config_loader()
    if not isinstance(loader, Loader):
        return
    for keys in dict.fromkeys(loader.left_out.get(tuple(words), "") for words in points):
        if keys:
            log.info("not the experiment's (or debug's), as other options were chosen than its own: %s", keys)


def tell_stand_in(words: Sequence[str], error: UserError) -> None:
    """Say in a refusal of data, or of what works on them, that they stand in for the experiment's own."""
    loader = GlobalHydra.instance().config_loader()
    made_up = isinstance(loader, Loader) and loader.left_out.get(tuple(words), "").endswith(OWN_DATA)
    if made_up and error.key.startswith(("dataset", "procedure")) and not error.hint:
        error.hint = "The images are debug=smoke's; debug=short has the experiment's own data"
