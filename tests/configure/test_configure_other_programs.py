"""Other programs' command lines as kdbench's: every translation composes, and what has no word here is named."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

import kdbench as package
from kdbench.configure.other_programs import translate
from kdbench.errors import UserError
from tests.support.shell import kdbench

DKD = """
DISTILLER: {TYPE: "DKD", TEACHER: "resnet32x4", STUDENT: "ShuffleV2"}
SOLVER: {BATCH_SIZE: 64, EPOCHS: 240, LR: 0.01, LR_DECAY_STAGES: [150, 180, 210], WEIGHT_DECAY: 0.0005}
DKD: {CE_WEIGHT: 1.0, ALPHA: 1.0, BETA: 6.0, T: 4.0, WARMUP: 20}
"""
OFD = """
DISTILLER: {TYPE: "OFD", TEACHER: "resnet32x4", STUDENT: "resnet8x4"}
SOLVER: {EPOCHS: 240, WEIGHT_DECAY: 0.0005}
OFD: {LOSS: {CE_WEIGHT: 1.0, FEAT_WEIGHT: 0.002}, CONNECTOR: {KERNEL_SIZE: 1}}
"""
RKD = """
DISTILLER: {TYPE: "RKD", TEACHER: "resnet32x4", STUDENT: "resnet8x4"}
SOLVER: {TRAINER: "dot", DOT: {DELTA: 0.09}}
RKD: {DISTANCE_WEIGHT: 20, ANGLE_WEIGHT: 40, PDIST: {SQUARED: false}}
"""
REP = "python train_student.py --path_t ./save/models/resnet32x4_vanilla/ckpt_epoch_240.pth --model_s resnet8x4"
LINES = {
    f"{REP} --distill kd -r 0.1 -a 0.9 -b 0": "teacher=resnet32x4 student=resnet8x4 loss=kl loss.weights.task=0.1 "
    "loss.weights.distill=0.9 loss.tau=4 schedule=crd240",
    f"{REP} --distill kd --kd_T 2 -a 1 --trial 3": "loss.tau=2 loss.weights.task=1 seed=3",
    f"{REP} --distill attention -a 0 -b 1000": "loss=at loss.weights.distill=1000",
    f"{REP} --distill factor -a 0 -b 200": "loss=ft loss.weights.distill=200",
    f"{REP} --distill kdsvd -a 0 -b 1": "loss=kdsvd loss.weights.distill=1",
    f"{REP} --distill abound -a 0 -b 1 --init_epochs 20": "loss=ab loss.weights.task=1 loss.epochs=20",
    f"{REP} --distill abound -r 0.5 -a 1 --init_epochs 20": "loss=sum +loss@loss.parts.ab=ab loss.weights.crd=0 "
    "loss.weights.task=0 loss.parts.ab.weights.task=0.5 loss.parts.kl.weights.distill=1 loss.parts.ab.epochs=20",
    f"{REP.replace('resnet8x4', 'vgg8')} --distill factor -a 0 -b 200 --init_epochs 9": "loss=ft loss.epochs=9 "
    "loss.lr=0.05",
    f"{REP} --distill fsp -a 0 -b 50": "loss=fsp loss.weights.distill=1 loss.switch=0.1111 schedule.epochs=270 "
    "schedule.milestones=[180,210,240]",
    "ofd.yaml": "loss=ofd loss.weights.task=1 loss.weights.distill=0.002 schedule.weight_decay=0.0005",
    "rkd.yaml": "loss=rkd loss.distance=20 loss.angle=40 optimizer=dot optimizer.options.delta=0.09",
    f"{REP} --distill similarity -a 1 -b 3000": "loss=sum loss@loss.parts.crd=sp loss.parts.kl.weights.distill=1 "
    "loss.parts.crd.weights.distill=3000",
    f"{REP} --distill crd -a 1 -b 0.8 --nce_k 4096": "loss=sum loss.parts.crd.negatives=4096",
    f"{REP.replace('resnet8x4', 'ShuffleV1')} --distill pkt -a 0 -b 30000": "student=shufflenetv1 schedule.lr=0.01",
    "python tools/train.py --cfg dkd.yaml": "loss=dkd loss.nckd=6 loss.warmup=0.08333 student=shufflenetv2",
    "dkd.yaml": "teacher=resnet32x4 schedule.weight_decay=0.0005",
    "python tools/train.py --cfg dkd.yaml DKD.BETA 2.0": "loss.nckd=2",
    "python train.py /data/photos --model resnet18 --kd-model-name timm/resnet50 --lr 0.1 -b 256 --epochs 90 "
    "--task-loss-weight 0.3 --kd-temperature 2": "teacher=timm teacher.name=resnet50 "
    "student=timm student.name=resnet18 loss.weights.task=0.3 loss.weights.distill=0.7 loss.tau=2 "
    "schedule.batch_size=256",
    "python train.py /data/photos --model deit_tiny_patch16_224 --aa rand-m9-mstd0.5-inc1 --mixup 0.8 --cutmix 1.0 "
    "--mixup-switch-prob 0.4 --reprob 0.3 --smoothing 0.1 --opt adamw --layer-decay 0.75 --drop-path 0.1 --drop 0.2 "
    "--model-ema --aug-repeats 3 --bce-loss --bce-target-thresh 0.2 --grad-accum-steps 4 --grad-checkpointing "
    "--lr 5e-4 --min-lr 1e-5 --warmup-lr 5e-7 --epochs 300 -b 128 --color-jitter 0.3": "dataset.mix.kind=both "
    "dataset.mix.alpha=0.8 dataset.mix.cutmix_alpha=1 dataset.mix.switch=0.4 dataset/augment=deit loss=bce "
    "dataset.augment.parts.1.policy=rand-m9-mstd0.5-inc1 dataset.augment.parts.2.probability=0.3 loss.threshold=0.2 "
    "optimizer.layer_decay=0.75 +student.options.drop_path_rate=0.1 +student.options.drop_rate=0.2 "
    "trainer.accumulate=4 schedule.repeats=3 schedule.batch_size=512 trainer.grad_checkpointing=true "
    "schedule.floor=0.02 schedule.warmup_from=0.001 schedule.per=epoch optimizer.no_decay=[own]",
    "python train.py /data/photos --mixup 0.2 --mixup-prob 0.5": "dataset.mix.kind=mixup dataset.mix.probability=0.5 "
    "dataset/augment=resized_crop optimizer.decay_1d=false",
}  # fmt: skip


@pytest.mark.parametrize("line", LINES)
def test_a_translation_says_what_the_line_said_and_composes(line):
    for name, text in (("dkd", DKD), ("ofd", OFD), ("rkd", RKD)):
        Path(f"{name}.yaml").write_text(text)
    made = translate(line, shlex.split(line))
    words = shlex.split(made.line)[2:]
    assert set(LINES[line].split()) <= set(words), made.line
    package.compose(words)


def test_a_setting_of_mdistillers_without_a_word_here_is_named():
    Path("ofd.yaml").write_text(OFD.replace("KERNEL_SIZE: 1", "KERNEL_SIZE: 3"))
    assert "not translated: OFD.CONNECTOR.KERNEL_SIZE 3" in translate("", ["ofd.yaml"]).notes
    Path("ofd.yaml").write_text(OFD)
    assert not any("not translated" in note for note in translate("", ["ofd.yaml"]).notes)
    line = f"{REP} --distill abound -a 0 -b 2"
    assert "-b 2: of no effect with --distill abound, there as here" in translate(line, shlex.split(line)).notes


def test_the_command_prints_it_and_what_it_left_out(capsys):
    assert kdbench("import", f"{REP} --distill kd -r 0.1 -a 0.9 -b 0 --tb_freq 3") == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("kdbench train dataset=cifar100") and "# not translated: --tb_freq 3" in out


def test_an_open_quote_is_a_mistake_of_the_line(capsys):
    assert kdbench("import", f"{REP} --distill 'kd") == 1
    err = capsys.readouterr().err
    assert "must be words as a shell parts them: no closing quotation" in err and "unexpected" not in err


@pytest.mark.parametrize("line", [f"{REP} --distill none", "make", "nowhere.yaml", "python train_student.py --kd_T"])
def test_what_is_not_understood_is_refused(line):
    with pytest.raises(UserError):
        translate(line, shlex.split(line))


@pytest.mark.parametrize(
    ("path", "network"),
    [
        ("save/models/wrn_40_2_vanilla/ckpt_epoch_240.pth", "wrn_40_2"),
        ("download_ckpts/cifar_teachers/ResNet50_vanilla", "resnet50"),  # mdistiller's folder
        ("save/models/resnet20_cifar100_lr_0.05_decay_0.0005_trial_0/", "resnet20"),
        ("resnet8x4_best.pth", "resnet8x4"),
        ("download_ckpts/cifar_teachers", None),
        ("..", None),
    ],
)
def test_a_teacher_is_named_by_its_file_or_its_folder(path, network):
    made = translate("", shlex.split(f"python train_student.py --path_t {path} --distill kd -r 0.1 -a 0.9 -b 0"))
    assert [word for word in made.words if word.startswith("teacher=")] == ([f"teacher={network}"] if network else [])


def test_a_path_that_does_not_name_the_teacher_is_said():
    line = "python train_student.py --path_t ... --distill kd -r 0.1 -a 0.9 -b 0"
    made = translate(line, shlex.split(line))
    assert not any(word.startswith("teacher=") for word in made.words) and "teacher.checkpoint=..." in made.words
    assert "--path_t ... does not name the teacher's network: add teacher=<network>" in made.notes
