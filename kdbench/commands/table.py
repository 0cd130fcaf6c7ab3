"""Fill a teacher's logit table ahead, or list the tables there are."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from omegaconf import DictConfig

from kdbench import configure
from kdbench.commands.train import chosen
from kdbench.errors import UserError, printable
from kdbench.files import in_bytes, on_disk

_USAGE = """usage: kdbench table build [group=option ...] [key=value ...]
       kdbench table info [FOLDER]

build   compute a teacher's logits for every view of every training image, for later runs to read. Takes what
        `kdbench train` takes, e.g. dataset=cifar100 teacher=resnet56. May be stopped and started again.
info    list the tables below FOLDER (default: outputs/teachers): size, share filled, what the teacher ran in.
        A table may be deleted at any time: what is needed is computed again."""

# No run is started, so no run folder is made: the log goes beside the teachers.
TAKES_KEYS = True
OWN = [
    "hydra.run.dir=${paths.teachers}", "hydra.sweep.dir=${paths.teachers}", "hydra.sweep.subdir=.",
    "hydra.job.name=table",
]  # fmt: skip


def main() -> int:
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        print(_USAGE)
        return 0 if words else 2
    if words[0] == "info":
        return info(words[1:])
    if words[0] != "build":
        raise UserError("kdbench table", words[0], "build or info")
    return configure.launch(fill, own=OWN, words=words[1:])


def fill(cfg: DictConfig) -> None:
    """Build the table of a configuration and print what was done."""
    from kdbench import build  # loads torch

    done = build.fill_table(cfg, chosen(), _progress)
    rate = f", {done.computed / done.seconds:,.0f} a second" if done.computed else ""
    print(f"table {done.path}  ({in_bytes(on_disk(done.path))} on disk)")
    print(f"{done.entries:,} entries, {done.computed:,} of them computed now in {done.seconds:.1f} s{rate}")


def info(words: list[str]) -> int:
    """List tables; only headers and tags are read."""
    parser = argparse.ArgumentParser(prog="kdbench table info", description=__doc__)
    parser.add_argument("folder", nargs="?", default="outputs/teachers", help="where to look (default: %(default)s)")
    folder = Path(parser.parse_args(words).folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder")
    rows = [tuple(printable(cell).replace("\n", "\\n") for cell in row) for row in _described(folder)]
    if not rows:
        print(f"no tables below {folder}")
        return 0
    lines = [("table", "images", "views", "classes", "type", "filled", "on disk", "full", "device"), *rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    print("\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines))
    return 0


def _described(folder: Path) -> Iterator[tuple[str, ...]]:
    from kdbench.tables.file import count_filled, shape_in
    from kdbench.tables.store import find_tables

    for path, header in find_tables(folder):
        name, taken = str(path.relative_to(folder)), in_bytes(on_disk(path))
        shape, count = shape_in(header), None
        with suppress(OSError):  # a table that may not be read hides no other
            count = None if shape is None else count_filled(path, shape)
        if shape is None or count is None:
            yield (name, *["?"] * 4, "damaged" if shape is None else "unreadable", taken, "?", "?")
            continue
        key = header["key"]
        device = str(key.get("device", "?")) if isinstance(key, Mapping) else "?"
        filled = f"{100 * count / shape.entries:.1f} %"
        size = [f"{shape.rows:,}", str(shape.views), str(shape.classes), str(shape.dtype).removeprefix("torch.")]
        yield (name, *size, filled, taken, in_bytes(shape.bytes), device)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(TextColumn("table"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()) as bar:
        task = bar.add_task("", total=total)
        yield lambda done: bar.advance(task, done)
