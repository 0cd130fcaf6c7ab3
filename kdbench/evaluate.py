"""A finished run's student, built again and measured on any split of its own or another dataset."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from hydra import initialize_config_dir
from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError

from kdbench.build import ConfigCatalogue, load_data, plain
from kdbench.configure import register
from kdbench.data.batches import EvaluationBatches, Loading
from kdbench.engine.checkpoint import STUDENT
from kdbench.engine.device import place
from kdbench.engine.evaluate import evaluate
from kdbench.engine.fidelity import compare_networks
from kdbench.engine.options import TrainerOptions, require
from kdbench.errors import UserError, nearest
from kdbench.paths import CONFIG_DIR
from kdbench.results.result import is_finished, read_result
from kdbench.runs.folder import network_of_run
from kdbench.runs.recipe import flatten


def evaluate_run(
    folder: Path, split: str, overrides: list[str], weights: str = STUDENT, against: Path | None = None
) -> dict[str, float]:
    """A run's student on one split ("test", "val" or "train", un-augmented) of its own or another dataset.

    `overrides` are `dataset=<name>` or `dataset.<key>=<value>`; `against` is the folder of another run. Returns the
    number of images and `metrics.report`, with `against` also `fidelity.compare_networks` to the network there.
    Raises UserError if a folder holds no finished student or if the dataset does not fit it.
    """
    tree = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    dataset = dataset_node(tree["dataset"], overrides)
    data = load_data(json.dumps(dataset))
    _, network, info = network_of_run(folder, ConfigCatalogue(), weights)
    require(info == data.info, "dataset", f"{data.name} {tuple(data.info)}", f"like the run's: {tuple(info)}")
    images = getattr(data, split)
    require(images is not None, "--split", split, "test or train: this dataset has no validation split")
    known = TrainerOptions.__dataclass_fields__  # a run of an earlier version may have had others
    placement = place(TrainerOptions(**{key: value for key, value in tree["trainer"].items() if key in known}))
    batches = EvaluationBatches(data, images, Loading(batch_size=500, device=placement.device))
    network = placement.put(network)
    if against is None:
        return {"images": len(images), **evaluate(network, batches)}
    other, theirs = network_of_run(against, ConfigCatalogue())[1:]
    require(theirs == info, "--against", f"{against} {tuple(theirs)}", f"for images like the run's: {tuple(info)}")
    return {"images": len(images), **compare_networks(network, placement.put(other), batches)}


def teacher_folder(folder: Path) -> Path:
    """Where a finished run's teacher lies. Raises UserError if it has none, or one that is no run of its own."""
    if not is_finished(folder):
        raise UserError(f"{folder}: not finished, so it does not say who taught it; --against takes a run folder, too")
    teacher = read_result(folder).teacher
    if teacher is None or not teacher.folder:
        name = f"teacher {teacher.name} is no run of its own" if teacher else "no teacher taught it"
        raise UserError(f"{folder}: {name}; --against takes a run folder, too")
    # Named from where the run was started: the current folder, or one above the run.
    places = [Path(), *folder.resolve().parents]
    found = next((place / teacher.folder for place in places if (place / teacher.folder).exists()), None)
    if found is None:
        raise UserError(f"{folder}: its teacher {teacher.folder} is not here any more")
    return found


def dataset_node(node: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """A dataset's plain node after overrides; a `dataset=<name>` replaces it, a key changes it."""
    for override in overrides:
        key, _, value = override.partition("=")
        if key == "dataset":
            register()
            with initialize_config_dir(CONFIG_DIR, version_base="1.3"):
                node = ConfigCatalogue().node("dataset", value)
            continue
        changed = OmegaConf.create({"dataset": node})
        OmegaConf.set_struct(changed, True)
        try:
            OmegaConf.update(changed, key, yaml.safe_load(value))
        except (ConfigKeyError, ConfigAttributeError) as error:
            raise UserError(f"{key}: {nearest(key, flatten({'dataset': node}), 'no such key. Nearest: {}')}") from error
        node = plain(changed)["dataset"]
    return node
