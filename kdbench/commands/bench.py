"""Time a configuration's training on this machine, part by part, and against the plain loop."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from kdbench import configure
from kdbench.arguments import fit
from kdbench.arguments.ranges import above_to, within
from kdbench.commands.train import chosen
from kdbench.errors import UserError, require, split
from kdbench.files import in_bytes, write_json
from kdbench.results.read import LATENCY
from kdbench.results.result import is_finished, read_result

if TYPE_CHECKING:
    from kdbench.bench.timing import Contender
    from kdbench.data.bundle import Bundle
    from kdbench.runs.recipe import Recipe

TAKES_KEYS = True
OWN = (  # this command's defaults; what the user types of them counts instead
    "hydra.run.dir=${paths.outputs}/bench",
    "hydra.job.name=bench",
)
HELP = """kdbench bench --latency RUN [--batch 1,64] [--seconds S] [--json FILE] [--trust]
       kdbench bench --data [--seconds S] [--workers W] [--json FILE] [key=value ...]
       kdbench bench [--baseline] [--members N] [--seconds S] [--workers W] [--json FILE] [key=value ...]
Time a configuration's training on this machine, part by part, and against the plain loop.

It takes the keys of `kdbench train`; nothing is trained to the end and no run is written. Networks start with random
weights. Where the dataset is not on this machine, random images of its shapes stand in for it.

  --baseline     also time the plain loop: a DataLoader's workers (PIL transforms, or padding of texts), float32, a live
                 teacher, and `.item()` in every step; both take turns, and the ratio is taken round by round
  --members N    also time N students trained side by side (a sweep of N points)
  --seconds S    how long the turns go on (default 20)
  --workers W    worker processes of the plain loop (default: one a core, at most 8); with --data of all
  --data         instead: how fast training batches are made, and nothing else, beside torchvision's transforms in a
                 DataLoader of torch; of images that stream from their files also packed (dataset.packed=true)
  --against NAME=COMMAND   also time what COMMAND trains; may be given again. It prints "ready", then, for every line
                 with a number of steps on its stdin, the seconds that they took (scripts/bench_peer.py)
  --json FILE    write all figures there, too
  --latency RUN  instead: how long a finished run's student takes for an answer here, by torch and onnxruntime, and its
                 size; --batch: inputs a call (default 1,64); --trust: run code that the run's folder names. It is kept
                 beside the run (latency.json) if one input a call is measured, and kdbench compare shows that by torch

