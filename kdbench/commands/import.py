"""Import another program's command line: what kdbench train takes in its place (RepDistiller, mdistiller, timm)."""

from __future__ import annotations

import argparse

from kdbench.configure.other_programs import translate
from kdbench.errors import split


def main() -> int:
    arguments = _parse()
    line = " ".join(arguments.line)
    words = split("kdbench import", line.replace("\\\n", " ")) if len(arguments.line) == 1 else arguments.line
    made = translate(line, words)
    print(made.line)
    for note in made.notes:
        print(f"# {note}")
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="kdbench import",
        description=__doc__,
        epilog="kdbench import 'python train_student.py --path_t save/models/resnet32x4_vanilla/ckpt_epoch_240.pth "
        "--distill kd --model_s resnet8x4 -r 0.1 -a 0.9 -b 0', or a mdistiller YAML",
    )
    parser.add_argument("line", nargs=argparse.REMAINDER, help="the command, in quotes or not; or a YAML of mdistiller")
    arguments = parser.parse_args()
    if not arguments.line:
        parser.error("which command?")
    return arguments
