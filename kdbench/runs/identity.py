"""Identity: what a result is a result of, kept with it from the start, and what differs between two in words.

A folder that is met again is believed only if its identity is the run's own. Loads no torch: a finished run is shown
again at once.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from kdbench import world
from kdbench.counted import RESULT_FORMAT, as_before, counted, neutral
from kdbench.data import content
from kdbench.data.content import Content
from kdbench.data.stamp import Stamp
from kdbench.errors import UserError, show
from kdbench.files import read_object, write_json
from kdbench.results.result import RESULT, is_finished
from kdbench.results.status import FAILURE, START

log = logging.getLogger(__name__)

_MOST = 6  # differences that a message lists
_WAYS = "force=true runs it anew in its place; another folder (name=<label>, hydra.run.dir=<folder>) keeps both"


@dataclass(frozen=True)
class Identity:
    """What a run's figures follow from, but for the machine."""

    hash: str  # of the counted configuration, what it names of files and code included
    format: int = RESULT_FORMAT  # 0: the hash speaks for it
    named: Mapping[str, str] = field(default_factory=dict)  # what the files and runs hold that values name, by key
    code: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # digests by module, by what is named
    data: Content | None = None  # None: the hash speaks for it, or it is not known
    teacher: str = ""  # hash of its weights, or its key in the store; "" without one, or where it is not known
    settings: Mapping[str, object] = field(default_factory=dict)  # for words; in JSON the configuration has them

    def as_json(self) -> dict[str, object]:
        tree = asdict(self)
        del tree["settings"]
        return tree

    @classmethod
    def read(cls, known: Any, settings: Mapping[str, object]) -> Identity | None:
        """From what was JSON; None for anything else."""
        with suppress(TypeError, AttributeError, KeyError):
            data = known["data"]
            return cls(**{**known, "data": None if data is None else Content.read(data), "settings": settings})
        return None


class Kept:
    """What a run folder says of itself. `identity` is None for a run of the first edition, which kept a hash only."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.finished = folder, is_finished(folder)
        self.result = read_object(folder / RESULT) if self.finished else {}
        self.start = read_object(folder / START) if (folder / START).exists() else {}
        about = self.result or self.start
        self.hash = str(about.get("hash", ""))
        self.settings = settings_of(about.get("choices"), about.get("config"))
        self.identity = Identity.read(about.get("identity"), self.settings)

    @property
    def there(self) -> bool:
        return bool(self.result or self.start)

    def unchanged(self) -> bool:
        """Whether the files of its data are as they were, which is known without reading them."""
        stamp = Stamp.read(self.start.get("stamp"))
        return stamp is not None and stamp.holds()


def settings_of(choices: Any, config: Any) -> dict[str, object]:
    """Choices and counted values of a run, for words."""
    parts = [part if isinstance(part, Mapping) else {} for part in (choices, config)]
    return as_before({key: value for part in parts for key, value in part.items() if counted(key)})


def refuse_other(folder: Path, own: Identity, data: Callable[[], Content] | None = None) -> None:
    """Raise a UserError that says what differs if a folder holds another run, finished or not.

    own: the identity of the run that is asked for, as far as it is known. `data` gives what its data holds; asked only
    if the files are not as they were.
    """
    kept = Kept(folder)
    if not kept.there:
        return
    known = kept.identity
    if known is None and kept.hash == own.hash and not own.format:
        return
    if known is None:
        differing = _from_the_first_edition(kept, own)
    else:
        if own.data is None and data is not None and known.data is not None:
            own = replace(own, data=known.data if kept.unchanged() else data())
        differing = differences(known, own)
    if differing:
        raise UserError(f"{folder}: holds {_kind(kept, own)} ({_listed(differing)}). {_WAYS}.")
    if known is None:
        log.info("%s: made before kdbench kept with a run what it is of; its configuration is this one's", folder)


def tell_of_other_data(folder: Path, data: Content) -> None:
    """Say what of its data has changed since a run was trained; for what measures it again on them."""
    known = Kept(folder).identity
    changed = [] if known is None or known.data is None else content.differences(known.data, data)
    if changed:
        log.warning("%s: its data are not those that it was trained and measured on: %s", folder, _listed(changed))


def keep(folder: Path, own: Identity, stamp: Stamp | None, about: Mapping[str, object]) -> None:
    """Write run.json, with which a run starts: where it does, its identity, and the stamp of its data's files."""
    where = {"host": socket.gethostname(), "process": os.getpid()}
    kept = {"hash": own.hash, **where, **about, "identity": own.as_json()}
    write_json(folder / START, {**kept, "stamp": None if stamp is None else asdict(stamp)})
    if world.first():
        (folder / FAILURE).unlink(missing_ok=True)


