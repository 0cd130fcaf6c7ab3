"""`kdbench clean`: what of finished runs may go, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kdbench.commands.clean import tables
from kdbench.tables.file import LogitTable, Shape
from tests.support.shell import kdbench, train


def files(folder: str = ".") -> set[str]:
    return {str(path) for path in Path(folder).rglob("*") if path.is_file() and path.suffix not in (".lock", ".log")}


def test_what_may_go_goes_and_the_run_stays_what_it_was(capsys):
    run = train("paths.outputs=outputs", "hydra.run.dir=outputs/runs/one", "teacher.table=on")
    machine = json.loads((run / "result.json").read_text())["machine"]
    assert machine["host"] and machine["cores"] >= 1 and machine["peak_memory"] > 1e7
    assert not list(Path("outputs").rglob("checkpoint.pt")), "a finished run and its teacher keep none"
    before = files()
    (run / "checkpoint.pt").write_bytes(b"of an earlier kdbench" * 1000)
    stage = Path("outputs/runs/two/stages/1-taught")  # finished, of a run that is not
    stage.mkdir(parents=True)
    (stage / "result.json").write_bytes((run / "result.json").read_bytes())
    (stage / "checkpoint.pt").write_bytes(b"of its teacher that learns")
    (Path("outputs/runs/two/checkpoint.pt")).write_bytes(b"of a run that is not finished")
    table = next(Path("outputs/teachers").rglob("*.table"))
    orphan = table.with_name("00.table")
    orphan.write_bytes(table.read_bytes().replace(b'"weights": "', b'"weights": "f', 1)[: table.stat().st_size])
    assert kdbench("clean") == 1, "no answer, and no --yes"
    out = capsys.readouterr()
    assert "checkpoint of a finished run" in out.out and "--yes removes them" in out.err
    assert "1 x broken table" in out.out
    assert (run / "checkpoint.pt").exists()
    assert kdbench("clean", "--yes") == 0
    kept = {"outputs/runs/two/checkpoint.pt", f"{stage}/checkpoint.pt", f"{stage}/result.json"}
    assert files() == before | kept
    assert kdbench("clean") == 0 and "nothing to remove" in capsys.readouterr().out
    assert kdbench("clean", "--tables", "--yes") == 0
    assert not list(Path("outputs").rglob("*.table"))
    assert kdbench("evaluate", str(run)) == 0
    assert kdbench("clean", "nowhere") == 1


@pytest.mark.parametrize("name", ["stages/1-generation1/result.json", "run.json", "epsilon.json"])
def test_a_table_stays_whose_teacher_a_stage_an_unfinished_run_or_a_search_names(name, tmp_path):
    """born_again's generations teach and are stages of one run; a run that was killed wants its table again."""
    table = tmp_path / "teachers" / "tables" / "00.table"
    LogitTable(table, {"weights": "ab" * 32}, Shape(2, 1, 3, torch.float32))
    record = tmp_path / "runs" / "one" / name
    record.parent.mkdir(parents=True)
    record.write_text(json.dumps({"student": {"weights": "ab" * 32}}))
    assert list(tables(tmp_path, every=False)) == []
    assert [one.path for one in tables(tmp_path, every=True)] == [table]
    record.unlink()
    (one,) = tables(tmp_path, every=False)
    assert one.path == table and one.why.endswith("no run here names its teacher")
    table.write_bytes(b"no table")
    assert [one.why for one in tables(tmp_path, every=False)] == ["broken table"]
