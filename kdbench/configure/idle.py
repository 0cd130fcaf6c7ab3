"""Idle keys: what was typed and changes nothing in a run. It is said; what contradicts is refused where it is read."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

from omegaconf import DictConfig, OmegaConf

from kdbench.arguments import locate, parameters
from kdbench.configure.check import RATES
from kdbench.errors import UserError, show

log = logging.getLogger(__name__)

_REFUSED = tuple(f"teacher.{key}" for key in ("checkpoint", "checkpoint_key", "run", "finetune"))  # by build
_TRAINING = ("schedule.", "optimizer.", "seed", "stop_epoch", "label_smoothing")  # of a teacher


def idle(cfg: DictConfig, words: Sequence[str]) -> set[str]:
    """A sentence for each key typed in `words` that changes nothing; one in a sweep over what it goes with may do so
    in some points. `cfg`: the composed configuration, checked."""
    typed = [word.partition("=")[0].lstrip("+~") for word in words]
    found = [(key, why) for prefix, why in _idle(cfg) for key in typed if key.startswith(prefix)]
    return {f"{key}: changes nothing {why}" for key, why in found if key not in _REFUSED} | set(_late(cfg, typed))


def _late(cfg: DictConfig, typed: Sequence[str]) -> Iterator[str]:
    """What is said of a learning rate that would fall after the training's end, where the schedule was typed: crd240
    with schedule.epochs=60 trains at one rate throughout. A debug option shortens whatever there is, and means it."""
    for place in ("schedule", "teacher.schedule") if "debug" not in typed else ():
        if not any(key == place or key.startswith(f"{place}.") for key in typed):
            continue
        epochs, marks = _value(cfg, f"{place}.epochs"), _value(cfg, f"{place}.milestones") or ()
        if _value(cfg, f"{place}.shape") == "step" and isinstance(epochs, int):
            late = [str(mark) for mark in marks if isinstance(mark, (int, float)) and mark >= epochs]  # type: ignore
            if late:
                after = f"{', '.join(late)} after the training's end ({place}.epochs={epochs})"
                yield f"{place}.milestones: {after}, so the learning rate does not fall there"


def tell_idle(points: Sequence[set[str]]) -> None:
    """Say what changes nothing in any of these runs."""
    for sentence in sorted(set.intersection(*points)) if points else ():
        log.warning("%s", sentence)


def _idle(cfg: DictConfig) -> Iterator[tuple[str, str]]:
    """The beginnings of keys that nothing reads in this run, and why."""
    teacher = "teacher."
    if _value(cfg, "teacher._target_") is None:
        yield teacher, "with teacher=none"
    else:
        given = next((key for key in ("run", "checkpoint") if _value(cfg, f"teacher.{key}")), None)
        single = str(_value(cfg, "procedure._target_")).endswith(".single")  # others may train a teacher on
        if given and single and not _value(cfg, "teacher.finetune"):
            yield from ((f"{teacher}{key}", f"with teacher.{given}, which is not trained") for key in _TRAINING)
        yield from _of_schedule(cfg, f"{teacher}schedule")
        yield from _of_rates(cfg, teacher)
    yield from _of_schedule(cfg, "schedule")
    yield from _of_rates(cfg, "")
    yield from _of_reader(cfg)
    for part in ("mix", "noise"):
        if _value(cfg, f"dataset.{part}.kind") == "none":
            yield f"dataset.{part}.", f"with dataset.{part}.kind=none"
    if _value(cfg, "dataset.noise.kind") not in (None, "none") and not _value(cfg, "dataset.noise.rate"):
        yield from ((f"dataset.noise.{key}", "with dataset.noise.rate=0") for key in ("kind", "seed", "any_class"))
    if not _value(cfg, "dataset.validation") and _value(cfg, "dataset.subset") is None:
        yield "dataset.split_seed", "without dataset.validation and dataset.subset"


def _of_schedule(cfg: DictConfig, place: str) -> Iterator[tuple[str, str]]:
    shape = _value(cfg, f"{place}.shape")
    others = ("milestones", "gamma") if shape != "step" else ()
    flat = ("floor", "cycles") if shape in ("constant", "step") else ()
    yield from ((f"{place}.{key}", f"with {place}.shape={shape}") for key in (*others, *flat))
    if not _value(cfg, f"{place}.warmup"):
        yield from ((f"{place}.{key}", f"without {place}.warmup") for key in ("warmup_from", "warmup_overlaps"))


def _of_rates(cfg: DictConfig, place: str) -> Iterator[tuple[str, str]]:
    """A rate of the schedule's that is typed with the value that stands there: another one is refused by the check."""
    name = _value(cfg, f"{place}optimizer.name")
    for rate in RATES:
        own = f"{place}optimizer.{rate}"
        takes, value = _value(cfg, own), _value(cfg, f"{place}schedule.{rate}")
        if takes != value:
            counts = f", which takes none from the schedule: {own}={show(takes)} counts" if takes is not None else ""
            yield f"{place}schedule.{rate}", f"with {place}optimizer {name}{counts}"


def _of_reader(cfg: DictConfig) -> Iterator[tuple[str, str]]:
    """Where the data lie, of data that kdbench brings itself or makes up."""
    try:
        reads = parameters(locate(_value(cfg, "dataset.reader")))
    except UserError:  # said when it is read
        return
    if "root" not in reads:
        yield "dataset.root", f"with dataset {_value(cfg, 'dataset.name')}, which reads no file of yours"


def _value(cfg: DictConfig, key: str) -> object:
    return OmegaConf.select(cfg, key, throw_on_resolution_failure=False)
