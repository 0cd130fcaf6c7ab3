"""Origins of a teacher that is one network: a weights file, a run, published weights, its own training."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from kdbench import world
from kdbench.arguments.code import Code, code_of, sources
from kdbench.arguments.ranges import Text
from kdbench.counted import as_before
from kdbench.data.bundle import Bundle
from kdbench.engine.device import place
from kdbench.errors import UserError, require, under
from kdbench.files import lock
from kdbench.losses.ce import CE
from kdbench.models.adopt import without_classifier
from kdbench.models.base import last_layer_name
from kdbench.models.interface import Interface
from kdbench.models.names import published_names
from kdbench.models.weights import WeightsFile, file_at, load_into, read_file, weight_hash
from kdbench.results.metrics import EMBEDDING
from kdbench.results.result import is_finished
from kdbench.runs.adapt import fitted, interface_of_run
from kdbench.runs.folder import NETWORK, network_of_run, spec_of_run
from kdbench.runs.identity import refuse_other
from kdbench.runs.lifecycle import run_stage
from kdbench.runs.obtain import measured
from kdbench.runs.recipe import Catalogue, LossSpec, NetworkSpec, Origin, Recipe, Record, Seeds, TeacherSpec
from kdbench.runs.stage import Stage, Start, identity_of
from kdbench.runs.taught import TaughtBy

log = logging.getLogger(__name__)

SINGLE = (
    "checkpoint",
    "checkpoint_key",
    "run",
    "finetune",
)  # keys of teacher that say where a single network comes from

# Choices that are the teacher's too, as long as it has none of its own under the second name (configs/train.yaml).
_SHARED = {
    "optimizer": "optimizer@teacher.optimizer",
    "schedule": "schedule@teacher.schedule",
    "dataset/augment": "+dataset/augment@dataset.teacher_augment",
}

STORE_FORMAT = 1  # raise it when a change of code changes what a stored teacher would be


@dataclass(frozen=True)
class FromFile:
    """teacher.checkpoint: weights of a known network, in any form that `models.weights` reads."""

    network: NetworkSpec
    path: Path
    key: str | None = None  # teacher.checkpoint_key: which weights of the file

    def describe(self, catalogue: Catalogue) -> NetworkSpec:
        with under("teacher.checkpoint"):
            file_at(self.path)
        return self.network

    def obtain(self, spec: TeacherSpec, recipe: Recipe, data: Bundle) -> TaughtBy:
        """Raises UserError if the file is none, or if its weights are not the network's, or know other classes."""
        with under("teacher.checkpoint"):
            file = read_file(self.path, self.key)
        if data.task is EMBEDDING:
            network = self.network.make(data.info)
            with under("teacher.checkpoint"):
                self._load_embedding(network, file)
            return replace(measured(self.network.name, network, self.path, recipe, data), entry=file.entry)
        known = _interface_of_file(self.path, file)
        classes = len(known.classes or data.classes)
        network = self.network.make(data.info._replace(num_classes=classes))
        with under("teacher.checkpoint"):
            load_into(network, file.state, str(self.path))
        own = _published_too(known, network, classes)
        network = fitted(network, own, data, "teacher.checkpoint", self.path)
        taught = measured(self.network.name, network, self.path, recipe, data)
        return replace(taught, entry=file.entry)

    def _load_embedding(self, network: nn.Module, file: WeightsFile) -> None:
        try:
            load_into(network, without_classifier(network, file.state), str(self.path))
        except UserError as error:
            if self.network.config.get("embedding") is False:
                raise UserError(f"{error}; teacher.embedding=true leaves the classifier out") from error
            raise


@dataclass(frozen=True)
class FromRun:
    """teacher.run: the student of a finished run, with its own network."""

    folder: Path

    def describe(self, catalogue: Catalogue) -> NetworkSpec:
        return spec_of_run(self.folder, catalogue)[0]

    def obtain(self, spec: TeacherSpec, recipe: Recipe, data: Bundle) -> TaughtBy:
        """Raises UserError if the run is not finished, or if it is for other data."""
        found, network, info = network_of_run(self.folder, recipe.catalogue)
        network = fitted(network, interface_of_run(self.folder), data, "teacher.run", self.folder, info)
        return measured(found.name, network, self.folder, recipe, data)


@dataclass(frozen=True)
class Published:
    """A network that comes with trained weights and a head for them (timm, torchvision)."""

    network: NetworkSpec

    def describe(self, catalogue: Catalogue) -> NetworkSpec:
        return self.network

    def obtain(self, spec: TeacherSpec, recipe: Recipe, data: Bundle) -> TaughtBy:
        network = self.network.make(data.info)
        own = getattr(network, "published", None)
        if own is not None:
            network = fitted(network, own, data, "teacher.pretrained", self.network.name)
        return measured(self.network.name, network, None, recipe, data)


