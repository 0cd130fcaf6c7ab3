"""Export a run's student for programs without kdbench: ONNX, torch.export, TorchScript, safetensors, int8."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kdbench.commands.evaluate import add_trust, find_run, trust_of
from kdbench.files import in_bytes

if TYPE_CHECKING:
    from kdbench.deploy.export import Exported

FORMATS = {
    "onnx": "ONNX, for any batch size (pip install 'kdbench[export]'; the default)",
    "pt2": "a torch.export archive: torch.export.load(FILE).module()",
    "torchscript": "TorchScript: torch.jit.load(FILE), also from C++",
    "safetensors": "the weights alone, with names, mean, std, size and classes in the header",
}


def main() -> int:
    arguments = _parse()
    folder = find_run(Path(arguments.run))
    from kdbench.deploy.export import export, refuse_missing  # loads torch
    from kdbench.deploy.student import open_student
    from kdbench.runs.folder import EXPORT

    formats = [name for name in FORMATS if getattr(arguments, name)]
    formats = formats or ([] if arguments.int8 else ["onnx"])
    for name in [*formats, *(["int8"] if arguments.int8 else [])]:
        refuse_missing(name)
    named = Path(arguments.run).name if Path(arguments.run).is_file() else "student.safetensors"
    student = open_student(folder, named, trust_of(arguments))
    out = arguments.out or folder / EXPORT
    _print(export(student, formats, out, trust_of(arguments), arguments.int8))
    print(f"input: {student.about()['input']}; output: {student.about()['output']}; all of it in {out / 'export.json'}")
    return 0


def _print(done: Sequence[Exported]) -> None:
    for one in done:
        print(f"{one.path}  {in_bytes(one.bytes)}")
        if one.path.suffix != ".safetensors":
            same = f"{100 * one.agreement:.2f} % same answers"
            print(f"  against torch: largest difference of a logit {one.difference:.2g}, {same}")
        if one.accuracy is not None:
            before, after = (100 * share for share in one.accuracy)
            print(f"  top-1 on the test set: {before:.2f} % before, {after:.2f} % after")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="kdbench export", description=__doc__)
    parser.add_argument("run", help="a run folder, or a weights file in one (best.safetensors)")
    for name, text in FORMATS.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    parser.add_argument(
        "--int8", action="store_true", help="ONNX with 8-bit integers; its accuracy on the test set, before and after"
    )
    parser.add_argument("--out", metavar="DIR", type=Path, help="where to (default: RUN/export)")
    add_trust(parser)
    return parser.parse_args()
