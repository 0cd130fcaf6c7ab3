"""Every dataset's YAML composes, is explained, and fits the function that reads it; new files are found by globbing."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from kdbench.arguments import locate
from kdbench.configure import construct
from kdbench.data.augment.views import CropFlip
from kdbench.data.load import load_bundle

CONFIGS = Path(__file__).parents[2] / "configs"
DATASETS = sorted(path.stem for path in (CONFIGS / "dataset").glob("*.yaml"))
AUGMENTS = sorted(path.stem for path in (CONFIGS / "dataset" / "augment").glob("*.yaml"))
WITHOUT_FILES = ["digits", "fake", "gaussian", "udhr"]


def node(*overrides: str) -> dict:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose(overrides=["+paths=default", *overrides])
    made = OmegaConf.to_container(config.dataset, resolve=True, throw_on_missing=True)
    assert isinstance(made, dict)
    return made


def test_what_there_is():
    expected = "cifar10 cifar100 digits fake fashion_mnist gaussian imagefolder imagenet mnist stl10 svhn tiny_imagenet"
    assert set(expected.split()) <= set(DATASETS)
    assert {"none", "crop_flip", "jitter", "rand_augment", "cutout", "resized_crop"} <= set(AUGMENTS)


@pytest.mark.parametrize("name", DATASETS)
def test_a_dataset_composes_and_fits_its_reader(name):
    keys = node(f"+dataset={name}")
    assert keys["_target_"] == "kdbench.data.load.load_bundle"
    own = keys.keys() - inspect.signature(load_bundle).parameters.keys() - {"_target_"}
    reader = inspect.signature(locate(keys["reader"], "dataset.reader")).parameters
    given = {"root", "cache", "download", "channels"}
    assert reader.keys() - given == own, "every option of the reader has its key, with a comment"
    augment = construct(keys["augment"], "dataset.augment")
    assert augment.draw(3, torch.Generator()).shape == (3,)


@pytest.mark.parametrize("name", WITHOUT_FILES)
def test_datasets_without_files_load(name):
    bundle = construct(node(f"+dataset={name}", "paths.data=nowhere"), "dataset")
    assert len(bundle.train) >= 2 and not Path("nowhere").exists()


@pytest.mark.parametrize("name", AUGMENTS)
def test_an_augmentation_suits_any_dataset(name):
    tokens = name.startswith("token_")
    for dataset in ("udhr",) if tokens else ("digits", "cifar10"):  # another choice leaves no keys of the first behind
        augment = construct(node(f"+dataset={dataset}", f"dataset/augment={name}")["augment"], "dataset.augment")
        inputs = torch.zeros((3, 3, 16, 16), dtype=torch.uint8) if not tokens else torch.ones((3, 9), dtype=torch.int64)
        view = augment.draw(3, torch.Generator().manual_seed(0))
        assert augment(inputs, view).shape == inputs.shape


def test_a_teacher_can_have_its_own_augmentation():
    keys = node("+dataset=digits", "+dataset/augment@dataset.teacher_augment=crop_flip", "dataset/augment=none")
    bundle = construct(keys, "dataset")
    assert bundle.for_teacher().augment == CropFlip(pad=1) and bundle.augment.views == 1


@pytest.mark.parametrize("path", sorted((CONFIGS / "dataset").rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_key_is_explained(path):
    lines = path.read_text().splitlines()
    assert re.match(r"# \S.{20,}", lines[0]), "the first line says what it is"
    elsewhere = {"_target_", "name", "reader", "std", "defaults", "parts"}  # in shared/base.yaml, or beside mean
    for line in lines:
        key = re.match(r"\s*(\w+):", line)
        if key and key[1] not in elsewhere:
            assert "#" in line, f"{key[1]} is not explained"
