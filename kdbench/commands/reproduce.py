"""Reproduce a paper's experiments, resumable, and compare them: kdbench reproduce kim2021."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from kdbench.errors import UserError, nearest
from kdbench.paths import SCRIPTS

_PREFIX = "reproduce_"


def main() -> int:
    arguments, words = _parse()
    papers = {file.stem.removeprefix(_PREFIX): file for file in sorted(SCRIPTS.glob(f"{_PREFIX}*.sh"))}
    if arguments.paper is None:
        width = max(map(len, papers))
        print("\n".join(f"{name:<{width}}  {_about(file)}" for name, file in papers.items()))
        print("\nkdbench reproduce PAPER [small|full] [key=value ...]; then: kdbench claims")
        return 0
    if arguments.paper not in papers:
        hint = nearest(arguments.paper, papers, "Did you mean {}? ")
        raise UserError(f"kdbench reproduce {arguments.paper}: no such paper. {hint}Papers: {', '.join(papers)}")
    bash = shutil.which("bash")
    if bash is None:
        raise UserError("kdbench reproduce: the papers' sets of runs are shell scripts, and there is no bash here")
    # The scripts call kdbench: this one, wherever it is installed.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    command = [bash, str(papers[arguments.paper]), arguments.size, *words]
    return subprocess.run(command, env=os.environ | {"PATH": path}).returncode


def _about(file: Path) -> str:
    """The first sentence of a script's comment."""
    lines = file.read_text(encoding="utf-8").splitlines()[1:]
    comment = " ".join(
        line.removeprefix("#").strip() for line in lines[: next(i for i, x in enumerate(lines) if x[:1] != "#")]
    )
    return re.split(r"\.\s(?=[A-Z])|\s?Usage:", comment)[0].rstrip(".")


def _parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="kdbench reproduce",
        description=__doc__,
        epilog="Further words (seed=0, dataset.subset=4000) go to every run.",
    )
    parser.add_argument("paper", nargs="?", help="e.g. kim2021; without one: what there is")
    parser.add_argument("size", nargs="?", default="small", help="small (the default; minutes on a CPU) or full")
    arguments, words = parser.parse_known_args()
    if "=" in arguments.size:
        words, arguments.size = [arguments.size, *words], "small"
    if arguments.size not in ("small", "full"):
        raise UserError("size", arguments.size, "small or full")
    for word in words:
        if "=" not in word:
            raise UserError(f"{word}: not of the form key=value")
    return arguments, words
