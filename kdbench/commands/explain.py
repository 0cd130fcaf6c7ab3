"""Explain what a key means, or every key of a group: kdbench explain trainer.clip."""

from __future__ import annotations

import argparse
import sys
import textwrap

from kdbench.configure.comments import Comment, explain
from kdbench.configure.options import folders, headline, options
from kdbench.errors import UserError

_WIDTH = 110


def main() -> int:
    arguments = _parse()
    places = folders(sys.argv[1:])
    chosen = dict(word.partition("=")[::2] for word in arguments.words if "=" in word)
    keys = [word for word in arguments.words if "=" not in word] or list(chosen)
    if not keys:
        raise UserError(
            "kdbench explain: which key? E.g. trainer.clip, loss.tau loss=dkd, or schedule for all of its keys"
        )
    for key in keys:
        found = explain(key, chosen, places)
        if file := options(key, places).get(chosen.get(key, "")):  # a value of a plain key is no option's name
            print(f"{key}={chosen[key]}: {headline(file)}")
        _print(found)
    return 0


def _print(found: list[Comment]) -> None:
    width = max(len(f"{one.key} = {one.value}") for one in found if len(one.value) < 40) if len(found) > 1 else 0
    for one in found:
        head = f"{one.key} = {one.value}" if one.value else f"{one.key}:"
        text = textwrap.wrap(one.text, _WIDTH) or [""]
        print(f"{head:<{width}}  {text[0]}".rstrip())
        for line in text[1:]:
            print(f"{'':<{width}}  {line}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="kdbench explain", description=__doc__)
    parser.add_argument(
        "words", nargs="*", metavar="KEY", help="a key (trainer.clip), a group (trainer), or GROUP=OPTION"
    )
    parser.add_argument("--config-dir", "-cd", metavar="DIR", help="also look in this folder")
    return parser.parse_intermixed_args()
