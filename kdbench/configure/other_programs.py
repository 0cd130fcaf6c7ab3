"""Command lines and files of other programs as kdbench's words: RepDistiller, mdistiller, timm. Nothing of them is run.

What has no word here is named, never guessed. Sources: RepDistiller's train_student.py, mdistiller's engine/cfg.py, the
help of timm's train.py.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from kdbench.configure.options import options
from kdbench.errors import UserError
from kdbench.paths import CONFIG_DIR

# Networks that are called otherwise.
_NETWORKS = {
    "MobileNetV2": "mobilenetv2_half", "mobile_half": "mobilenetv2_half", "mobile_full": "mobilenetv2",
    "ShuffleV1": "shufflenetv1", "ShuffleV2": "shufflenetv2", "ResNet50": "resnet50", "ResNet18": "resnet18",
    "ResNet34": "resnet34",
}  # fmt: skip
_SLOW = ("mobilenetv2_half", "mobilenetv2", "shufflenetv1", "shufflenetv2")  # RepDistiller trains these with lr 0.01
# RepDistiller's --distill, and mdistiller's TYPE.
_METHODS = {
    "kd": "kl", "hint": "fitnet", "attention": "at", "similarity": "sp", "correlation": "cc", "vid": "vid",
    "crd": "crd", "fsp": "fsp", "rkd": "rkd", "pkt": "pkt", "nst": "nst", "fitnet": "fitnet", "at": "at", "sp": "sp",
    "dkd": "dkd", "reviewkd": "reviewkd", "factor": "ft", "kdsvd": "kdsvd", "abound": "ab", "ofd": "ofd",
}  # fmt: skip
# mdistiller's keys of a method that are kdbench's of the same loss; those in _FOLLOW follow from the networks here.
_OF_METHOD = {
    "LOSS.CE_WEIGHT": "weights.task", "CE_WEIGHT": "weights.task", "LOSS.KD_WEIGHT": "weights.distill",
    "LOSS.FEAT_WEIGHT": "weights.distill", "REVIEWKD_WEIGHT": "weights.distill", "TEMPERATURE": "tau", "T": "tau",
    "ALPHA": "tckd", "BETA": "nckd", "P": "power", "NCE.K": "negatives", "NCE.MOMENTUM": "momentum",
    "NCE.TEMPERATURE": "tau", "FEAT.DIM": "dimensions", "K": "vectors", "DISTANCE_WEIGHT": "distance",
    "ANGLE_WEIGHT": "angle", "INIT_PRED_VAR": "variance", "MAX_MID_CHANNEL": "middle",
}  # fmt: skip
_FOLLOW = (
    "FEAT.STUDENT_DIM", "FEAT.TEACHER_DIM", "INPUT_SIZE", "SHAPES", "OUT_SHAPES", "IN_CHANNELS", "OUT_CHANNELS",
)  # fmt: skip
# What kdbench has no word for, and does as mdistiller's defaults say.
_AS_THERE = {"CONNECTOR.KERNEL_SIZE": 1, "HINT_LAYER": 2, "MODE": "exact", "EPS": 1e-5, "STU_PREACT": False,
             "PDIST.EPSILON": 1e-12, "PDIST.SQUARED": False}  # fmt: skip


@dataclass
class Translation:
    """A command of kdbench's, and what of the other could not be said in it."""

    words: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def line(self) -> str:
        return " ".join(["kdbench train", *self.words])


def translate(line: str, words: Sequence[str]) -> Translation:
    """What `kdbench train` takes in place of this line (a shell's words of it), or of a mdistiller YAML.

    Raises UserError for what is none of the three programs' and for a method that kdbench has not.
    """
    script = next((Path(word).name for word in words if word.endswith(".py")), "")
    rest = list(words[next((i for i, w in enumerate(words) if w.endswith(".py")), -1) + 1 :])
    if script == "train_student.py":
        return _repdistiller(rest)
    if script == "train.py" and "--cfg" in rest:
        at = rest.index("--cfg")
        return _mdistiller(_config(rest[at + 1]), rest[at + 2 :])
    if script == "train.py" or (script == "" and "--kd-model-name" in words):
        return _timm(rest if script else list(words))
    if len(words) == 1 and words[0].endswith((".yaml", ".yml")):
        return _mdistiller(_config(words[0]), [])
    known = "train_student.py of RepDistiller, train.py --cfg of mdistiller or its YAML, or timm's train.py"
    raise UserError("kdbench import", line, f"a command of {known}")


