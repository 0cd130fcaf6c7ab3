"""What the pages in docs/ show works as it is written there."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from tests.support.shell import kdbench

DOCS = Path(__file__).parent.parent / "docs"


def files_of(page: str) -> dict[str, str]:
    """The files that a page tells to write: a name in backquotes on a line of its own, then a block."""
    return dict(re.findall(r"^`([\w./]+)`\n\n```\w+\n(.*?)```", page, flags=re.DOTALL | re.MULTILINE))


def lines_of(page: str) -> list[str]:
    """The kdbench commands of a page's shell blocks."""
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL))
    return [line.split("  #")[0] for line in blocks.splitlines() if line.startswith("kdbench ")]


def test_parts_of_ones_own_work_as_their_page_says(monkeypatch):
    page = (DOCS / "own.md").read_text(encoding="utf-8")
    files = files_of(page)
    assert len(files) == 6
    for name, text in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(str(Path.cwd()))
    for name in ("mynet", "mydata", "myprocedure"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    lines = lines_of(page)
    assert len(lines) == 5
    for line in lines:
        assert kdbench(*shlex.split(line)[1:], "trainer.progress=none") == 0, line
    results = sorted(str(path.parent.name) for path in Path("outputs/runs").rglob("result.json"))
    assert any("stripes" in name or "torch_dataset" in name for name in map(str, Path("outputs/runs").iterdir()))
    assert len([name for name in results if not name[0].isdigit()]) == 5


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