def restamp(folder: Path, stamp: Stamp | None) -> None:
    """Note that the files are as they are now, so that they are not read again the next time; where that can be."""
    with suppress(OSError):
        kept = read_object(folder / START) if (folder / START).exists() else {}
        if stamp is not None and stamp.digest and Stamp.read(kept.get("stamp")) != stamp:
            write_json(folder / START, {**kept, "stamp": asdict(stamp)})


def differences(old: Identity, new: Identity) -> list[str]:
    """What differs from one run to another in words, the most telling first; [] if it is the same run.

    "optimizer.lr 0.1 -> 0.5", "loss mine.Loss: its code changed (helper)", "photos: 24 -> 48 training images".
    """
    said = list(_changed_settings(old.settings, new.settings)) if old.hash != new.hash else []
    changed = _changed(old.named, new.named) if {*old.named} == {*new.named} else []
    said += [f"{key}: {show(new.settings.get(key, 'what it names'))} holds something else now" for key in changed]
    for name in sorted({*old.code} & {*new.code}):
        modules = _changed(old.code[name], new.code[name])
        said += [f"{name}: its code changed ({', '.join(modules)})"] if modules else []
    if old.data is not None and new.data is not None:
        said += content.differences(old.data, new.data)
    if old.teacher and new.teacher and old.teacher != new.teacher and old.named == new.named:
        said.append("the teacher's weights are others")
    if old.format != new.format:
        said.append(f"kdbench's figures have changed since (format {old.format} -> {new.format})")
    return said or (["another configuration"] if old.hash != new.hash else [])


def _changed(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    return sorted(key for key in {*old, *new} if old.get(key) != new.get(key))


def _changed_settings(old: Mapping[str, object], new: Mapping[str, object]) -> Iterator[str]:
    """Options that differ, then values, but for those that come with an option or repeat another's."""
    if not old or not new:
        return
    groups = [key for key in new if "." not in key and isinstance(new[key], str) and old.get(key, new[key]) != new[key]]
    yield from (f"{key} {show(old[key])} -> {show(new[key])}" for key in groups)
    told: set[tuple[str, str, str]] = set()
    for key in sorted({*old} | {*new}, key=lambda key: (key.startswith("teacher."), key)):
        before, after = old.get(key, neutral(key)), new.get(key, neutral(key))
        if before == after or key in groups or key.startswith(tuple(f"{group}." for group in groups)):
            continue
        if key == "procedure.stage" or (key.endswith("_target_") and groups):
            continue
        words = (key.rpartition(".")[2], show(before), show(after))
        if words not in told:
            yield f"{key} {words[1]} -> {words[2]}"
        told.add(words)


def _from_the_first_edition(kept: Kept, own: Identity) -> list[str]:
    """What differs as far as a run says that kept its configuration only; its keys that there were not yet do not."""
    both = {*kept.settings} & {*own.settings}
    said = list(_changed_settings({k: kept.settings[k] for k in both}, {k: own.settings[k] for k in both}))
    if said or kept.hash == own.hash:
        return said
    if not kept.settings:
        return ["another configuration"]
    return [f"{key}: it is not known what this was then" for key in own.named]


def _kind(kept: Kept, own: Identity) -> str:
    what = "a finished run" if kept.finished else "an unfinished run"
    if kept.hash != own.hash:
        return f"{what} of another configuration"
    return f"{what} of this configuration, but of something that has changed since"


def _listed(differing: list[str]) -> str:
    more = len(differing) - _MOST
    return "; ".join(differing[:_MOST]) + (f"; and {more} more" if more > 0 else "")
