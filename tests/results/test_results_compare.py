"""`kdbench compare` on made-up result.json trees, through the command line."""

from __future__ import annotations

import json
import re
import statistics
import sys
from pathlib import Path

import pytest

from kdbench.results.read import read_runs
from kdbench.results.rows import compare
from tests.support.results import language_result, result, write


def test_one_row_a_setting_with_mean_and_deviation_over_seeds(run_compare, sweep):
    code, out, err = run_compare(sweep)
    lines = out.splitlines()
    assert code == 0 and err == ""
    assert lines[0] == "the same in all: dataset=digits, teacher=resnet20, student=resnet8"
    assert lines[1].split()[:4] == ["loss", "loss.tau", "teacher", "%"]
    spread = 100 * statistics.stdev((0.90, 0.91, 0.95))
    assert [line.split() for line in lines[2:5]] == [
        ["dkd", "2", "97.00", "93.50", "92.50", "1", "90.00", "12"],
        ["kl", "4", "97.00", "93.00", "±", "1.00", "92.00", "±", "1.00", "3", "90.00", "±", "0.00", "12"],
        f"kl 1 97.00 92.00 ± {spread:.2f} 91.00 ± {spread:.2f} 3 90.00 ± 0.00 12".split(),
    ]
    assert lines[6].startswith("against loss=kl, loss.tau=4, last: 95 % intervals")  # the best that has runs enough
    assert ["TOO FEW RUNS" in line for line in lines[8:]] == [True, False] and "CANNOT BE TOLD" in lines[9]
    _, out, _ = run_compare(sweep, "--where", "seed=0")
    few = "TOO FEW RUNS to say which differences are more than chance: 3 seeds a setting, or more."
    assert out.splitlines()[5:] == ["", few]


def test_what_an_option_brings_is_not_a_column_of_its_own(sweep):
    assert compare(read_runs([sweep]).runs).columns == ["loss", "loss.tau"]  # loss.beta comes with loss=dkd


def test_a_key_that_follows_another_is_shown_once(tmp_path):
    for lr in (0.1, 0.2):
        write(tmp_path / f"{lr}", result(0.9, schedule__lr=lr, optimizer__lr=lr))
    assert compare(read_runs([tmp_path]).runs).columns == ["optimizer.lr"]


def test_folders_and_force_and_devices_do_not_tell_runs_apart(tmp_path):
    write(tmp_path / "a", result(0.9))
    other = result(0.92, seed=1, force=True, trainer__device="cuda")
    other["config"] |= {"paths.data": "/mnt/data", "dataset.root": "/mnt/data"}
    write(tmp_path / "b", other)
    (row,) = compare(read_runs([tmp_path]).runs).rows
    assert len(row.runs) == 2 and row.metrics["last"].mean == pytest.approx(0.91)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"choices": {"dataset": "cifar10"}, "images": {"train": 50000, "test": 10000}}, "differ in their data"),
        ({"last": {"epoch": 240}}, "30, 240 epochs"),
        ({"teacher": {"weights": "bb"}}, "2 different sets of weights"),
    ],
)
def test_warns_of_what_is_not_comparable(run_compare, tmp_path, changes, words):
    write(tmp_path / "a", result(0.9))
    write(tmp_path / "b", result(0.9, loss__tau=9, **changes))
    code, _, err = run_compare(tmp_path)
    assert code == 0 and words in err


def test_no_warning_for_a_teacher_for_each_seed(run_compare, tmp_path):
    for tau in (1, 4):
        for seed in (0, 1):
            made = result(0.9, loss__tau=tau, seed=seed, teacher={"weights": f"w{seed}", "test/top1": 0.95 + seed / 50})
            write(tmp_path / f"{tau}-{seed}", made)
    code, out, err = run_compare(tmp_path)
    assert code == 0 and err == "" and "96.00 ± 1.41" in out


def test_a_seed_counted_twice_is_pointed_out(run_compare, tmp_path):
    write(tmp_path / "a", result(0.9))
    write(tmp_path / "b", result(0.9))
    assert "counted more than once in n = 2" in run_compare(tmp_path)[2]


