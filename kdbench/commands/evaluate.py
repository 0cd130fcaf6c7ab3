"""Evaluate a run's student: accuracy, negative log-likelihood and calibration."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from kdbench.errors import UserError

_PERCENT = ("top1", "top5", "agreement", "teacher_top1")  # shares, shown in percent


def main() -> int:
    arguments = _parse()
    folder = find_run(Path(arguments.run))
    overrides = [f"dataset={arguments.dataset}"] if arguments.dataset else []
    from kdbench.evaluate import evaluate_run, teacher_folder  # loads torch

    against = None
    if arguments.against is not None:
        against = teacher_folder(folder) if arguments.against == "teacher" else find_run(Path(arguments.against))
    named = Path(arguments.run).name if Path(arguments.run).is_file() else "student.safetensors"
    figures = evaluate_run(folder, arguments.split, [*overrides, *arguments.overrides], named, against)
    if arguments.json:
        print(json.dumps(figures))
    else:
        print(f"{folder} on {arguments.split}")
        width = max(map(len, figures), default=0)
        print("\n".join(f"  {name:<{width}}  {_show(name, value)}" for name, value in figures.items()))
    return 0


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
    parser.add_argument("--json", action="store_true", help="print one line of JSON, shares as fractions")
    arguments = parser.parse_intermixed_args()
    for override in arguments.overrides:
        if "=" not in override or not override.startswith("dataset"):
            raise UserError(f"{override}: only changes to the dataset make sense here, e.g. dataset.root=/data")
    return arguments


def _show(name: str, value: object) -> str:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return str(value)
    if isinstance(value, float) and name.rsplit("/", 1)[-1] in _PERCENT:
        return f"{100 * value:.2f} %"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
