"""One student in training: its network, loss, optimizer and random state, and the step that moves them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kdbench.engine.compiled import compiled
from kdbench.engine.distiller import Distiller
from kdbench.engine.ema import Average
from kdbench.engine.graph import WARM_UP, graphed, wants_graph
from kdbench.engine.metrics import Meters
from kdbench.engine.optimizer import lr_setter, make_optimizer
from kdbench.engine.options import OptimizerOptions, TrainerOptions
from kdbench.types import Batch, Outputs, Target


class Learner:
    """What one student owns. Several learners may share a batch stream and a teacher (a cohort).

    `factors` [total steps] multiply the optimizer's learning rate; `seed` makes dropout and random losses a function
    of (seed, epoch), so that a resumed training replays them. `truth`: true labels, where there is noise.
    """

    def __init__(
        self,
        distiller: Distiller,
        optimizer: OptimizerOptions,
        trainer: TrainerOptions,
        factors: list[float],
        steps_per_epoch: int,
        seed: int,
        truth: Tensor | None = None,
    ) -> None:
        device = distiller.placement.device
        graph = wants_graph(trainer, device, optimizer)
        self.distiller = distiller
        self.optimizer = make_optimizer(optimizer, [distiller], graph)
        self.meters = Meters(device, steps_per_epoch, truth)
        self.lr = optimizer.lr
        self.factors = factors
        self.steps_per_epoch = steps_per_epoch
        self.seed = seed
        self.steps_done = 0
        self.average = Average(distiller.student, trainer.ema) if trainer.ema else None
        self._random_state: list[Tensor] = []
        self._draws = False  # whether a step has drawn random numbers on the device
        self._unsure = WARM_UP if graph else 0  # steps until it is known whether a recorded step does
        # Decided once, so that the step has no branches: how it runs, and what happens before and after the update.
        self._set_lr = lr_setter(self.optimizer)
        self._forward = compiled(distiller, trainer, device, len(factors))
        self._update = graphed(self.update, trainer, device) if graph else self.update
        self._before_update: list[Callable[[], Any]] = []
        self._after_update: list[Callable[[], Any]] = []
        if trainer.clip is not None:
            clip, parameters = trainer.clip, list(distiller.parameters())
            self._before_update.append(lambda: nn.utils.clip_grad_norm_(parameters, clip))
        if self.average is not None:
            self._after_update.append(self.average.update)

    @property
    def network(self) -> nn.Module:
        """The network that is evaluated and exported: the student, or its moving average."""
        return self.distiller.student if self.average is None else self.average.network

    def begin_epoch(self, epoch: int) -> None:
        self.distiller.train()
        self.meters.reset()
        # numpy's mixing of (seed, epoch) into one number would do as well; a prime keeps neighbours apart.
        torch.manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        self.leave()

    def step(self, batch: Batch, teacher: Outputs | None) -> None:
        """One update from one batch; `teacher` is what the teacher says of it."""
        self._set_lr(self.lr * self.factors[self.steps_done])
        self._update(batch.input, self._heard(teacher), batch.target)
        self.steps_done += 1

    def update(self, image: Tensor, teacher: Outputs | None, target: Target) -> None:
        """The device's part of a step: the same work every time, and nothing counted in Python."""
        output = self._forward(image, teacher, target)
        output.terms.total.backward()
        for act in self._before_update:
            act()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for act in self._after_update:
            act()
        self.meters.add(output, teacher, target)

    def _heard(self, teacher: Outputs | None) -> Outputs | None:
        # Only what the loss reads: a recorded step copies its inputs.
        needs = self.distiller.loss.needs
        return None if teacher is None else Outputs(teacher.logits, {key: teacher.features[key] for key in needs})

    def step_in_turn(self, batch: Batch, teacher: Outputs | None) -> None:
        """The same step with this learner's own random state, for learners that take turns."""
        self.enter()
        before = self._random_state[-1]
        self.step(batch, teacher)
        self.leave()
        if self._unsure:
            self._draws = self._draws or not torch.equal(before, self._random_state[-1])
            self._unsure -= 1

    @property
    def independent(self) -> bool:
        """Whether its step may run beside others on the device. Recorded steps that draw random numbers may not: the
        generator keeps its state in device memory, which all recordings share."""
        return not self._unsure and not self._draws

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

    def state(self) -> dict[str, Any]:
        """All that a bit-exact continuation needs; random states are functions of (seed, epoch)."""
        average = self.average.network.state_dict() if self.average is not None else None
        return {
            "distiller": self.distiller.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": average,
            "steps_done": self.steps_done,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.distiller.load_state_dict(state["distiller"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._set_lr = lr_setter(self.optimizer)
        if self.average is not None:
            self.average.restore(state["average"], state["steps_done"])
        self.steps_done = state["steps_done"]
