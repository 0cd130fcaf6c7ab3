"""The configuration that a run's choices alone would give: what its values are measured against."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from kdbench.counted import counted
from kdbench.paths import CONFIG_DIR

NAMED = ("dataset", "teacher", "student", "loss")  # what a run is first of all


class Reference(NamedTuple):
    config: DictConfig  # the task's configuration, without Hydra's node
    defaults: dict[str, str | None]  # the option of every group when only those of NAMED are chosen
    roots: frozenset[str]  # the keys at the top then


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
    overrides = [f"{'' if group in usual else '+'}{group}={option}" for group, option in chosen if option is not None]
    roots = frozenset(str(key) for key in plain) - {"hydra"}
    if usual == dict(chosen):
        return Reference(without_hydra(plain), usual, roots)
    return Reference(compose(name, overrides=[*sources, *overrides]), usual, roots)


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
