"""Choose PTLoss's epsilon for a teacher on validation images, before any student is trained."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from kdbench import configure
from kdbench.arguments.code import sources
from kdbench.commands.train import chosen
from kdbench.errors import UserError
from kdbench.results.result import as_json

if TYPE_CHECKING:
    from kdbench.runs.recipe import Recipe
    from kdbench.runs.taught import TaughtBy
    from kdbench.types import Calibration

TAKES_KEYS = True
OWN = (  # this command's defaults; what the user types of them counts instead
    "loss=ptloss",
    "++loss.epsilon=search",  # ++: a loss without this key is refused by name
    "hydra.run.dir=${paths.outputs}/epsilon",
    "hydra.sweep.dir=${paths.outputs}/epsilon",
    "hydra.sweep.subdir=.",
    "hydra.job.name=search-epsilon",
)
HELP = """kdbench search-epsilon [-m] [group=option ...] [key=value ...]
Choose PTLoss's epsilon for a teacher on the validation split, before any student is trained.

It takes the keys of `kdbench train`, of which dataset, teacher and loss count. A teacher that is not there yet is
trained. The result goes to outputs/epsilon/<dataset>/<teacher>-<hash>: epsilon.json, candidates.csv, curves.png,
candidates.png. Test images play no part in the choice.

  loss.epsilon=search|gradient    draw candidates (default), or fit them by gradient through the proxy teacher
  loss.search.count=200           candidates; all settings: kdbench train --cfg job -p loss.search loss=ptloss
  loss.search.per_class=true      coefficients for each class
  loss.tau=4                      the temperature that it will be used at

Examples:
  kdbench search-epsilon teacher=resnet20 dataset=digits
  kdbench search-epsilon teacher.run=outputs/runs/digits/... loss.tau=1 loss.search.criterion=nll
  kdbench search-epsilon -m loss.epsilon=search,gradient loss.search.per_class=true,false"""


def main() -> int:
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(HELP)
        return 0
    return configure.launch(search, refuse, own=OWN)


def search(cfg: DictConfig) -> None:
    """One search, in a folder named by the teacher, the images and the settings; a finished one is only shown again."""
    from kdbench.files import read_json
    from kdbench.runs.obtain import obtain

    recipe = refuse(cfg)
    data = recipe.data()
    recipe.refuse_uncalibrated(data)
    assert data.val is not None
    teacher = obtain(recipe.need_teacher("a network: an epsilon belongs to a teacher"), recipe, data)
    images = [data.fingerprint, data.val.rows.tolist(), data.val.labels.tolist()]
    if bool((data.val.rows < 0).all()) and data.content.val is not None:  # not of the training images
        images.append(data.content.val.samples)
    code = sources({"loss": dict(recipe.loss.config)})
    about = [teacher.weights, images, dict(recipe.loss.config), *([code] if code else [])]
    identity = json.dumps(about, sort_keys=True)
    name = f"{teacher.name.replace('/', '_')}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"
    out = Path(cfg.paths.outputs) / "epsilon" / data.name / name
    if recipe.force or not (out / "epsilon.json").exists():
        # Of all that is known of the teacher, the validation split alone goes in.
        logits = teacher.reference["val"]
        found = recipe.loss.make().calibrate(logits, data.val.labels.to(logits.device))
        write(found, out, {"dataset": data.name, **_about(teacher)})
    show(read_json(out / "epsilon.json"), out, recipe)


def refuse(cfg: DictConfig) -> Recipe:
    """The recipe. Raises a UserError for a configuration that leaves nothing to choose."""
    from kdbench import build

    recipe = build.make_recipe(cfg, list(HydraConfig.get().overrides.task), chosen())
    if not recipe.loss.make().needs_calibration:
        epsilon = recipe.loss.config.get("epsilon")
        if epsilon is None:
            raise UserError("loss", recipe.loss.name, "ptloss: no other has an epsilon")
        raise UserError("loss.epsilon", epsilon, "search or gradient")
    recipe.need_teacher("a network: an epsilon belongs to a teacher")
    return recipe


def write(found: Calibration, out: Path, about: Mapping[str, object]) -> None:
    """The figures, the table, and last epsilon.json: its presence means that all are there."""
    from kdbench.files import write_json

    out.mkdir(parents=True, exist_ok=True)
    for name, figure in found.figures.items():
        figure.savefig(out / f"{name}.png", dpi=150)
    with (out / "candidates.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(found.table[0]))
        writer.writeheader()
        writer.writerows(found.table)
    write_json(out / "epsilon.json", {**found.record, **about})


def show(record: Mapping[str, Any], out: Path, recipe: Recipe) -> None:
    """Print what was chosen, how good it is where it was chosen and where it had no say, and what to type next."""
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=True)
    images = record["images"]
    heads = (f"where chosen (n={images['choose']})", f"held out (n={images['held_out']})")
    table = Table(record["criterion"], *heads, box=None, header_style="bold", pad_edge=False)
    for name, title in (("teacher", "teacher"), ("best", record["origin"])):
        table.add_row(title, *(f"{record['scores'][half][name]:.5f}" for half in ("choose", "held_out")))
    console.print(table, highlight=False)
    gain = f"{record['held_out_gain']:.2g} +- {record['held_out_stderr']:.1g} (standard error)"
    lines = [f"gain on held-out images  {gain}, the best of {record['count']} candidates, {record['seconds']:.1f} s"]
    if record["held_out_gain"] < 2 * record["held_out_stderr"]:
        lines.append("That is within the noise: these images do not show that this epsilon helps.")
    if not record["per_class"]:
        lines.append(f"epsilon  {', '.join(format(value, '.4g') for value in record['epsilon'])}")
    lines.append(
        f"strength {record['strength']:.2f}: the loss pulls that many times as hard as plain KL (loss.epsilon=null)"
    )
    lines += [f"files    {out}", f"next     {next_command(recipe.record.overrides, out / 'epsilon.json')}"]
    for line in lines:
        console.print(line, markup=False, highlight=False)


def _about(teacher: TaughtBy) -> dict[str, object]:
    """The teacher's entry, without its figures on test images."""
    return {"teacher": {key: value for key, value in as_json(teacher.record()).items() if not key.startswith("test/")}}


def next_command(overrides: Sequence[str], file: Path) -> str:
    """The training that uses the file: everything that was typed, but for what only this command reads."""
    spent = re.compile(r"loss$|loss\.epsilon$|loss\.search\b|force$|hydra\b|monitor$")
    kept = [word for word in overrides if not spent.match(configure.key_of(word))]
    path = str(file) if re.fullmatch(r"[\w./-]+", str(file)) else f"'{file}'"  # Hydra's own quotes
    return shlex.join(["kdbench", "train", *kept, "loss=ptloss", f"loss.epsilon={path}"])