def _network(name: str) -> str:
    return _NETWORKS.get(name, name)


def _network_at(path: str) -> str | None:
    """The network that a path names: "save/models/<network>_vanilla/ckpt_epoch_240.pth", the folder alone, or a file
    <network>_best.pth."""
    known = options("student", [Path(CONFIG_DIR)])
    for name in (Path(path).name, Path(path).parent.name):
        segments = name.split("_")
        network = _network("_".join(segments[:3]) if segments[0] == "wrn" else segments[0])
        if network in known:
            return network
    return None


def _method(name: str) -> str:
    found = _METHODS.get(name.lower())
    if found is None:
        raise UserError(
            "method", name, f"one that kdbench has ({', '.join(sorted(_METHODS))}); kdbench list loss has more"
        )
    return found


def _repdistiller_flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("train_student.py", add_help=False, exit_on_error=False)
    for name, default in (
        ("--path_t", None), ("--model_s", "resnet8"), ("--distill", "kd"), ("--dataset", "cifar100"), ("--trial", None),
        ("--lr_decay_epochs", None), ("--kd_T", "4"), ("--epochs", None), ("--batch_size", None),
        ("--learning_rate", None), ("--lr_decay_rate", None), ("--weight_decay", None), ("--momentum", None),
        ("--nce_k", None), ("--nce_t", None), ("--nce_m", None), ("--feat_dim", None), ("--hint_layer", None),
        ("--init_epochs", None),
    ):  # fmt: skip
        parser.add_argument(name, default=default)
    parser.add_argument("-r", "--gamma", default="1")
    parser.add_argument("-a", "--alpha", default="0")
    parser.add_argument("-b", "--beta", default="0")
    return parser


def _repdistiller(words: Sequence[str]) -> Translation:
    given, unknown = _parsed(_repdistiller_flags(), words)
    made = Translation([f"dataset={given.dataset}", "schedule=crd240"])
    student = _network(given.model_s)
    if given.path_t:
        teacher = _network_at(given.path_t)
        if teacher is None:
            made.notes.append(f"--path_t {given.path_t} does not name the teacher's network: add teacher=<network>")
        else:
            made.words.append(f"teacher={teacher}")
        made.words.append(f"teacher.checkpoint={given.path_t}")
    made.words.append(f"student={student}")
    if student in _SLOW:
        given.learning_rate = "0.01"  # whatever was typed
    _two_stages(given, made)
    made.words += _sum_of(_method(given.distill), given)
    _keys(made, given, {
        "epochs": "schedule.epochs", "batch_size": "schedule.batch_size", "learning_rate": "schedule.lr",
        "weight_decay": "schedule.weight_decay", "momentum": "optimizer.momentum", "lr_decay_rate": "schedule.gamma",
        "trial": "seed",
    })  # fmt: skip
    if given.lr_decay_epochs:
        made.words.append(f"'schedule.milestones=[{given.lr_decay_epochs}]'")
    where = "loss.parts.crd" if float(given.alpha) else "loss"
    if given.distill == "crd":
        _keys(made, given, {"nce_k": f"{where}.negatives", "nce_t": f"{where}.tau", "nce_m": f"{where}.momentum",
                            "feat_dim": f"{where}.dimensions"})  # fmt: skip
    if given.distill == "factor":
        _keys(made, given, {"init_epochs": f"{where}.epochs"})
        if not re.match("resnet|wrn", student) or given.model_s == "ResNet50":  # for which the rate is the training's
            made.words.append(f"{where}.lr={given.learning_rate or 0.05}")
    if given.distill == "abound":
        _keys(made, given, {"init_epochs": f"{'loss.parts.ab' if float(given.alpha) else 'loss'}.epochs"})
    if given.distill == "hint" and given.hint_layer:
        made.notes.append(f"--hint_layer {given.hint_layer}: layers have names here; see kdbench explain loss=fitnet")
    made.notes += _left(unknown)
    made.notes.append("RepDistiller reports the best epoch by the test set; kdbench's test figure is the last epoch's")
    return made


