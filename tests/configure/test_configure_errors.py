"""Every mistake on a command line is one message that names it, before any work; never a traceback."""

from __future__ import annotations

import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

from kdbench import cli

SMOKE = ["debug=smoke", "trainer.progress=none"]

# (command line, words that the message must hold)
MISTAKES = [
    # keys
    ("train loss.taau=3", ["loss.taau=3", "loss=kl has no key 'taau'", "Did you mean loss.tau?"]),
    ("train +loss.weights.tsk=1", ["loss.weights.tsk", "Did you mean loss.weights.task?"]),
    ("train +foo=1", ["foo: there is no such key", "Keys: dataset"]),
    ("train hydra.run.dirr=x", ["hydra.run.dirr", "Did you mean hydra.run.dir?"]),
    ("train seed.x=3", ["seed is a value"]),
    ("train loss=ce loss.tau=3", ["loss=ce has no key 'tau'", "It is a key of loss=abkd, "]),
    ("train schedule.milestones=[1]", ["schedule=cosine has no key 'milestones'", "schedule=step"]),
    ("train schedule.cycles=2", ["It can be added (+schedule.cycles=2)"]),
    ("train student.name=resnet20", ["Did you mean student=resnet20?", "It is a key of student=", "student=timm"]),
    ("train teacher=timm teacher.shortcut=A", ["teacher=timm has no key 'shortcut'"]),
    ("train +loss.tau=3", ["loss.tau exists; write it without the +"]),
    ("train student=timm student.options.drop_rate=0.1", ["are added with a +: +student.options.drop_rate=0.1"]),
    ("train student=timm student.options={drop_rate:0.1}", ["To add it: +student.options={drop_rate:0.1}"]),
    ("train loss.weights={task:1,distll:2}", ["loss.weights has no key 'distll'", "Did you mean distill?"]),
    ("train ~loss.tau", ["loss.tau: was removed"]),
    ("train loss=sum ~loss.parts.crd", ["loss.parts.crd: was removed", "loss.weights.crd=0 leaves it out"]),
    ("train ~teacher", ["teacher: was removed", "kdbench list teacher"]),
    ("train +loss@foo=kl", ["foo: there is no such key"]),
    ("train loss=sum loss@loss.parts.crd=nd logger=none", ["logger=none: logger has no option 'none'"]),
    ("train loss=sum loss@loss.parts.crd=ndd", ["loss@loss.parts.crd=ndd", "Did you mean loss@loss.parts.crd=nd"]),
    ("train loss=sum loss@loss.parts.kd=kl", ["add it with a +: +loss@loss.parts.kd=kl"]),
    ("train loss@loss.parts.kd=kl", ["add it with a +: +loss@loss.parts.kd=kl; what has parts is loss=sum"]),
    ("train loss=sum +loss@loss.parts.kd=kl loss.weights.kd=2", ["It can be added (+loss.weights.kd=2)"]),
    ("train loss=sum +loss@loss.parts.kd=kl +loss.weights.kx=2", ["loss.weights.kx: there is no such key"]),
    ("train loss=sum loss@loss.parts.crd=at student=mlp teacher=mlp", ["kdbench: loss.parts.crd: loss=at compares"]),
    ("train paths.outputs=${oc.env:NOPE}", ["paths.outputs = ${oc.env:NOPE}: Environment variable 'NOPE' not found"]),
    ("train paths.runs=${oc.env:NOPE}/x", ["paths.runs = ${oc.env:NOPE}/x: Environment variable"]),
    ("train -m paths.outputs=${nope} seed=0,1", ["paths.outputs = ${nope}: it refers to a key that"]),
    (
        "train experiment=kim2016_sequence_kd_small debug=smoke",
        ["procedure = sequence_level", "debug=short has the experiment's own data"],
    ),
    (
        "train experiment=tang2019_bilstm_small debug=smoke",
        ["dataset.augment = TokenDropout", "debug=short has the experiment's own data"],
    ),
    ("train teacher=./", ["teacher has no option './'", "Did you mean teacher.run=./?"]),
    ("train dataset=../", ["Did you mean dataset=text (or tensors, imagefolder) dataset.root=../?"]),
    # names of other programs and papers
    ("train tau=4", ["there is no key 'tau'", "Did you mean loss.tau=4?"]),
    ("train temperature=4", ["Did you mean loss.tau=4?"]),
    ("train -m temperature=4,8", ["temperature=4,8: there is no key", "Did you mean loss.tau=4,8?"]),
    ("train -m model=resnet8,mlp", ["Did you mean student=resnet8,mlp?"]),
    ("train lr=0.1", ["Did you mean schedule.lr=0.1?"]),
    ("train epochs=3", ["Did you mean schedule.epochs=3?"]),
    ("train batch_size=32", ["Did you mean schedule.batch_size=32?"]),
    ("train model=resnet20", ["Did you mean student=resnet20?"]),
    ("train trainer.max_epochs=3", ["Did you mean schedule.epochs=3?"]),
    ("train trainer.accelerator=gpu", ["Did you mean trainer.device=cuda?"]),
    ("train gpu=1", ["Did you mean trainer.device=cuda:1?"]),
    ("train wandb=true", ["Did you mean logger=wandb?"]),
    ("train dataset.batch_size=8", ["Did you mean schedule.batch_size=8?"]),
    ("train teacher.epochs=3", ["Did you mean teacher.schedule.epochs=3?"]),
    ("train schedule=cosine_annealing", ["Did you mean schedule=cosine?"]),
    ("train loss=kd", ["Did you mean loss=kl?"]),
    ("train loss=qqqq", ["loss has no option 'qqqq'", "wttm. One of your own needs --config-dir FOLDER"]),
    ("train student=mobilenetv3_small_050", ["student=timm student.name=mobilenetv3_small_050"]),
    ("train dataset.augment=none", ["Did you mean dataset/augment=none?"]),
    # options
    ("train loss=dkdd", ["loss=dkdd", "Did you mean loss=dkd", "kdbench list loss"]),
    ("train dataset/augment=flp", ["Did you mean dataset/augment=flip?", "kdbench list dataset/augment"]),
    ("train loss=", ["loss=: loss needs one of its options", "dkd"]),
    ("train student=null", ["student=null", "resnet8"]),
    ("train loss=kl,dkd", ["add -m", "loss=sum"]),
    ("train loss=[kl,js]", ["loss = [kl,js]", "one option", "-m loss=a,b", "loss=sum"]),
    ("train dataset/augment=[flip,none]", ["dataset/augment = [flip,none]", "one option"]),
    ("train -m loss=[kl,js],ce", ["one option", "loss=sum"]),
    ("train +experiment=nope", ["write it without the +: experiment=nope"]),
    ("train hydra/launcher=submitit_slurm", ["pip install hydra-submitit-launcher"]),
    # values
    ("train seed=1.5", ["seed = 1.5", "a whole number (int)"]),
    ("train seed=0..3", ["seed = 0..3", "-m 'seed=range(0,3)'"]),
    ("train loss.tau=abc", ["loss.tau", "abc", "number"]),
    ("train loss.tau=-1", ["loss.tau", "-1"]),
    ("train loss.scale=tau", ["loss.scale = tau", "one of tau2, none", "Did you mean tau2?"]),
    ("train teacher.schedule.epochs=0", ["kdbench: teacher.schedule.epochs = 0: must be at least 1"]),
    ("train 'loss.tau=${nope}'", ["loss.tau = ${nope}", "does not have"]),
    ("train loss.tau=???", ["loss.tau: needs a value"]),
    ("train loss._target_=kdbench.losses.kl.KLL", ["loss._target_", "Did you mean KL?"]),
    # a rate that nothing reads
    ("train optimizer=adamw schedule.lr=0.003", ["schedule.lr = 0.003: must be typed as optimizer.lr=0.003", "0.001"]),
    ("train optimizer=adamw teacher.schedule.lr=0.01", ["teacher.schedule.lr = 0.01: must be typed as teacher.optim"]),
    ("train optimizer=lamb schedule.weight_decay=0.3", ["schedule.weight_decay = 0.3: must be typed as optimizer.wei"]),
    ("train optimizer.lr=0.02 schedule.lr=0.01", ["schedule.lr = 0.01", "its own is 0.02"]),
    ("train -m optimizer=adamw,sgd schedule.lr=0.01", ["schedule.lr = 0.01: must be typed as optimizer.lr=0.01"]),
    ("train optimizer=deit schedule.lr=nan", ["schedule.lr = nan: must be a number (float), at least 0"]),
    # a choice for another place
    ("train dataset/augment@dataset.teacher_augment=flip", ["add it with a +: +dataset/augment@dataset.teacher_aug"]),
    # form
    ("train loss.tau=[1", ["loss.tau=[1", "cannot be read as key=value"]),
    ("train resnet20", ["resnet20: not of the form key=value"]),
    ("train --config-dir nowhere", ["nowhere: there is no such folder"]),
    ("trian loss=kl", ["there is no command 'trian'", "kdbench train"]),
    ("loss=kl seed=1", ["Did you mean: kdbench train loss=kl seed=1"]),
    ("-m loss=kl,dkd", ["Did you mean: kdbench train -m loss=kl,dkd"]),
    # sweeps
    ("train -m loss=kl,nope", ["loss=nope", "dkd"]),
    ("train -m loss=kl,ce loss.tau=1,2", ["loss=ce has no key 'tau'"]),
    ("train -m loss.tau=1,-3,abc", ["nothing was run, as 2 of 3", "loss.tau=-3", "loss.tau=abc"]),
    ("train -m loss.tau=range(10000000)", ["loss.tau = range(10000000): must be fewer values", "10,000,000 points"]),
    ("train -m loss.tau=range(0)", ["loss.tau = range(0): must be one value or more"]),
    ("train -m loss=kl,dkd hydra/launcher=cohort hydra.launcher.max_members=0", ["hydra.launcher.max_members = 0:"]),
    ("train -m loss=kl,dkd hydra/launcher=cohort hydra.launcher.max_members=-3", ["hydra.launcher.max_members = -3:"]),
    ("train -m loss=kl,dkd hydra.sweeper.max_batch_size=0", ["hydra.sweeper.max_batch_size = 0: must be"]),
    # other commands
    ("bench --seconds nan", ["--seconds = nan: must be a number"]),
    ("bench --seconds inf", ["--seconds = inf: must be in (0, 86400]"]),
    ("bench --against plain", ["--against = plain: must be NAME=COMMAND"]),
    ("explain lr", ["lr: there is no such key", "Did you mean optimizer.lr or schedule.lr?"]),
    ("train -m loss.tau=interval(1,20)", ["loss.tau = interval(1,20): must be values", "hydra/sweeper=optuna"]),
    ("list los", ["there is no group 'los'", "Did you mean loss?"]),
    ("list --config-dir nowhere", ["nowhere: there is no such folder"]),
    ("evaluate nowhere", ["nowhere: there is no such folder"]),
    ("evaluate .", ["not a run folder"]),
]


