"""List what can be chosen: all groups, or the options of one with a line on each."""

from __future__ import annotations

import argparse
import fnmatch
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kdbench.configure.options import folders, groups, headline, options, summary
from kdbench.errors import UserError, nearest

# Where choices come from that are no files of kdbench.
_ELSEWHERE = {
    "optimizer": "Any optimizer of timm: optimizer=timm optimizer.name=NAME; "
    'names: python -c "import timm.optim as o; print(*o.list_optimizers())"',
    "student": "Any network of timm: student=timm student.name=NAME; "
    "names: python -c \"import timm; print(*timm.list_models('*resnet*'))\"",
    "teacher": "Any network of timm: teacher=timm teacher.name=NAME; "
    "names: python -c \"import timm; print(*timm.list_models('*resnet*'))\"",
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="kdbench list", description=__doc__)
    parser.add_argument("group", nargs="?", help="a group of options, e.g. loss; without one, every group")
    parser.add_argument("pattern", nargs="?", default="", help="only names that contain this, or match it (res*)")
    parser.add_argument("--config-dir", "-cd", help="also list the options in this folder")
    arguments = parser.parse_intermixed_args()
    places = folders(sys.argv[1:])
    if arguments.config_dir and not Path(arguments.config_dir).is_dir():
        raise UserError(f"--config-dir {arguments.config_dir}: there is no such folder")
    if arguments.group is None:
        _print_groups(places)
    else:
        _print_options(arguments.group.strip("/"), arguments.pattern, places)
    return 0


def _print_groups(places: list[Path]) -> None:
    _print_rows([(group, summary(group, places)) for group in groups(places)])
    print("\nkdbench list GROUP says what each option is; kdbench train GROUP=OPTION chooses it.")


def _print_options(group: str, pattern: str, places: list[Path]) -> None:
    known = options(group, places)
    if not known:
        names = groups(places)
        hint = nearest(group, names, "Did you mean {}? ")
        raise UserError(f"there is no group '{group}'. {hint}Groups: {', '.join(names)}")
    chosen = [name for name in known if not pattern or pattern in name or fnmatch.fnmatch(name, pattern)]
    if not chosen:
        hint = nearest(pattern, known, "Did you mean {}? ")
        raise UserError(f"no option of {group} matches '{pattern}'. {hint}Options: {', '.join(known)}")
    _print_rows([(name, headline(known[name])) for name in chosen])
    if group in _ELSEWHERE:
        print(f"\n{_ELSEWHERE[group]}")


def _print_rows(rows: list[tuple[str, str]]) -> None:
    if not sys.stdout.isatty():  # one option a line, for grep
        width = max(len(name) for name, _ in rows)
        print("\n".join(f"{name:<{width}}  {text}".rstrip() for name, text in rows))
        return
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column()
    for row in rows:
        table.add_row(*row)
    Console(highlight=False).print(table)
