"""Which keys of a configuration make a run what it is: the one list that names, hashes and comparisons go by."""

from __future__ import annotations

import re
from collections.abc import Mapping

# Raise it when a change of kdbench's code changes every run's figures. 1: the first edition, which did not say so.
RESULT_FORMAT = 2
# Where only those of runs with one part change (a loss, a network, an augmentation), enter its `_target_` with the next
# number here: other runs are believed as before. What no release has had yet needs no entry.
REVISED: Mapping[str, int] = {}

# Keys that change nothing in a run's results, so that they change neither its hash nor its folder:
UNCOUNTED = (
    "force",  # whether to run again
    "name",  # a label
    "tags",
    "monitor",  # what a sweeper reads
    "logger",  # who is shown the rows
    "paths",  # where things are kept; its values inside other keys do not count either
    "experiment",  # overlays: what they set counts, not their names
    "debug",
    "local",
    "teacher.table",  # the same logits, kept or asked anew
    "teacher.trust",  # whether it may be read, not what it is
    "trainer.cuda_graph",  # the same kernels, recorded, or in another order between students
    "trainer.streams",  # in runs of the first edition
    "trainer.deterministic",  # the same arithmetic, added up in one order
    "trainer.grad_checkpointing",  # the same arithmetic, done twice
    "trainer.device",  # a run may be resumed on another device; result.json says which it was
    "trainer.threads",
    "trainer.eval_batch_size",
    "trainer.checkpoint_every",
    "trainer.progress",
)

# Keys that came later, with the value that gives what was before them: at that value they do not count, so that runs
# and stored teachers of before are still found. "teacher.optimizer" is an optimizer's node as well.
ADDED: Mapping[str, object] = {
    "dataset.trim": False,
    "dataset.mix.cutmix_alpha": 1.0,
    "dataset.mix.switch": 0.5,
    "dataset.mix.probability": 1.0,
    "loss.as_published": False,
    "loss.falls": None,
    "optimizer.layer_decay": None,
    "optimizer.no_decay": [],
    "schedule.warmup_from": 0.0,
    "schedule.warmup_overlaps": False,
    "schedule.per": "step",
    "schedule.repeats": 1,
    "student.upscale": None,
    "teacher.upscale": None,
    "student.embedding": False,
    "teacher.embedding": False,
    "teacher.finetune": False,
    "trainer.accumulate": 1,
}

# Keys by which the repetitions of one setting differ:
SEEDS = ("seed", "seeds", "teacher.seed", "dataset.data_seed")


def counted(key: str) -> bool:
    """Whether a dotted key, or a group, belongs to a run's identity."""
    return not _under(key, UNCOUNTED)


def result_format(tree: object) -> int:
    """The edition of the figures that a configuration, plain or flat, gives: the highest of all parts that it names."""
    if isinstance(tree, Mapping):
        named = (REVISED.get(str(value), 0) for key, value in tree.items() if str(key).endswith("_target_"))
        return max([RESULT_FORMAT, *named, *map(result_format, tree.values())])
    return max(map(result_format, tree), default=RESULT_FORMAT) if isinstance(tree, (list, tuple)) else RESULT_FORMAT


def as_before(values: Mapping[str, object], place: str = "") -> dict[str, object]:
    """Values by key without those that came later and change nothing. place: the group that the keys lie in."""
    return {key: value for key, value in values.items() if not _changes_nothing(f"{place}{key}", value)}


def neutral(key: str) -> object:
    """The value at which a key that came later changes nothing; None for one that was always there."""
    return ADDED.get(key, ADDED.get(key.removeprefix("teacher.")))


_OF_PART = re.compile(r"^loss\.(parts\.\w+\.)+(?=falls$)")  # other keys that came later have counted in sums


def _changes_nothing(key: str, value: object) -> bool:
    key = _OF_PART.sub("loss.", key)
    later = key in ADDED or key.removeprefix("teacher.") in ADDED
    return later and value in (neutral(key), str(neutral(key)))  # flattened, a list is text


def is_seed(key: str) -> bool:
    """Whether a dotted key only numbers the repetitions of a setting."""
    return _under(key, SEEDS)


def _under(key: str, names: tuple[str, ...]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)