def words_of(line: str) -> list[str]:
    """As a shell would take it apart."""
    return [word.strip("'") for word in line.split()]


@pytest.mark.parametrize(("line", "expected"), MISTAKES, ids=[line for line, _ in MISTAKES])
def test_a_mistake_is_one_message(line, expected, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["kdbench", *words_of(line)])
    code = cli.main()
    captured = capsys.readouterr()
    assert code == 1
    assert captured.err.startswith("kdbench: ") and "Traceback" not in captured.err + captured.out
    for words in expected:
        assert words in captured.err
    assert not list(Path.cwd().glob("outputs/runs/*/*")), "a refused run must leave no folder"


@pytest.mark.parametrize("flag", ["--epochs", "-epochs"])
def test_an_unknown_flag_shows_the_usage(flag, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["kdbench", "train", flag, "3"])
    assert cli.main() == 2
    err = capsys.readouterr().err
    assert f"unrecognized arguments: {flag}" in err and "keys are typed without dashes: schedule.epochs=3" in err


@pytest.mark.parametrize("more", [[], ["-m", "seed=0,1"], ["-m", "seed=0,1", "hydra/launcher=cohort"]])
@pytest.mark.parametrize(
    ("words", "place"),
    [(["student=faulty", "loss=ce"], "line 7 (__init__)"), (["student=mlp_128", "loss=faulty"], "line 12 (setup)")],
)
def test_a_fault_in_code_of_the_users_names_its_place(words, place, more, tmp_path, monkeypatch, capsys):
    """Whoever writes a loss was told that an unexpected RuntimeError should not happen, without its file and line."""
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "faulty.yaml").write_text("_target_: my_faulty.Net\nwidth: 8\n")
    (tmp_path / "loss").mkdir()
    (tmp_path / "loss" / "faulty.yaml").write_text("_target_: my_faulty.Loss\nweights: {task: 1}\n")
    (tmp_path / "my_faulty.py").write_text(
        "from torch import nn\nfrom kdbench.losses.ce import CE\n\n"
        "class Net(nn.Module):\n    def __init__(self, num_classes, width: int = 8):\n"
        "        super().__init__()\n        self.first = nn.Linear(width - 9, num_classes)\n"
        "\n\nclass Loss(CE):\n    def setup(self, student, teacher):\n        self.made = nn.Linear(-1, 3)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    words = ["debug=smoke", "teacher=none", *words, "--config-dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["kdbench", "train", *words, *more])
    assert cli.main() == 1
    said = capsys.readouterr().err
    assert f"my_faulty.py, {place}" in said and "should not happen" not in said


