"""The report page and its plots, of made-up runs: what they show, that nothing of a stranger's runs in them acts."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from kdbench.results.plots.plot import Axis, Cells, Plot, Series, decades, linear, logarithmic, round_ticks
from kdbench.results.plots.runs import candidates
from kdbench.results.plots.svg import HEIGHT, svg
from kdbench.results.predictions import predictions
from kdbench.results.read import read_runs
from kdbench.results.rows import compare
from tests.support.results import result, write

EVIL = "<script>alert(1)</script>"


def finished(folder: Path, loss: str, tau: float, seed: int) -> None:
    """A run with everything that a plot is made of."""
    random = np.random.default_rng(seed)
    label = np.arange(100) % 4
    hit = random.random(100) < 0.6 + tau / (100 if tau < 99 else 1000)
    answer = np.where(hit, label, (label + 1) % 4)
    made = result(float(hit.mean()), loss__tau=tau, seed=seed, choices={"loss": loss}, images={"test": 100})
    made["student"] = {"name": "resnet8", "parameters": 1000 * (1 + len(loss))}
    made["seconds"], made["formula"] = 10.0 + len(loss) + seed, f"{loss}, tau = {tau}"
    write(folder, made)
    predictions(label, answer, random.random(100), label).write(folder)
    (folder / "network.json").write_text(json.dumps({"classes": ["cat", EVIL, "dog", "frog"]}))
    rows = [{"epoch": epoch, "test/top1": 0.5 + epoch / 100, "train/loss": 1 / epoch} for epoch in range(1, 11)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{torn")
    found = [{"rank": i, "origin": "random", "choose": 0.1 + i / 100, "held_out": 0.2} for i in range(1, 5)]
    (folder / "epsilon.json").write_text(json.dumps({"criterion": "brier", "candidates": found}))


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    for loss in ("kl", "dkd"):
        for tau in (0, 1, 8, float("inf")):
            for seed in range(3):
                finished(tmp_path / "runs" / f"{loss}-{tau}-{seed}", loss, tau, seed)
    return tmp_path / "runs"


def test_every_candidate_of_a_search_is_drawn_one_colour_a_family(tmp_path):
    finished(tmp_path / "a", "ptloss", 1, 0)
    kinds = [f"{kind} M={order}" for kind in ("r/m", "uniform", "fit") for order in (1, 3, 5)]
    origins = [f"{kind} r={size}" for kind in kinds for size in (1, 2)]
    found = [{"rank": i, "origin": name, "choose": 0.1 + i, "held_out": 0.2} for i, name in enumerate(origins)]
    (tmp_path / "a" / "epsilon.json").write_text(json.dumps({"candidates": found}))
    (plot,) = candidates(compare(read_runs([tmp_path]).runs).rows, [])
    *families, chosen = plot.series
    assert sorted(x for one in families for x in one.x) == [one["choose"] for one in found] and chosen.x == [0.1]
    assert [one.name for one in families] == ["", *kinds[:6]]
    assert "18 candidates" in plot.note and "gray" in plot.note


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [name for name, _ in attributes if name in ("src", "href") or name.startswith("on")]


def test_the_page_has_table_verdicts_and_plots_and_needs_no_network(run_compare, sweep, tmp_path):
    report = tmp_path / "report.html"
    code, out, err = run_compare(sweep, "--report", report, "--against", "loss=kl,loss.tau=1")
    assert code == 0 and f"written: {report}" in err and "against loss=kl" in out
    text = report.read_text(encoding="utf-8")
    page = Page(text)
    assert not page.links and not {"script", "link", "img", "iframe"} & set(page.tags) and "@import" not in text
    assert "url(" not in text and page.tags.count("table") == 2
    assert page.tags.count("tr") == 1 + 8 + 1 + 7 and page.tags.count("figure") == page.tags.count("svg") == 9
    titles = ["test/top1 over epochs", "train/loss over epochs", "against loss.tau", "against parameters"]
    titles += ["against seconds", "Reliability", "Differences by class", "Teacher and student", "epsilon", "Versions"]
    assert all(title in text for title in titles)
    assert "are of 7 of the 8 settings" in text and text.count("have different formulas") == 1
    assert "prefers-color-scheme:dark" in text and "@media print" in text and 'name="viewport"' in text


def test_text_of_runs_is_escaped_and_every_plot_is_wellformed(run_compare, sweep, tmp_path):
    for seed in range(3):
        finished(sweep / f"evil-{seed}", f"{EVIL}\"'&", 1, seed)
    report = tmp_path / "report.html"
    assert run_compare(sweep, "--report", report, "--svg", tmp_path / "svg")[0] == 0
    text = report.read_text(encoding="utf-8")
    assert EVIL not in text and "&lt;script&gt;" in text
    assert not {"script"} & set(Page(text).tags)
    drawn = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    files = sorted((tmp_path / "svg").iterdir())
    assert len(drawn) == len(files) == 9
    for one in [*drawn, *(file.read_text(encoding="utf-8") for file in files)]:
        ElementTree.fromstring(one)
        assert "nan" not in re.sub(r">[^<]*<", "><", one).replace("dominant", "")


def test_zero_and_infinity_stand_at_the_ends_of_a_logarithmic_axis():
    axis = logarithmic("tau", [0.0, 1.0, 4.0, 16.0, float("inf")])
    places = [axis.place(value) for value, _ in axis.ticks]
    assert [text for _, text in axis.ticks] == ["0", "1", "4", "16", "inf"]
    assert places == sorted(places) and 0 < places[0] < places[1] and places[-1] < 1
    assert places[2] - places[1] == pytest.approx(places[3] - places[2])
    assert [text for _, text in logarithmic("tau", [1.0, 4.0]).ticks] == ["1", "4"]


@pytest.mark.parametrize("values", [[1.0], [0.0, 0.0], [-5.0, 1e9], [1e-12, 2e-12], [float("nan")], []])
def test_an_axis_holds_its_values(values):
    axis = linear("x", values)
    assert axis.low < axis.high and len(axis.ticks) < 15
    assert all(0 <= axis.place(value) <= 1 for value in values if value == value)


def test_ticks_are_round():
    assert round_ticks(0.0, 1.0) == [(pytest.approx(n / 5), f"{n / 5:.1f}") for n in range(6)]
    assert [text for _, text in round_ticks(91.3, 97.2)] == ["92", "94", "96"]
    assert [text for _, text in decades("p", [50_000, 2_000_000]).ticks] == ["50k", "100k", "200k", "500k", "1M", "2M"]


def test_costs_that_are_near_each_other_have_ticks():
    for values in ([293.0, 374.0], [360.0, 361.0], [1.01e6, 1.02e6], [0.7]):
        axis = decades("seconds", values)
        assert len(axis.ticks) >= 2 and all(axis.low <= tick <= axis.high for tick, _ in axis.ticks)


def test_no_name_of_a_setting_is_cut():
    names = [
        f"loss=kl, loss.tau={tau}, optimizer.layer_decay=0.75, teacher=resnet20, trainer.ema=0.999" for tau in (1, 4)
    ]
    names.append(f"{names[0]} less {names[1]}")
    axis = linear("x", [0.0, 1.0])
    series = [Series(name, [0.0, 1.0], [0.0, 1.0]) for name in names]
    text = svg(Plot("p", "a title", "", axis, axis, series))
    root = ElementTree.fromstring(text)
    lines = [(float(one.get("y", "0")), one.text or "") for one in root.iter() if one.tag.endswith("text")]
    legend = [line for y, line in lines if y > HEIGHT]
    assert " ".join(legend) == " ".join(names) and max(map(len, legend)) <= 56
    assert float(root.get("viewBox", "").split()[3]) > max(y for y, _ in lines)


def test_names_of_classes_have_room():
    names = ["aquarium_fish", "bee", "sweet_pepper"]
    cells = Cells(names, names, [[0.8, 0.1, 0.1]] * 3)
    drawn = svg(Plot("p", "a title", "", Axis("student", 0, 1), Axis("teacher", 0, 1), cells=cells))
    axis = Axis("class", 0, 4, ticks=[(i, name) for i, name in enumerate(names)])
    drawn += svg(Plot("p", "a title", "", linear("x", [0.0, 1.0]), axis, [Series("", [0.5], [1.0], kind="points")]))
    assert drawn.count(">aquarium_fish<") == drawn.count(">sweet_pepper<") == 3


def test_single_plots_as_png(run_compare, sweep, tmp_path):
    assert run_compare(sweep, "--where", "loss=kl", "--png", tmp_path / "png")[0] == 0
    files = list((tmp_path / "png").iterdir())
    assert len(files) == 7 and all(file.read_bytes().startswith(b"\x89PNG") for file in files)


def test_runs_that_kept_nothing_have_a_page_too(run_compare, tmp_path):
    write(tmp_path / "runs" / "a", result(0.9))
    (tmp_path / "runs" / "half" / ".hydra").mkdir(parents=True)
    report = tmp_path / "report.html"
    assert run_compare(tmp_path / "runs", "--report", report)[0] == 0
    text = report.read_text(encoding="utf-8")
    assert "1 runs of 1 settings" in text and "<svg" not in text and "half: not finished" in text
    code, _, err = run_compare(tmp_path / "runs", "--report", report, "--by", "loss")
    assert code == 1 and "--by loss: makes several tables" in err


def test_a_thousand_runs_in_five_seconds(run_compare, tmp_path):
    for i in range(1000):
        folder = tmp_path / "runs" / str(i)
        write(folder, result(0.9 + i / 1e5, loss__tau=i % 100, seed=i // 100))
        rows = [{"epoch": epoch, "test/top1": 0.5, "train/loss": 1 / epoch} for epoch in range(1, 61)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    start = time.process_time()
    assert run_compare(tmp_path / "runs", "--report", tmp_path / "report.html")[0] == 0
    assert time.process_time() - start < 5


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="there is no browser here to look with")
def test_a_browser_shows_it(run_compare, sweep, tmp_path):
    """The plots' colours are on the picture, on white and on black paper."""
    report = tmp_path / "report.html"
    run_compare(sweep, "--report", report)
    picture = tmp_path / "picture.png"
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=420,2400"]
    words += [f"--user-data-dir={tmp_path / 'browser'}", f"--screenshot={picture}", report.as_uri()]
    subprocess.run([str(BROWSER), *words], check=True, capture_output=True, timeout=120)
    from PIL import Image

    with Image.open(picture) as image:
        seen = {colour for _, colour in image.convert("RGB").getcolors(1 << 24) or []}
        assert image.getpixel((3, 3))[:3] == (255, 255, 255)
    assert {(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0x00, 0x9E, 0x73)} <= seen


@pytest.mark.skipif(BROWSER is None, reason="there is no browser here to look with")
def test_on_paper_no_column_is_cut_off(run_compare, sweep, tmp_path):
    report, printed = tmp_path / "report.html", tmp_path / "printed.html"
    run_compare(sweep, "--where", "loss=kl", "--report", report)
    measured = "<script>document.title = document.documentElement.scrollWidth</script>"
    printed.write_text(report.read_text(encoding="utf-8").replace("@media print", "@media all") + measured, "utf-8")
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=720,900"]
    words += [f"--user-data-dir={tmp_path / 'browser'}", "--dump-dom", printed.as_uri()]
    page = subprocess.run([str(BROWSER), *words], check=True, capture_output=True, timeout=120, text=True).stdout
    assert "<title>720</title>" in page and "on such images" in page