Examples:
  kdbench bench dataset=cifar100 teacher=resnet56 student=resnet20 schedule=crd240 --baseline
  kdbench bench dataset=cifar100 teacher=resnet32x4 student=resnet8x4 trainer.precision=bf16 --members 8
  kdbench bench --data dataset=imagefolder dataset.root=photos dataset.size=224 dataset/augment=resized_crop --workers 2
  kdbench bench --latency outputs/runs/digits/..."""


RANGES = {
    "members": Annotated[int, within(1, 1000)],
    "seconds": Annotated[float, above_to(0, 86_400)],
    "workers": Annotated[int, within(0, 1000)] | None,
}


def main() -> int:
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(HELP)
        return 0
    options, words = _parse(sys.argv[1:])
    if options.latency is not None:
        return latency(options, words)
    work = data if options.data else bench
    task = (lambda cfg: serve(cfg, options)) if options.serve else (lambda cfg: work(cfg, options, words))
    return configure.launch(task, own=OWN, words=words)


def _parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """This command's own options, and the words that are Hydra's."""
    parser = argparse.ArgumentParser(prog="kdbench bench", add_help=False, allow_abbrev=False)
    parser.add_argument("--baseline", action="store_true")
    parser.add_argument("--members", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--against", action="append", default=[])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--latency")
    parser.add_argument("--batch", default="1,64")
    parser.add_argument("--trust", action="store_true")
    parser.add_argument("--data", action="store_true")
    # Be a contender of another `kdbench bench`.
    parser.add_argument("--serve", choices=("plain", "table", "live", "batches", "loader"))
    options, words = parser.parse_known_args(arguments)
    for other in options.against:
        name, _, command = other.partition("=")
        require(bool(name and command.strip()), "--against", other, "NAME=COMMAND")
        split("--against", command)
    for name, annotation in RANGES.items():
        fit(getattr(options, name), annotation, f"--{name}")
    return options, words


def bench(cfg: DictConfig, options: argparse.Namespace, words: list[str]) -> None:
    """One benchmark, printed and, if asked for, written."""
    from kdbench.bench.remote import Remote
    from kdbench.bench.report import PLAIN, contender, measure, text, ways
    from kdbench.bench.workbench import prepare

    recipe = _recipe(cfg)
    with ExitStack() as stack:

        def apart(*what: str) -> Remote:
            """A process of its own: neither settings nor the state of one's memory and threads reach another."""
            return stack.enter_context(Remote([sys.executable, "-m", "kdbench", "bench", *what, *words]))

        others: dict[str, Remote] = {}
        if options.baseline:
            workers = [] if options.workers is None else [f"--workers={options.workers}"]
            others[PLAIN] = apart("--serve=plain", *workers)
        for name, _, command in (other.partition("=") for other in options.against):
            others[name] = stack.enter_context(Remote(split("--against", command)))
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kdbench-bench-")))
        data, real = _data(recipe)
        quick = options.seconds < 1
        bench = prepare(recipe, data, scratch)
        in_process = quick or bench.placement.device.type != "cpu"  # a GPU's memory and caches are shared in any case
        ours = {
            name: contender(bench, way) if in_process else apart(f"--serve={way.served}", f"--members={way.members}")
            for name, way in ways(bench, options.members).items()
        }
        result = measure(bench, ours, others, options.seconds, options.members, quick)
    if not real:
        print(f"dataset {data.name} is not here: random images of its shapes stand in for it")
    print(text(result))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def data(cfg: DictConfig, options: argparse.Namespace, words: list[str]) -> None:
    """Batches alone, each contender in a process of its own."""
    from kdbench.bench.remote import Remote
    from kdbench.bench.report import LOADER, OWN, PACKED, data_text, measure_data
    from kdbench.data.bundle import ImageFiles

    recipe = _recipe(cfg)
    made, _real = _data(recipe)
    workers = _workers(options)
    ways = {OWN: ["--serve=batches"], LOADER: ["--serve=loader", f"--workers={workers}"]}
    if isinstance(made.train.inputs, ImageFiles):
        words = [*words, f"dataset.workers={workers}"]
        ways = {OWN: ways[OWN], PACKED: [*ways[OWN], "dataset.packed=true"], LOADER: ways[LOADER]}
    with ExitStack() as stack:
        contenders = {
            name: stack.enter_context(Remote([sys.executable, "-m", "kdbench", "bench", *way, *words]))
            for name, way in ways.items()
        }
        result = measure_data(contenders, recipe.schedule.batch_size, options.seconds)
    shape = "x".join(str(side) for side in made.train.inputs.shape[1:])
    print(f"{made.name}: {len(made.train):,} {made.info.samples} of {shape}, batch {recipe.schedule.batch_size}, "
          f"{workers} workers")  # fmt: skip
    print(data_text(result, made.info.samples))
    if options.json is not None:
        write_json(options.json, result)


def _workers(options: argparse.Namespace) -> int:
    import os

    return min(os.cpu_count() or 1, 8) if options.workers is None else options.workers


