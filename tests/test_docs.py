"""What the pages in docs/ show works as it is written there."""

from __future__ import annotations

import ast
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.hydra_config import HydraConfig

import kdbench as kdbench_package
from kdbench.configure import register
from kdbench.configure.check import check
from kdbench.configure.comments import explain
from kdbench.configure.options import groups, options
from kdbench.errors import UserError
from kdbench.paths import CONFIG_DIR
from tests.support.shell import kdbench

DOCS = Path(__file__).parent.parent / "docs"


def files_of(page: str) -> dict[str, str]:
    """The files that a page tells to write: a name in backquotes on a line of its own, then a block."""
    return dict(re.findall(r"^`([\w./]+)`\n\n```\w+\n(.*?)```", page, flags=re.DOTALL | re.MULTILINE))


def lines_of(page: str) -> list[str]:
    """The kdbench commands of a page's shell blocks."""
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL))
    return [line.split("  #")[0] for line in blocks.splitlines() if line.startswith("kdbench ")]


def typed_on(page: Path) -> list[str]:
    """The lines of a page, or of a configuration file's header, that name keys of a training, as they are typed: what
    the page leaves out (...) and stand-ins (<a run>) not."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".yaml":
        header = "".join(line[1:] for line in text.splitlines(keepends=True) if line.startswith("#"))
        ends = r" -m\b|;|,? or | {3,}| \(|\n"
        found = re.findall(rf"(?:^|[ ,])(kdbench train [^;]*?)(?={ends})", header, flags=re.MULTILINE)
    else:
        blocks = re.findall(r"```(\w*)\n(.*?)```", text.replace("\\\n", " "), flags=re.DOTALL)
        shells = [block for language, block in blocks if language in ("", "bash")]
        found = [re.split(r"\s#", line)[0] for block in shells for line in block.splitlines()]
        found += re.findall(r"`(kdbench train [^`]*)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    found = [re.sub(r"^torchrun .*? -m kdbench", "kdbench", line.replace(" ...", "").strip()) for line in found]
    keyed = re.compile(r"kdbench (train|bench|table build|search-epsilon) (?!.*(<|--from|RUN loss)).*=")
    return list(dict.fromkeys(line for line in found if keyed.match(line)))


def lines() -> dict[str, str]:
    """What all pages and headers tell to type, by page; of experiments of one paper that differ in nothing else, one.

    own.md's lines are run by a test of their own, as are those of a loss of one's own; experiments without another word
    are seen by the experiments' tests.
    """
    found: dict[str, tuple[str, str]] = {}
    for page in [DOCS.parent / "README.md", *sorted(DOCS.glob("*.md")), *sorted(Path(CONFIG_DIR).rglob("*.yaml"))]:
        for line in typed_on(page) if page.name != "own.md" else ():
            alone = re.fullmatch(r"kdbench train experiment=\w+( (teacher\.)?seed=\S+)*", line)
            if not alone and "entropy_kd" not in line:
                found.setdefault(re.sub(r"experiment=([a-z]+\d+)\w*", r"\1", line), (page.name, line))
    return {f"{page}: {line.removeprefix('kdbench ')}": line for page, line in found.values()}


def point(word: str) -> str:
    """A word of a sweep as its first point has it."""
    key, equals, value = word.partition("=")
    if not equals or (re.fullmatch(r"\[.*\]|{.*}|'.*'", value) and not re.search(r"\],\[|},{", value)):
        return word
    value = re.sub(r"^interval\(([^,]*),.*", r"\1", value)
    return key + equals + re.split(r",(?![^\[{]*[\]}])", value)[0]


@pytest.mark.parametrize("line", lines().values(), ids=lines().keys())
def test_every_command_of_a_page_composes(line, monkeypatch):
    words = [word for word in shlex.split(line) if "=" in word or word == "--config-dir" or word == "my"]
    if "my" in words:  # --config-dir my student=mine: the user's own file
        Path("my/student").mkdir(parents=True)
        text = "_target_: kdbench.models.resnet.ResNet\ndepth: 8\nwidths: [16, 16, 32, 64]\n"
        Path("my/student/mine.yaml").write_text(text)
        assert kdbench("train", *words, "--cfg", "job") == 0
        register()  # without that folder, for the tests after this one
        return
    # Plugins of Hydra's that may not be here: what their launchers take is theirs.
    words = [word for word in words if not re.match(r"\+?hydra[./]", word)]
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)  # of a command that ran in this process before
    check(kdbench_package.compose(list(map(point, words))))


def test_the_pages_lines_are_found():
    """As many as there are: what no test sees rots."""
    assert len(lines()) > 80
    assert point("loss=kl,dkd") == "loss=kl" and point("loss.layers=[a,b]") == "loss.layers=[a,b]"
    assert point("student.hidden=[30,30],[300,300]") == "student.hidden=[30,30]"
    assert point("loss.weights={task:0,distill:1},{task:1}") == "loss.weights={task:0,distill:1}"


def test_parts_of_ones_own_work_as_their_page_says(monkeypatch):
    page = (DOCS / "own.md").read_text(encoding="utf-8")
    files = files_of(page)
    assert len(files) == 8
    for name, text in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(str(Path.cwd()))
    for name in ("mynet", "myloss", "mydata", "myprocedure"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    lines = lines_of(page)
    assert len(lines) == 6
    for line in lines:
        assert kdbench(*shlex.split(line)[1:], "trainer.progress=none") == 0, line
    results = sorted(str(path.parent.name) for path in Path("outputs/runs").rglob("result.json"))
    assert any("stripes" in name or "torch_dataset" in name for name in map(str, Path("outputs/runs").iterdir()))
    assert len([name for name in results if not name[0].isdigit()]) == 6


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_links_of_a_page_lead_somewhere(page):
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / link).exists(), link


def test_the_notebook_runs(repository, monkeypatch):
    pytest.importorskip("pandas")
    cells = json.loads((repository / "examples" / "notebook.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert len(code) == 5 and not any(cell.get("outputs") for cell in cells)
    monkeypatch.syspath_prepend(str(repository))
    names: dict[str, object] = {}
    shown = []
    for source in code:  # as a kernel would: statements, then the value of the last line
        *lines, last = source.strip().splitlines()
        exec("\n".join(lines).replace("=8", "=2"), names)
        shown.append(eval(last, names) if not re.match(r"\w+ = ", last) else exec(last.replace("=8", "=2"), names))
    assert shown[0] >= 0.1 and [row[:2] for row in shown[1]] == [("kl", 0), ("kl", 1), ("dkd", 0), ("dkd", 1)]
    assert shown[3][0] in "0123456789" and shown[4][0] == (1, 10)


def test_every_option_and_key_that_a_page_names_exists(repository):
    places = [Path(CONFIG_DIR)]
    known = {group: set(options(group, places)) for group in groups(places)}
    wrong = []
    for page in [repository / "README.md", *sorted((repository / "docs").glob("*.md"))]:
        own = {
            Path(name).stem for name in files_of(page.read_text(encoding="utf-8"))
        }  # that the page itself tells to write
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for word in re.findall(r"`([a-z][\w./@]*(?:=[^`\s]*)?)`", text) + re.findall(
            r"`(?:[^`]*\s)?([a-z][\w./@]*=[\w.]+)[^`]*`", text
        ):
            key, _, value = word.partition("=")
            group = key.partition("@")[0]
            chosen = group in known and re.fullmatch(r"[a-z_0-9]+", value)
            if chosen and value not in known[group] | own | {"mine"}:
                wrong.append(f"{page.name}: {word}")
            root = key.partition(".")[0]
            if (
                "." in key
                and "/" not in key
                and "@" not in key
                and root in known
                and not key.endswith((".md", ".py", ".json", ".safetensors"))
            ):
                try:
                    explain(key, {}, places)
                except UserError as error:
                    wrong.append(f"{page.name}: {word}: {error}")
    assert not wrong, "\n".join(wrong)


def dotted(text: str) -> set[str]:
    """Names of kdbench's own that a text has: kdbench.x.y, and paths of modules (engine/device.py)."""
    names = set(re.findall(r"\bkdbench(?:\.[A-Za-z_]\w*)+", text))
    paths = re.findall(r"\b(?:kdbench/)?((?:[a-z_]+/)+[a-z_]+\.py)\b", text)
    folders = {path.name for path in Path(kdbench_package.__path__[0]).iterdir() if path.is_dir()}
    return names | {f"kdbench/{path}" for path in paths if path.partition("/")[0] in folders}