@dataclass(frozen=True)
class Trained:
    """A network that is trained on labels when it is first asked for, and kept for all later runs."""

    network: NetworkSpec

    def describe(self, catalogue: Catalogue) -> NetworkSpec:
        return self.network

    def obtain(self, spec: TeacherSpec, recipe: Recipe, data: Bundle) -> TaughtBy:
        """A lock makes parallel runs wait for one training; an interrupted one continues. Raises UserError for data
        without labels."""
        allowed = "a network that is trained: teacher.pretrained=true, teacher.checkpoint or teacher.run"
        require(data.task is not EMBEDDING, "teacher", self.network.name, f"{allowed}; {data.name} has no labels")
        stage = self.stage(spec, recipe, data)
        refuse_other(stage.folder, identity_of(stage))
        _say_shared(self.network.name, recipe.record.overrides)
        if not is_finished(stage.folder):  # looked at before any lock: a store may be read-only
            stage.folder.parent.mkdir(parents=True, exist_ok=True)
            with ExitStack() as stack:
                world.agreed(lambda: _enter(stack, lock(f"{stage.folder}.lock")))
                if not is_finished(stage.folder):
                    log.info("teacher %s: trained now, once, and kept in %s", self.network.name, stage.folder)
                    self._tell_of_older(stage, spec, recipe, data)
                run_stage(stage, None)
        network = network_of_run(stage.folder, recipe.catalogue)[1]
        had = measured(self.network.name, network, stage.folder, recipe, data)
        return replace(had, key=stage.recipe.record.hash)

    def stage(self, spec: TeacherSpec, recipe: Recipe, data: Bundle) -> Stage:
        """Its own training."""
        return teacher_stage(self.network, spec, recipe, data)

    def _tell_of_older(self, stage: Stage, spec: TeacherSpec, recipe: Recipe, data: Bundle) -> None:
        """Why a teacher that the first edition kept is not taken: it did not keep what code it was trained with."""
        if stage.recipe.record.code:
            older = store_folder(self.network, store_key(self.network, spec, recipe, data, False), recipe, data)
            if is_finished(older):
                log.info("the one in %s does not say which code of yours it is of, so it is not used", older)


@dataclass(frozen=True)
class FineTuned(Trained):
    """teacher.finetune with a checkpoint: a network that is trained on from a file's weights, once, and kept.

    Its last layer starts anew where the file's has another shape (other classes).
    """

    path: Path = Path()
    key: str | None = None  # teacher.checkpoint_key

    def describe(self, catalogue: Catalogue) -> NetworkSpec:
        with under("teacher.checkpoint"):
            file_at(self.path)
        return self.network

    def stage(self, spec: TeacherSpec, recipe: Recipe, data: Bundle) -> Stage:
        """Raises UserError if the file is none, or of another network."""
        with under("teacher.checkpoint"):
            file = read_file(self.path, self.key)
        start = self._start(file, data)
        made = teacher_stage(self.network, spec, recipe, data, weight_hash(file.state))
        return replace(made, start=start)

    def _start(self, file: WeightsFile, data: Bundle) -> Start:
        network = self.network.make(data.info)
        fresh, last = network.state_dict(), last_layer_name(network)
        given = published_names(file.state, fresh)
        head = {name for name in fresh if last and name.startswith(f"{last}.") and name in given}
        head = {name for name in head if given[name].shape != fresh[name].shape}
        if head:
            log.info("teacher %s: its last layer, %s, starts anew: that of %s has other classes",
                     self.network.name, last, self.path)  # fmt: skip
        with under("teacher.checkpoint"):
            load_into(network, {**given, **{name: fresh[name] for name in head}}, str(self.path))
        return Start({name: value for name, value in network.state_dict().items() if name not in head})


def _enter(stack: ExitStack, lock: AbstractContextManager[object]) -> None:
    stack.enter_context(lock)


def _interface_of_file(path: Path, file: WeightsFile) -> Interface:
    """What a weights file says itself; of a run's file from before it said so, what the run folder says."""
    told = any(file.about.get(key) for key in ("classes", "mean"))
    if not told and path.suffix == ".safetensors" and (path.parent / NETWORK).is_file():
        return interface_of_run(path.parent)
    return Interface.read(file.about, str(path))


def _published_too(known: Interface, network: nn.Module, classes: int) -> Interface:
    """What a file of a library's weights does not say itself: it was trained as that library's own are, if it has as
    many classes."""
    own = getattr(network, "published", None)
    if own is None or known.classes is not None or len(own.classes or ()) != classes:
        return known
    return own if known.mean is None else replace(own, mean=known.mean, std=known.std)


def origin_of(
    network: NetworkSpec, checkpoint: Text | None = None, run: Text | None = None, checkpoint_key: Text | None = None,
    finetune: bool = False, key: str = "teacher",
) -> Origin:  # fmt: skip
    """The origin of a single network. Raises UserError for a run and a checkpoint at once, for a key alone, and for
    nothing to fine-tune."""
    alone = bool(checkpoint_key) and not checkpoint
    require(not alone, f"{key}.checkpoint_key", checkpoint_key, f"null without {key}.checkpoint")
    require(not (run and checkpoint), f"{key}.checkpoint", checkpoint, f"null when {key}.run is given")
    published = bool(network.config.get("pretrained"))
    require(not finetune or ((bool(checkpoint) or published) and not run), f"{key}.finetune", True,
            f"false without {key}.checkpoint or {key}.pretrained=true")  # fmt: skip
    if finetune:
        return FineTuned(network, Path(checkpoint), checkpoint_key) if checkpoint else Trained(network)
    if run:
        return FromRun(Path(run))
    if checkpoint:
        return FromFile(network, Path(checkpoint), checkpoint_key)
    return Published(network) if network.pretrained else Trained(network)