def _two_stages(given: argparse.Namespace, made: Translation) -> None:
    """`abound` and `fsp` have a first training of their own, and -b no effect: their second stage is CE and KL."""
    if given.distill in ("abound", "fsp") and float(given.beta):
        made.notes.append(f"-b {given.beta}: of no effect with --distill {given.distill}, there as here")
    if given.distill == "fsp":  # its first epochs stand in front, here they are a share of all
        first, then = int(given.init_epochs or 30), int(given.epochs or 240)
        given.epochs = str(first + then)
        falls = (given.lr_decay_epochs or "150,180,210").split(",")
        given.lr_decay_epochs = ",".join(str(int(epoch) + first) for epoch in falls)
        where = "loss.parts.crd" if float(given.alpha) else "loss"
        made.words.append(f"{where}.switch={first / (first + then):.4g}")
        given.beta = "1"


def _sum_of(loss: str, given: argparse.Namespace) -> list[str]:
    """gamma CE + alpha KL + beta of the method."""
    gamma, alpha, beta = (f"{float(value):g}" for value in (given.gamma, given.alpha, given.beta))
    if loss == "kl":
        tau = f"loss.tau={float(given.kd_T):g}"
        return ["loss=kl", f"loss.weights.task={gamma}", f"loss.weights.distill={alpha}", tau]
    if float(alpha) == 0:
        own = [] if loss == "ab" else [f"loss.weights.distill={beta}"]
        return [f"loss={loss}", f"loss.weights.task={gamma}", *own]
    if loss == "ab":  # whose only term is the label's
        return [
            "loss=sum", "+loss@loss.parts.ab=ab", "loss.weights.crd=0", "loss.weights.task=0",
            f"loss.parts.ab.weights.task={gamma}", f"loss.parts.kl.weights.distill={alpha}",
            f"loss.parts.kl.tau={float(given.kd_T):g}",
        ]  # fmt: skip
    part = [] if loss == "crd" else [f"loss@loss.parts.crd={loss}"]
    return [
        "loss=sum", *part, f"loss.weights.task={gamma}", f"loss.parts.kl.weights.distill={alpha}",
        f"loss.parts.kl.tau={float(given.kd_T):g}", f"loss.parts.crd.weights.distill={beta}",
    ]  # fmt: skip


def _config(path: str) -> Mapping[str, object]:
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not a readable configuration ({type(error).__name__})") from error
    if not isinstance(tree, dict) or "DISTILLER" not in tree:
        raise UserError(f"{path}: no configuration of mdistiller (it has no DISTILLER)")
    return tree


def _mdistiller(tree: Mapping[str, object], changes: Sequence[str]) -> Translation:
    """Its defaults stand in the code: the CIFAR-100 protocol, but for the weight decay of 1e-4."""
    flat = {**_flat(tree), **dict(zip(changes[::2], map(yaml.safe_load, changes[1::2])))}
    kind = str(flat.get("DISTILLER.TYPE", "NONE"))
    made = Translation([f"dataset={flat.get('DATASET.TYPE', 'cifar100')}", "schedule=crd240"])
    student = _network(str(flat.get("DISTILLER.STUDENT", "resnet32")))
    if kind in ("NONE", "Vanilla"):
        made.words += ["teacher=none", f"student={student}", "loss=ce"]
    else:
        made.words += [f"teacher={_network(str(flat.get('DISTILLER.TEACHER', 'ResNet50')))}", f"student={student}"]
        made.words += _method_of(kind, flat, made)
        folder = f"download_ckpts/cifar_teachers/{flat.get('DISTILLER.TEACHER', 'ResNet50')}_vanilla"
        made.notes.append(f"its teacher's weights: teacher.checkpoint={folder}, trained here otherwise")
    solver = {
        "SOLVER.EPOCHS": "schedule.epochs", "SOLVER.BATCH_SIZE": "schedule.batch_size", "SOLVER.LR": "schedule.lr",
        "SOLVER.LR_DECAY_RATE": "schedule.gamma", "SOLVER.MOMENTUM": "optimizer.momentum",
    }  # fmt: skip
    made.words += [f"{key}={flat[name]:g}" for name, key in solver.items() if name in flat]
    made.words.append(f"schedule.weight_decay={flat.get('SOLVER.WEIGHT_DECAY', 1e-4):g}")
    if flat.get("SOLVER.TRAINER") == "dot":
        delta = flat.get("SOLVER.DOT.DELTA", flat.get("DOT.DELTA", 0.075))
        made.words += ["optimizer=dot", f"optimizer.options.delta={delta:g}"]
    stages = flat.get("SOLVER.LR_DECAY_STAGES")
    if stages and list(stages) != [150, 180, 210]:
        made.words.append(f"'schedule.milestones=[{','.join(map(str, stages))}]'")
    return made