def there(name: str) -> bool:
    """Whether a module, or something that a module holds, has this name."""
    root = Path(kdbench_package.__path__[0])
    if "/" in name:
        return (root.parent / name).exists()
    _, *parts = name.split(".")
    for count in range(len(parts), -1, -1):
        place = root.joinpath(*parts[:count])
        file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
        if file.exists():
            source = file.read_text(encoding="utf-8")
            return all(re.search(rf"\b{part}\b", source) for part in parts[count:])
    return False


def test_every_module_and_name_of_kdbench_that_a_text_names_exists(repository):
    pages = [repository / "README.md", repository / "CONTRIBUTING.md", *(repository / "docs").glob("*.md")]
    pages += [*(repository / "configs").rglob("*.yaml"), *(repository / "examples").rglob("*.*")]
    texts = [(page.name, page.read_text("utf-8")) for page in pages]
    for file in (*(repository / "kdbench").rglob("*.py"), *(repository / "scripts").rglob("*.py")):
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        said = [ast.get_docstring(node) for node in ast.walk(ast.parse(file.read_text("utf-8"))) if type(node) in kinds]
        texts.append((file.name, "\n".join(filter(None, said))))
    own = {"kdbench.failure", "kdbench/losses/entropy_kd.py", "kdbench/engine/cfg.py"}  # a log, to write, a peer's
    wrong = [f"{place}: {name}" for place, text in texts for name in dotted(text) - own if not there(name)]
    assert not wrong, "\n".join(wrong)
    assert dotted("`kdbench.engine.trainer.run_steps`, engine/device.py, my/own.py") == {
        "kdbench.engine.trainer.run_steps", "kdbench/engine/device.py",
    }  # fmt: skip
    assert there("kdbench.engine.loop.train_epoch") and not there("kdbench.engine.trainer.run_steps")
    assert there("kdbench/engine/device.py") and not there("kdbench/engine/lanes.py")