def test_unfinished_and_broken_folders_are_named(run_compare, sweep):
    (sweep / "digits" / "half" / ".hydra").mkdir(parents=True)
    (sweep / "digits" / "half" / "metrics.jsonl").write_text('{"epoch": 1}\n{"epoch": 2}\n')
    (sweep / "digits" / "torn").mkdir()
    (sweep / "digits" / "torn" / "result.json").write_text('{"choices": {')
    (sweep / "digits" / "alien").mkdir()
    (sweep / "digits" / "alien" / "result.json").write_text("[1]")
    code, out, err = run_compare(sweep)
    assert code == 0 and "dkd" in out
    assert "half: not finished: epoch 2 was its last" in err
    assert "torn: result.json: not a readable JSON file" in err and "alien: result.json: no result of kdbench" in err


def test_nothing_to_compare_is_no_success(run_compare, tmp_path):
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "result.json").write_text("{")
    code, out, err = run_compare(tmp_path)
    assert code == 1 and out == "" and "torn: result.json: not a readable JSON file" in err


def test_stages_and_stored_teachers_are_no_runs_of_their_own(tmp_path):
    write(tmp_path / "runs" / "a", result(0.9))
    write(tmp_path / "runs" / "a" / "stages" / "1", result(0.8, loss__tau=1))
    write(tmp_path / "teachers" / "digits" / "t", result(0.97, teacher=None))
    assert [run.folder.name for run in read_runs([tmp_path]).runs] == ["a"]
    assert [run.folder.name for run in read_runs([tmp_path / "teachers"]).runs] == ["t"]


def test_a_metric_that_is_only_wished_for_is_left_out_where_no_run_has_it(run_compare, sweep):
    code, out, err = run_compare(sweep, "--metric", "gain/test/top1?,test/nll?")
    assert code == 0 and "test/nll" in out and "gain/" not in out and "no run has gain/test/top1\n" in err
    assert "test top-1 (last)" in run_compare(sweep, "--metric", "gain/test/top1?")[1]


def test_metrics_by_name(run_compare, sweep):
    _, out, _ = run_compare(sweep, "--metric", "best,test/nll", "--metric", "best/val/top1")
    header, first = out.splitlines()[1:3]
    assert "test top-1 (best by val) %" in header and "test/nll" in header and "best/val/top1 %" in header
    assert first.split() == ["dkd", "2", "97.00", "92.50", "0.2500", "95.00", "1", "90.00", "12"]


def test_sorted_by_a_column(run_compare, sweep):
    _, out, _ = run_compare(sweep, "--sort", "loss.tau")
    assert [line.split()[1] for line in out.splitlines()[2:5]] == ["1", "2", "4"]
    _, out, _ = run_compare(sweep, "--sort", "loss.tau", "--reverse")
    assert [line.split()[1] for line in out.splitlines()[2:5]] == ["4", "2", "1"]


def test_sorted_by_what_runs_cost(run_compare, tmp_path):
    for loss, seconds in (("kl", 3.0), ("dkd", 1.0), ("ce", 2.0)):
        write(tmp_path / loss, {**result(0.9, choices={"loss": loss}), "cost": {"cpu_seconds": seconds}})
    lines = run_compare(tmp_path, "--sort", "cpu_seconds")[1].splitlines()
    assert [line.split()[0] for line in lines[2:5]] == ["dkd", "ce", "kl"]


def test_names_stay_text_in_markdown_and_latex(run_compare, tmp_path):
    for name in ("<b>", "a|b"):
        write(tmp_path / name, result(0.9, choices={"loss": name}))
    marked, typeset = (run_compare(tmp_path, option)[1] for option in ("--markdown", "--latex"))
    assert "| &lt;b> |" in marked and "a\\|b" in marked
    assert "\\textless{}b\\textgreater{}" in typeset and "a\\textbar{}b" in typeset


def test_csv_and_json_are_fractions_with_all_digits(run_compare, sweep):
    _, out, _ = run_compare(sweep, "--csv")
    header, first = out.splitlines()[:2]
    assert header == "loss,loss.tau,teacher,last,last std,best,best std,n,agreement,seconds,folders"
    assert first.startswith("dkd,2,0.97,0.935,,0.925")
    rows = json.loads(run_compare(sweep, "--json")[1])["rows"]
    assert rows[1]["metrics"]["last"]["std"] == pytest.approx(0.01) and rows[1]["n"] == 3


