"""Every key of the composed default configuration with wrong values of each kind: the key is named as it is typed."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from kdbench import build
from kdbench.configure import register
from kdbench.configure.check import check
from kdbench.configure.naming import without_hydra
from kdbench.errors import UserError
from kdbench.paths import CONFIG_DIR
from kdbench.runs.recipe import flatten

ALWAYS: list[Any] = [{"a": 1}, ""]
IN_TURN: list[Any] = [[[1]], math.nan, math.inf, -math.inf, 1e30, True, 2**70, -5, "wrong value"]  # one of them a key

# What may be right of the values above, by the end of the key.
TEXTS = (".name", ".reader", ".root", ".cache", ".extra", ".checkpoint", ".run", "name", "paths.")
FLAGS = ("download", "any_class", "flip", "allow_chance", "nesterov", "decay_1d", "channels_last", "deterministic",
         "drop_last", "force", "packed", "pretrained", "trust")  # fmt: skip


@pytest.fixture(scope="module")
def composed():
    """The default run on made-up images, with its choices."""
    register([])
    with initialize_config_dir(CONFIG_DIR, version_base="1.3"):
        overrides = ["dataset=fake", "dataset/augment=crop_flip"]
        root = compose("train", overrides=overrides, return_hydra_config=True)
        before = HydraConfig.instance().cfg
        HydraConfig.instance().set_config(root)
        yield without_hydra(root), dict(root.hydra.runtime.choices)
        HydraConfig.instance().cfg = before


def refusal(cfg: DictConfig, choices: dict[str, Any], **values: Any) -> str | None:
    """What is said of the configuration with these values; None if it is accepted."""
    changed = cfg.copy()
    OmegaConf.set_struct(changed, False)
    for key, value in values.items():
        OmegaConf.update(changed, key, value, merge=False)
    try:
        check(changed)
        build.make_recipe(changed, [], choices)
    except UserError as error:
        return str(error)
    return None


def allowed(key: str, value: Any) -> bool:
    """Whether this one of the values above may be meant. A number for a text is the text that was typed."""
    if isinstance(value, bool):
        return key.endswith(FLAGS)
    if value == -5 and isinstance(value, int) and key.endswith(("seed", "seeds.init", "seeds.data", ".mean")):
        return True
    if key == "loss.tau" and value in (math.inf, 1e30, 2**70):
        return True
    text = not isinstance(value, (dict, list)) and value != ""
    return text and (key.startswith("paths.") or key.endswith(TEXTS))


def test_every_wrong_value_names_its_key_as_typed(composed):
    cfg, choices = composed
    faults = []
    keys = [key for key in flatten(OmegaConf.to_container(cfg, resolve=True)) if not key.endswith("_target_")]
    for turn, key in enumerate(keys):
        for value in [*ALWAYS, IN_TURN[turn % len(IN_TURN)]]:
            said = refusal(cfg, choices, **{key: value})
            if said is None and not allowed(key, value):
                faults.append(f"{key} = {value}: accepted")
            if said is not None and not said.startswith(key):
                faults.append(f"{key} = {value}: {said}")
    assert len(keys) > 90 and not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("teacher.schedule.warmup", 200, "teacher.schedule.warmup = 200: must be no longer than the training"),
        ("schedule.warmup", "5 parsecs", "schedule.warmup = 5 parsecs: must be a duration"),
        ("schedule.epochs", 1_000_000, "schedule.epochs = 1000000: must be at least 1, at most 100,000"),
        ("teacher.optimizer.name", "sgdd", "teacher.optimizer.name = sgdd: must be sgd"),
        ("optimizer.name", "sgdd", "optimizer.name = sgdd: must be sgd"),
        ("teacher.optimizer.lr", -1, "teacher.optimizer.lr = -1: must be at least 0"),
        ("seeds.init", 2**64, "seeds.init = 18446744073709551616: must be within 64 bits"),
        ("dataset.transfer.fraction", 0, "dataset.transfer.fraction = 0: must be a number (float), in (0, 1] or null"),
        ("dataset.augment.pad", -1, "dataset.augment.pad = -1: must be in [0, 1024]"),
        ("dataset.mean", 1e30, "dataset.mean = 1e+30: must be"),
        ("dataset.std", 0.0, "dataset.std = 0.0: must be"),
        ("teacher.run", "", "teacher.run = '': must be text that is not empty or null"),
        ("teacher.checkpoint", "", "teacher.checkpoint = '': must be text that is not empty or null"),
        ("paths.outputs", None, "paths.outputs = null: must be text"),
        ("paths.outputs", "", "paths.outputs = '': must be text"),
        ("trainer.device", "meta", "trainer.device = meta: must be auto, cpu, cuda"),
        ("student.depth", 10**6, "student.depth = 1000000: must be in [1, 10000]"),
    ],
)
def test_sentences(composed, key, value, message):
    cfg, choices = composed
    said = refusal(cfg, choices, **{key: value})
    assert said is not None and said.startswith(message)
