"""`kdbench train` through the command line, for real: one run, sweeps, folders named by what differs."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from kdbench import cli, configure
from kdbench.commands import train as command
from kdbench.configure.naming import run_name
from kdbench.configure.options import options
from kdbench.paths import CONFIG_DIR

SMOKE = ["debug=smoke", "trainer.progress=none"]


@pytest.fixture
def train(monkeypatch, capsys):
    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["kdbench", "train", *words])
        code = cli.main()
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def composed():
    """A composed configuration with Hydra's node, as a run sees it."""
    configure.register()
    with initialize_config_dir(CONFIG_DIR, version_base="1.3"):

        def make(*overrides: str):
            cfg = compose("train", overrides=list(overrides), return_hydra_config=True)
            HydraConfig.instance().set_config(cfg)
            return cfg

        yield make
    HydraConfig.instance().cfg = None


def folders() -> list[Path]:
    return sorted(Path("outputs/runs").glob("*/*"))


def test_a_run_a_sweep_and_the_same_run_again_share_folders(train):
    assert train(*SMOKE, "loss=kl", "loss.tau=2")[0] == 0
    (first,) = folders()
    assert re.fullmatch(r"resnet14-resnet8-kl,loss\.tau=2,.*-[0-9a-f]{8}", first.name) and first.parent.name == "fake"
    written = (first / "result.json").stat().st_mtime_ns
    assert json.loads((first / "result.json").read_text())["choices"]["loss"] == "kl"
    code, out, err = train("-m", *SMOKE, "loss=kl", "loss.tau=2,3")
    assert code == 0 and err == "" and "[HYDRA]" not in out
    assert len(folders()) == 2 and first in folders()
    assert (first / "result.json").stat().st_mtime_ns == written, "a finished run is not run again"
    assert (first / "train.log").read_text().count("INFO") > 0


@pytest.mark.parametrize("launcher", ["basic", "cohort"])
def test_a_sweep_ends_in_one_table(train, launcher):
    sweep = ["-m", *SMOKE, "teacher=none", f"hydra/launcher={launcher}", "seed=0,1"]
    code, out, _ = train(*sweep, "loss=ce,kl,focal")  # kl needs a teacher
    assert code == 1
    header, *rows = [re.split(r"\s{2,}", line.strip()) for line in out.rstrip().splitlines()[-5:-2]]
    assert header[0] == "loss" and "n" in header
    assert {row[0] for row in rows} == {"ce", "focal"}
    assert {row[header.index("n")] for row in rows} == {"2"}, (header, rows)  # two seeds, one row
    assert out.rstrip().splitlines()[-1].startswith("TOO FEW RUNS")
    assert "the same in all" not in train("-m", *SMOKE, "teacher=none", "loss=ce")[1], "one run is no comparison"


def test_a_failed_run_does_not_lose_the_others(train):
    code, out, err = train("-m", *SMOKE, "teacher=none", "loss=kl,ce")
    assert code == 1
    assert "kdbench: 1 of 2 runs failed." in err and "loss=kl teacher=none: teacher = none" in err.replace(
        "teacher=none loss=kl", "loss=kl teacher=none"
    )
    assert "Traceback" not in out + err and "Error executing job" not in err
    (kept,) = folders()
    assert "-ce" in kept.name and (kept / "result.json").exists()


def test_parts_of_a_batch_have_two_images(train):
    code, _, err = train(*SMOKE, "teacher=none", "loss=ce", "trainer.accumulate=13")
    assert code == 1 and "trainer.accumulate = 13: must be at most 12, half of schedule.batch_size" in err


def test_what_will_fail_is_said_before_the_first_run(train):
    """A learning rate a layer for a network that is not timm's was refused when its turn came, hours into a sweep."""
    words = ["-m", *SMOKE, "teacher=none", "loss=ce", "student=mlp", "student.hidden=[4]"]
    code, out, err = train(*words, "optimizer.layer_decay=null,0.75")
    assert code == 1 and "1 of 2 runs failed" in err
    said = out.index("1 of 2 runs will fail, and the others are run")
    assert out.index("optimizer.layer_decay = 0.75: must be null", said) < out.index("loss ce: CE(y, s)")


def test_a_sweepers_figure_is_returned(train, monkeypatch):
    values = []
    real = command.train
    monkeypatch.setattr(command, "train", lambda cfg: values.append(real(cfg)) or values[-1])
    assert train(*SMOKE, "teacher=none", "loss=ce")[0] == 0
    assert len(values) == 1 and 0 <= values[0] <= 1


def test_a_sweep_over_teachers_may_set_their_keys(composed):
    """-m teacher=none,resnet14 teacher.seed=0,1: without a teacher its keys do not count, so it is one run."""
    words = [(f"teacher={teacher}", f"teacher.seed={seed}") for teacher in ("none", "resnet14") for seed in (0, 1)]
    points = [composed(*pair) for pair in words]
    alone, again, *taught = [run_name(cfg) for cfg in points]
    assert alone == again and "seed" not in alone and len({alone, *taught}) == 3
    assert run_name(composed("teacher=none", "teacher.schedule.epochs=7", "teacher.allow_chance=true")) == alone
    assert "shared" not in points[0].teacher and "seed" in points[0].teacher


