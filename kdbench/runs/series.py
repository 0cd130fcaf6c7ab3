"""What procedures of several stages share: folders and records, teachers from stages, and the result of the whole."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from kdbench import world
from kdbench.data.batches import EvaluationBatches, Loading
from kdbench.data.bundle import Bundle, Split
from kdbench.data.tokenise import TOKENIZER
from kdbench.engine.checkpoint import STUDENT, save_weights
from kdbench.engine.device import evaluation_batch, place
from kdbench.engine.evaluate import all_logits, keepable
from kdbench.engine.metrics import task_figures
from kdbench.models.base import count_parameters
from kdbench.models.weights import weight_hash
from kdbench.results.metrics import CLASSIFICATION
from kdbench.results.predictions import PREDICTIONS
from kdbench.results.result import NetworkResult, RunResult, StageResult, as_part, is_finished, read_result
from kdbench.runs.folder import NETWORK, about_weights, clear, network_of_run, save_config, save_network
from kdbench.runs.identity import Identity, keep, refuse_other
from kdbench.runs.lifecycle import only_here, run_stage
from kdbench.runs.obtain import introduced, measure, measured
from kdbench.runs.recipe import NetworkSpec, Recipe, Record, Seeds
from kdbench.runs.stage import Stage, Start, identity_of, student_stage
from kdbench.runs.taught import TaughtBy

APART = 1000  # between the seeds of two stages of one run, so that the seeds 0, 1, 2, ... of a sweep never meet them


@dataclass(frozen=True)
class Series:
    """One procedure at work in folder `out`. Its stages are ordinary runs in `out/stages/<number>-<name>`."""

    recipe: Recipe
    out: Path
    data: Bundle
    entries: list[StageResult] = field(default_factory=list)  # of the stages so far, for the result

    def stage(self, name: str, teacher: TaughtBy | None = None, recipe: Recipe | None = None) -> Stage:
        """The next stage: a variation of the series' recipe (None: as it is) on its data; its number is its turn."""
        folder = self.out / "stages" / f"{len(self.entries) + 1}-{name.replace('/', '_')}"
        stage = student_stage(recipe or self.recipe, self.data, folder)
        return replace(stage, recipe=replace(stage.recipe, record=_record(stage, teacher)))

    def run(self, stage: Stage, teacher: TaughtBy | None) -> RunResult:
        """Train the stage, or read its result if it is finished; note it for the result of the whole."""
        result = run_stage(stage, teacher)
        self.note(stage, result)
        return result

    def note(self, stage: Stage, result: RunResult) -> None:
        """Keep a finished stage's figures."""
        self.entries.append(as_part(result, stage.folder, self.out))

    def finished(self, folder: Path) -> TaughtBy:
        """The network of a finished stage, measured."""
        spec, network, _ = network_of_run(folder, self.recipe.catalogue)
        return measured(spec.name, network, folder, self.recipe, self.data)

    def taught(self, folder: Path) -> TaughtBy:
        """The network of a finished stage as a teacher. Raises UserError if it is no better than chance."""
        allow = self.recipe.teacher.allow_chance if self.recipe.teacher else True
        return introduced(self.finished(folder), self.data, allow, longer="schedule.epochs")

    def publish(
        self,
        name: str,
        spec: NetworkSpec,
        network: nn.Module,
        like: Path,
        teacher: TaughtBy | None = None,
    ) -> Path:
        """A network that no stage trained as a finished stage, so that it can be compared, and can teach.

        It is measured here; what its result says of time, images and loss is that of the stage in folder `like`.
        """
        stage = self.stage(name, teacher, replace(self.recipe, student=spec))
        record = stage.recipe.record
        identity = identity_of(stage, teacher)
        refuse_other(stage.folder, identity)
        if not is_finished(stage.folder):
            base = read_result(like)
            save_network(stage.folder, spec, self.data)
            save_config(stage.folder, record.tree)
            save_weights(stage.folder / STUDENT, network, about_weights(spec, self.data))
            weights = weight_hash(network.state_dict())
            replace(
                base,
                name=stage.folder.name,
                hash=record.hash,
                identity=identity.as_json(),
                choices=dict(record.choices),
                config=record.config,
                student=NetworkResult(spec.name, parameters=count_parameters(network), weights=weights),
                last={"epoch": base.last["epoch"], **self._measured(network, teacher, stage.folder)},
                best=None,
                seconds=0.0,
                cost={},
            ).write(stage.folder)
        self.note(stage, read_result(stage.folder))
        return stage.folder

    def _measured(self, network: nn.Module, teacher: TaughtBy | None, folder: Path) -> dict[str, float]:
        """Its figures; what it says of the test set is kept in its folder."""
        placement = place(self.recipe.trainer)
        reference, found = measure(placement.put(network), self.recipe, self.data, placement)
        for name, split in (("val", self.data.val), ("test", self.data.test)):
            if split is not None and name in reference:
                logits, theirs = reference[name], teacher.reference.get(name) if teacher else None
                label = split.wanted.to(logits.device)
                values = task_figures(self.data.task, logits, label, theirs)
                found |= {f"{name}/{key}": value for key, value in values.items()}
                rated = name == "test" and self.data.task is CLASSIFICATION
                if rated and (kept := keepable(logits, label, theirs)) is not None:
                    kept.write(folder)
        return found

    def _cost(self) -> dict[str, float | None]:
        """Of all its trainings together, as far as each of them knows."""
        trained = [read_result(self.out / entry.folder).cost for entry in self.entries if entry.seconds]
        known = [name for name in trained[0] if all(name in one for one in trained)] if trained else []
        return {name: sum(one[name] or 0.0 for one in trained) for name in known}

    @property
    def last(self) -> Path:
        """The folder of the stage that was run last."""
        return self.out / self.entries[-1].folder

    def after(self, folder: Path) -> Start:
        """The weights of a finished stage, for another stage to go on from."""
        return Start(network_of_run(folder, self.recipe.catalogue)[1].state_dict())

    def answers(self, teacher: TaughtBy, split: Split) -> Tensor:
        """A teacher's logits [N, C] on the inputs of a split as they are, not augmented."""
        placement = place(self.recipe.trainer)
        size = evaluation_batch(self.recipe.trainer, placement.device, self.data.info)
        loading = Loading(size, device=placement.device, channels_last=placement.channels_last)
        return all_logits(teacher.trained(), EvaluationBatches(self.data, split, loading))[0]

    def conclude(
        self,
        last: Path,
        figures: Mapping[str, float | None] | None = None,
        tables: Mapping[str, Sequence[Mapping[str, object]]] | None = None,
        instead: Mapping[str, Any] | None = None,
    ) -> RunResult:
        """The whole as a run of its own: the network and result of the stage in folder `last`, under the recipe's name.

        Adds `stages`, `figures` (numbers by name) and `tables` (rows by name) to the result, which is written last.
        `instead`: fields of the result that replace those of `last`, whose network is not the outcome then.
        """
        recipe, out = self.recipe, self.out
        if instead is None:
            kept = [name for name in (TOKENIZER, PREDICTIONS) if (last / name).exists()]
            for name in (NETWORK, STUDENT, *kept):
                _link(last / name, out / name)
        save_config(out, recipe.record.tree)
        record = recipe.record
        result = replace(read_result(last), **(instead or {}))
        result = replace(
            result, name=out.name, hash=record.hash, identity=_whole(self).as_json(),
            choices=dict(record.choices), config=record.config,
            overrides=record.overrides, tags=record.tags, seed=recipe.seeds.init,
            seconds=round(sum(entry.seconds for entry in self.entries), 3), cost=self._cost(),
            figures={**result.figures, **(figures or {})}, stages=list(self.entries),
            tables={name: list(rows) for name, rows in (tables or {}).items()},
        )  # fmt: skip
        result.write(out)
        return result