def test_the_reference_has_every_option_with_its_keys(repository):
    docs = runpy.run_path(str(repository / "scripts" / "docs.py"))
    loss = docs["group_page"]("loss")
    for name in options("loss", [Path(CONFIG_DIR)]):
        assert f"\n## loss={name}\n" in loss
    assert loss.count("**Formula:**") == len(options("loss", [Path(CONFIG_DIR)]))
    assert "| `trainer.clip` | `null` | largest gradient norm" in docs["group_page"]("trainer")
    commands, python = docs["commands_page"](), docs["python_page"]()
    for command in (repository / "kdbench" / "commands").glob("[a-z]*.py"):
        assert f"## kdbench {command.stem.replace('_', '-')}\n" in commands
    assert "### `kdbench.train(" in python and "### `Student.predict(" in python
    assert "largest difference" not in python and "usage: kdbench predict" in commands


def test_the_site_is_built(repository, tmp_path):
    pytest.importorskip("material")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "-q",
        "--strict",
        "-d",
        str(tmp_path / "site"),
        "-f",
        str(repository / "mkdocs.yml"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(repository)})
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "reference" / "loss" / "index.html").exists()


def test_own_photos_become_a_table_by_the_pages_lines(photos, monkeypatch):
    os.symlink(photos, "photos")
    os.symlink(photos / "red", "new_photos")
    reviews = [f"{'good' if row % 2 else 'dull'} film,{row % 2}" for row in range(40)]
    Path("reviews.csv").write_text("\n".join(["text,label", *reviews]))
    Path("new.csv").write_text("text\na fine film\n")
    page = lines_of((DOCS / "after.md").read_text(encoding="utf-8"))
    lines = [line for line in page if "--int8" not in line and " LM " not in line]  # in tests/deploy
    texts = [line for line in lines if "reviews" in line or "new.csv" in line or "--text" in line]
    lines = [*(line for line in lines if line not in texts), *(line.replace("RUN", "TEXTS") for line in texts)]
    assert len(lines) == 8 and lines[0].startswith("kdbench train dataset=imagefolder")
    quick = ["schedule.epochs=1", "teacher.schedule.epochs=1", "teacher.allow_chance=true", "trainer.progress=none"]
    for line in lines:
        words = shlex.split(line)[1:]
        if "export" in words:
            pytest.importorskip("onnxscript")
        assert kdbench(*words, *(quick if words[0] == "train" else [])) == 0, line
        if "--csv" in words:
            answers = Path("answers.csv").read_text(encoding="utf-8").splitlines()
            assert len(answers) == (2 if "new.csv" in words else 21)
