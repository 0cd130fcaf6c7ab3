"""One student in training: its network, loss, optimizer and random state, and the step that moves them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from kdbench.engine.distiller import Distiller
from kdbench.engine.metrics import Meters
from kdbench.engine.optimizer import make_optimizer
from kdbench.engine.options import OptimizerOptions, TrainerOptions
from kdbench.types import Batch, Outputs


class Learner:
    """What one student owns. Several learners may share a batch stream and a teacher (a cohort).

    `factors` [total steps] multiply the optimizer's learning rate; `seed` makes dropout and random losses a function
    of (seed, epoch), so that a resumed training replays them.
    """

    def __init__(
        self,
        distiller: Distiller,
        optimizer: OptimizerOptions,
        trainer: TrainerOptions,
        factors: list[float],
        steps_per_epoch: int,
        seed: int,
    ) -> None:
        self.distiller = distiller
        self.optimizer = make_optimizer(optimizer, [distiller])
        self.lr = optimizer.lr
        self.factors = factors
        self.steps_per_epoch = steps_per_epoch
        self.seed = seed
        self.steps_done = 0
        self._random_state: list[torch.Tensor] = []
        self.average = (
            AveragedModel(distiller.student, multi_avg_fn=get_ema_multi_avg_fn(trainer.ema)) if trainer.ema else None
        )
        # Decided once, so that the step has no branches: what happens between backward and update, and after it.
        self._before_update: list[Callable[[], Any]] = []
        self._after_update: list[Callable[[], Any]] = []
        if trainer.clip is not None:
            clip, parameters = trainer.clip, list(distiller.parameters())
            self._before_update.append(lambda: nn.utils.clip_grad_norm_(parameters, clip))
        if self.average is not None:
            average = self.average
            self._after_update.append(lambda: average.update_parameters(distiller.student))

    @property
    def network(self) -> nn.Module:
        """The network that is evaluated and exported: the student, or its moving average."""
        return self.distiller.student if self.average is None else self.average.module

    def begin_epoch(self, epoch: int) -> None:
        self.distiller.train()
        self.meters = Meters(self.distiller.placement.device, self.steps_per_epoch)
        # numpy's mixing of (seed, epoch) into one number would do as well; a prime keeps neighbours apart.
        torch.manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        self.leave()

    def step(self, batch: Batch, teacher: Outputs | None) -> None:
        """One update from one batch; `teacher` is what the teacher says of it."""
        self._set_lr(self.lr * self.factors[self.steps_done])
        output = self.distiller(batch.image, teacher, batch.target)
        output.terms.total.backward()
        for act in self._before_update:
            act()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for act in self._after_update:
            act()
        self.meters.add(output, teacher, batch.target)
        self.steps_done += 1

    def step_in_turn(self, batch: Batch, teacher: Outputs | None) -> None:
        """The same step with this learner's own random state, for learners that take turns."""
        self.enter()
        self.step(batch, teacher)
        self.leave()

    def enter(self) -> None:
        """Make the global generators this learner's (5 kB to copy on the CPU, no device sync)."""
        torch.set_rng_state(self._random_state[0])
        if len(self._random_state) > 1:
            torch.cuda.set_rng_state(self._random_state[1], self.distiller.placement.device)

    def leave(self) -> None:
        device = self.distiller.placement.device
        self._random_state = [torch.get_rng_state()]
        if device.type == "cuda":
            self._random_state.append(torch.cuda.get_rng_state(device))

    def _set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def state(self) -> dict[str, Any]:
        """All that a bit-exact continuation needs; random states are functions of (seed, epoch)."""
        average = self.average.state_dict() if self.average is not None else None
        return {
            "distiller": self.distiller.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": average,
            "steps_done": self.steps_done,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.distiller.load_state_dict(state["distiller"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.steps_done = state["steps_done"]