@contextmanager
def opened(recipe: Recipe, out: Path) -> Iterator[Series]:
    """The series in folder `out`, which no other process works in meanwhile; empty first if the recipe says force."""
    with only_here(out):
        series = Series(replace(recipe, force=False), out, recipe.data())
        world.agreed(lambda: _begin(series, recipe.force))
        yield series


def _begin(series: Series, force: bool) -> None:
    """Make the folder this series' own. Raises UserError if it holds another run."""
    if force:
        clear(series.out)
    own, record = _whole(series), series.recipe.record
    refuse_other(series.out, own)
    if not is_finished(series.out):
        keep(series.out, own, series.data.stamp, {"choices": dict(record.choices), "config": record.config})


def _whole(series: Series) -> Identity:
    """Of the series as one run; its stages, in its folder, have the rest."""
    return identity_of(student_stage(series.recipe, series.data, series.out))


def seeds_apart(seeds: Seeds, steps: int) -> Seeds:
    """Other seeds for another stage of the same run: initial weights, order and augmentation."""
    return Seeds(seeds.init + APART * steps, seeds.data + APART * steps)


def specs_named(recipe: Recipe, names: Sequence[str], key: str) -> list[NetworkSpec]:
    """Networks by name: the recipe's own student with the options typed for it, others as their YAML has them.

    Raises UserError naming the entry of the list `key`.
    """
    mine, own = recipe.student.name, recipe.student
    network = recipe.catalogue.network
    return [own if name == mine else network(name, key=f"{key}[{i}]") for i, name in enumerate(names)]


def _record(stage: Stage, teacher: TaughtBy | None) -> Record:
    """What a stage's result.json says it is: the whole run's configuration with the stage's own parts in place."""
    recipe, record = stage.recipe, stage.recipe.record
    tree = dict(record.tree)
    tree |= {"student": dict(recipe.student.config), "loss": dict(recipe.loss.config), "seeds": asdict(recipe.seeds)}
    tree |= {"optimizer": asdict(recipe.optimizer), "schedule": asdict(recipe.schedule)}
    tree["procedure"] = {**record.section("procedure"), "stage": stage.folder.name}
    named = {"teacher": teacher.name if teacher else "none", "student": recipe.student.name, "loss": recipe.loss.name}
    own = hashlib.sha256(f"{record.hash}/{stage.folder.name}".encode()).hexdigest()
    return replace(record, hash=own, choices={**record.choices, **named}, tree=tree, alone=False)


def _link(source: Path, target: Path) -> None:
    """The same file under another name, without its bytes twice where the disk allows that; never half a file."""
    if not world.first():
        return
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)
    temporary.unlink(missing_ok=True)  # a rename onto another name of the same file does nothing
