"""How large kdbench is for who reads it: what the plainest run enters before its first step, and figures of the source.

    python scripts/measure_house.py [--list] [--trace-only | --source-only]

The run is `kdbench train debug=smoke teacher=none loss=ce` in a folder of its own, followed by Python's profiler up to
the first optimizer step. Only kdbench's code counts: what is called, but neither what is merely imported nor what is
called while a module is. About ten seconds.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

HOUSE = Path(__file__).resolve().parent.parent
PACKAGE = HOUSE / "kdbench"
RUN = ["train", "debug=smoke", "teacher=none", "loss=ce", "trainer.device=cpu", "trainer.progress=none"]
LOOSE = ("dict[str, Any]", "Mapping[str, Any]")


class FirstStep(BaseException):
    """Ends the run that is followed; no `except Exception` on the way keeps it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="the names behind the counts, too")
    parser.add_argument("--trace-only", action="store_true")
    parser.add_argument("--source-only", action="store_true")
    arguments = parser.parse_args()
    found: dict[str, Any] = {}
    if not arguments.source_only:
        found |= trace(arguments.list)
    if not arguments.trace_only:
        found |= source(arguments.list)
    print(json.dumps(found, indent=1))


def trace(names: bool) -> dict[str, Any]:
    """Files and functions that the run enters, and its stack at the first optimizer step, `cli.main` being frame 1."""
    began, entered, importing = time.perf_counter(), set[CodeType](), 0

    def follow(frame: FrameType, event: str, _argument: object) -> None:
        nonlocal importing
        if frame.f_code.co_name == "<module>":
            importing += {"call": 1, "return": -1}.get(event, 0)
        elif event == "call" and not importing:
            entered.add(frame.f_code)

    sys.path.insert(0, str(HOUSE))
    sys.argv = ["kdbench", *RUN]
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        from kdbench import cli

        stack: list[CodeType] = []
        _stop_at_first_step(stack)
        sys.setprofile(follow)
        try:
            code = cli.main()
            raise SystemExit(f"the run ended with {code} before its first step")
        except FirstStep:
            pass
        finally:
            sys.setprofile(None)
            os.chdir(HOUSE)
    own = {code for code in entered if _is_ours(code) and not code.co_name.startswith("<")}
    files = sorted({_place(code) for code in own})
    frames = [code for code in stack if _is_ours(code)]
    found: dict[str, Any] = {
        "files entered": len(files),
        "functions entered": len(own),
        "frames of kdbench at the step": len(frames),
        "frames of all libraries at the step": len(stack),
        "seconds to the step, followed": round(time.perf_counter() - began, 1),
    }
    if names:
        by_file = Counter(map(_place, own))
        found["entered"] = {file: by_file[file] for file in files}
        found["stack"] = [f"{_place(code)}:{code.co_name}" for code in frames]
    return found


def _stop_at_first_step(stack: list[CodeType]) -> None:
    """Note who calls the first optimizer step, from `cli.main` on, and end the run there."""
    import torch

    def step(*_: object, **__: object) -> None:
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            stack.insert(0, frame.f_code)
            if frame.f_code.co_name == "main" and _place(frame.f_code) == "cli.py":
                break
            frame = frame.f_back
        raise FirstStep

    torch.optim.SGD.step = torch.optim.AdamW.step = step  # type: ignore[assignment, method-assign]


def _is_ours(code: CodeType) -> bool:
    return Path(code.co_filename).is_relative_to(PACKAGE)


def _place(code: CodeType) -> str:
    return str(Path(code.co_filename).relative_to(PACKAGE))


def source(names: bool) -> dict[str, Any]:
    """Lines, functions, parameters and loose types of all files of the package."""
    files = sorted(PACKAGE.rglob("*.py"))
    texts = [file.read_text(encoding="utf-8") for file in files]
    functions = [one for file, text in zip(files, texts) for one in _functions(file, ast.parse(text))]
    lengths = sorted(length for _, length, _ in functions)
    wide = sorted(((count, name) for name, _, count in functions), reverse=True)
    found: dict[str, Any] = {
        "files": len(files),
        "lines": sum(len(text.splitlines()) for text in texts),
        "lines of tests": sum(len(f.read_text(encoding="utf-8").splitlines()) for f in (HOUSE / "tests").rglob("*.py")),
        **{loose: sum(text.count(loose) for text in texts) for loose in LOOSE},
        "function lines, median": statistics.median(lengths),
        "function lines, longest": lengths[-1],
        "most parameters": wide[0][0],
        "functions of more than 7 parameters": sum(count > 7 for count, _ in wide),
    }
    if names:
        found["parameters"] = {name: count for count, name in wide if count > 7}
        found["loose"] = {
            str(file.relative_to(PACKAGE)): count
            for file, text in zip(files, texts)
            if (count := sum(text.count(loose) for loose in LOOSE))
        }
        found["long"] = {name: length for name, length, _ in functions if length > 40}
    return found


def _functions(file: Path, tree: ast.AST) -> Iterator[tuple[str, int, int]]:
    """Name, lines and parameters (without self) of every function."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            arguments = node.args
            every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
            every += [one for one in (arguments.vararg, arguments.kwarg) if one is not None]
            count = len(every) - (bool(every) and every[0].arg in ("self", "cls"))
            name = f"{file.relative_to(PACKAGE)}:{node.name}"
            yield name, (node.end_lineno or node.lineno) - node.lineno + 1, count


if __name__ == "__main__":
    main()
