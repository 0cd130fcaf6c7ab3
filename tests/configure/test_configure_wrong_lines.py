"""Some two hundred wrong command lines: each is one sentence that begins with the key as it was typed, before any work.

Lines that Hydra itself refuses are in test_configure_errors; here are those that it lets through.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from kdbench.commands import train
from kdbench.configure.check import check
from kdbench.configure.naming import without_hydra
from kdbench.errors import UserError
from kdbench.runs import lifecycle
from tests.support.procedures import MLPS, TINY, as_job, composed, in_hydra, put

# Groups, and words beside them, each of which makes a wrong line.
LINES: dict[str, list[str]] = {
    "": """
        seed=1.5  | seed=abc | seed=18446744073709551616 | seed=-9223372036854775809 | force=3 | name='' | name=[a]
        tags=3 | monitor=nope | monitor=test/top11 | monitor='' | seeds.init=1.5 | seeds.data=[1] | paths.outputs=''
        paths.outputs=null | paths.outputs=[a] | paths.teachers={a: 1}
        loss.tau=-1 | loss.tau=nan | loss.tau=abc | loss.tau=[1] | loss.tau={a: 1} | loss.tau=true | loss.tau=''
        loss.scale=tau | loss.scale=1 | loss.weights=3 | loss.weights.task=-1 | loss.weights.distill=nan
        loss.weights={task: 0, distill: 0} | loss.weights={tsk: 1} | loss.weights.task=inf
        loss._target_=builtins.dict | loss._target_=os.path | loss._target_=os.nowhere | loss._target_=kdbench.losses.KL
        loss._target_='' | loss._target_=[a] | loss._target_=torch.nn.Identity | loss._target_=builtins.print
        student._target_=builtins.dict | student._target_=os.system.x | student._target_=7 | student.hidden=[]
        student.hidden=[0] | student.hidden=[1.5] | student.hidden=3 | student.hidden=abc | student.hidden=[100000]
        student.dropout=1 | student.dropout=-0.1 | student.dropout=nan | student.input_dropout=abc
        teacher.run='' | teacher.run=[1] | teacher.run={a: 1} | teacher.run=true | teacher.run=3 | teacher.run=nowhere
        teacher.checkpoint='' | teacher.checkpoint={a: 1} | teacher.checkpoint=[b] | teacher.checkpoint=nowhere.pt
        teacher.checkpoint_key=x | teacher.stop_epoch=0 | teacher.stop_epoch=99 | teacher.stop_epoch=1.5
        teacher.label_smoothing=1 | teacher.label_smoothing=-0.1 | teacher.seed=1.5 | teacher.seed=9223372036854775808
        teacher.table=yes | teacher.table={a: 1} | teacher.allow_chance=3 | teacher.trust=maybe
        teacher._target_=builtins.dict | teacher.hidden=[] | teacher.schedule.epochs=0 | teacher.schedule.warmup=200
        teacher.schedule.shape=sine | teacher.schedule={a: 1} | teacher.schedule=3 | teacher.optimizer.name=sgdd
        teacher.optimizer.lr=-1 | +teacher.optimizer.options={foo: 1}
        schedule.epochs=0 | schedule.epochs=-1 | schedule.epochs=1.5 | schedule.epochs=nan | schedule.epochs=inf
        schedule.epochs=abc | schedule.epochs=1000000 | schedule.epochs=true | schedule.batch_size=1
        schedule.batch_size=0 | schedule.lr=-1 | schedule.lr=nan | schedule.lr=1e30 | schedule.lr=fast
        schedule.warmup=-1 | schedule.warmup=often | schedule.warmup=200 | schedule.floor=2 | schedule.shape=sine
        schedule.weight_decay=1 | schedule.weight_decay=-1
        optimizer.name=sgdd | optimizer.name='' | optimizer.lr=x | optimizer.momentum=1 | +optimizer.options={foo: 1}
        optimizer.weight_decay=-1 | optimizer.decay_1d=3
        trainer.device=meta | trainer.device=gpu | trainer.device='' | trainer.device=cuda:x | trainer.precision=fp8
        trainer.threads=0 | trainer.clip=0 | trainer.ema=1 | trainer.ema=-0.5 | trainer.limit_steps=0
        trainer.evaluate_every=0 | trainer.eval_batch_size=0 | trainer.progress=loud | trainer.cuda_graph=yes
        trainer.deterministic=maybe | trainer.checkpoint_every=1.5 | trainer.channels_last=3 | trainer.drop_last=3
        dataset.validation=1 | dataset.validation=-0.1 | dataset.validation=inf | dataset.validation=1e30
        dataset.validation=2.5 | dataset.validation=64 | dataset.subset=0 | dataset.subset=nan | dataset.subset=100000
        dataset.classes=[0] | dataset.classes=[] | dataset.classes=[0,99] | dataset.classes=[a,b] | dataset.classes=3
        dataset.classes=[0,0] | dataset.channels=2 | dataset.mean=[0.5,0.5] | dataset.mean=inf | dataset.mean=1e30
        dataset.mean=abc | dataset.std=0 | dataset.std=-1 | dataset.std=[] | dataset.augment=3
        dataset.augment={pad: 3} | dataset.augment={_target_: builtins.dict}
        dataset.augment={_target_: torch.nn.Identity} | dataset.augment={_target_: nowhere.Crop}
        dataset.augment={_target_: kdbench.data.augment.strong.RandAugment, magnitude: 31}
        dataset.teacher_augment=[crop] | dataset.mix.kind=mixcut
        dataset.mix=3 | dataset.mix={kind: mixup, alpha: 0} | dataset.mix={kind: mixup, beta: 1}
        dataset.noise.rate=0.5
        dataset.noise={kind: symmetric, rate: 2} | dataset.noise.kind=loud | dataset.noise.for=none
        dataset.transfer.per_class=inf | dataset.transfer.per_class=0 | dataset.transfer.per_class=2.5
        dataset.transfer.fraction=0 | dataset.transfer.fraction=2 | dataset.transfer.classes=[x]
        dataset.transfer.omit=3 | dataset.transfer.omit=[0,1,2,3] | dataset.transfer.crops=-1
        dataset.transfer.extra=nowhere | dataset.transfer.extra='' | dataset.transfer.seed=1.5 | dataset.workers=-1
        dataset.workers=many | dataset.n=0 | dataset.n=1e30 | dataset.size=3.5 | dataset.reader=os.path
        dataset.reader=builtins.len | dataset.reader=digits | dataset.reader=kdbench.nowhere.read | dataset.name=''
        dataset.root={a: 1} | dataset.cache='' | dataset.download=3 | dataset.split_seed=1.5
        dataset._target_=builtins.dict | dataset._target_=os.path
        procedure._target_=os.system | procedure._target_=builtins.dict | procedure._target_=kdbench.nowhere
        +procedure.out=here | +procedure.speed=3
    """.replace("\n", "|").split("|"),
    "dataset/augment=crop_flip": [
        "dataset.augment.pad=-1", "dataset.augment.pad=1.5", "dataset.augment.pad=100000", "dataset.augment.flip=3",
        "dataset.augment.padding=mirror", "dataset.augment._target_=os.getcwd", "dataset.augment._target_=builtins.int",
    ],
    "dataset/augment=rand_augment": ["dataset.augment.parts=[]", "dataset.augment.parts=3"],
    "loss=ptloss": [
        "loss.epsilon=-2/m", "loss.epsilon=nowhere.json", "loss.epsilon=[[1],[1,2]]", "loss.epsilon=[inf]",
        "loss.order=100000", "loss.order=0", "loss.series=half", "loss.epsilon=[[0.1],[0.2]]",
    ],
    "loss=fitnet": ["loss.layer=stage9"],
    "teacher=ensemble": [
        "teacher.members=[0]", "teacher.members=3", "teacher.members=[1.5,2]", "teacher.members=[true,0]",
        "teacher.members=[[0],1]", "teacher.members=[{seed: a},1]", "teacher.members=[{sead: 1},1]",
        "teacher.members=[nothing,1]", "teacher.members=['',1]", "teacher.members=[null,1]", "teacher.weights=[1,2]",
        "teacher.weights=[1,1,0]", "teacher.mean=median", "teacher.tau=0", "teacher.network=''",
        "teacher.members=[99999999999999999999,1]",
    ],
    "procedure=born_again": ["procedure.generations=0", "procedure.generations=1.5", "procedure.share=[middle]"],
    "procedure=sequential": [
        "procedure.chain=[mlp]", "procedure.chain=3", "procedure.chain=[mlp,nothing]", "procedure.chain=[mlp,'']",
        "procedure.losses=[kl]", "procedure.losses=[kl,nothing]", "procedure.losses=[{name: kl, tau: -2},mse]",
        "procedure.losses=[{tau: 2},mse]", "procedure.losses=3", "procedure.direct=maybe",
    ],
    "procedure=specialists": [
        "procedure.specialists=1", "procedure.specialists=9", "procedure.size=0", "procedure.size=4", "procedure.top=0",
        "procedure.top=4", "procedure.epochs=0", "procedure.lr=-1", "procedure.distil=3",
    ],
    "procedure=snapshot": [
        "procedure.cycles=1", "procedure.cycles=3", "procedure.keep=1", "procedure.keep=3", "procedure.mean=median",
        "procedure.tau=0",
    ],
    "procedure=noisy_student": [
        "procedure.iterations=0", "procedure.labelled=0", "procedure.labelled=2.5", "procedure.labels=firm",
        "procedure.threshold=1", "procedure.per_class=0", "procedure.students=[mlp]", "procedure.students=[mlp,mlp,x]",
    ],
    "procedure=meta_pseudo_labels": [
        "procedure.pseudo=draw", "procedure.teacher_lr=0", "procedure.supervised=-1", "procedure.finetune_epochs=-1",
        "procedure.finetune_lr=-1", "procedure.labelled=inf",
    ],
    "procedure=bias_correction": ["procedure.by=guess"],
    "procedure=mutual": ["procedure.peers=1", "procedure.peers=1.5", "procedure.students=[mlp]"],
    "procedure=self_distillation": ["procedure.past=year", "procedure.decay=1", "procedure.decay=0"],
}  # fmt: skip


class Begun(Exception):
    """A training was begun."""


@pytest.fixture(scope="module")
def no_training():
    """Nothing is trained here: what begins to is not refused."""
    patch = pytest.MonkeyPatch()

    def begin(*_: object) -> None:
        raise Begun

    patch.setattr(lifecycle, "run_stages", begin)
    before = HydraConfig.instance().cfg
    yield
    HydraConfig.instance().cfg = before
    patch.undo()


@pytest.fixture
def configuration():
    """A function that composes the tiny experiment with a group, and has Hydra ready for its lines."""
    with ExitStack() as stack:

        def compose(group: str) -> DictConfig:
            learns = group not in ("procedure=mutual", "procedure=self_distillation")
            members = ["teacher.network=mlp"] if group == "teacher=ensemble" else []
            tiny = [word for word in TINY if learns or not word.startswith("teacher.")]
            mlps = [word for word in MLPS if not word.startswith("teacher") or (learns and not members)]
            stack.close()
            root = composed(*tiny, *mlps, *filter(None, [group]), *members)
            stack.enter_context(in_hydra())
            HydraConfig.instance().set_config(root)
            return root

        yield compose


def said(root: DictConfig, line: str, out: Path) -> str:
    """What is said of a line; "" where it was accepted."""
    cfg = without_hydra(root)
    put(cfg, line)
    try:
        check(cfg, root)
        with as_job(root, out):
            train.train(cfg)
    except UserError as error:
        return str(error)
    except Begun:
        pass
    return ""


def fault(root: DictConfig, line: str, out: Path) -> str:
    """What is wrong with what is said of a line; "" for nothing."""
    try:
        sentence = said(root, line, out)
    except Exception as error:  # would be called unexpected
        return f"{type(error).__name__}: {error}"
    key, _, value = line.lstrip("+").partition("=")
    names = sentence.startswith((key, key.removesuffix("._target_"))) or value.strip("'") in sentence
    return "" if sentence and names else sentence or "accepted"


def test_every_wrong_line_is_a_sentence_about_it(no_training, configuration, tmp_path):
    faults = []
    for group, lines in LINES.items():
        root = configuration(group)
        for number, line in enumerate(filter(None, map(str.strip, lines))):
            found = fault(root, line, tmp_path / group / str(number))  # another line's folder would be another run's
            faults += [f"{group} {line}: {found}"] if found else []
    assert sum(map(len, LINES.values())) > 250 and not faults, "\n".join(faults)