def test_flags_may_stand_between_keys(tmp_path, monkeypatch, capsys):
    """argparse refused loss=kl --config-dir my student=mine: to it the first row of keys was all of them."""
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "mine.yaml").write_text("_target_: kdbench.models.mlp.MLP\nhidden: [3]\n")
    line = ["train", "loss=ce", "--config-dir", str(tmp_path), "student=mine", "--cfg", "job", "seed=7"]
    monkeypatch.setattr(sys, "argv", ["kdbench", *line])
    assert cli.main() == 0
    composed = capsys.readouterr().out
    assert "losses.ce.CE" in composed and "- 3" in composed and "\nseed: 7\n" in composed


def test_a_flag_before_nothing_takes_no_other_word_for_its_value(monkeypatch, capsys):
    """`kdbench table build --foo` was told to type foo=hydra.run.dir=..., which kdbench itself adds."""
    monkeypatch.setattr(sys, "argv", ["kdbench", "train", "--seed", "loss=kl"])
    assert cli.main() == 2
    assert "typed without dashes: seed=VALUE" in capsys.readouterr().err


def test_a_file_in_the_place_of_a_folder_is_named(monkeypatch, capsys):
    Path("afile").write_text("x")
    for word in ("hydra.run.dir=afile", "paths.runs=afile"):
        monkeypatch.setattr(sys, "argv", ["kdbench", "train", "debug=smoke", "teacher=none", "loss=ce", word])
        assert cli.main() == 1
        err = capsys.readouterr().err
        assert err.startswith("kdbench: afile") and "a file stands where a folder has to be" in err
        assert "Errno" not in err