def test_json_is_what_other_programs_read(run_compare, tmp_path):
    for tau in (4.0, float("inf")):
        write(tmp_path / str(tau), result(0.9, loss__tau=tau, last={"test/nll": float("nan")}))
    text = run_compare(tmp_path, "--json", "--metric", "last,test/nll")[1]
    rows = json.loads(text, parse_constant=pytest.fail)["rows"]
    assert {row["differs"]["loss.tau"] for row in rows} == {4, "inf"} and rows[0]["metrics"]["test/nll"]["mean"] is None


def test_markdown(run_compare, sweep):
    lines = run_compare(sweep, "--markdown")[1].splitlines()
    assert lines[0].startswith("| loss | loss.tau | teacher % |") and lines[1].startswith("| --- | --- | ---: |")
    assert len(lines) == 5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "nowhere: there is no such folder"),
        (["."], "there are no runs here"),
        (["runs", "--sort", "los.tau"], "Did you mean loss.tau"),
        (["runs", "--metric", "test/top"], "Did you mean test/top1"),
        (["runs", "--where", "loss"], "--where = loss: must be KEY=VALUE"),
        (["runs", "--where", "loss=ce"], "their values: dkd, kl"),
        (["runs", "--where", "loss=kl", "--where", "loss=dkd"], "one value a key, and loss has two"),
        (["runs", "--where", "los=ce"], "--where los: no run has this key"),
        (["runs", "--by", "studen"], "Did you mean student"),
        (["runs", "--against", "loss=kl"], "must name one setting, names 2, which differ: loss.tau="),
        (["runs", "--against", "loss=ce"], "must name one setting, names 0; their values of loss: dkd, kl"),
        (["runs", "--against", "loss=kl,loss.tau=9"], "must name one setting, names 0; their values of loss.tau: "),
        (["runs", "--against", "los=kl"], "--against los: no run has this key. Did you mean loss?"),
        (["runs", "--against", "seed=0"], "must be a setting, without a seed"),
        (["runs", "beside.csv"], "beside.csv: is neither a folder nor a file in a run's folder"),
        (["runs", "--rows", "loss"], "--rows and --columns go together"),
        (["runs", "--rows", "loss", "--columns", "studen"], "--columns studen: no run has this key"),
        (["runs", "--rows", "loss", "--columns", "seed"], "--columns = seed: must be a key of settings"),
        (["runs", "--by", "loss", "--csv"], "makes several tables"),
        (["runs", "--by", "loss", "--against", "loss=kl"], "--by = loss: must be a key that --against does not name"),
        (["runs", "--svg", "runs/digits/dkd/result.json"], "must be a folder, or not there yet"),
    ],
)
def test_mistakes_are_messages(run_compare, sweep, tmp_path, monkeypatch, arguments, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "beside.csv").touch()
    monkeypatch.chdir(tmp_path / "empty" if arguments == ["."] else tmp_path)
    code, out, err = run_compare(*arguments)
    assert code == 1 and words in err and "Traceback" not in err + out


@pytest.fixture
def clear_sweep(tmp_path: Path) -> Path:
    """Three losses with four seeds each and two students: dkd is better than kl in every seed, ce is like kl."""
    for student, base in (("resnet8", 0.80), ("mlp", 0.60)):
        for loss, gain in (("kl", 0.0), ("dkd", 0.05), ("ce", 0.0)):
            for seed, noise in enumerate((0.001, -0.002, 0.001, 0.0)):
                other = {"kl": noise, "dkd": noise / 2, "ce": -noise / 3}[loss]
                made = result(base + gain + other + seed / 100, choices={"loss": loss, "student": student}, seed=seed)
                write(tmp_path / "runs" / f"{student}-{loss}-{seed}", made)
    return tmp_path / "runs"


def test_verdicts_against_a_named_setting(run_compare, clear_sweep):
    code, out, err = run_compare(clear_sweep, "--where", "student=resnet8", "--against", "loss=kl")
    assert code == 0 and err == ""
    head, _, *rows = out.splitlines()[6:]
    assert head.startswith("against loss=kl, last: 95 % intervals") and "2 comparisons" in head
    told = {row.split()[0]: row.rstrip() for row in rows}
    assert told["loss=dkd"].endswith("BETTER") and "+5.00" in told["loss=dkd"] and "4 pairs" in told["loss=dkd"]
    assert told["loss=ce"].endswith("NO DIFFERENCE SHOWN")


