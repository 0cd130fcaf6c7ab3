"""Check on this machine that what makes kdbench fast changes nothing, and time it against the goals.

    python scripts/device_check [--out FOLDER] [--only goals,equal] [--minutes 9] [--quick] [--seconds 10] [--peer PATH]

kdbench need not be installed, only what it is made of. Each section runs in a process of its own with a time limit, so
that a broken one (a sticky CUDA error, a compilation without end) harms no other; device_check.json and device_check.md
in FOLDER are written anew after every section, goals first, so that a check that is stopped has shown what it found so
far. What another call left in device_check.json stays beside it: so sections may come in several calls. The page ends
with the flags of kdbench/engine/device.py that the results justify. `--quick` runs every section with tiny sizes, also
on a CPU, where nothing is recorded: so nothing in here is untried but the device. Exits with 1 if a check failed.

  run      whole epochs of `kdbench train` with a table, against what is promised (this and the next four: goals)
  sweep    the same of 16 runs as a cohort
  live     the same of one run with a live teacher
  eager    the same of one run whose steps are not recorded
  bench    `kdbench bench` beside the plain loop, and beside RepDistiller where --peer is a checkout of it
  equal    recorded steps against eager ones: schedules, optimizers, last batches, dropout, cohorts, resume, failures
  kernels  where a step's time goes on the device
  matrix   a step in every precision, memory layout and way to run it
  cohort   steps of many students: in turn, as one graph, as a vmapped stack
  losses   every loss but those of several teachers, of a token and of transformers, recorded and eager
  follow   other precisions against float32, a table, a cohort, a resumed run
  compile  a compiled student: the same numbers, and what a step gains
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
LIMITS = {  # of each section, in seconds
    "run": 120, "sweep": 150, "live": 90, "eager": 90, "bench": 240, "equal": 240, "kernels": 60, "matrix": 150,
    "cohort": 150, "losses": 300, "follow": 180, "compile": 240,
}  # fmt: skip
NEEDED = ("torch", "numpy", "hydra", "omegaconf", "antlr4", "safetensors", "filelock", "rich", "tensorboard", "timm")
GOALS = ("run", "sweep", "live", "eager", "bench")


def importable() -> None:
    """Let this process and its children find this package and kdbench, also where it is not installed."""
    needed = {"device_check": HERE.parent, "kdbench": ROOT, "hydra_plugins.kdbench_cohort": ROOT / "kdbench" / "_hydra"}
    sys.path = [path for path in sys.path if Path(path or ".").resolve() != HERE]  # its modules are the package's
    added = [str(path) for name, path in needed.items() if not found(name)]
    sys.path += added
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), *added]))


def found(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the package that it would be in
        return False


def read(file: Path) -> dict[str, Any]:
    """What a file of results holds; nothing where there is none, or none that can be read."""
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return {}


def supervise(command: list[str], name: str, out: Path, limit: float) -> dict[str, Any]:
    """One section in a process of its own; what it found so far if it is stopped or dies. It writes to its `--out`."""
    file, begin, ended = out / f".{name}.json", time.perf_counter(), ""
    section: dict[str, Any] = {"verdicts": [], "figures": {}}
    file.unlink(missing_ok=True)
    with open(out / f"{name}.log", "w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [*command, "--section", name, "--out", str(file)], stdout=log, stderr=log, start_new_session=True
        )
        try:
            if process.wait(limit):
                ended = f"ended with {process.returncode}"
        except subprocess.TimeoutExpired:
            ended = f"stopped after {limit:.0f} s"
        finally:  # with what it started, compilers and workers, also when it died or this process is interrupted
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):  # a driver that hangs may keep it for ever
                process.wait(30)
    section |= read(file)
    file.unlink(missing_ok=True)
    if ended:
        section["verdicts"].append(
            {"name": f"section {name}", "ok": False, "detail": f"{ended}; see {name}.log", "flag": ""}
        )
    return section | {"seconds": round(time.perf_counter() - begin, 1)}


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/device_check"))
    parser.add_argument("--only", default=",".join(LIMITS), help="sections, in this order")
    parser.add_argument("--minutes", type=float, default=0, help="end after so many minutes (0: no limit)")
    parser.add_argument("--seconds", type=float, default=10, help="how long ways to step take turns")
    parser.add_argument("--peer", default="", help="a checkout of RepDistiller")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--section", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    names = [own for name in arguments.only.split(",") for own in (GOALS if name == "goals" else (name,))]
    unknown = [name for name in names if name not in LIMITS]
    if unknown:
        parser.error(f"--only: no section {unknown[0]}; there are goals, {', '.join(LIMITS)}")
    arguments.only = list(dict.fromkeys(names))
    return arguments


def main() -> int:
    arguments = parsed()
    importable()
    missing = [name for name in NEEDED if not found(name)]
    if missing:
        print(f"not to be imported here: {', '.join(missing)}; copies in a folder of PYTHONPATH do", file=sys.stderr)
        return 2
    if arguments.section:
        from device_check.sections import run_section

        return run_section(arguments)
    from device_check.page import page, replace

    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * arguments.minutes if arguments.minutes else float("inf")
    kept = out / "device_check.json"
    sections: dict[str, Any] = read(kept).get("sections", {})
    command = [sys.executable, str(HERE), "--seconds", str(arguments.seconds), "--peer", arguments.peer]
    for name in arguments.only:
        left = end - time.monotonic()
        if left < 5:
            print(f"{name}: no time left", flush=True)
            continue
        section = supervise([*command, *["--quick"] * arguments.quick], name, out, min(LIMITS[name], left))
        sections[name] = section
        sections = {own: sections[own] for own in LIMITS if own in sections}  # the goals first, whenever they came
        bad = [verdict["name"] for verdict in section["verdicts"] if verdict["ok"] is False]
        said = f"failed: {', '.join(bad)}" if bad else "nothing failed"
        print(f"{name}: {section['seconds']:.0f} s, {said}", flush=True)
        replace(kept, json.dumps({"sections": sections}, indent=1) + "\n")
        replace(out / "device_check.md", page(sections))
    print(page(sections))
    return int(any(verdict["ok"] is False for section in sections.values() for verdict in section["verdicts"]))


if __name__ == "__main__":
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts; for trainer.deterministic
    raise SystemExit(main())
