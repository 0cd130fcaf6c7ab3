"""Evaluate a run's student: accuracy, negative log-likelihood and calibration."""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from kdbench.arguments import Trust, trusting
from kdbench.errors import UserError, read_from, require
from kdbench.results.metrics import metric_of
from kdbench.results.result import is_finished, read_result

if TYPE_CHECKING:
    from kdbench.data.bundle import Bundle
    from kdbench.engine.device import Placement
    from kdbench.types import Info


def main() -> int:
    arguments = _parse()
    folder = find_run(Path(arguments.run))
    overrides = [f"dataset={arguments.dataset}"] if arguments.dataset else []
    against = None
    if arguments.against is not None:
        against = teacher_folder(folder) if arguments.against == "teacher" else find_run(Path(arguments.against))
    named = Path(arguments.run).name if Path(arguments.run).is_file() else "student.safetensors"
    figures = evaluate_run(
        folder, arguments.split, [*overrides, *arguments.overrides], named, against, trust_of(arguments)
    )
    if arguments.json:
        print(json.dumps(figures))
    else:
        print(f"{folder} on {arguments.split}")
        width = max(map(len, figures), default=0)
        print("\n".join(f"  {name:<{width}}  {_show(name, value)}" for name, value in figures.items()))
    return 0


def evaluate_run(
    folder: Path,
    split: str,
    overrides: list[str],
    weights: str = "student.safetensors",
    against: Path | None = None,
    trust: Trust | None = None,
) -> dict[str, float]:
    """A run's student on one split ("test", "val" or "train", un-augmented) of its own or another dataset.

    `overrides` are `dataset=<name>` or `dataset.<key>=<value>`; `against` is the folder of another run; `trust` says
    what the folders may name that is run (default: kdbench's own). Returns the number of images and
    `metrics.measure_logits`, with `against` also `evaluate.compare_networks` to the network there.
    Raises UserError if a folder holds no finished student or if the dataset does not fit it.
    """
    from kdbench.build import ConfigCatalogue  # all of this loads torch
    from kdbench.data.batches import EvaluationBatches, Loading
    from kdbench.engine.evaluate import compare_networks, evaluate
    from kdbench.runs.adapt import as_trained, fitted, interface_of_run
    from kdbench.runs.folder import network_of_run, read_config

    trust = trust or trusting()
    tree = read_config(folder, "dataset", "trainer")
    if not any(override.startswith("dataset=") for override in overrides):
        trust.check(tree["dataset"], str(folder / "config.yaml"))
    catalogue = ConfigCatalogue(trust)
    _, network, info = network_of_run(folder, catalogue, weights)
    network, data = as_trained(network, info, folder, _data(folder, tree["dataset"], overrides, info))
    images = getattr(data, split)
    require(images is not None, "--split", split, "test or train: this dataset has no validation split")
    placement = _placement(tree["trainer"], folder / "config.yaml")
    batches = EvaluationBatches(data, images, Loading(batch_size=500, device=placement.device))
    network = placement.put(network)
    count = {data.info.samples: len(images.wanted)}
    if against is None:
        return count | evaluate(network, batches)
    other, theirs = network_of_run(against, catalogue)[1:]
    other = fitted(other, interface_of_run(against), data, "--against", against, theirs)
    return count | compare_networks(network, placement.put(other), batches)


def _data(folder: Path, dataset: dict[str, object], overrides: list[str], info: Info) -> Bundle:
    """A run's data read again, or what the overrides make of them: other texts are read with the run's own tokenizer,
    and cut where it cuts."""
    from kdbench.build import dataset_node, load_data
    from kdbench.data.tokenise import TOKENIZER
    from kdbench.runs.identity import tell_of_other_data
    from kdbench.types import TokenInfo

    if overrides and "tokenizer" in dataset and (folder / TOKENIZER).exists():
        dataset = dataset | {"tokenizer": str(folder)}
        dataset |= {"length": info.length} if isinstance(info, TokenInfo) and "length" in dataset else {}
    with nullcontext() if overrides else read_from(folder / "config.yaml"):
        data = load_data(json.dumps(dataset_node(dataset, overrides)))
    if not overrides:
        tell_of_other_data(folder, data.content)
    return data


def _placement(trainer: dict[str, object], source: Path) -> Placement:
    """Where the run's own trainer options place a network; `source` is the file that they stand in."""
    from kdbench.configure import check_node
    from kdbench.engine.device import place
    from kdbench.engine.options import TrainerOptions

    known = TrainerOptions.__dataclass_fields__  # a run of an earlier version may have had others
    with read_from(source):
        return place(check_node({key: trainer[key] for key in trainer if key in known}, TrainerOptions, "trainer"))


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


def find_run(path: Path) -> Path:
    """The run folder at `path`, or the one that a checkpoint at `path` lies in. UserError if it is none."""
    if not path.exists():
        raise UserError(f"{path}: there is no such folder or file")
    folder = path if path.is_dir() else path.parent
    if not (folder / "config.yaml").is_file():
        inside = sorted(str(file.parent) for file in folder.rglob("config.yaml") if file.parent.name != ".hydra")
        runs = ", ".join(inside[:3]) + (", ..." if len(inside) > 3 else "")
        hint = f" Runs in it: {runs}" if path.is_dir() and inside else ""
        raise UserError(f"{path}: not a run folder, or a file in one (no config.yaml there).{hint}")
    return folder


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="kdbench evaluate", description=__doc__)
    parser.add_argument("run", help="a run folder, or a weights file in one (best.safetensors)")
    parser.add_argument("overrides", nargs="*", help="changes to the run's dataset, e.g. dataset.root=/data")
    parser.add_argument(
        "--split", choices=("test", "val", "train"), default="test", help="which images (default: test)"
    )
    parser.add_argument(
        "--against", metavar="RUN", help="also how close it is to another run's student, or to its own `teacher`"
    )
    parser.add_argument("--dataset", help="another dataset with the same classes (kdbench list dataset)")
    add_trust(parser)
    parser.add_argument("--json", action="store_true", help="print one line of JSON, shares as fractions")
    arguments = parser.parse_intermixed_args()
    for override in arguments.overrides:
        if "=" not in override or not override.startswith("dataset"):
            raise UserError(f"{override}: only changes to the dataset make sense here, e.g. dataset.root=/data")
    return arguments


def add_trust(parser: argparse.ArgumentParser) -> None:
    """The options of every command that opens a run folder, which may be a stranger's; read by `trust_of`."""
    parser.add_argument("--trust", action="store_true", help="run code that the run's folder names, whatever it is")
    parser.add_argument("--config-dir", metavar="DIR", help="run code that your configurations in DIR name, too")


def trust_of(arguments: argparse.Namespace) -> Trust:
    """What may be run. Raises UserError for a --config-dir that is not there."""
    if arguments.config_dir is not None and not Path(arguments.config_dir).is_dir():
        raise UserError(f"--config-dir {arguments.config_dir}: there is no such folder")
    folders = [arguments.config_dir] if arguments.config_dir is not None else []
    return Trust(None) if arguments.trust else trusting(*folders)


def _show(name: str, value: float) -> str:
    return metric_of(name).text(value) if isinstance(value, float) else str(value)
