"""Which runs a comparison is of: read once and quickly, told apart by what they are results of, printed safely."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
import time
from typing import Any

import pytest

from kdbench.results.read import read_runs
from kdbench.results.rows import compare
from tests.support.results import result, write
from tests.support.shell import processor_seconds


def test_commands_that_differ_in_one_value_are_one_sweep(run_compare, tmp_path):
    words = [["loss=ce", f"seed={seed}"] for seed in (0, 1)]
    words += [[f"loss={loss}", f"seed={seed}", "a=[1,2]"] for loss in ("kl", "dkd") for seed in (0, 1, 2)]
    words += [["loss=ce", "a=[1,3]"], ["loss=ce", "a=[1,4]"]]
    for number, overrides in enumerate(words):
        write(tmp_path / str(number), {**result(0.9, seed=number), "overrides": overrides})
    _, out, _ = run_compare(tmp_path, "--checklist")
    told = dict(line.split(": ", 1) for line in out.splitlines())
    assert told["Commands"].split("; ") == [
        "kdbench train -m loss=ce seed=0,1", "kdbench train -m loss=kl,dkd seed=0,1,2 'a=[1,2]'",
        "kdbench train loss=ce 'a=[1,3]'", "kdbench train loss=ce 'a=[1,4]'",
    ]  # fmt: skip


def test_the_parts_of_an_augmentation_are_named_by_their_classes(run_compare, tmp_path):
    for number, name in enumerate(("Crop", "Flip")):
        parts = [{"_target_": f"kdbench.data.{name}", "pad": 4}, {"_target_": "kdbench.data.Cutout", "size": 16}]
        write(tmp_path / name, result(0.9 - number / 10, dataset__augment__parts=parts))
    _, out, _ = run_compare(tmp_path)
    assert "Flip + Cutout" in out and "_target_" not in out


def test_a_measured_latency_stands_beside_the_figures(run_compare, tmp_path):
    of = result(0.9)["student"].get("weights", "")
    one = {"way": "torch", "batch": 1, "milliseconds": 1.25}
    kept = {"kl": {"weights": of, "latency": [{"way": "torch", "batch": 64, "milliseconds": 9.0}, one]}}
    hostile = {  # no figure, no fault
        "dkd": [],
        "mse": {"weights": "others", "latency": [one | {"milliseconds": 7.0}]},
        "at": {"weights": of, "latency": [one | {"milliseconds": math.nan}]},
        "sp": {"weights": of, "latency": [one | {"milliseconds": -7.0}]},
        "cc": {"weights": of, "latency": [one | {"milliseconds": 10**400}]},
        "rkd": {"weights": of, "latency": [one | {"milliseconds": None}]},
    }
    for name, tree in (kept | hostile).items():
        write(tmp_path / name, result(0.9, loss=name))
        (tmp_path / name / "latency.json").write_text(json.dumps(tree))
    code, out, _ = run_compare(tmp_path)
    assert code == 0 and "ms an input" in out
    assert sorted(line.split()[-1] for line in out.splitlines() if line.startswith("kl ")) == ["-"] * 6 + ["1.25"]


def test_a_librarys_network_is_found_by_its_own_name_and_by_its_option(run_compare, tmp_path):
    for name in ("resnet18", "vit_tiny"):
        choices = {"choices": {"teacher": "timm"}, "teacher": {"name": name}}
        write(tmp_path / name, result(0.9, teacher__name=name, **choices))
    for words, n in ((("teacher=timm",), 2), (("teacher=resnet18",), 1)):
        assert len(json.loads(run_compare(tmp_path, "--where", *words, "--json")[1])["rows"]) == n
    _, out, _ = run_compare(tmp_path, "--rows", "teacher", "--columns", "student")
    assert [line.split()[0] for line in out.splitlines()[1:]] == ["resnet18", "vit_tiny"]


def test_a_thousand_runs_in_a_second(tmp_path):
    long = {f"dataset.augment.key{i}": f"value{i}" for i in range(100)}
    for seed in range(1000):
        made = result(0.9 + seed / 1e5, seed=seed // 10, loss__tau=seed % 10)
        made["config"] |= long
        write(tmp_path / str(seed), made)
    start = time.process_time()
    rows = compare(read_runs([tmp_path]).runs).rows
    assert len(rows) == 10 and time.process_time() - start < 1  # 0.35 s of processor time on an idle core


def test_the_whole_command_compares_a_thousand_runs_of_many_settings_in_a_second(run_compare, tmp_path):
    for i in range(1000):
        made = result(0.9 + i % 7 / 100, loss__tau=i // 3, seed=i % 3)
        made["config"] |= {f"trainer.{key}": None for key in range(70)}  # as many keys as a run has
        write(tmp_path / str(i), made)
    start = time.process_time()
    code, out, _ = run_compare(tmp_path)
    taken = time.process_time() - start
    assert code == 0 and "55611 comparisons" in out
    assert taken < 1.5, f"{taken:.2f} s"  # 0.8 s of processor time on an idle core


def test_hundreds_of_runs_in_a_second_without_torch(tmp_path):
    for seed in range(300):
        write(tmp_path / str(seed), result(0.9, seed=seed, loss__tau=seed % 10))
    code = (
        f"import sys; sys.argv = ['kdbench', 'compare', {str(tmp_path)!r}]\n"
        "from kdbench import cli; assert cli.main() == 0\n"
        "assert not {'torch', 'hydra', 'timm'} & set(sys.modules)"
    )
    start = processor_seconds()
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert processor_seconds() - start < 3  # 0.4 s


def test_a_run_that_is_named_twice_is_read_once(tmp_path):
    write(tmp_path / "runs" / "a", result(0.9))
    (tmp_path / "link").symlink_to(tmp_path / "runs")
    paths = [tmp_path, tmp_path / "runs" / "a", tmp_path / "runs" / "a" / "result.json", tmp_path / "link"]
    assert len(read_runs(paths).runs) == 1


def test_a_strangers_result_steers_no_terminal_and_no_spreadsheet(tmp_path, run_compare):
    for i, text in enumerate(("\x1b[2J\x9b1m[link=http://x]here[/link]", "=HYPERLINK(1)", "@SUM(1)", "[/red]")):
        write(tmp_path / str(i), result(0.9, choices={"student": text}, loss__name=text))
    write(tmp_path / "deep", {"student": "x"})
    (tmp_path / "deep" / "result.json").write_text("[" * 20_000)
    for form in ([], ["--markdown"], ["--csv"], ["--json"]):
        code, out, err = run_compare(tmp_path, *form)
        assert code == 0 and not set("\x1b\x9b") & set(out + err)
        assert "[/red]" in out and "[link=http://x]here[/link]" in out
        if form == ["--csv"]:
            assert "'=HYPERLINK(1)" in out and "'@SUM(1)" in out and not re.search(r"(^|,)[=@]", out, re.MULTILINE)
    assert "deep" in err or "deep" in out


def of(top1: float, rows: int = 48, **changes: Any) -> dict[str, Any]:
    """A result of this edition, which says what it is of."""
    part = {"count": rows, "samples": "s", "labels": "l"}
    data = {"name": "photos", "inputs": f"i{rows}", "rows": rows, "train": part, "val": None}
    identity = {"hash": "h", "format": 2, "named": {}, "code": {}, "data": data, "teacher": "t"}
    return {**result(top1, **changes), "identity": identity}


def test_runs_of_other_data_are_not_pooled_and_it_is_said(run_compare, tmp_path):
    for seed in (0, 1):
        write(tmp_path / f"old-{seed}", of(0.9, rows=24, seed=seed))
        write(tmp_path / f"new-{seed}", of(0.7, rows=48, seed=seed))
    rows = compare(read_runs([tmp_path]).runs).rows
    assert sorted(row.metrics["last"].mean for row in rows) == pytest.approx([0.7, 0.9])
    assert [len(row.runs) for row in rows] == [2, 2]
    _, out, err = run_compare(tmp_path)
    assert "in 2 rows, since they are of other data" in err and "old-0" in err and "new-0" in err
    assert re.search(r"version=A \S*new-0, version=B \S*old-0", err), "a table of equal names said not which is which"
    assert [line.split()[0] for line in out.splitlines()[1:4]] == ["version", "B", "A"]
    assert run_compare(tmp_path, "--against", "version=A")[0] == 0
    assert "their values of version: A, B" in run_compare(tmp_path, "--against", "version=C")[2]


@pytest.mark.parametrize(
    ("part", "value", "words"), [("code", {"loss m.L": {"m": "2"}}, "own code"), ("format", 3, "edition")]
)
def test_nor_are_runs_of_other_code_or_of_another_edition(run_compare, tmp_path, part, value, words):
    other = of(0.8, seed=1)
    other["identity"][part] = value
    write(tmp_path / "a", of(0.9))
    write(tmp_path / "b", other)
    assert len(compare(read_runs([tmp_path]).runs).rows) == 2 and f"other {words}" in run_compare(tmp_path)[2]


def test_the_same_hash_with_other_data_is_another_run_and_a_copy_is_none(run_compare, tmp_path):
    for name, rows in (("a", 24), ("b", 48)):
        write(tmp_path / name, of(0.9, rows=rows) | {"hash": "h"})
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    rows = compare(read_runs([tmp_path]).runs).rows
    assert [len(row.runs) for row in rows] == [1, 1]
    err = run_compare(tmp_path)[2]
    assert err.count("once more and is not counted") == 1 and "copy is the run of" in err


def test_networks_are_called_what_they_are(tmp_path):
    taught = of(0.9, choices={"student": "timm", "teacher": "resnet20"}, student__name="resnet18", teacher__run="t")
    taught["teacher"] = {**taught["teacher"], "name": "wrn_16_2"}
    write(tmp_path / "a", taught)
    same = compare(read_runs([tmp_path]).runs).same
    assert (same["student"], same["teacher"]) == ("resnet18", "wrn_16_2")


@pytest.mark.parametrize("option", ["--report", "--parquet"])
def test_a_folder_in_the_place_of_a_file_is_refused_before_the_table(option, run_compare, sweep, tmp_path):
    code, out, err = run_compare(sweep, option, str(tmp_path))
    assert code == 1 and not out and f"{option} = {tmp_path}: must be a file, or not there yet" in err


def test_a_list_in_the_key_of_a_texts_context_is_no_fault(run_compare, tmp_path):
    """dataset.context is a number of a corpus, and [before, after] of frames."""
    for seed in (0, 1):
        write(tmp_path / f"runs/vectors/{seed}", result(0.9, dataset__context=[0, 0], seed=seed))
    code, out, err = run_compare(tmp_path / "runs")
    assert (code, err) == (0, "") and "90.00" in out
