"""The scripts that write figures: what they can do without a GPU and without an hour."""

from __future__ import annotations

import importlib.util
import json
import sys
import time

import pytest
import torch

from tests.support import losses as losses_parts


@pytest.fixture
def script(repository):
    def load(name: str):
        spec = importlib.util.spec_from_file_location(name, repository / "scripts" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def device(repository, monkeypatch):
    """A module of scripts/device_check."""
    monkeypatch.syspath_prepend(str(repository / "scripts"))
    return lambda name: importlib.import_module(f"device_check.{name}")


def test_the_device_check_finds_nothing_wrong_and_would_find_it(device, tmp_path, monkeypatch, capsys):
    equal, parts = device("equal"), device("check")
    check = parts.Check(tmp_path, quick=True, seconds=0.1)
    check.words = [*parts.SMALL, "trainer.device=cpu"]
    check.judge("table", lambda: equal._table(check))
    check.judge("cohort", lambda: equal._cohort(check))
    check.on_cuda("recorded", lambda: equal._recorded(check, [], 1), "graphs")
    applies = True if torch.cuda.is_available() else None
    assert [verdict.ok for verdict in check.verdicts] == [True, True, applies]
    # A table that gives other logits is found out, and so is a check that breaks.
    monkeypatch.setattr(parts.Workbench, "table", lambda bench: (bench.batches, lambda batch: _other(bench, batch)))
    check.judge("table", lambda: equal._table(check))
    monkeypatch.setattr(parts.Workbench, "table", lambda bench: 1 / 0)
    check.judge("cohort", lambda: equal._cohort(check))
    assert [verdict.ok for verdict in check.verdicts[3:]] == [False, False]
    assert "ZeroDivisionError" in check.verdicts[4].detail and "FAIL" in capsys.readouterr().out


def test_the_device_check_keeps_what_it_found_of_sections_that_end_early(device, tmp_path):
    """Each section is a process: one that is stopped or dies is a verdict, and the others' results stay."""
    supervise, page = device("__main__").supervise, device("page").page
    found = '{"machine": {}, "verdicts": [{"name": "a", "ok": true, "detail": "", "flag": "graphs"}], "figures": {}}'
    text = f"import pathlib, subprocess, sys, time\npathlib.Path(sys.argv[-1]).write_text({found!r})\n"
    (tmp_path / "child.py").write_text("import pathlib, time\ntime.sleep(1.2)\npathlib.Path('late').touch()\n")
    child = f"subprocess.Popen([sys.executable, 'child.py'], cwd={str(tmp_path)!r})\n"
    sections = {}
    half = "pathlib.Path(sys.argv[-1]).write_text('{\"verdicts\": [')\n"  # as it is when it is stopped there
    for name, end, limit in (
        ("run", "", 20),
        ("matrix", "", 20),
        ("losses", "", 20),
        ("equal", "sys.exit(7)\n", 20),
        ("live", child + "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n", 20),
        ("sweep", half + "sys.exit(1)\n", 20),
        ("cohort", child + "time.sleep(60)\n", 0.6),
    ):
        (tmp_path / "section.py").write_text(text + end)
        sections[name] = supervise([sys.executable, str(tmp_path / "section.py")], name, tmp_path, limit)
    oks = {name: [verdict["ok"] for verdict in section["verdicts"]] for name, section in sections.items()}
    assert oks["run"] == [True] and oks["equal"] == [True, False] and oks["cohort"][-1] is False
    assert oks["live"] == [True, False] and oks["sweep"] == [False]
    written = page(sections)
    assert "ended with 7" in written and "stopped after" in written and "ended with -11" in written
    assert "`recorded steps = False (did not end: equal)`" in written
    del sections["equal"]
    assert "`recorded steps = False (not run: equal)`" in page(sections)
    sections["equal"] = sections["run"] | {"verdicts": [*sections["run"]["verdicts"]]}
    written = page(sections)
    assert "`recorded steps = True (" in written
    assert "`PROVEN_COMPILE = False (not run: compile; not tried on a GPU)`" in written
    assert "`AUTO_PRECISION = bf16 (not tried on a GPU)`" in written
    sections["run"]["verdicts"].append({"name": "b", "ok": False, "detail": "", "flag": "graphs"})
    times = {"bf16, channels last, graph": 0.9, "tf32, contiguous, graph": 0.7, "fp16, graph": 0.5, "bf16, eager": 0.1}
    times["bf16, graph, cudnn.benchmark"] = 0.6  # no run of kdbench searches for kernels
    ways = {name: {"median": 1e-3 * ms, "low": 0.0, "high": 0.0, "n": 3} for name, ms in times.items()}
    sections["matrix"] = {"verdicts": [], "figures": {"ways": ways}, "seconds": 1.0}
    assert "`recorded steps = False (failed: b)`" in page(sections)
    assert "`AUTO_PRECISION = tf32 (tf32, contiguous, graph: 0.700 ms)`" in page(sections)
    time.sleep(0.8)
    assert not (tmp_path / "late").exists()  # what a stopped section started is stopped too


def test_the_device_check_goes_on_after_a_check_that_runs_out_of_memory(device, tmp_path):
    check = device("check").Check(tmp_path, quick=True, seconds=0.1)
    kept: list[int] = []
    check.kept = lambda check: kept.append(len(check.verdicts))

    def short():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    check.judge("large", short)
    check.judge("small", lambda: (True, "runs"))
    assert [verdict.ok for verdict in check.verdicts] == [False, True] and kept == [1, 2]
    assert check.verdicts[0].detail.startswith("OutOfMemoryError: CUDA out of memory")


def test_the_device_check_reads_what_a_killed_one_left(device, tmp_path):
    read = device("__main__").read
    (tmp_path / "half.json").write_text('{"sections": {"run"')
    assert read(tmp_path / "half.json") == {} == read(tmp_path / "none.json")
    device("page").replace(tmp_path / "whole.json", '{"sections": {}}')
    assert read(tmp_path / "whole.json") == {"sections": {}} and [*tmp_path.glob("*.new")] == []


def test_the_device_check_says_what_it_lacks_and_puts_the_goals_first(device, tmp_path, monkeypatch, capsys):
    main = device("__main__")
    found, path = main.found, [*sys.path]
    monkeypatch.setattr(sys, "path", path)
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setattr(sys, "argv", ["device_check", "--only", "equal,run", "--out", str(tmp_path)])
    monkeypatch.setattr(main, "found", lambda name: name != "hydra" and found(name))
    assert main.main() == 2 and "hydra; copies in a folder of PYTHONPATH" in capsys.readouterr().err
    monkeypatch.setattr(main, "found", found)
    section = {"verdicts": [], "figures": {}, "seconds": 1.0}
    monkeypatch.setattr(main, "supervise", lambda *_: section)
    assert main.main() == 0
    assert [*json.loads((tmp_path / "device_check.json").read_text())["sections"]] == ["run", "equal"]
    text = (tmp_path / "device_check.md").read_text()
    assert text.index("## run") < text.index("## equal")


def test_every_section_of_the_device_check_has_a_limit_and_is_explained(device):
    main = device("__main__")
    assert list(main.LIMITS) == list(device("sections").SECTIONS)
    assert all(f"\n  {name} " in main.__doc__ for name in main.LIMITS)


def _other(bench, batch):
    answer = bench.teacher.teacher(batch)
    return answer._replace(logits=answer.logits + torch.arange(answer.logits.shape[1]))


def test_a_distance_between_weights(device):
    distance = device("check").distance
    a = {"w": torch.tensor([3.0, 4.0])}
    assert distance(a, a) == 0.0
    assert distance({"w": torch.tensor([3.0, 9.0])}, a) == 1.0
    assert distance({"w": torch.tensor([3.0, float("nan")])}, a) == float("inf")


def test_the_table_replaces_what_stands_between_its_marks(script, tmp_path, monkeypatch):
    table = script("bench_table")
    step = {"median": 0.06, "low": 0.05, "high": 0.07, "n": 9, "students": 1, "images_per_second": 1.0}
    steps = dict.fromkeys((table.TABLE, table.LIVE, table.PLAIN, table.PEER), step)
    steps |= {f"8 students at once, {name}": step | {"students": 8} for name in (table.TABLE, table.LIVE)}
    ratio = {"median": 5.0, "low": 4.5, "high": 5.5, "n": 9, "times": 1}
    result = {
        "configuration": {"teacher": "resnet56", "student": "resnet20"}, "steps": steps,
        "ratios": {f"{table.PLAIN} / {name}": ratio for name in steps},
        "roofline": {"bandwidth": 1e9, "rate": 1e9, "dtype": "fp32"},
        "machine": {"name": "chip", "threads": 2, "cores": 2, "precision": "fp32", "torch": "2", "python": "3"},
    }  # fmt: skip
    monkeypatch.setattr(table, "DOCS", tmp_path)
    monkeypatch.setattr(table, "measure", lambda *_: result)
    monkeypatch.setattr(sys, "argv", ["bench_table.py"])
    (tmp_path / "benchmarks.md").write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    table.main()
    table.main()
    text = (tmp_path / "benchmarks.md").read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert text.count("### chip, 2 threads, fp32") == 1
    assert text.count("| resnet56 -> resnet20 | 60.0 | 60.0 | 60.0, **5.0x** (4.5 to 5.5) |") == 3
    assert list(json.loads((tmp_path / "benchmarks.json").read_text())) == ["chip, 2 threads, fp32"]


def test_the_device_check_gives_every_loss_the_views_that_it_compares(device):
    equal = device("equal")
    several = {name for name in losses_parts.NAMES if losses_parts.ready(name).views > 1}
    assert several and several <= {*equal.NEEDS, *equal.LEFT_OUT}


def test_the_device_check_knows_which_losses_wait_for_the_device(device):
    assert set(device("equal").WAITING) == losses_parts.WAITING
