"""Student and loss as one module from tensors to tensors, so that DDP, compilation and CUDA graphs can wrap it."""

from __future__ import annotations

from torch import Tensor, nn

from kdbench.engine.device import Placement
from kdbench.losses.base import DistillationLoss
from kdbench.types import Outputs, StepOutput, Target


class Distiller(nn.Module):
    """One forward pass of a student under its loss.

    A loss's adapters are parameters here, beside the student's: they train with it and stay out of the export.
    """

    def __init__(self, student: nn.Module, loss: DistillationLoss, placement: Placement) -> None:
        super().__init__()
        self.student = student
        self.loss = loss
        self.placement = placement

    def forward(self, image: Tensor, teacher: Outputs | None, target: Target) -> StepOutput:
        """image [B, C, H, W]; the loss itself runs outside autocast, in float32."""
        with self.placement.autocast():
            outputs = self.student(image)
        terms = self.loss(outputs, teacher, target)
        return StepOutput(terms, outputs.logits.detach())