def test_without_a_baseline_the_best_is_judged_as_strictly_as_all_pairs(run_compare, clear_sweep):
    words = ["--where", "student=resnet8", "--json"]
    best = json.loads(run_compare(clear_sweep, *words)[1])["verdicts"]
    assert best["comparisons"] == 3 and {one["against"]["loss"] for one in best["of"]} == {"dkd"}
    assert {one["verdict"] for one in best["of"]} == {"WORSE"}
    named = json.loads(run_compare(clear_sweep, *words, "--against", "loss=dkd")[1])["verdicts"]
    assert named["comparisons"] == 2 and named["of"][0]["p_holm"] < best["of"][0]["p_holm"]
    every = json.loads(run_compare(clear_sweep, *words, "--against", "all")[1])["verdicts"]
    assert len(every["of"]) == every["comparisons"] == 3


def test_a_setting_with_one_run_silences_no_others(run_compare, clear_sweep):
    write(clear_sweep / "lucky", result(0.99, choices={"loss": "at"}))
    told = json.loads(run_compare(clear_sweep, "--where", "student=resnet8", "--json")[1])["verdicts"]
    assert {one["against"]["loss"] for one in told["of"]} == {"dkd"}
    assert sorted(one["verdict"] for one in told["of"]) == ["TOO FEW RUNS", "WORSE", "WORSE"]


def test_margin_is_what_matters_to_nobody(run_compare, clear_sweep):
    words = ["--where", "student=resnet8", "--against", "loss=kl", "--json"]
    told = [json.loads(run_compare(clear_sweep, *words, "--margin", margin)[1])["verdicts"]["of"] for margin in (0, 9)]
    assert [one["verdict"] for one in told[0]] == ["BETTER", "CANNOT BE TOLD"]
    assert [one["verdict"] for one in told[1]] == ["BETTER", "NO DIFFERENCE SHOWN"]
    code, _, err = run_compare(clear_sweep, "--margin", "-1")
    assert code == 1 and "--margin = -1.0: must be a number of 0 or more" in err


def test_the_correlation_of_seeds_is_said(run_compare, clear_sweep):
    _, out, _ = run_compare(clear_sweep, "--where", "student=resnet8", "--against", "loss=kl")
    assert "; runs of one seed correlate by 0.99" in out or "; runs of one seed correlate by 1.00" in out


def test_a_pooled_variance_where_settings_vary_alike(run_compare, tmp_path):
    noise = {"kl": (0.004, 0.0, -0.004), "dkd": (-0.003, 0.004, -0.001), "at": (0.0, -0.004, 0.004)}
    for loss, gain in (("kl", 0.0), ("dkd", 0.016), ("at", 0.0)):
        for seed, off in enumerate(noise[loss]):
            write(tmp_path / "runs" / f"{loss}-{seed}", result(0.8 + gain + off, choices={"loss": loss}, seed=seed))
    own = run_compare(tmp_path / "runs", "--against", "loss=kl")[1]
    alone, together = re.findall(r"(\S+) to (\S+)", next(x for x in own.splitlines() if x.startswith("loss=dkd")))
    assert float(alone[0]) > float(together[0]) and float(alone[1]) < float(together[1]) and "CANNOT BE TOLD" in own
    pooled = run_compare(tmp_path / "runs", "--against", "loss=kl", "--pooled")[1]
    assert "one variance for all settings, 4 degrees of freedom, as if all vary alike (Bartlett's p = " in pooled
    assert next(x for x in pooled.splitlines() if x.startswith("loss=dkd")).rstrip().endswith("BETTER")
    best = json.loads(run_compare(tmp_path / "runs", "--pooled", "--json")[1])["verdicts"]
    assert best["pooled"]["holds"] and best["comparisons"] == 3 and best["of"][0]["alone"]["freedom"] == 4.0


def test_settings_that_vary_unlike_keep_their_own_variance(run_compare, tmp_path):
    for place, loss in enumerate(("kl", "at", "sp", "vid", "rkd", "pkt", "nst", "cc", "ft", "dkd")):
        for seed in range(4):
            value = 0.7 + (0.1 if loss == "dkd" else 1e-3) * ((place + 2 * seed) * 7 % 5 - 2)
            write(tmp_path / "runs" / f"{loss}-{seed}", result(value, choices={"loss": loss}, seed=seed))
    plain, pooled = (run_compare(tmp_path / "runs", "--against", "loss=kl", *more)[1] for more in ((), ("--pooled",)))
    assert "settings do not vary alike (Bartlett's p = " in pooled
    assert pooled.splitlines()[-9:] == plain.splitlines()[-9:]