def latency(options: argparse.Namespace, words: list[str]) -> int:
    """How long a finished student takes for an answer on this machine, and its size."""
    from kdbench.deploy.latency import latencies, size_of
    from kdbench.deploy.student import load

    require(not words, "--latency", " ".join(words), "a run alone: it has its own configuration")
    sizes = [int(word) if word.strip().isdecimal() else 0 for word in options.batch.split(",")]
    require(min(sizes) >= 1, "--batch", options.batch, "numbers of 1 or more, e.g. 1,64")
    student = load(options.latency, options.trust)
    size, seconds = size_of(student), options.seconds / 10  # ten turns or so fit into what is asked for
    found = latencies(student, sizes, seconds)
    costs = f"{size.parameters:,} parameters, {in_bytes(size.bytes)}, {size.flops / 1e6:,.1f} MFLOP an input"
    print(f"{student.name}  {costs}")
    width = max(len(one.way) for one in found)
    print(f"{'':<{width}}  batch  ms a call (10 % to 90 %)   inputs a second")
    for one in found:
        spread = f"({one.spread[0]:.3f} to {one.spread[1]:.3f})"
        print(f"{one.way:<{width}}  {one.batch:>5}  {one.milliseconds:>9.3f} {spread:<18}  {one.rate:>12,.0f}")
    tree = {"network": student.name, **size._asdict(), "latency": [one._asdict() for one in found]}
    if options.json is not None:
        write_json(options.json, tree)
    if 1 in sizes and is_finished(student.folder):  # what compare shows is of one input
        _keep(student.folder, tree)
    return 0


def _keep(folder: Path, tree: dict[str, object]) -> None:
    """Beside the run, with the weights that it was measured of; a folder of someone else's may not be written to."""
    try:
        write_json(folder / LATENCY, {"weights": read_result(folder).student.weights, **tree})
    except (OSError, UserError) as error:
        print(f"not kept beside the run: {error}", file=sys.stderr)


def serve(cfg: DictConfig, options: argparse.Namespace) -> None:
    """The plain loop, or one of kdbench's own ways, on stdin and stdout."""
    from kdbench.bench.reference import ReferenceLoop
    from kdbench.bench.remote import serve
    from kdbench.bench.report import Way, contender
    from kdbench.bench.workbench import prepare

    recipe = _recipe(cfg)
    data = _data(recipe)[0]
    if options.serve in ("batches", "loader"):
        serve(_alone(recipe, data, options))
        return
    if options.serve == "plain":
        serve(ReferenceLoop(recipe, data, _workers(options)).turn)
        return
    with tempfile.TemporaryDirectory(prefix="kdbench-bench-") as scratch:
        serve(contender(prepare(recipe, data, Path(scratch)), Way(options.serve, options.members)))


def _alone(recipe: Recipe, data: Bundle, options: argparse.Namespace) -> Contender:
    """Batches as kdbench makes them, or as the plain loop's loader does. Between turns their workers may make four
    batches each, or two."""
    from kdbench.bench.reference import plain_loader
    from kdbench.bench.report import batches_alone, endless
    from kdbench.data.bundle import ImageFiles
    from kdbench.engine.device import place
    from kdbench.runs.stage import student_stage, train_batches

    placement = place(recipe.trainer)
    if options.serve == "loader":
        workers = _workers(options)
        loader = plain_loader(data, recipe.schedule.batch_size, workers, placement.device, stays=True)
        return batches_alone(endless(lambda _: loader), placement.wait, 2 * workers + 1)
    batches = train_batches(student_stage(recipe, data, Path()), placement)
    ahead = 4 * data.workers if isinstance(data.train.inputs, ImageFiles) else 0
    return batches_alone(endless(lambda number: batches.epoch(number, 10**6)), placement.wait, ahead + 1)


def _recipe(cfg: DictConfig) -> Recipe:
    from kdbench import build

    return build.make_recipe(cfg, list(HydraConfig.get().overrides.task), chosen())


def _data(recipe: Recipe) -> tuple[Bundle, bool]:
    """The configured data if it is on this machine, else a stand-in; and which of the two."""
    from kdbench import build
    from kdbench.bench.standin import stand_in

    node = recipe.record.section("dataset")
    try:
        return build.load_data(json.dumps({**node, "download": False})), True
    except UserError:
        other = stand_in(node)
        if other is None:
            raise
        return build.load_data(json.dumps(other)), False
