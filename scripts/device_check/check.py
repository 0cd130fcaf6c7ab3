"""A section's work in progress: experiments, verdicts and figures."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from kdbench.bench.standin import stand_in
from kdbench.bench.timing import Contender, race
from kdbench.bench.workbench import Workbench, prepare
from kdbench.build import load_data, make_recipe
from kdbench.configure import register
from kdbench.engine.device import own_stream
from kdbench.engine.evaluate import all_logits
from kdbench.engine.graph import TRIED, WARM_UP
from kdbench.engine.learner import Learner
from kdbench.engine.loop import cohort_graph, train_epoch
from kdbench.paths import CONFIG_DIR

SMALL = [
    "dataset=fake", "dataset.n=210", "dataset.n_test=64", "dataset.size=16", "teacher=resnet8", "student=resnet8",
    "schedule=cosine", "schedule.batch_size=32",
]  # fmt: skip
PAIR = ["teacher=resnet56", "student=resnet20", "schedule=crd240"]
CIFAR = ["dataset=fake", "dataset.size=32", "dataset.num_classes=100", *PAIR]
WHOLE = [*CIFAR, "dataset.n=50000", "dataset.n_test=10000"]  # CIFAR-100's shapes
SHORT = [*CIFAR, "dataset.n=9232", "dataset.n_test=640"]  # 144 steps of 64, more than lie ahead at once, and one of 16
CLOSE = 1e-3  # relative distance of weights that steps in another order of addition may have

Found = tuple[bool | None, str]  # whether a check passed (None: does not apply on this machine), and what it saw


class Verdict(NamedTuple):
    name: str
    ok: bool | None
    detail: str
    flag: str = ""  # the flag of engine/device.py that needs it


class Check:
    """One section's work. `words`: the experiment that it is done with; `peer`: a checkout of RepDistiller."""

    def __init__(self, scratch: Path, quick: bool, seconds: float, peer: str = "") -> None:
        self.words, self.whole = (SMALL, SMALL) if quick else (SHORT, WHOLE)
        self.scratch, self.quick, self.seconds, self.peer = scratch, quick, seconds, peer
        self.kept: Callable[[Check], None] = lambda check: None  # called after every verdict
        self.cuda = torch.cuda.is_available()
        self.on = "on" if self.cuda else "auto"  # trainer.cuda_graph where it can be had
        self.verdicts: list[Verdict] = []
        self.figures: dict[str, Any] = {}

    def bench(self, *words: str, whole: bool = False) -> Workbench:
        """An experiment made ready; of a whole data set where steps are timed."""
        base = self.whole if whole else self.words
        made = recipe(*base, "trainer.compile=off", "trainer.cuda_graph=off", *words)
        return prepare(made, data_of(made), self.scratch)

    def judge(self, name: str, check: Callable[[], Found], flag: str = "") -> None:
        """One verdict; what the check raises is one too."""
        begin = time.perf_counter()
        try:
            verdict = Verdict(name, *check(), flag)
        except Exception as error:
            traceback.print_exc()
            said = str(error).splitlines()[0][:200] if str(error) else ""
            verdict = Verdict(name, False, f"{type(error).__name__}: {said}", flag)
        word = {True: "ok  ", False: "FAIL", None: "n/a "}[verdict.ok]
        print(f"{word} {verdict.name}: {verdict.detail} ({time.perf_counter() - begin:.1f} s)", flush=True)
        self.verdicts.append(verdict)
        self.kept(self)
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()  # raises after an error that stays with the process, whose section ends with it

    def on_cuda(self, name: str, check: Callable[[], Found], flag: str = "") -> None:
        """A check that only a CUDA device can pass; elsewhere it is run without recordings, and can only break."""
        self.judge(name, check if self.cuda else lambda: (None, f"needs a CUDA device; without: {check()[1]}"), flag)

    def trained(self, words: Sequence[str], count: int = 1) -> list[dict[str, torch.Tensor]]:
        """The states of fresh students after two epochs, with their evaluation between them."""
        bench = self.bench(*words)
        learners = [bench.learner() for _ in range(count)]
        self.epochs(bench, learners, 2)
        failed = next((one.failure for one in learners if one.failure), None)
        if failed is not None:
            raise failed
        return [state(one) for one in learners]

    def epochs(self, bench: Workbench, learners: Sequence[Learner], until: int, first: int = 0) -> None:
        """What the trainer does, without a run folder."""
        live = bench.recipe.teacher is None or bench.recipe.teacher.table == "off"
        batches, teacher = (None if live else bench.table()) or bench.live()
        graph = cohort_graph(learners, bench.placement.device)
        with own_stream(bench.placement.device):
            for epoch in range(first, until):
                for learner in learners:
                    learner.begin_epoch(epoch)
                train_epoch(learners, batches.epoch(epoch, until), teacher, lambda: None, graph)
                for learner in learners:
                    all_logits(learner.network, bench.sets["test"])

    def contend(self, contenders: dict[str, Contender], name: str, words: Sequence[str], count: int = 1) -> None:
        """A way to step that is tried before it is timed: one that fails is a verdict, not the end."""

        def ready() -> Found:
            bench = self.bench(*words, whole=True)
            turn = bench.steps(bench.table() or bench.live(), [bench.learner() for _ in range(count)])
            turn(WARM_UP + TRIED)
            contenders[name] = turn
            return True, "runs"

        self.judge(name, ready)

    def time(self, contenders: dict[str, Contender], seconds: float) -> None:
        """Let ways to step take turns; their figures are kept as ways."""
        if contenders:
            raced = race(contenders, seconds, turn=min(1.0, seconds / 10))
            ways = {name: raced.step(name)._asdict() for name in raced.seconds}
            self.figures.setdefault("ways", {}).update(ways)
            self.kept(self)


@contextmanager
def set_aside(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def recipe(*words: str) -> Any:
    """The recipe that `kdbench train words...` would run."""
    GlobalHydra.instance().clear()
    register([])
    typed = dict(word.partition("=")[::2] for word in words)
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        cfg = compose("train", overrides=list(words))
    groups = ("dataset", "teacher", "student", "loss", "optimizer", "schedule")
    defaults = {"dataset": "digits", "teacher": "resnet20", "student": "resnet8", "loss": "kl", "optimizer": "sgd"}
    return make_recipe(cfg, list(words), {g: typed.get(g) or defaults.get(g, "cosine") for g in groups})


def data_of(made: Any) -> Any:
    node = made.record.tree["dataset"]
    return load_data(json.dumps(stand_in(node) or node))


def state(learner: Learner) -> dict[str, torch.Tensor]:
    """Weights and batch-norm statistics in float64 on the CPU; counters left out."""
    tensors = learner.distiller.state_dict().items()
    return {key: value.cpu().double() for key, value in tensors if value.is_floating_point()}


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """|a - b| / |b| over all weights; infinite where one is not finite."""
    difference = sum(float((a[key] - b[key]).square().sum()) for key in b)
    size = sum(float(value.square().sum()) for value in b.values())
    relative = (difference / max(size, 1e-30)) ** 0.5
    return relative if relative == relative else float("inf")


def kdbench(*words: str) -> None:
    """Run the command; what it wrote to stderr is part of the error if it fails."""
    done = subprocess.run([sys.executable, "-m", "kdbench", *words], capture_output=True, text=True)
    if done.returncode:
        said = " | ".join(done.stderr.splitlines()[-3:])
        raise RuntimeError(f"kdbench {words[0]} ended with {done.returncode}: {said}")
