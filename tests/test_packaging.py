"""What is installed runs: from a wheel and as an editable install, in any folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    repository = Path(__file__).parent.parent
    folder = tmp_path_factory.mktemp("wheel")
    return Path(next(WheelBuilder(str(repository)).build(directory=str(folder), versions=["standard"])))


def run(path: Path, *words: str) -> str:
    """`kdbench words...` from a folder that a wheel was unpacked into."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("KDBENCH")}
    done = subprocess.run(
        [sys.executable, "-m", "kdbench", *words],
        env=environment | {"PYTHONPATH": str(path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_runs_in_any_folder(wheel, tmp_path, monkeypatch):
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert "train" in run(site, "--help")
    assert "file://" + str(site / "kdbench" / "configs") in run(site, "train", "--info", "searchpath")
    assert "_target_: kdbench.losses.dkd.DKD" in run(site, "train", "loss=dkd", "--cfg", "job", "-p", "loss")
    assert "dkd" in run(site, "list", "loss", "dkd")
    assert list(Path.cwd().iterdir()) == []


def test_the_wheel_holds_all_configs_and_plugins_and_nothing_else(wheel, repository):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    configs = {
        f"kdbench/configs/{file.relative_to(repository / 'configs').as_posix()}"
        for file in (repository / "configs").rglob("*.yaml")
        if "local" not in file.relative_to(repository / "configs").parts
    }
    plugins = {f"hydra_plugins/{file.name}" for file in (repository / "kdbench/_hydra/hydra_plugins").glob("*.py")}
    assert configs | plugins <= names
    strangers = {name for name in names - plugins if not name.startswith("kdbench/")}
    assert not strangers and not any("__pycache__" in name for name in names)
    assert not any(name.startswith("kdbench/_hydra") for name in names), "a second copy would be registered twice"


def test_the_wheel_brings_its_texts_and_they_are_small(wheel, repository):
    with zipfile.ZipFile(wheel) as archive:
        held = {info.filename: info.compress_size for info in archive.infolist() if "/embedded/" in info.filename}
    files = (repository / "kdbench/data/embedded").iterdir()
    assert held.keys() == {f"kdbench/data/embedded/{path.name}" for path in files} and held
    assert sum(held.values()) < 600_000


def test_the_metadata_names_what_is_needed(wheel):
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith("METADATA"))
        fields = Parser().parsestr(archive.read(name).decode())
        entry = next(name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert "kdbench = kdbench.__main__:run" in archive.read(entry).decode()
    needed = {re.split("[<>=!~ ]", word)[0] for word in fields.get_all("Requires-Dist") if "extra ==" not in word}
    assert {"torch", "torchvision", "timm", "hydra-core", "tensorboard"} <= needed
    assert fields["Requires-Python"] == ">=3.10"


def test_an_editable_install_sees_the_checkout_and_the_plugins(repository, tmp_path):
    editable = next(WheelBuilder(str(repository)).build(directory=str(tmp_path), versions=["editable"]))
    with zipfile.ZipFile(editable) as archive:
        content = {name: archive.read(name).decode() for name in archive.namelist() if name.endswith(".pth")}
        assert not [name for name in archive.namelist() if name.endswith(".yaml")], "copies would go stale"
    (lines,) = (text.split() for text in content.values())
    assert [Path(line) for line in lines] == [repository, repository / "kdbench" / "_hydra"]
