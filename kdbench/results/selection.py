"""Selecting runs by what they were set to, parting them, and laying their figures out by two keys."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from kdbench.counted import is_seed
from kdbench.errors import UserError, nearest, require, show, some
from kdbench.results.read import Run
from kdbench.results.render import figure, setting
from kdbench.results.rows import VERSION, Comparison, Row, named_choices, neutral

_VALUES = 20  # of a key that are printed where none of them was typed


def conditions(text: str, option: str) -> dict[str, str]:
    """ "loss=kl,loss.tau=4" by key. Raises UserError for what is no key=value."""
    found = {}
    for part in re.split(r",(?=[\w.]+=)", text):
        key, equals, value = part.partition("=")
        if not equals or not key:
            raise UserError(option, text, "KEY=VALUE, several with commas, e.g. loss=kl,loss.tau=4")
        require(key not in found, option, text, f"one value a key, and {key} has two")
        found[key] = value
    return found


def value_of(run: Run, key: str) -> Any:
    """What a run chose, as tables name it, or was set to, or its `task`; None for a key that it lacks."""
    if key == "task":
        return run.result.task
    if key in run.result.choices:
        return named_choices(run).get(key, run.result.choices[key])
    return neutral(run.result.config.get(key))


def _fits(run: Run, key: str, text: str) -> bool:
    """Whether it was set so; a library's network, or a run that teaches, goes by the option of its group, too."""
    return _is(value_of(run, key), text) or _is(run.result.choices.get(key, ...), text)


def meets(values: Mapping[str, object], wanted: Mapping[str, str]) -> bool:
    """Whether values are the ones written: as text, or as YAML reads it (4 is 4.0, [6,6] is [6, 6])."""
    return all(key in values and _is(values[key], text) for key, text in wanted.items())


def where(runs: Sequence[Run], wanted: Mapping[str, str]) -> list[Run]:
    """The runs that were set so. Raises UserError, naming the values that there are, if none was."""
    left = list(runs)
    for key, text in wanted.items():
        known = known_key(left, key, "--where")
        kept = [run for run in left if _fits(run, known, text)]
        if left and not kept:
            values = some(_ordered({show(value_of(run, known)) for run in left}), _VALUES)
            raise UserError(f"--where {key}={text}: no run has it; their values: {values}")
        left = kept
    return left


def by(runs: Sequence[Run], key: str) -> dict[str, list[Run]]:
    """Runs parted by their value of a key."""
    parts: dict[str, list[Run]] = {}
    for run in runs:
        parts.setdefault(show(value_of(run, known_key(runs, key, "--by"))), []).append(run)
    return {value: parts[value] for value in _ordered(set(parts))}


def known_key(runs: Sequence[Run], key: str, option: str) -> str:
    """The key, if some run has it. Raises UserError naming near ones."""
    if key == "task" or any(key in run.result.choices or key in run.result.config for run in runs):
        return key
    known = sorted({name for run in runs for name in [*run.result.choices, *run.result.config]})
    raise UserError(f"{option} {key}: no run has this key. {nearest(key, known)}".rstrip())


def baseline(comparison: Comparison, text: str) -> Row:
    """The one setting that --against names. Raises UserError if it names none, or several: of none with the values that
    there are, of several with what they differ in."""
    wanted, left = conditions(text, "--against"), list(comparison.rows)
    for key, value in wanted.items():
        require(not is_seed(key), "--against", text, "a setting, without a seed: it stands for all its seeds")
        before = left
        if key == VERSION and key in comparison.columns:
            left = [row for row in before if row.differs.get(key) == value]
        else:
            known_key([row.runs[0] for row in before], key, "--against")
            left = [row for row in before if _fits(row.runs[0], key, value)]
        if not left:
            given = (row.differs.get(key, value_of(row.runs[0], key)) for row in before)
            values = some(_ordered({show(one) for one in given}), _VALUES)
            raise UserError(f"--against {text}: must name one setting, names 0; their values of {key}: {values}")
    if len(left) == 1:
        return left[0]
    differ = [key for key in comparison.columns if len({show(row.differs.get(key)) for row in left}) > 1]
    shown = "; ".join(setting(row, differ) for row in left[:5])
    raise UserError(f"--against {text}: must name one setting, names {len(left)}, which differ: {shown}")


def pivot(comparison: Comparison, rows: str, columns: str, metric: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows of one metric laid out by two keys. Raises UserError for two settings in one cell and for
    seeds, over which a cell is the mean."""
    for key, option in ((rows, "--rows"), (columns, "--columns")):
        require(not is_seed(key), option, key, "a key of settings: a cell is the mean over seeds")
    placed: dict[tuple[str, str], Row] = {}
    for row in comparison.rows:
        place = (show(value_of(row.runs[0], rows)), show(value_of(row.runs[0], columns)))
        if place in placed:
            others = [key for key in comparison.columns if key not in (rows, columns)]
            both = " and ".join(setting(one, others) for one in (placed[place], row))
            raise UserError(
                f"--rows {rows} --columns {columns}: two settings at {rows}={place[0]}, {columns}={place[1]} ({both}). "
                "Choose one with --where KEY=VALUE."
            )
        placed[place] = row
    across, down = _ordered({place[1] for place in placed}), _ordered({place[0] for place in placed})
    kind = comparison.metric(metric)
    body = [
        [name, *(figure(placed[name, one].metrics[metric], kind) if (name, one) in placed else "-" for one in across)]
        for name in down
    ]
    return [f"{rows} \\ {columns}", *across], body


def _ordered(names: set[str]) -> list[str]:
    """Numbers by size; words by letter, the numbers in them by size: resnet8, resnet20, resnet110."""

    def place(name: str) -> tuple[int, float, str]:
        try:
            return 0, float(name), ""
        except ValueError:
            return 1, 0.0, re.sub("[0-9]+", lambda digits: digits[0].zfill(20), name)

    return sorted(names, key=place)


def _is(value: Any, text: str) -> bool:
    if str(value) == text:
        return True
    try:
        return bool(value == yaml.safe_load(text))
    except yaml.YAMLError:
        return False
