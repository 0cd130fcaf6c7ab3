"""Train a student under a teacher; with -m, a sweep of runs."""

from __future__ import annotations

from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from kdbench import configure
from kdbench.commands.compare import print_runs
from kdbench.errors import UserError

TAKES_KEYS = True


def main() -> int:
    return configure.launch(train, refuse, ended=print_runs)


def train(cfg: DictConfig) -> float | None:
    """One run. Returns what a Hydra sweeper optimises."""
    from kdbench import build  # torch is loaded when a run starts, not for --help or --cfg

    job = HydraConfig.get()
    return build.run(cfg, Path(job.runtime.output_dir), list(job.overrides.task), chosen())


def refuse(cfg: DictConfig) -> None:
    """Raise a UserError for an experiment that cannot run."""
    from kdbench import build

    build.make_recipe(cfg, list(HydraConfig.get().overrides.task), chosen())


def chosen() -> dict[str, str]:
    """The option of each group. UserError if the configuration (--config-name) is not made like train.yaml."""
    job = HydraConfig.get()
    choices = {group: option for group, option in configure.group_choices(job).items() if option is not None}
    lacking = [group for group in configure.NAMED if group not in choices]
    if lacking:
        name = job.job.config_name
        raise UserError(f"{name}.yaml chooses no {lacking[0]}: its defaults list must name one, as train.yaml's does")
    return choices
