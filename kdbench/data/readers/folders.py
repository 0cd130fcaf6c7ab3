"""Folders of a set as a person lays them out: which part is which, and which class."""

from __future__ import annotations

import logging
import os
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from kdbench.data.files import LeftOut, entries, images_below, place_of
from kdbench.errors import UserError

log = logging.getLogger("kdbench")
# In any case, and with an ending such as _set, " images" or 2017.
PARTS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_ENDING = re.compile(r"[ _-]?(set|data|images|split|\d+)$")
_MEANT = {"train": "a training", "val": "a validation", "test": "a test"}


def part_of(name: str) -> str | None:
    """Which part of a set a folder's name says, or None."""
    plain = _ENDING.sub("", name.casefold())
    return next((part for part, words in PARTS.items() if plain in words), None)


def parts_of(base: Path, left_out: LeftOut) -> dict[str, Path]:
    """Where the parts "train", "val" and "test" lie; of a set without parts "train" is `base` itself.

    A folder is a part if its name says so and it holds folders. What lies beside the parts is counted in `left_out`.
    Raises UserError for two folders of one part, a part without train/, and parts without class folders.
    """
    here = entries(base, LeftOut())
    called = {name: part for name in here.folders if (part := part_of(name)) is not None}
    deep = {name: part for name, part in called.items() if entries(base / name, LeftOut()).folders}
    flat = sorted(name for name in called if name not in deep)
    where = base.resolve()
    if "train" not in deep.values():
        _refuse_without_train(where, here.folders, sorted(deep), flat)
        return {"train": base}
    found: dict[str, Path] = {}
    for name, part in deep.items():
        if part in found:
            both = f"{found[part].name}/ and {name}/ in {where}"
            raise UserError(f"dataset.root: {both} would both be {_MEANT[part]} set: rename or move one")
        found[part] = base / name
    for name in here.folders:
        if name in flat and images_below(base / name, LeftOut()):
            raise UserError(f"dataset.root: {where / name} holds no class folders: move its images into one a class")
        if name not in deep:
            left_out[f"images in {name}/, beside {found['train'].name}/"] += len(images_below(base / name, LeftOut()))
    if here.images:
        left_out[f"images beside {found['train'].name}/"] += len(here.images)
    return found


def _refuse_without_train(where: Path, folders: Sequence[str], deep: Sequence[str], flat: Sequence[str]) -> None:
    if deep:
        raise UserError(
            f"dataset.root: {where / deep[0]} looks like {_MEANT[part_of(deep[0]) or 'test']} set, but there is no "
            f"train/ with class folders beside it: move the classes to train on into {where / 'train'}"
        )
    plain = {name for name in flat if _ENDING.sub("", name.casefold()) == name.casefold()}
    if len({part_of(name) for name in plain}) > 1 or (plain and len(folders) == len(plain)):
        listed = ", ".join(f"{name}/" for name in sorted(plain))
        raise UserError(
            f"dataset.root: {listed} in {where} hold no class folders, and are taken for no classes: move their images "
            "into a folder a class"
        )


def class_folders(folder: Path, left_out: LeftOut, names: Sequence[str] | None = None) -> dict[str, Path]:
    """Class names and where they lie, sorted by name; names are in one Unicode form (NFC), whatever the disk's.

    names: the classes of the training set; a folder whose name differs from one of them in case only is that class.
    Raises UserError for two folders of one name, or one folder under two names.
    """
    here = entries(folder, left_out)
    if here.images:
        left_out[f"images beside the class folders of {folder.name}/"] += len(here.images)
    found: dict[str, Path] = {}
    places: dict[tuple[int, int], str] = {}
    for raw in here.folders:
        path = folder / raw
        name = _class_name(path, names)
        if name in found:
            raise UserError(
                f"dataset.root: {found[name]} and {path} are one class, {name}, spelled in two ways (case, or the form "
                "of an accent): move their images together"
            )
        place = place_of(path)
        if place in places:
            raise UserError(f"dataset.root: {folder / places[place]} and {path} are the same folder: remove one")
        places[place], found[name] = raw, path
    alike = _alike(found) if names is None else []
    if alike:
        log.warning("%s: classes differ in case only: %s", folder, ", ".join(alike))
    return dict(sorted(found.items()))


def _class_name(path: Path, names: Sequence[str] | None) -> str:
    try:
        os.fsencode(path.name).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"dataset.root: the name of {os.fsencode(path)!r} is no UTF-8: rename it") from error
    name = unicodedata.normalize("NFC", path.name)
    if names is None or name in names:
        return name
    same = [other for other in names if other.casefold() == name.casefold()]
    if len(same) != 1:
        return name
    log.warning("%s is taken for the class %s: they differ in case only", path, same[0])
    return same[0]


def _alike(names: Sequence[str] | dict[str, Path]) -> list[str]:
    by_case: dict[str, list[str]] = {}
    for name in names:
        by_case.setdefault(name.casefold(), []).append(name)
    return [" and ".join(group) for group in by_case.values() if len(group) > 1]
