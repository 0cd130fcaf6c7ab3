"""Pages of the site that are read from the code: options from configs and docstrings, commands from their help.

The Python functions from their docstrings. A hook of mkdocs (mkdocs.yml); `python scripts/docs.py DIR` writes files.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from hydra import initialize_config_dir

from kdbench import api
from kdbench.arguments import locate
from kdbench.arguments.code import Trust
from kdbench.build import ConfigCatalogue
from kdbench.cli import commands, purpose
from kdbench.configure import register
from kdbench.configure.comments import of_option, of_root
from kdbench.configure.options import groups, headline, options
from kdbench.deploy.student import Student
from kdbench.errors import UserError
from kdbench.paths import CONFIG_DIR

ROOT = Path(__file__).resolve().parent.parent
PLACES = [Path(CONFIG_DIR)]
LISTED = ("student", "experiment", "debug", "teacher")  # one line an option: their keys are few, or other groups'


def pages() -> dict[str, str]:
    """Every generated page by its path on the site."""
    register()
    made = {"index.md": _home(), "changelog.md": (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")}
    made["reference/options.md"] = _options_index()
    made |= {f"reference/{group.replace('/', '_')}.md": group_page(group) for group in groups(PLACES)}
    return made | {"reference/commands.md": commands_page(), "reference/python.md": python_page()}


def on_files(files: Any, config: Any) -> Any:
    """mkdocs: add the generated pages."""
    from mkdocs.structure.files import File

    for path, content in pages().items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, **_others: Any) -> str:
    """mkdocs: links of a page as they lead from the site; to files that are no pages, without a link."""
    text = markdown.replace("](../README.md", "](index.md")
    return re.sub(r"\[([^\]]+)\]\((?:\.\./)?(?:kdbench|examples|scripts)/[^)]*\)", r"\1", text)


def group_page(group: str) -> str:
    """One group: each option with what it is, its formula and source, and its keys with defaults and meaning."""
    found = options(group, PLACES)
    lines = [f"# {group}", "", f"`{group}=OPTION`; {len(found)} options, as `kdbench list {group}` prints them.", ""]
    if group in LISTED:
        lines += ["| option | what it is |", "|---|---|"]
        lines += [f"| `{name}` | {_cell(headline(file))} |" for name, file in found.items()]
        first = next(iter(found))
        return "\n".join([*lines, "", *(_keys(group, first) if group == "student" else []), ""])
    for name, file in found.items():
        lines += [f"## {group}={name}", "", headline(file), "", *_about(group, name, file), *_keys(group, name)]
    return "\n".join(lines)


def _about(group: str, name: str, file: Path) -> Iterator[str]:
    """Formula and docstring of what the option builds."""
    tree = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    target = tree.get("_target_") or tree.get("reader") if isinstance(tree, dict) else None
    if group == "loss":
        with initialize_config_dir(CONFIG_DIR, version_base="1.3"):
            made = ConfigCatalogue(Trust(None)).loss(name).make()
        yield from (f"**Formula:** `{made.formula}`", "")
        if getattr(made, "paper", ""):
            yield from (f"**Source:** {made.paper}", "")
    if target:
        with contextlib.suppress(UserError):
            yield from (_text(locate(target)), "")


def _keys(group: str, name: str) -> list[str]:
    found = of_option(group, name, PLACES)
    if not found:
        return []
    rows = [
        f"| `{one.key}` | {_cell(f'`{one.value}`' if one.value else '')} | {_cell(one.text)} |"
        for one in found.values()
    ]
    return ["| key | default | meaning |", "|---|---|---|", *rows, ""]


def commands_page() -> str:
    """Every command with its help."""
    lines = ["# Commands", ""]
    for name, module in commands().items():
        lines += [f"## kdbench {name}", "", purpose(module), "", "```text", _help(name, module.stem), "```", ""]
    return "\n".join(lines)


def python_page() -> str:
    """The package's own functions, and what `kdbench.load` returns."""
    lines = ["# Python", "", _text(api), ""]
    for name in ("train", "sweep", "load", "read_runs", "compose"):
        lines += _signature(f"kdbench.{name}", getattr(api, name))
    lines += ["## Student", "", _text(Student), ""]
    for name, thing in vars(Student).items():
        if name.startswith("_") or name in Student.__dataclass_fields__ or not thing.__doc__:
            continue
        lines += _signature(f"Student.{name}", thing.fget if isinstance(thing, property) else thing)
    return "\n".join(lines)


def _signature(name: str, thing: Callable[..., Any]) -> list[str]:
    return [f"### `{name}{inspect.signature(thing)}`", "", _text(thing), ""]


def _help(name: str, stem: str) -> str:
    module = importlib.import_module(f"kdbench.commands.{stem}")
    if stem == "train":
        about = yaml.safe_load((Path(CONFIG_DIR) / "hydra" / "default.yaml").read_text(encoding="utf-8"))["help"]
        return f"{about['header']}\n{about['footer']}".strip()
    before, said = sys.argv, io.StringIO()
    sys.argv = [f"kdbench {name}", "--help"]
    columns = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "110"
    try:
        with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            module.main()
    finally:
        sys.argv = before
        os.environ.pop("COLUMNS") if columns is None else os.environ.__setitem__("COLUMNS", columns)
    return said.getvalue().strip()


def _options_index() -> str:
    lines = ["# Options", "", "A run is a choice in each group (`group=option`) and values (`key=value`).", ""]
    lines += ["| group | options |", "|---|---|"]
    for group in groups(PLACES):
        lines.append(f"| [{group}]({group.replace('/', '_')}.md) | {len(options(group, PLACES))} |")
    lines += ["", "## Keys of no group", "", "| key | default | meaning |", "|---|---|---|"]
    lines += [f"| `{one.key}` | `{one.value}` | {_cell(one.text)} |" for one in of_root().values()]
    return "\n".join(lines)


def _home() -> str:
    """The README, with its links as they lead from the site."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.sub(r"\]\(docs/", "](", text)


def _text(thing: Any) -> str:
    return inspect.getdoc(thing) or ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    for path, content in pages().items():
        place = Path(sys.argv[1]) / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(content, encoding="utf-8")
