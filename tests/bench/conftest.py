from __future__ import annotations

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from kdbench.build import make_recipe
from kdbench.configure import register
from kdbench.paths import CONFIG_DIR
from kdbench.runs.recipe import Recipe

TINY = [
    "dataset=fake", "dataset.n=64", "dataset.n_test=32", "dataset.size=8", "dataset.num_classes=4", "teacher=resnet8",
    "student=resnet8", "schedule.batch_size=16", "trainer.device=cpu", "trainer.precision=fp32",
]  # fmt: skip
CHOICES = {"dataset": "fake", "teacher": "resnet8", "student": "resnet8", "loss": "kl", "optimizer": "sgd"}


@pytest.fixture
def recipe(tmp_path):
    """A recipe of the tiny experiment, with some keys changed."""

    def make(*words: str, without: tuple[str, ...] = ()) -> Recipe:
        GlobalHydra.instance().clear()
        register([])
        choices = CHOICES | {k: v for k, _, v in (word.partition("=") for word in words) if k in CHOICES}
        tiny = [word for word in TINY if not word.startswith(without)] if without else TINY
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            cfg = compose("train", overrides=[*tiny, f"paths.outputs={tmp_path}", *words])
        return make_recipe(cfg, list(words), choices)

    return make
