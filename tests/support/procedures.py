"""The smallest experiments that procedures are tested on, composed and run as the command line does."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

import kdbench.commands.train as commands_train
from kdbench.configure.compose import register
from kdbench.configure.naming import without_hydra
from kdbench.errors import UserError
from kdbench.paths import CONFIG_DIR

# Perceptrons on 8x8 images of four made-up classes: a stage takes a few milliseconds.
TINY = [
    "dataset=fake", "dataset.n=64", "dataset.n_test=48", "dataset.size=8", "dataset.channels=1",
    "dataset.num_classes=4", "dataset.validation=0.25", "dataset/augment=none",
    "schedule.epochs=2", "schedule.batch_size=16", "schedule.lr=0.02", "schedule.warmup=0",
    "teacher.schedule.epochs=2", "teacher.schedule.batch_size=16", "teacher.schedule.lr=0.02",
    "teacher.schedule.warmup=0", "teacher.allow_chance=true", "trainer.device=cpu", "trainer.progress=none",
]  # fmt: skip
MLPS = ["teacher=mlp", "teacher.hidden=[24]", "student=mlp", "student.hidden=[24]"]


def train(*words: str, out: str = "run", without: Sequence[str] = (), plain: bool = False) -> Path:
    """`kdbench train` on the tiny experiment, into folder `out`.

    `without`: nodes whose keys the tiny experiment does not set; `plain`: it sets nothing.
    """
    tiny = [] if plain else [word for word in TINY if word.split(".")[0] not in without]
    typed = [*tiny, *words]
    root = composed(*typed)
    with in_hydra(), as_job(root, Path(out), typed):
        commands_train.train(without_hydra(root))
    return Path(out)


def composed(*typed: str) -> DictConfig:
    """A command line's configuration, with Hydra's node. Composed once for all lines with the same groups."""
    groups = tuple(word for word in typed if "." not in word.partition("=")[0])
    root = copy.deepcopy(_composed(groups))
    put(root, *(word for word in typed if word not in groups))
    return root


def put(cfg: DictConfig, *words: str) -> None:
    """Values as they are typed into a configuration."""
    for override in OverridesParser.create().parse_overrides(list(words)):
        OmegaConf.update(cfg, override.key_or_group, override.value(), merge=False, force_add=override.is_add())


@functools.cache  # composing takes 0.3 s, and most tests differ in values only
def _composed(groups: tuple[str, ...]) -> DictConfig:
    with in_hydra():
        return compose("train", overrides=list(groups), return_hydra_config=True)


@contextmanager
def as_job(root: DictConfig, out: Path, typed: Sequence[str] = ()) -> Iterator[None]:
    """Let Hydra say of its running job what it is and where its folder lies."""
    before = HydraConfig.instance().cfg
    with read_write(root.hydra), open_dict(root.hydra.runtime):
        root.hydra.runtime.output_dir, root.hydra.overrides.task = str(out), list(typed)
    HydraConfig.instance().set_config(root)
    try:
        yield
    finally:
        HydraConfig.instance().cfg = before


def in_hydra() -> AbstractContextManager[object]:
    register()
    return initialize_config_dir(CONFIG_DIR, version_base="1.3")  # for networks and losses that options name


def result(folder: Path | str) -> dict[str, Any]:
    return json.loads((Path(folder) / "result.json").read_text(encoding="utf-8"))


def refusal(*words: str, without: Sequence[str] = ()) -> str:
    """The message of an experiment that is refused."""
    with pytest.raises(UserError) as caught:
        train(*words, without=without)
    return str(caught.value)


def stages(folder: Path) -> list[Path]:
    return sorted((folder / "stages").iterdir(), key=lambda path: int(path.name.split("-")[0]))