def test_names_follow_from_the_configuration_alone(composed):
    plain = run_name(composed())
    assert re.fullmatch(r"digits/resnet20-resnet8-kl-[0-9a-f]{8}", plain)
    assert run_name(composed("loss.tau=4", "seed=0", "schedule=cosine")) == plain  # the defaults, typed
    assert run_name(composed("force=true", "trainer.progress=none", "trainer.device=cpu", "paths.data=/x")) == plain
    assert run_name(composed("seed=1", "loss.tau=2")) == run_name(composed("loss.tau=2.0", "seed=1", "seeds.init=1"))
    assert ",loss.tau=2,seed=1-" in run_name(composed("seed=1", "loss.tau=2"))
    assert ",schedule=step-" in run_name(composed("schedule=step"))


def test_names_differ_with_every_setting_that_counts(composed):
    lines = [
        ["loss.tau=2"], ["seed=1"], ["seeds.data=1"], ["teacher.seed=1"], ["schedule@teacher.schedule=step"],
        ["teacher.depth=14"], ["dataset/augment=none"], ["trainer.clip=1"],
    ]  # fmt: skip
    assert len({run_name(composed(*line)) for line in lines}) == len(lines)


def test_a_name_is_one_short_folder_name_whatever_is_typed(composed):
    name = run_name(
        composed("schedule=step", "schedule.milestones=[1,2,3]", "name='a/b c'", "teacher.checkpoint=/x/y.pt")
    )
    assert re.fullmatch(r"digits/a\.bc-[\w.=,+-]+-[0-9a-f]{8}", name)
    many = [f"{key}={value}" for key, value in (("schedule.lr", 0.123456789), ("optimizer.momentum", 0.987654321))]
    assert len(run_name(composed(*many, "loss.label_smoothing=0.0123456789", "seed=123456789"))) < 140


def test_a_configuration_that_cannot_be_resolved_still_gets_a_name(composed):
    assert run_name(composed("loss.tau=${nope}")).startswith("refused/")


def test_the_hash_ignores_where_data_lies_and_how_numbers_are_written(composed):
    digest = configure.config_hash(composed())
    assert re.fullmatch("[0-9a-f]{64}", digest)
    assert configure.config_hash(composed("paths.data=/elsewhere", "loss.tau=4.0")) == digest
    assert configure.config_hash(composed("loss.tau=5")) != digest


def test_a_file_counts_by_its_content(composed, tmp_path):
    def hash_of(path):
        return configure.config_hash(composed(f"teacher.checkpoint={path}"))

    first, second = tmp_path / "a.pt", tmp_path / "b.pt"
    nothing = hash_of(first), hash_of(second)
    first.write_bytes(b"weights")
    second.write_bytes(b"weights")
    assert nothing[0] != nothing[1] and hash_of(first) == hash_of(second) not in nothing
    second.write_bytes(b"others")
    assert hash_of(second) != hash_of(first)


def test_flat(composed):
    found = configure.flat(OmegaConf.create({"a": {"b": 1, "c": [1, 2]}, "d": "${a.b}", "e": {}, "f": [{"g": 1}, 2]}))
    assert found == {"a.b": 1, "a.c": "[1,2]", "d": 1, "e": "{}", "f.0.g": 1, "f.1": 2}


def test_every_student_is_a_teacher(composed):
    stored = ConfigStore.instance().repo["teacher"]
    assert {f"{name}.yaml" for name in options("student", [Path(CONFIG_DIR)])} <= stored.keys()
    cfg = composed("teacher=wrn_16_2", "student=wrn_16_2", "schedule=step")
    network, teacher = OmegaConf.to_container(cfg.student), OmegaConf.to_container(cfg.teacher, resolve=True)
    assert {key: teacher[key] for key in network} == network
    assert teacher["checkpoint"] is None and teacher["schedule"]["gamma"] == 0.1, "own keys, and the student's schedule"


def test_a_teachers_own_values_and_schedule(composed):
    cfg = composed(
        "teacher=timm", "teacher.name=resnet18", "schedule@teacher.schedule=step", "teacher.schedule.epochs=7"
    )
    assert (cfg.teacher.name, cfg.teacher.schedule.epochs, cfg.teacher.schedule.shape) == ("resnet18", 7, "step")
    assert cfg.schedule.epochs != 7 and cfg.teacher.optimizer.lr == cfg.teacher.schedule.lr


def test_a_users_own_loss_and_network(train, tmp_path):
    for group, text in {
        "student": "# Mine.\n_target_: mine_parts.Small\nwidth: 4\n",
        "loss": "# Mine.\n_target_: mine_parts.Half\nweights: {task: 0.5}\n",
    }.items():
        (tmp_path / group).mkdir()
        (tmp_path / group / "mine.yaml").write_text(text)
    Path("mine_parts.py").write_text(
        "from torch import nn\n"
        "from kdbench.types import Outputs\n"
        "from kdbench.losses.ce import CE as Half\n"
        "class Small(nn.Module):\n"
        "    def __init__(self, num_classes: int, in_channels: int, image_size: int, width: int = 2):\n"
        "        super().__init__()\n"
        "        self.conv = nn.Conv2d(in_channels, width, 3)\n"
        "        self.fc = nn.Linear(width, num_classes)\n"
        "    def forward(self, image):\n"
        "        pooled = self.conv(image).mean((2, 3))\n"
        "        return Outputs(self.fc(pooled), {'pooled': pooled})\n"
    )
    mine = ["--config-dir", str(tmp_path), *SMOKE, "student=mine", "loss=mine", "teacher=mine", "teacher.width=8"]
    code, out, err = train(*mine)
    assert code == 0 and err == ""
    assert "0.5 CE(y, s)" in out and folders()[0].name.startswith("mine-mine-mine")