def _method_of(kind: str, flat: Mapping[str, Any], made: Translation) -> list[str]:
    loss, start = _method(kind), f"{kind.upper()}."
    own = {key.removeprefix(start): value for key, value in flat.items() if key.startswith(start)}
    usual = {"kl": ["weights.task=0.1", "weights.distill=0.9", "tau=4"], "reviewkd": ["weights.distill=1"]}.get(
        loss, []
    )
    typed = [f"{_OF_METHOD[name]}={value:g}" for name, value in own.items() if name in _OF_METHOD]
    known = {word.partition("=")[0] for word in typed}
    warm = own.get("WARMUP", own.get("WARMUP_EPOCHS"))
    if warm is not None:
        typed.append(f"warmup={float(warm) / float(flat.get('SOLVER.EPOCHS', 240)):.4g}")
    for name in own.keys() - {*_OF_METHOD, *_FOLLOW, "WARMUP", "WARMUP_EPOCHS"}:
        if name not in _AS_THERE or own[name] != _AS_THERE[name]:
            made.notes.append(f"not translated: {start}{name} {own[name]}")
    return [f"loss={loss}", *(f"loss.{w}" for w in [*(u for u in usual if u.partition("=")[0] not in known), *typed])]


def _timm_flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("train.py", add_help=False, exit_on_error=False)
    parser.add_argument("data", nargs="?")
    for name in (
        "--data-dir", "--dataset", "--model", "--kd-model-name", "--kd-distill-type", "--distill-loss-weight",
        "--task-loss-weight", "--kd-temperature", "--img-size", "--lr", "--epochs", "--opt", "--weight-decay",
        "--sched", "--warmup-epochs", "--model-ema-decay", "--smoothing", "--mixup", "--cutmix", "--clip-grad",
        "--seed", "--momentum", "--drop-path", "--drop", "--workers", "--aa", "--reprob", "--aug-repeats",
        "--mixup-prob", "--mixup-switch-prob", "--bce-target-thresh", "--grad-accum-steps", "--layer-decay", "--min-lr",
        "--warmup-lr", "--color-jitter",
    ):  # fmt: skip
        parser.add_argument(name)
    parser.add_argument("-b", "--batch-size")
    for flag in (
        "--pretrained",
        "--model-ema",
        "--amp",
        "--channels-last",
        "--pin-mem",
        "--bce-loss",
        "--grad-checkpointing",
    ):
        parser.add_argument(flag, action="store_true")
    return parser


def _timm(words: Sequence[str]) -> Translation:
    given, unknown = _parsed(_timm_flags(), words)
    root = given.data_dir or given.data
    size = f"dataset.size={given.img_size or 224}"
    data = ["dataset=imagenet"] if root and "imagenet" in root.lower() else ["dataset=imagefolder", size]
    made = Translation([*data, *([f"dataset.root={root}"] if root else [])])
    if given.kd_model_name:
        name = re.sub(r"^timm/", "", given.kd_model_name)
        made.words += ["teacher=timm", f"teacher.name={name}", "teacher.pretrained=true"]
    made.words += ["student=timm", f"student.name={given.model or 'resnet50'}"]
    made.words += ["student.pretrained=true", "student.new_head=true"] if given.pretrained else []
    made.words += _timm_loss(given, made)
    optimizer = {None: "sgd", "sgd": "sgd", "adamw": "adamw"}.get(given.opt)
    made.words += [f"optimizer={optimizer}"] if optimizer else ["optimizer=timm", f"optimizer.name={given.opt}"]
    made.words.append("schedule=step" if given.sched == "step" else "schedule=cosine")
    rates = "schedule" if optimizer == "sgd" else "optimizer"  # the others have a rate of their own
    if given.grad_accum_steps:  # timm's batch is one of the parts
        given.batch_size = int(given.grad_accum_steps) * int(given.batch_size or 128)
    _keys(made, given, {
        "epochs": "schedule.epochs", "batch_size": "schedule.batch_size", "lr": f"{rates}.lr",
        "weight_decay": f"{rates}.weight_decay", "warmup_epochs": "schedule.warmup", "momentum": "optimizer.momentum",
        "clip_grad": "trainer.clip", "smoothing": "loss.label_smoothing", "seed": "seed", "workers": "dataset.workers",
    })  # fmt: skip
    if given.model_ema or given.model_ema_decay:
        made.words.append(f"trainer.ema={given.model_ema_decay or 0.9998}")
    made.words += ["trainer.channels_last=on"] if given.channels_last else []
    _keys(made, given, {"drop": "+student.options.drop_rate", "drop_path": "+student.options.drop_path_rate"})
    _timm_recipe(given, made, rates)
    made.notes += _left(unknown)
    return made


