"""What is composed: experiments give way to what is typed, text stays text, and plain Hydra composes the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

import kdbench
from kdbench.configure import naming
from kdbench.configure.check import check
from kdbench.configure.compose import compose, register
from kdbench.configure.launch import launch
from kdbench.configure.loader import Loader
from kdbench.configure.text import in_quotes, quoted, readable
from kdbench.errors import UserError
from tests.support.shell import kdbench as kdbench_command

SMALL = "experiment=kim2021_kl_small"  # chooses loss=kl with values of its own, teacher=resnet20, dataset=digits


def node(name: str, *words: str):
    return OmegaConf.to_container(kdbench.compose(words)[name], resolve=True)


def test_an_experiments_values_count_for_the_option_it_chose():
    assert node("loss", SMALL)["tau"] == 20 and node("loss", SMALL, "loss=kl")["weights"] == {"task": 0, "distill": 1}
    assert node("loss", SMALL, "loss=kl", "loss.tau=2")["tau"] == 2, "what is typed counts in any case"


def test_a_debug_file_gives_way_to_another_dataset_alone():
    """debug=smoke dataset=digits was refused for dataset.n, which nobody had typed."""
    assert node("dataset", "debug=smoke", "dataset=digits") == node("dataset", "dataset=digits")
    assert node("dataset", "debug=smoke", "dataset=fake")["n"] == node("dataset", "debug=smoke")["n"] == 96
    assert node("teacher", "debug=smoke", "teacher=mlp", "dataset=digits")["schedule"]["epochs"] == 2


def test_debug_leaves_an_experiment_what_it_is_about():
    omitted = node("dataset", "experiment=hinton2015_omit3_small", "debug=smoke")
    assert omitted["name"] == "fake" and omitted["transfer"]["omit"] == [3] and omitted["n"] == 96
    noisy = node("dataset", "experiment=kim2021_noise_small", "debug=smoke")["noise"]
    assert (noisy["kind"], noisy["rate"]) == ("symmetric", 0.4)
    typed = node("dataset", "experiment=kim2021_noise_small", "debug=smoke", "dataset=digits")
    assert typed == node("dataset", "experiment=kim2021_noise_small"), "a dataset that is typed is no stand-in"
    replaced = node("dataset", "experiment=kim2021_noise_small", "debug=smoke", "dataset=mnist")
    assert replaced == node("dataset", "dataset=mnist")


@pytest.mark.parametrize("words", [["experiment=kim2021_pskd_small"], ["procedure=mutual"]])
def test_debug_brings_no_teacher_where_there_is_none(words):
    assert node("teacher", *words, "debug=smoke")["_target_"] is None
    assert node("teacher", *words, "debug=smoke", "teacher=mlp")["hidden"], "what is typed counts in any case"
    assert node("teacher", "debug=smoke")["depth"] == 14
    assert node("teacher", "experiment=zhang2018_mutual_small", "procedure=single", "debug=smoke")["_target_"] is None


def test_a_procedure_takes_of_debug_what_it_has():
    assert node("procedure", "experiment=huang2017_snapshot_small", "debug=smoke")["cycles"] == 2
    assert node("procedure", "debug=smoke") == node("procedure")
    assert node("procedure", "experiment=huang2017_snapshot_small", "debug=smoke", "procedure.cycles=1")["cycles"] == 1


def test_debug_short_keeps_data_and_networks():
    words = ["experiment=kim2016_sequence_kd_small"]
    assert node("dataset", *words, "debug=short") == node("dataset", *words)
    assert node("student", *words, "debug=short") == node("student", *words)
    assert node("schedule", *words, "debug=short")["epochs"] == 2
    assert node("teacher", "experiment=kim2021_undertrained_small", "debug=short")["stop_epoch"] is None


@pytest.mark.parametrize("loss", ["ce", "dkd", "kim_mse"])
def test_another_option_has_its_own_values(loss):
    assert node("loss", SMALL, f"loss={loss}") == node("loss", f"loss={loss}")
    assert node("schedule", SMALL, f"loss={loss}")["epochs"] == 60, "what the experiment says of other groups stays"


def test_groups_inside_and_beside_a_group_are_groups_of_their_own():
    assert node("teacher", SMALL, "teacher=resnet32")["schedule"]["epochs"] == 60
    crd = node("teacher", SMALL, "schedule=crd240")["schedule"]  # follows the choice of schedule
    assert crd == node("teacher", "schedule=crd240")["schedule"] and crd["epochs"] == 240
    assert node("dataset", SMALL, "dataset=fake") == node("dataset", "dataset=fake")


def test_no_teacher_has_a_teachers_keys_in_their_place():
    assert (
        "shared" not in node("teacher", "teacher=none")
        and node("teacher", "teacher=none", "teacher.seed=1")["seed"] == 1
    )


def test_plain_hydra_on_the_module_composes_the_same():
    with initialize_config_module("kdbench.configs", version_base=None):
        cfg = hydra_compose("train", overrides=["teacher=wrn_16_2", SMALL, "loss=ce"])
    assert cfg == kdbench.compose(["teacher=wrn_16_2", SMALL, "loss=ce"]) and cfg.teacher.depth == 16


def test_a_fresh_process_needs_nothing_but_hydra(repository):
    code = (
        "from hydra import initialize_config_module, compose\n"
        "import sys, importlib.resources\n"
        "with initialize_config_module('kdbench.configs', version_base='1.3'):\n"
        "    assert compose('train', overrides=['teacher=resnet20']).teacher.depth == 20\n"
        "assert importlib.resources.files('kdbench.configs').joinpath('train.yaml').is_file()\n"
        "assert not {'torch', 'timm'} & set(sys.modules)\n"
    )
    path = os.pathsep.join([str(repository), str(repository / "kdbench/_hydra")])
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": path})


@pytest.mark.parametrize("name", ["2024_01", "1e3", "007", "0x10", "1_1", "true", "1.50"])
def test_a_text_stays_as_it_was_typed(name):
    assert node("dataset", "dataset=imagefolder", f"dataset.root={name}")["root"] == name
    assert kdbench.compose([f"name={name}"]).name == name


def test_numbers_are_numbers_where_numbers_are_asked_for():
    cfg = kdbench.compose(["optimizer.lr=1e-1", "dataset=fake", "dataset.n=1_000", "loss.tau=4"])
    assert (cfg.optimizer.lr, cfg.dataset.n, cfg.loss.tau) == (0.1, 1000, 4)
    assert node("dataset", "dataset.classes=[1_1,007,3]")["classes"] == ["1_1", "007", 3]


def test_a_text_inside_a_mapping_stays_as_it_was_typed():
    for words in (["dataset.transfer.extra=2024_01"], ["dataset.transfer={extra: 2024_01, seed: 1_0}"]):
        transfer = node("dataset", *words)["transfer"]
        assert transfer["extra"] == "2024_01" and transfer.get("seed", 0) in (0, 10)
    classes = node("dataset", "dataset.transfer={only: [007, 1_1], per_class: 1_0}")["transfer"]
    assert (classes["only"], classes["per_class"]) == (["007", "1_1"], 10)
    assert node("paths", "paths.data=007")["data"] == "007"


@pytest.mark.parametrize(
    "word", ["dataset.mean=[1_0,0.5]", "loss.weights={task: 1_0}", "dataset.root=1_0:30", "tags=[1_0]"]
)
def test_what_is_no_text_or_no_number_is_left_to_hydra(word):
    cfg = kdbench.compose(["dataset=imagefolder"])
    assert in_quotes(word, cfg) == (word if not word.startswith("tags") else "tags=['1_0']")


def test_a_launchers_worker_knows_what_the_loader_that_it_gets_refers_to():
    code = (
        "import kdbench.configure.compose\n"
        "from omegaconf import OmegaConf\n"
        "assert all(map(OmegaConf.has_resolver, ('kd.run', 'kd.point', 'kd.sweep')))\n"
        "cfg = OmegaConf.create({'a': '${kd.sweep:}', 'b': '${kd.sweep:}'})\n"
        "again = OmegaConf.create({'a': '${kd.sweep:}'})\n"
        "assert cfg.a == cfg.b != again.a\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    assert kdbench.compose([readable("paths.outputs=~/out")]).paths.runs == "/home/ann/out/runs"
    assert kdbench.compose(["paths.outputs='~/out'"]).paths.outputs == "/home/ann/out"


@pytest.mark.parametrize(
    "name", ["a,b", "a=b", "[1]", "{x}", "${x}", "two words", "it's", "a(b)", "back\\slash", "ü", "end\\"]
)
def test_a_path_that_is_there_needs_no_quotes(name):
    Path(name).mkdir()
    assert kdbench.compose([readable(f"teacher.run={name}")]).teacher.run == name
    assert kdbench.compose([f"teacher.run={quoted(name)}"]).teacher.run == name


def test_what_is_no_utf8_is_refused_by_name():
    with pytest.raises(UserError, match="is no UTF-8 text"):
        readable("dataset.root=" + os.fsdecode(b"caf\xe9"))


def test_what_the_locale_cannot_write_is_refused_with_what_to_type(monkeypatch):
    """Under LC_ALL=C PYTHONUTF8=0 the bytes of a UTF-8 word come as surrogates; its folder could not be written."""
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")
    with pytest.raises(UserError, match=r"name=ünï: the locale's encoding \(ascii\).*LC_ALL=C.UTF-8"):
        readable("name=" + "ünï".encode().decode("ascii", "surrogateescape"))


def test_the_weight_of_a_part_that_was_added_is_typed_with_a_plus():
    words = ["loss=sum", "+loss@loss.parts.js=js", "+loss.weights.js=2", "loss.weights.crd=0", "hydra.run.dir=run"]
    assert kdbench_command("train", "debug=smoke", "student=mlp", "teacher=mlp", *words) == 0
    assert "2 (" in json.loads(Path("run/result.json").read_text(encoding="utf-8"))["formula"]


@pytest.fixture
def composed(monkeypatch):
    """The words of every composition from here on."""
    found: list[list[str]] = []
    real = ConfigLoaderImpl._load_configuration_impl

    def counted(self, config_name, overrides, *rest, **more):
        found.append(list(overrides))
        return real(self, config_name, overrides, *rest, **more)

    monkeypatch.setattr(ConfigLoaderImpl, "_load_configuration_impl", counted)
    naming._reference.cache_clear()
    return found


def test_a_command_line_is_composed_once_and_so_are_its_choices_alone(composed):
    """Hydra composes it for `hydra.mode` first; a composition takes 0.07 s."""
    launch(lambda cfg: None, words=["loss=kl", "loss.tau=3", "seed=4"])
    assert len(composed) == 2 and composed[0] == ["loss=kl", "loss.tau=3", "seed=4"]
    with pytest.raises(UserError, match="several values"):  # which Hydra's first composition lets pass
        launch(lambda cfg: None, words=["seed=4,5"])


@pytest.mark.parametrize("launcher", ["basic", "cohort"])
def test_each_point_of_a_sweep_is_composed_once(launcher, composed):
    """Hydra composes it to see whether it can be, kdbench to check it, a launcher to run it."""
    seen = []
    words = ["-m", f"hydra/launcher={launcher}", "loss=kl", "loss.tau=3,4", "seed=4"]
    assert launch(lambda cfg: seen.append(cfg.loss.tau), words=words) == 0
    points = [words for words in composed if "hydra.mode=MULTIRUN" in words]
    assert seen == [3, 4] and len(points) == 2 and len(composed) == 4  # the whole sweep's, and the choices alone


@pytest.mark.parametrize("kind", ["hydra", "all", "job"])
def test_a_composed_configuration_is_shown_with_its_values(kind, capsys):
    assert kdbench_command("train", "--cfg", kind, "--resolve") == 0
    shown = OmegaConf.create(capsys.readouterr().out)
    if kind == "job":
        assert shown.seeds.init == 0 and "hydra" not in shown
    else:
        name = shown.hydra.run.dir.removeprefix("outputs/runs/")
        assert name.startswith("digits/resnet20-resnet8-kl-") and shown.hydra.sweep.subdir.endswith(name)


def test_no_question_to_hydra_copies_its_repository(monkeypatch, capsys):
    """Hydra copies it for each of the 120 groups that --help asks for, which takes a second, and to compose."""
    monkeypatch.setattr(ConfigRepository, "__deepcopy__", lambda *_: pytest.fail("a copy"), raising=False)
    assert kdbench_command("train", "--help") == 0
    out = capsys.readouterr().out
    assert "resnet20" in out and "loss=dkd student=resnet8" in out


def test_a_file_is_parsed_once_until_it_changes(tmp_path, monkeypatch):
    file, words = tmp_path / "loss" / "mine.yaml", [f"hydra.searchpath=[file://{tmp_path}]", "loss=mine"]
    file.parent.mkdir()
    file.write_text("_target_: kdbench.losses.kl.KL\nweights: {task: 1.0}\n", encoding="utf-8")
    assert kdbench.compose(words).loss.weights == {"task": 1.0}
    with monkeypatch.context() as patched:
        patched.setattr(FileConfigSource, "load_config", lambda *_, **__: pytest.fail("parsed again"))
        assert kdbench.compose(words).loss.weights == {"task": 1.0}
    file.write_text("_target_: kdbench.losses.kl.KL\nweights: {task: 0.25}\n", encoding="utf-8")
    assert kdbench.compose(words).loss.weights == {"task": 0.25}
    before = file.stat()  # an edit of the same length, within what the file system counts as one moment
    file.write_text("_target_: kdbench.losses.kl.KL\nweights: {task: 0.75}\n", encoding="utf-8")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert kdbench.compose(words).loss.weights == {"task": 0.75}


def test_what_is_merged_is_merged_once_until_a_part_changes(monkeypatch):
    """Files that stay the same are laid over each other once; each configuration is nevertheless one's own."""
    register()
    store = ConfigStore.instance()
    monkeypatch.setitem(store.repo, "loss", {})
    for weight in (1.0, 0.25):
        store.store(group="loss", name="stored", node={"_target_": "kdbench.losses.kl.KL", "weight": weight})
        first = compose(["loss=stored"])
        assert first.loss.weight == weight
        first.loss.weight = 7
        with monkeypatch.context() as patched:
            patched.setattr(Loader, "_load_single_config", lambda *_, **__: pytest.fail("merged again"))
            again = compose(["loss=stored", "seed=4"])
        assert (again.loss.weight, again.seed) == (weight, 4)


def test_options_of_another_library_take_any_of_its_arguments():
    cfg = kdbench.compose(["student=deit_tiny_cifar", "+student.options.depth=4"])
    check(cfg)
    assert cfg.student.options == {"patch_size": 4, "depth": 4}


def test_an_empty_mapping_over_one_with_keys_is_refused():
    with pytest.raises(UserError) as caught:
        kdbench.compose(["loss=sum", "loss.parts={}"])
    assert str(caught.value).startswith("loss.parts = {}: must be a mapping with keys")
    assert "~loss.parts.kl takes one out" in str(caught.value)
    assert list(kdbench.compose(["loss=sum", "~loss.parts.kl"]).loss.parts) == ["crd"]
    assert not kdbench.compose(["student=timm", "student.options={}"]).student.options
