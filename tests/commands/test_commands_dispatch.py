"""The dispatcher, `list`, help, completion, and what a command costs before it starts."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kdbench import __version__, cli
from kdbench.configure.options import groups, headline, options
from kdbench.paths import CONFIG_DIR
from tests.support.shell import processor_seconds

GROUPS = groups([Path(CONFIG_DIR)])


@pytest.fixture
def kdbench(monkeypatch, capsys):
    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["kdbench", *words])
        code = cli.main()
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_help_names_every_command_with_its_purpose(kdbench):
    code, out, _ = kdbench("--help")
    assert code == 0
    for name, module in cli.commands().items():
        assert any(line.split() == [name, *cli.purpose(module).split()] for line in out.splitlines())
    assert kdbench()[0] == 2  # no command: the same help, but a failure


@pytest.mark.parametrize("module", cli.commands().values(), ids=list(cli.commands()))
def test_a_command_has_a_purpose_and_a_main(module):
    assert cli.purpose(module).endswith(".")
    assert "main" in {node.name for node in ast.parse(module.read_text()).body if isinstance(node, ast.FunctionDef)}


def test_version(kdbench):
    assert kdbench("--version") == (0, f"kdbench {__version__}\n", "")


@pytest.mark.parametrize("words", [["--help"], ["list", "loss"], ["train", "--cfg", "job"]], ids=" ".join)
def test_starts_without_torch(words):
    code = (
        f"import sys; sys.argv = ['kdbench', *{words!r}]\n"
        "from kdbench import cli; assert cli.main() == 0; assert not {'torch', 'timm', 'scipy'} & set(sys.modules)"
    )
    start = processor_seconds()
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert processor_seconds() - start < 4  # 0.1 to 0.5 s


def test_python_m_kdbench():
    done = subprocess.run([sys.executable, "-m", "kdbench", "--version"], check=True, capture_output=True, text=True)
    assert done.stdout == f"kdbench {__version__}\n"


def test_argparse_of_python_3_14_is_kept_from_hydras_lazy_help(monkeypatch, kdbench):
    import argparse

    def strict(_parser: argparse.ArgumentParser, action: argparse.Action) -> None:
        assert action.help is None or isinstance(action.help, str), "argparse: badly formed help string"

    monkeypatch.setattr(argparse.ArgumentParser, "_check_help", strict, raising=False)
    add = argparse.ArgumentParser._add_action

    def add_checked(parser: argparse.ArgumentParser, action: argparse.Action) -> argparse.Action:
        parser._check_help(action)
        return add(parser, action)

    monkeypatch.setattr(argparse.ArgumentParser, "_add_action", add_checked)
    assert kdbench("train", "--cfg", "job", "-p", "loss")[0] == 0


@pytest.mark.parametrize("group", GROUPS)
def test_list_has_a_line_on_every_option(kdbench, group):
    code, out, _ = kdbench("list", group)
    lines = dict(line.split(maxsplit=1) for line in out.split("\n\n")[0].splitlines())
    assert code == 0
    for name, file in options(group, [Path(CONFIG_DIR)]).items():
        assert lines[name] == headline(file).strip(), f"{file} must begin with a comment that says what it is"


def test_list_without_a_group_names_all(kdbench):
    _, out, _ = kdbench("list")
    assert [line.split()[0] for line in out.split("\n\n")[0].splitlines()] == GROUPS
    assert not {"shared", "hydra"} & set(out.split("\n\n")[0].replace(",", " ").split())


def test_list_pattern_and_a_users_folder(kdbench, tmp_path):
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "mynet.yaml").write_text("# mynet: My own network. By J. Doe.\n_target_: mine.Net\n")
    assert kdbench("list", "student", "myn*", "--config-dir", str(tmp_path))[1].startswith("mynet  My own network\n")
    assert kdbench("list", "teacher", "mynet", "--config-dir", str(tmp_path))[1].startswith("mynet  My own network\n")
    assert [line.split()[0] for line in kdbench("list", "loss", "dkd")[1].splitlines()][:1] == ["dkd"]


def test_train_help_shows_groups_examples_and_the_configuration(kdbench):
    code, out, _ = kdbench("train", "--help")
    assert code == 0 and out.startswith("kdbench train [-m]")
    assert "loss: " in out and "and every network of student" in out
    assert "Examples:" in out and "evaluate_every: 1" in out


def complete(kdbench, monkeypatch, line: str) -> set[str]:
    monkeypatch.setenv("COMP_LINE", line)
    return set(kdbench("-sc", "query=bash")[1].split())


def test_tab_completion(kdbench, monkeypatch):
    assert complete(kdbench, monkeypatch, "kdbench tr") == set(cli.commands())
    assert {"loss=dkd", "loss=dkpp"} <= complete(kdbench, monkeypatch, "kdbench train loss=dk")
    assert "teacher=resnet20" in complete(kdbench, monkeypatch, "kdbench train teacher=resnet")
    assert complete(kdbench, monkeypatch, "kdbench compare out") == set()


def test_info_and_hydras_own_help(kdbench):
    assert CONFIG_DIR in kdbench("train", "--info", "searchpath")[1]
    assert "hydra/launcher: " in kdbench("train", "--hydra-help")[1]


@pytest.mark.parametrize("ask", [lambda: torch.empty(10**15), lambda: bytearray(2**60)], ids=["torch", "python"])
def test_too_little_memory_is_no_fault_of_the_program(kdbench, monkeypatch, ask):
    monkeypatch.setattr("kdbench.commands.list.main", ask)
    code, _, err = kdbench("list")
    assert code == 1 and err.startswith("kdbench: out of memory") and "schedule.batch_size" in err
    assert "unexpected" not in err


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("predict", "nowhere --top 2 pictures"),
        ("compare", "nowhere --csv nowhere"),
        ("status", "nowhere --json nowhere"),
        ("list", f"loss --config-dir {CONFIG_DIR} kl"),
        ("explain", f"loss --config-dir {CONFIG_DIR} trainer.clip"),
        ("evaluate", "nowhere --split test dataset.root=elsewhere"),
    ],
)
def test_flags_may_stand_between_what_they_do_not_belong_to(kdbench, command, words):
    code, out, err = kdbench(command, *words.split())
    assert "unrecognized" not in err  # argparse's own word, as it takes all of a row of words or none
    assert "nowhere" in err if "nowhere" in words else code == 0 and out
