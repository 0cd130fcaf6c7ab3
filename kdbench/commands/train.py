"""Train a student under a teacher; with -m, a sweep of runs."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from kdbench import configure
from kdbench.arguments import trusting
from kdbench.counted import result_format
from kdbench.errors import UserError, require
from kdbench.results.metrics import CLASSIFICATION, metric_of
from kdbench.results.report import in_a_line, show
from kdbench.results.result import RunResult, is_finished, read_result
from kdbench.runs.identity import Kept

TAKES_KEYS = True
_DROPPED = re.compile(
    r"[+~]*(hydra[./]|force=|teacher\.trust=|paths\.|monitor=)"
)  # words of a run that are not its own


def main() -> int:
    about = [word for word in sys.argv[1:] if "=" not in word and not word.startswith("-")]
    if about and {"-h", "--help"} & set(sys.argv[1:]):
        sys.argv[1:] = [word for word in sys.argv[1:] if word not in ("-h", "--help")]
        from kdbench.commands.explain import main  # kdbench train --help trainer

        return main()
    own, words = from_run(sys.argv[1:])
    return configure.launch(train, refuse, own=own, words=words, ended=ended, finished=finished, better=better)


def from_run(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """What was typed for the finished run that `--from RUN` names, less what is typed anew, and the other words.

    With another option of a group the old one's keys are left out; where a run lies, and that it was forced, is not
    taken over. `--trust` is for a run whose words name code that is not kdbench's. Raises UserError for no such run.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--from", dest="run", metavar="RUN")
    parser.add_argument("--trust", action="store_true")
    options, rest = parser.parse_known_args(list(words))
    if options.run is None:
        return [], list(words)
    folder = Path(options.run)
    require(is_finished(folder), "--from", options.run, "the folder of a finished run (one with a result.json)")
    before = [word for word in read_result(folder).overrides if not _DROPPED.match(word)]
    if not options.trust:
        named = [{configure.key_of(word).rpartition(".")[2]: word.partition("=")[2]} for word in before]
        trusting().check([*named, *(_mapping(word) for word in before)], str(folder / "result.json"))
    typed = {configure.key_of(word) for word in rest}
    groups = {key for key in typed if "." not in key}
    return [word for word in before if configure.key_of(word).partition(".")[0] not in groups], rest


def _mapping(word: str) -> Any:
    """The value of a word as a mapping, if it is one."""
    try:
        return yaml.safe_load(word.partition("=")[2])
    except yaml.YAMLError:
        return None


def train(cfg: DictConfig) -> float | None:
    """One run: the composed experiment in its folder or, if it is finished, just its result.

    Returns the value that a Hydra sweeper reads (`monitor`). Raises UserError before any work for what cannot run.
    """
    # Imported here: torch is loaded when a run starts, not for --help or --cfg.
    from kdbench.build import make_procedure, make_recipe, refuse_others_folder
    from kdbench.runs.trial import refuse_no_result, refuse_unmeasured, try_networks

    job = HydraConfig.get()
    out = Path(job.runtime.output_dir)
    recipe = make_recipe(cfg, list(job.overrides.task), chosen())
    procedure = make_procedure(cfg.procedure)
    refuse_others_folder(recipe, out)
    done = is_finished(out) and not recipe.force
    if not done:
        refuse_unmeasured(cfg.monitor, recipe.data())
        try_networks(recipe)
    result = read_result(out) if done else procedure(recipe, out)
    refuse_no_result(result, out)
    if done:
        _show_again(result, out)
    else:
        show(result, out, already=False)
    return result.monitored(cfg.monitor)


def _show_again(result: RunResult, out: Path) -> None:
    """A finished run; of a sweep in a line, so that those that are trained now stand out."""
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        print(in_a_line(result, out))
    else:
        show(result, out, already=True)


def refuse(cfg: DictConfig) -> UserError | None:
    """Raise a UserError for a point of a sweep that cannot run, or whose folder holds another run.

    Returns the one that its networks and data will refuse it with. Those are tried where the points run in this
    process, which would read the same data next, and build the same networks (0.05 s for small ones); not with a
    sweeper that optimises, nor where the data are more than are kept.
    """
    from kdbench.build import keeps_data, make_recipe, refuse_others_folder
    from kdbench.runs.trial import try_networks

    job = HydraConfig.get()
    recipe = make_recipe(cfg, list(job.overrides.task), chosen())
    refuse_others_folder(recipe, configure.point_folder(job))
    plugins = {str(node["_target_"]).rpartition(".")[2] for node in (job.sweeper, job.launcher)}
    here = plugins <= {"BasicSweeper", "BasicLauncher", "CohortLauncher"} and not job.launcher.get("devices")
    if here and keeps_data(recipe):
        try:
            try_networks(recipe)
        except UserError as error:
            return error
        except Exception:  # the point says so itself, with its traceback
            return None
    return None


def finished(cfg: DictConfig, out: Path) -> Callable[[], float | None] | None:
    """Showing its result, if this very run is finished in folder `out` and nothing that it follows from has changed;
    None for a run that is to be looked at more closely. Loads no torch and no data."""
    try:
        if cfg.force is not False or not is_finished(out):
            return None
        kept, counted = Kept(out), configure.counted_in(cfg)
        known = kept.identity
        own = (counted.hash, result_format(counted.values))
        if known is None or (known.hash, known.format) != own or not kept.unchanged():
            return None
        result = read_result(out)
    except Exception:  # what is damaged or cannot be resolved: the checks say so
        return None

    def shown() -> float | None:
        _show_again(result, out)
        return result.monitored(str(cfg.monitor))

    return shown


def better(cfg: DictConfig) -> int:
    """1 where more of what a sweeper reads is better, -1 where less is."""
    if cfg.monitor != "auto":
        name = str(cfg.monitor)
        return CLASSIFICATION.primary.better if name in ("last", "best") else metric_of(name).better
    from kdbench.build import make_recipe

    return make_recipe(cfg, [], chosen()).data().task.primary.better


def ended(folders: Sequence[Path]) -> None:
    """The table that a sweep ends in."""
    from kdbench.commands.compare import print_runs  # loads scipy, which a single run does without

    print_runs(folders)


def chosen() -> dict[str, str]:
    """The option of each group. UserError if the configuration (--config-name) is not made like train.yaml."""
    job = HydraConfig.get()
    choices = {group: option for group, option in configure.group_choices(job).items() if option is not None}
    lacking = [group for group in configure.NAMED if group not in choices]
    if lacking:
        name = job.job.config_name
        raise UserError(f"{name}.yaml chooses no {lacking[0]}: its defaults list must name one, as train.yaml's does")
    return choices
