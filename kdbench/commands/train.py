"""Train a student under a teacher; with -m, a sweep of runs."""

from __future__ import annotations

from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from kdbench import configure


def main() -> int:
    return configure.launch(train)


def train(cfg: DictConfig) -> float | None:
    """One run. Returns what a Hydra sweeper optimises."""
    from kdbench import build  # torch is loaded when a run starts, not for --help or --cfg

    job = HydraConfig.get()
    choices = {
        str(group): option for group, option in job.runtime.choices.items() if not str(group).startswith("hydra")
    }
    return build.run(cfg, Path(job.runtime.output_dir), list(job.overrides.task), choices)