def _timm_recipe(given: argparse.Namespace, made: Translation, rates: str) -> None:
    """Augmentations, mixtures, memory, and learning rates by epoch, as timm's scheduler has them."""
    mixed = {kind: float(getattr(given, kind) or 0) for kind in ("mixup", "cutmix")}
    both, one = all(mixed.values()), next((kind for kind, alpha in mixed.items() if alpha), None)
    if one is not None:
        made.words += [f"dataset.mix.kind={'both' if both else one}", f"dataset.mix.alpha={mixed[one]:g}"]
        made.words += [f"dataset.mix.cutmix_alpha={mixed['cutmix']:g}"] if both else []
        _keys(made, given, {"mixup_prob": "dataset.mix.probability"})
        _keys(made, given, {"mixup_switch_prob": "dataset.mix.switch"} if both else {})
    erased = float(given.reprob or 0)
    made.words.append(
        f"dataset/augment={'deit' if erased and given.aa else 'resnet_a1' if given.aa else 'resized_crop'}"
    )
    _keys(made, given, {"aa": "dataset.augment.parts.1.policy"})
    if given.aa:
        made.words += [f"dataset.augment.parts.2.probability={erased:g}"] if erased else []
    made.notes += ["not translated: --reprob without --aa"] if erased and not given.aa else []
    if given.color_jitter and float(given.color_jitter) and not given.aa:
        made.notes.append("not translated: --color-jitter without --aa")
    _keys(made, given, {"grad_accum_steps": "trainer.accumulate"})
    made.words += ["trainer.grad_checkpointing=true"] if given.grad_checkpointing else []
    _keys(made, given, {"layer_decay": "optimizer.layer_decay"})
    if given.sched != "step":
        made.words += ["schedule.per=epoch", "schedule.warmup_overlaps=true"]
        _keys(made, given, {"aug_repeats": "schedule.repeats"})
        for name, key in (("min_lr", "floor"), ("warmup_lr", "warmup_from")):
            if getattr(given, name) and given.lr:
                made.words.append(f"schedule.{key}={float(getattr(given, name)) / float(given.lr):.4g}")
    made.words += ["'optimizer.no_decay=[own]'", *(["optimizer.decay_1d=false"] if rates == "schedule" else [])]


def _timm_loss(given: argparse.Namespace, made: Translation) -> list[str]:
    """task CE + distill KL; with the task's weight alone the other is what is left of 1; 1 and 1 without both."""
    if not given.kd_model_name:
        threshold = f"loss.threshold={given.bce_target_thresh}"
        binary = ["loss=bce", *([threshold] if given.bce_target_thresh else [])]
        return ["teacher=none", *(binary if given.bce_loss else ["loss=ce"])]
    made.notes += ["not translated: --bce-loss beside a teacher"] if given.bce_loss else []
    if given.kd_distill_type not in (None, "logit"):
        made.notes.append(
            f"--kd-distill-type {given.kd_distill_type}: not translated; kdbench list loss has feature losses"
        )
    task, distill = given.task_loss_weight, given.distill_loss_weight
    other = 1 - float(task) if task and not distill else float(distill or 1)
    weights = [f"loss.weights.task={float(task or 1):g}", f"loss.weights.distill={other:g}"]
    return ["loss=kl", *weights, f"loss.tau={float(given.kd_temperature or 4):g}"]


def _parsed(parser: argparse.ArgumentParser, words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    try:
        return parser.parse_known_args(list(words))
    except (argparse.ArgumentError, SystemExit) as error:
        raise UserError(f"kdbench import: not a command line of {parser.prog}: {error}") from error


def _keys(made: Translation, given: argparse.Namespace, names: Mapping[str, str]) -> None:
    made.words += [f"{key}={getattr(given, name)}" for name, key in names.items() if getattr(given, name) is not None]


def _left(unknown: Sequence[str]) -> list[str]:
    return [f"not translated: {' '.join(unknown)}"] if unknown else []


def _flat(tree: Mapping[str, object], prefix: str = "") -> dict[str, Any]:
    found: dict[str, object] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found
