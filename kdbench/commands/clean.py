"""Clean up: show what of finished runs is needed no more, and how much it takes, and remove it when told to."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from kdbench.errors import UserError, printable
from kdbench.files import in_bytes, is_locked, on_disk
from kdbench.results.result import RESULT, is_finished
from kdbench.results.status import LOCK

_SHOWN = 20  # paths that are printed
RECORDS = (RESULT, "run.json", "epsilon.json")  # what says which network a run, or a search, is of


class Spare(NamedTuple):
    """A file that may go, and why."""

    path: Path
    why: str
    bytes: int


def main() -> int:
    arguments = _parse()
    folder = Path(arguments.folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder")
    found = sorted([*checkpoints(folder), *tables(folder, arguments.tables)])
    if not found:
        print(f"{folder}: nothing to remove")
        return 0
    _print(found)
    if not arguments.yes and not _asked(found):
        return 1
    freed = sum(one.bytes for one in found if _removed(one))
    print(f"{in_bytes(freed)} freed")
    return 0


def checkpoints(folder: Path) -> Iterator[Spare]:
    """checkpoint.pt of finished runs: only an unfinished one goes on from it, or from its stages'. Whoever is at work
    is left alone."""
    for path in folder.rglob("checkpoint.pt"):
        run = path.parent
        whole = run.parent.parent if run.parent.name == "stages" else run
        if is_finished(run) and is_finished(whole) and not is_locked(run / LOCK):
            yield Spare(path, "checkpoint of a finished run", on_disk(path))


def tables(folder: Path, every: bool) -> Iterator[Spare]:
    """Tables of logits of networks that no run, stage or teacher below the folder is of or has as its teacher; with
    `every`, all of them: they are computed again when they are needed. A broken one can serve nobody."""
    if not any(folder.rglob("*.table")):
        return
    from kdbench.tables.store import find_tables  # loads torch

    found = []
    for path, header in find_tables(folder):
        key = header.get("key")
        if not is_locked(path.with_name(f"{path.name}.lock")):
            found.append((path, str(key["weights"]) if isinstance(key, dict) and "weights" in key else None))
    known = _named(folder, {weights for _, weights in found if weights})
    for path, weights in found:
        why = "broken table" if weights is None else "table, computed again when it is needed"
        if every or weights is None:
            yield Spare(path, why, on_disk(path))
        elif weights not in known:
            yield Spare(path, f"{why}: no run here names its teacher", on_disk(path))


def _named(folder: Path, weights: set[str]) -> set[str]:
    """Those hashes of networks that a file of a run, unfinished ones, stages of procedures and teachers among them, or
    of a search for an epsilon has in it."""
    known: set[str] = set()
    for name in RECORDS:
        for path in folder.rglob(name):
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            known |= {one for one in weights - known if one in text}
    return known


def _print(found: list[Spare]) -> None:
    for why in sorted({one.why for one in found}):
        same = [one for one in found if one.why == why]
        print(f"{in_bytes(sum(one.bytes for one in same)):>8}  {len(same)} x {why}")
    for one in sorted(found, key=lambda one: -one.bytes)[:_SHOWN]:
        print(f"{in_bytes(one.bytes):>8}  {printable(str(one.path))}")
    if len(found) > _SHOWN:
        print(f"          and {len(found) - _SHOWN} more")


def _asked(found: list[Spare]) -> bool:
    total = in_bytes(sum(one.bytes for one in found))
    if not sys.stdin.isatty():
        print(f"--yes removes them and frees {total}", file=sys.stderr)
        return False
    return input(f"Remove {len(found)} files and free {total}? [y/N] ").strip().lower() in ("y", "yes")


def _removed(one: Spare) -> bool:
    try:
        one.path.unlink()
    except OSError as error:
        print(printable(f"left: {one.path}: {error}"), file=sys.stderr)
        return False
    one.path.with_name(f"{one.path.name}.lock").unlink(missing_ok=True)
    return True


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="kdbench clean", description=__doc__)
    parser.add_argument("folder", nargs="?", default="outputs", help="where to look (default: %(default)s)")
    parser.add_argument("--tables", action="store_true", help="all tables of logits too: computed again when needed")
    parser.add_argument("--yes", action="store_true", help="remove without asking")
    return parser.parse_args()
