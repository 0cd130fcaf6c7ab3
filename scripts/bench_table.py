"""Write the table of docs/benchmarks.md: kdbench against the plain loop and, if one is given, a peer's own step.

    python scripts/bench_table.py [--peer PATH/TO/RepDistiller] [--seconds 60] [--members 8] [key=value ...]

Run it on a quiet machine; about two minutes a pair. Every pair is one `kdbench bench`, in which all contenders take
turns. The figures go to docs/benchmarks.json (one entry a machine and precision, replaced if it is there), the table to
docs/benchmarks.md between the two marks.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent.parent / "docs"
PAIRS = [("resnet56", "resnet20"), ("resnet110", "resnet8"), ("resnet32x4", "resnet8x4")]
BEGIN, END = "<!-- the table: written by scripts/bench_table.py -->", "<!-- end of the table -->"
PEER = "RepDistiller"
TABLE, LIVE, PLAIN = "teacher's logits from a table", "teacher asked for every batch", "plain loop"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="a checkout of RepDistiller")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("overrides", nargs="*", help="for every pair, e.g. trainer.precision=fp32")
    arguments = parser.parse_args()
    results = [measure(teacher, student, arguments) for teacher, student in PAIRS]
    file = DOCS / "benchmarks.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    machine = results[0]["machine"]
    known[f"{machine['name']}, {machine['threads']} threads, {machine['precision']}"] = results
    file.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    page = DOCS / "benchmarks.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    tables = "\n\n".join(section(name, found) for name, found in known.items())
    page.write_text(f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}", encoding="utf-8")


def measure(teacher: str, student: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One `kdbench bench`."""
    against = []
    if arguments.peer:
        script = Path(__file__).with_name("bench_peer.py")
        options = f"--peer {arguments.peer} --teacher {teacher} --student {student} --workers {arguments.workers}"
        against = [f"--against={PEER}={sys.executable} {script} {options}"]
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder) / "figures.json"
        words = [
            "dataset=cifar100",
            f"teacher={teacher}",
            f"student={student}",
            "schedule=crd240",
            *arguments.overrides,
        ]
        own = ["--baseline", f"--seconds={arguments.seconds}", f"--members={arguments.members}", f"--json={figures}"]
        command = [sys.executable, "-m", "kdbench", "bench", *own, f"--workers={arguments.workers}", *against, *words]
        subprocess.run(command, check=True)
        return json.loads(figures.read_text())


def section(name: str, results: list[dict[str, Any]]) -> str:
    """One machine and precision."""
    first = results[0]
    machine, roofline = first["machine"], first["roofline"]
    members = max((step["students"] for step in first["steps"].values()), default=1)
    head = (
        f"### {name}\n\n{machine['cores']} cores, torch {machine['torch']}, Python {machine['python']}; copies "
        f"{roofline['bandwidth'] / 1e9:.0f} GB/s, multiplies matrices in {roofline['dtype']} at "
        f"{roofline['rate'] / 1e9:.0f} GFLOP/s. CIFAR-100's shapes, batch 64, loss kl. Milliseconds a step (medians), "
        "and how many times as long the plain loop takes for the same training (median of the rounds, quartiles)."
    )
    rows = [
        f"| teacher -> student | plain loop | {PEER} | live teacher | table | cohort of {members}, live | cohort of "
        f"{members}, table | n |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
        *(row(result, members) for result in results),
    ]
    return head + "\n\n" + "\n".join(rows)


def row(result: dict[str, Any], members: int) -> str:
    about, steps = result["configuration"], result["steps"]
    ours = [LIVE, TABLE, f"{members} students at once, {LIVE}", f"{members} students at once, {TABLE}"]
    cells = [f"{about['teacher']} -> {about['student']}", *(_ms(steps.get(name)) for name in (PLAIN, PEER))]
    cells += [f"{_ms(steps[name])}, {_ratio(result, name)}" if name in steps else "" for name in ours]
    return f"| {' | '.join([*cells, str(steps[PLAIN]['n'])])} |"


def _ms(step: dict[str, Any] | None) -> str:
    return f"{1e3 * step['median']:.1f}" if step else ""


def _ratio(result: dict[str, Any], name: str) -> str:
    ratio = result["ratios"][f"{PLAIN} / {name}"]
    return f"**{ratio['median']:.1f}x** ({ratio['low']:.1f} to {ratio['high']:.1f})"


if __name__ == "__main__":
    main()