def test_parquet_has_what_csv_has(run_compare, sweep, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    code, _, err = run_compare(sweep, "--parquet", tmp_path / "table.parquet")
    assert code == 1 and "pip install 'kdbench[parquet]'" in err
    monkeypatch.undo()
    parquet = pytest.importorskip("pyarrow.parquet")
    assert run_compare(sweep, "--parquet", tmp_path / "table.parquet")[0] == 0
    read = parquet.read_table(tmp_path / "table.parquet").to_pylist()
    assert [row["loss"] for row in read] == ["dkd", "kl", "kl"] and read[0]["last"] == 0.935


def test_a_metric_of_which_less_is_better(run_compare, tmp_path):
    for tau, base in ((1, 0.5), (4, 0.3)):
        for seed in range(4):
            made = result(0.9, loss__tau=tau, seed=seed, last={"test/nll": base + seed / 1000 * tau})
            write(tmp_path / f"{tau}-{seed}", made)
    _, out, _ = run_compare(tmp_path, "--metric", "test/nll", "--against", "loss.tau=1")
    assert out.rstrip().endswith(" BETTER") and "-0.19" in out.splitlines()[-1]


@pytest.fixture
def language_sweep(tmp_path: Path) -> Path:
    for tau, base in ((1, 70.0), (2, 75.0), (4, 80.0)):
        for seed in range(4):
            made = language_result(base + seed / 10 * tau, loss__tau=tau, seed=seed)
            write(tmp_path / "language" / f"{tau}-{seed}", made)
    return tmp_path / "language"


def test_language_models_are_put_in_order_by_perplexity_the_lowest_first(run_compare, language_sweep, tmp_path):
    report = tmp_path / "report.html"
    code, out, _ = run_compare(language_sweep, "--report", report)
    lines = out.splitlines()
    assert (
        code == 0 and "test perplexity (last)  test perplexity (best by val)" in lines[1] and "%" not in lines[1][:60]
    )
    assert lines[2].split()[:6] == ["1", "60.00", "70.15", "±", "0.13", "71.15"]
    assert [line.split()[2] for line in lines[3:5]] == ["75.30", "80.60"]
    assert lines[-1].rstrip().endswith("WORSE") and "+10.45" in lines[-1]
    page = report.read_text()
    assert "test perplexity (last) against loss.tau" in page and "top-1" not in page


def test_perplexities_of_other_tokens_or_contexts_are_warned_about(tmp_path):
    for context in (16, 64):
        write(tmp_path / f"{context}", language_result(70.0, dataset__context=context))
    assert "dataset.context (16, 64): their perplexities are not comparable" in "".join(
        compare(read_runs([tmp_path]).runs).warnings
    )


def test_runs_of_several_tasks_have_tables_of_their_own(run_compare, language_sweep, sweep):
    code, out, _ = run_compare(sweep, language_sweep)
    assert code == 0 and out.count("the same in all") == 2
    assert [line for line in out.splitlines() if line.startswith("task=")] == [
        "task=classification", "task=language modelling"
    ]  # fmt: skip
    code, _, err = run_compare(sweep, language_sweep, "--csv")
    assert code == 1 and "--csv: is one table" in err and "--where task='language modelling'" in err
    code, out, _ = run_compare(sweep, language_sweep, "--csv", "--where", "task=language modelling")
    assert code == 0 and len(out.splitlines()) == 4


def test_by_makes_a_table_for_each_value(run_compare, clear_sweep):
    _, out, _ = run_compare(clear_sweep, "--by", "student")
    assert [line for line in out.splitlines() if line.startswith("student=")] == ["student=mlp", "student=resnet8"]
    assert out.count("the same in all") == 2 and out.count("against loss=dkd") == 2


def test_a_pivot(run_compare, clear_sweep):
    _, out, _ = run_compare(clear_sweep, "--rows", "loss", "--columns", "student", "--markdown")
    lines = out.splitlines()
    assert lines[0] == "| loss \\ student | mlp | resnet8 |" and lines[1] == "| --- | ---: | ---: |"
    assert [line.split()[1] for line in lines[2:]] == ["ce", "dkd", "kl"] and "86.50 ± 1.29" in lines[3]


def test_values_that_are_equal_are_one_and_stand_as_they_are_typed(run_compare, tmp_path):
    """tau=4 as it was typed and dkd's own 4.0 were two columns; null and true read None and True."""
    for loss, tau in (("kl", 4), ("dkd", 4.0), ("ce", 2)):
        write(tmp_path / loss, result(0.5, choices={"loss": loss}, loss__tau=tau, trainer__drop_last=loss == "ce"))
    _, out, _ = run_compare(tmp_path, "--rows", "loss", "--columns", "loss.tau", "--markdown")
    assert out.splitlines()[0] == "| loss \\ loss.tau | 2 | 4 |"
    _, out, _ = run_compare(tmp_path, "--by", "trainer.drop_last")
    assert "trainer.drop_last=true" in out and "trainer.drop_last=false" in out
    _, out, _ = run_compare(tmp_path)
    assert "true" in out and "True" not in out


def test_a_pivot_of_a_papers_size(run_compare, tmp_path):
    for loss in range(14):
        for student in range(13):
            made = result(0.5, choices={"loss": f"loss{loss}", "student": f"net{student}"})
            write(tmp_path / f"{loss}-{student}", made)
    _, out, _ = run_compare(tmp_path, "--rows", "loss", "--columns", "student", "--latex")
    lines = out.splitlines()
    assert lines[0] == "\\begin{tabular}{l" + 13 * "r" + "}" and len(lines) == 6 + 14
    assert all(line.count(" & ") == 13 for line in lines[4:-2]) and "loss \\textbackslash{} student" in lines[2]


def test_names_that_differ_by_a_number_are_ordered_by_it(run_compare, tmp_path):
    for student in ("resnet110", "resnet8", "vgg8", "resnet20"):
        write(tmp_path / student, result(0.5, choices={"student": student}))
    _, out, _ = run_compare(tmp_path, "--rows", "loss", "--columns", "student", "--markdown")
    assert out.splitlines()[0] == "| loss \\ student | resnet8 | resnet20 | resnet110 | vgg8 |"
    _, out, _ = run_compare(tmp_path, "--by", "student", "--latex")  # and a comment names each table
    assert [line for line in out.splitlines() if line.startswith("%")] == [
        f"% student={name}" for name in ("resnet8", "resnet20", "resnet110", "vgg8")
    ]


def test_a_cell_never_holds_two_settings(run_compare, sweep):
    code, _, err = run_compare(sweep, "--rows", "loss", "--columns", "student")
    assert code == 1 and "two settings at loss=kl, student=resnet8 (loss.tau=4 and loss.tau=1)" in err
    code, out, _ = run_compare(sweep, "--rows", "loss", "--columns", "student", "--where", "loss=kl,loss.tau=4")
    assert code == 0 and "93.00 ± 1.00" in out


def test_latex(run_compare, sweep):
    lines = run_compare(sweep, "--latex")[1].splitlines()
    assert lines[0].startswith("\\begin{tabular}{ll") and lines[2].startswith("loss & loss.tau & teacher \\% &")
    assert "$\\pm$" in lines[5] and lines[-2:] == ["\\bottomrule", "\\end{tabular}"]


def test_the_same_run_under_two_folders_counts_once(run_compare, tmp_path):
    for name in ("a", "b"):
        write(tmp_path / name, {**result(0.9), "hash": "abc"})
    write(tmp_path / "c", {**result(0.9, seed=1), "hash": "def"})
    _, out, err = run_compare(tmp_path)
    assert err == f"warning: {tmp_path / 'b'} is the run of {tmp_path / 'a'} once more and is not counted.\n"
    assert "  2  " in out.splitlines()[-1]


def test_the_checklist(run_compare, clear_sweep):
    _, out, _ = run_compare(clear_sweep, "--checklist")
    told = dict(line.split(": ", 1) for line in out.splitlines())
    assert told["Runs"] == "24 of 6 settings; 4 a setting" and told["Seeds"] == "0, 1, 2, 3"
    assert told["Data"] == "digits (1,294 train, 360 test)" and "best val/top1" in told["Selection"]
    assert told["Test set"].startswith("predictions of each test image are kept by 0 of 24 runs")
    assert told["Commands"] == "kdbench train" and told["Not known"].startswith("energy")
    assert told["Compute"].startswith("0.08 hours") and told["Teachers"] == "resnet20 aa"
