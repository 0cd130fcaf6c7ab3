"""A student in training, its step, and the loop over the batches that moves one student or many: one screen."""

from __future__ import annotations

import copy
import traceback
from typing import cast

import torch
from torch import Tensor, nn

from kdbench.engine.accumulate import joined, parts
from kdbench.engine.apart import APART, ApartOptimizer
from kdbench.engine.checkpoint import LearnerState
from kdbench.engine.device import wants_graph
from kdbench.engine.distiller import Distiller, wants_compilation
from kdbench.engine.ema import Average
from kdbench.engine.metrics import Meters
from kdbench.engine.optimizer import load_state, lr_setter, make_optimizer
from kdbench.engine.options import OptimizerOptions, TrainerOptions
from kdbench.types import Batch, LossTerms, OptimizerState, Outputs, StepOutput, counted


class Learner:
    """What one student owns: its network, loss, optimizer and random numbers. Several may share batches and a teacher.

    `factors` [total steps] multiply the optimizer's learning rate; `meters` note what its steps come to; `seed` makes
    dropout and random losses a function of (seed, epoch), so that a resumed training replays them.
    """

    def __init__(
        self,
        distiller: Distiller,
        optimizer: OptimizerOptions,
        trainer: TrainerOptions,
        factors: list[float],
        meters: Meters,
        seed: int,
    ) -> None:
        device = distiller.placement.device
        self.distiller = distiller
        if wants_compilation(trainer, device, len(factors)) and optimizer.name not in APART:
            distiller.compile_student(strict=trainer.compile == "on")
        self.recorded = wants_graph(trainer, device, optimizer)  # whether its steps may be part of a graph
        self.optimizer = make_optimizer(optimizer, [distiller], on_device=self.recorded or device.type == "cuda")
        self.set_lr = lr_setter(self.optimizer)
        self.scaler = torch.amp.GradScaler(device.type, enabled=distiller.placement.dtype == torch.float16)
        self.average = Average(distiller.student, trainer.ema) if trainer.ema else None
        self.trainer, self.clip, self.parameters = trainer, trainer.clip, list(distiller.parameters())
        self.lr, self.factors, self.meters, self.seed = optimizer.lr, factors, meters, seed
        self.steps_done = 0
        self.failure: Exception | None = None
        self.random_state: list[Tensor] = []  # of the CPU, and of the GPU where it is on one
        self.fresh_state: list[Tensor] = []  # the same at the start of the epoch

    def step(self, batch: Batch, teacher: Outputs | None) -> None:
        """One update from one batch; `teacher` is what the teacher says of it. A failure is kept, not raised."""
        if self.failure is None:
            self.enter()
            try:
                self.set_lr(self.lr * self.factors[self.steps_done])
                self.update(batch, teacher)
            except Exception as failure:
                if self.distiller.together is not None:  # the other processes must not wait for it
                    raise
                self.fail(failure)
            self.steps_done += 1
            self.leave()

    def backward(self, terms: LossTerms) -> None:
        """The gradient of the loss; of each of its terms, where the optimizer keeps them apart."""
        if isinstance(self.optimizer, ApartOptimizer):
            self.optimizer.backward(terms.weighted)
        else:
            self.scaler.scale(terms.total).backward()

    def update(self, batch: Batch, teacher: Outputs | None) -> None:
        """The device's part of a step: the same work every time, and nothing counted in Python."""
        teacher = counted(teacher, batch.target) if teacher is not None else None
        output = self.accumulated(batch, teacher)
        if self.distiller.together is not None:
            self.distiller.together.add_gradients()
        if self.clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update()
        self.meters.add(output, teacher, batch.target)

    def accumulated(self, batch: Batch, teacher: Outputs | None) -> StepOutput:
        """Gradients of a batch's loss: of the whole, or added up over `trainer.accumulate` parts of it.

        A part is a batch of its own to batch norm, and to losses that compare its rows.
        """
        if self.trainer.accumulate == 1:
            output: StepOutput = self.distiller(batch.input, teacher, batch.target)
            self.backward(output.terms)
            return output
        found = []
        for part, answer, share in parts(batch, teacher, self.trainer.accumulate):
            output = self.distiller(part.input, answer, part.target)
            self.scaler.scale(share * output.terms.total).backward()
            found.append((output, share))
        return joined(found)

    @property
    def counters(self) -> list[Tensor]:
        """What every step adds one to on the device: the batches of each batch norm and the steps of the meters. None
        with a compiled network, whose additions are not called from Python."""
        if self.distiller.compiled:
            return []
        buffers = self.distiller.student.named_buffers()
        return [self.meters.step, *(buffer for name, buffer in buffers if name.endswith("num_batches_tracked"))]

    @property
    def network(self) -> nn.Module:
        """The network that is evaluated and exported: the student, or its moving average."""
        return self.distiller.student if self.average is None else self.average.network

    def begin_epoch(self, epoch: int) -> None:
        self.distiller.train()
        self.meters.reset()
        # numpy's mixing of (seed, epoch) into one number would do as well; a prime keeps neighbours apart.
        seed = (self.seed * 1_000_003 + epoch) % 2**63
        torch.manual_seed(seed)
        if self.distiller.together is not None:
            self.distiller.together.begin_epoch(seed)
        self.leave()
        self.fresh_state = self.random_state

    def fail(self, failure: Exception) -> None:
        """Leave the training. What the failed step held (on a GPU, all of its activations) is given back."""
        self.failure = failure
        traceback.clear_frames(failure.__traceback__)
        self.optimizer.zero_grad(set_to_none=True)
        if self.distiller.placement.device.type == "cuda":
            torch.cuda.empty_cache()

    def enter(self) -> None:
        """Make the global generators this learner's (5 kB to copy on the CPU, no device sync)."""
        torch.set_rng_state(self.random_state[0])
        if len(self.random_state) > 1:
            torch.cuda.set_rng_state(self.random_state[1], self.distiller.placement.device)

    def leave(self) -> None:
        device = self.distiller.placement.device
        self.random_state = [torch.get_rng_state()]
        if device.type == "cuda":
            self.random_state.append(torch.cuda.get_rng_state(device))

    @property
    def draws(self) -> bool:
        """Whether its steps in this epoch drew random numbers on the device."""
        return not torch.equal(self.fresh_state[-1], self.random_state[-1])

    def copied(self) -> Learner:
        """The same learner in memory of its own, its network not compiled."""
        own = copy.copy(self)
        parts = (self.distiller, self.optimizer, self.scaler, self.average, self.meters)
        # At once: the optimizer's parameters are the network's, in the copy too.
        own.distiller, own.optimizer, own.scaler, own.average, own.meters = copy.deepcopy(parts)
        own.distiller.plain()
        own.set_lr, own.parameters = lr_setter(own.optimizer), list(own.distiller.parameters())
        for parameter, copied in zip(self.distiller.parameters(), own.parameters, strict=True):
            _hook_alike(parameter, copied)
        return own

    def take(self, other: Learner) -> None:
        """Go on from where a copy of it has come to."""
        self.restore(other.state())
        self.meters, self.random_state = other.meters, other.random_state

    def state(self) -> LearnerState:
        """All that a bit-exact continuation needs; random states are functions of (seed, epoch)."""
        return {
            "distiller": self.distiller.state_dict(),
            "optimizer": cast(OptimizerState, self.optimizer.state_dict()),
            "scaler": self.scaler.state_dict(),
            "average": self.average.network.state_dict() if self.average is not None else None,
            "steps_done": self.steps_done,
        }

    def restore(self, state: LearnerState) -> None:
        """Go on from a checkpoint, also one of another device or of steps that were not recorded."""
        self.distiller.load_state_dict(state["distiller"])
        load_state(self.optimizer, state["optimizer"])
        self.set_lr = lr_setter(self.optimizer)
        if state.get("scaler") and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        if self.average is not None and state["average"] is not None:
            self.average.restore(state["average"], state["steps_done"])
        self.steps_done = state["steps_done"]


def _hook_alike(parameter: nn.Parameter, copied: nn.Parameter) -> None:
    """Let a copy of a parameter have its hooks (a mask of its gradient, say), which deepcopy leaves out."""
    for hook in list((parameter._backward_hooks or {}).values()):
        copied.register_hook(hook)
    for hook in list((getattr(parameter, "_post_accumulate_grad_hooks", None) or {}).values()):
        copied.register_post_accumulate_grad_hook(hook)