def _say_shared(teacher: str, overrides: Sequence[str]) -> None:
    """Say which words, meant for the student perhaps, choose the teacher's own training too: another teacher."""
    typed = {key.lstrip("+"): value for key, _, value in (word.partition("=") for word in overrides)}
    shared = [key for key, own in _SHARED.items() if key in typed and own.lstrip("+") not in typed]
    if shared:
        words, own = ", ".join(f"{key}={typed[key]}" for key in shared), ", ".join(f"{_SHARED[key]}=" for key in shared)
        log.info("teacher %s: trained with %s too; %s would choose its own", teacher, words, own)


def teacher_stage(network: NetworkSpec, spec: TeacherSpec, recipe: Recipe, data: Bundle, start: str = "") -> Stage:
    """A teacher's own training: an ordinary run in the store, under cross-entropy. start: hash of the weights that it
    starts from."""
    key = store_key(network, spec, recipe, data)
    key = hashlib.sha256(f"{key} {start}".encode()).hexdigest() if start else key
    own = replace(
        recipe,
        student=network,
        teacher=None,
        loss=label_loss(spec),
        optimizer=spec.optimizer,
        schedule=spec.schedule,
        trainer=replace(recipe.trainer, ema=None, grad_checkpointing=False),
        seeds=Seeds(spec.seed, spec.seed),
        record=_record(network, spec, recipe.record, key, own_code(network, data)),
        force=False,
    )
    folder = store_folder(network, key, recipe, data)
    return Stage(own, folder, data.for_teacher(), data.train, stop_epoch=spec.stop_epoch)


def store_folder(network: NetworkSpec, key: str, recipe: Recipe, data: Bundle) -> Path:
    return recipe.teachers / data.name / f"{network.name.replace('/', '_')}-{key[:10]}"


def label_loss(spec: TeacherSpec) -> LossSpec:
    """What a teacher is trained with: cross-entropy with its labels, smoothed by `teacher.label_smoothing`."""
    smoothing = spec.label_smoothing
    return LossSpec("ce", {"label_smoothing": smoothing}, lambda: CE({"task": 1.0}, smoothing))


def store_key(network: NetworkSpec, spec: TeacherSpec, recipe: Recipe, data: Bundle, with_code: bool = True) -> str:
    """sha256 of all that a stored teacher's weights follow from; without the user's own code it is the first
    edition's."""
    trainer = recipe.trainer
    identity = {
        "format": STORE_FORMAT,
        "images": data.fingerprint[:32],  # the second half names unlabelled extras, which only the student sees
        "rows": _digest(data.train.rows),
        "labels": _digest(data.train.labels),
        "augment": repr(data.teacher_augment),
        "normalise": [list(data.mean), list(data.std)],
        "network": as_before(network.config, "student."),
        "optimizer": as_before(asdict(spec.optimizer), "optimizer."),
        "schedule": as_before(asdict(spec.schedule), "schedule."),
        "label_smoothing": spec.label_smoothing,
        "seed": spec.seed,
        "stop_epoch": spec.stop_epoch,
        "precision": place(trainer).precision,
        "trainer": [trainer.clip, trainer.limit_steps, trainer.drop_last]
        + ([trainer.accumulate] if trainer.accumulate > 1 else []),
    }
    code = own_code(network, data) if with_code else {}
    identity |= {"code": code} if code else {}
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()


def own_code(network: NetworkSpec, data: Bundle) -> Code:
    """The user's own code that a stored teacher follows from: its network's, and that of its augmentation."""
    augment = code_of(data.teacher_augment)
    return sources({"teacher": dict(network.config)}) | ({"dataset.teacher_augment": augment} if augment else {})


def _record(network: NetworkSpec, spec: TeacherSpec, record: Record, key: str, code: Code) -> Record:
    choices = {**record.choices, "teacher": "none", "student": network.name, "loss": "ce", "procedure": "single"}
    tree: dict[str, object] = {key: value for key, value in record.tree.items() if key in ("dataset", "trainer")}
    tree |= {"student": dict(network.config), "loss": {"label_smoothing": spec.label_smoothing}}
    tree |= {"optimizer": asdict(spec.optimizer), "schedule": asdict(spec.schedule)}
    tree |= {"seed": spec.seed, "stop_epoch": spec.stop_epoch}
    return Record(hash=key, choices=choices, tree=tree, code=code, alone=False)


def _digest(values: Tensor) -> str:
    return hashlib.sha256(values.cpu().numpy().tobytes()).hexdigest()