def test_a_recording_that_cannot_be_is_refused_before_a_teacher_is_trained(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["kdbench", "train", "debug=smoke", "trainer.cuda_graph=on"])
    assert cli.main() == 1
    shown = capsys.readouterr()
    assert "trainer.cuda_graph = on: must be auto or off: this run is on cpu" in shown.err
    assert "trained now" not in shown.out + shown.err


def test_traceback_on_request(monkeypatch, capsys):
    monkeypatch.setenv("KDBENCH_TRACEBACK", "1")
    monkeypatch.setattr(sys, "argv", ["kdbench", "train", "loss.taau=3"])
    assert cli.main() == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and "has no key 'taau'" in err


def raising(error: BaseException):
    def run(*_arguments: object) -> None:
        raise error

    return run


def test_a_bug_is_one_line_and_its_traceback_is_in_the_log(monkeypatch, capsys):
    monkeypatch.setattr("kdbench.build.make_procedure", Mock(side_effect=RuntimeError("cannot be\nmore lines")))
    monkeypatch.setattr(sys, "argv", ["kdbench", "train", *SMOKE])
    assert cli.main() == 1
    captured = capsys.readouterr()
    assert "kdbench: unexpected RuntimeError: cannot be\n" in captured.err and "KDBENCH_TRACEBACK=1" in captured.err
    assert "Traceback" not in captured.err + captured.out
    (log,) = Path.cwd().glob("outputs/runs/*/*/train.log")
    assert "Traceback" in log.read_text() and "cannot be" in log.read_text()


def test_control_c_says_how_to_go_on(monkeypatch, capsys):
    monkeypatch.setattr("kdbench.build.make_procedure", raising(KeyboardInterrupt()))
    monkeypatch.setattr(sys, "argv", ["kdbench", "train", *SMOKE])
    assert cli.main() == 130
    err = capsys.readouterr().err
    assert "The same command goes on" in err and "Traceback" not in err


def test_a_users_option_may_not_hide_behind_one_of_ours(tmp_path, monkeypatch, capsys):
    (tmp_path / "loss").mkdir()
    (tmp_path / "loss" / "kl.yaml").write_text("tau: 1\n")
    monkeypatch.setattr(sys, "argv", ["kdbench", "train", "--config-dir", str(tmp_path)])
    assert cli.main() == 1
    assert "kl.yaml: kdbench has an option of this name itself" in capsys.readouterr().err


def test_a_broken_configuration_file_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "loss").mkdir()
    (tmp_path / "loss" / "mine.yaml").write_text("a: [1\nb: 2\n")
    monkeypatch.setattr(sys, "argv", ["kdbench", "train", "--config-dir", str(tmp_path), "loss=mine"])
    assert cli.main() == 1
    err = capsys.readouterr().err
    assert "mine.yaml" in err and "line 2" in err and "Traceback" not in err


def test_an_experiment_that_names_what_does_not_exist(tmp_path, monkeypatch, capsys):
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\ndefaults:\n  - override /loss: kll\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    monkeypatch.setattr(sys, "argv", ["kdbench", "train", "--config-dir", str(tmp_path), "experiment=mine"])
    assert cli.main() == 1
    err = capsys.readouterr().err
    assert "loss/kll" in err and "kl" in err and "Traceback" not in err


def test_a_typo_in_an_experiment_is_found(tmp_path, monkeypatch, capsys):
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\nloss:\n  weights: {tsk: 1}\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    monkeypatch.setattr(sys, "argv", ["kdbench", "train", "--config-dir", str(tmp_path), "experiment=mine"])
    assert cli.main() == 1
    assert "loss.weights.tsk: there is no such key" in capsys.readouterr().err
