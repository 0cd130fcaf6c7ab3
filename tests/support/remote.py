"""A launcher like Ray's or Slurm's: it sends each job away as bytes and gets its end back as bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.utils import JobReturn

try:
    import cloudpickle
except ImportError:  # joblib brings it as a package of its own, or in itself
    from joblib.externals import cloudpickle

sent: list[int] = []  # jobs of each launch


class RemoteLauncher(BasicLauncher):
    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        sent.append(len(job_overrides))
        task, context = self.task_function, self.hydra_context
        self.task_function, self.hydra_context = _sent(task), _sent(context)
        try:
            return [_sent(job) for job in super().launch(job_overrides, initial_job_idx)]
        finally:
            self.task_function, self.hydra_context = task, context


def _sent(value: Any) -> Any:
    return cloudpickle.loads(cloudpickle.dumps(value))
