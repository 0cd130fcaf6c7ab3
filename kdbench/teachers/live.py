"""A frozen network that is asked anew for every batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kdbench.types import Batch, Outputs


def freeze(network: nn.Module) -> nn.Module:
    """Evaluation mode, no gradients: what every teacher is."""
    return network.eval().requires_grad_(False)


class LiveTeacher:
    """Outputs of a frozen network for the images of a batch.

    Images go through in chunks of one fixed size (`chunk`; the last one padded), because the last bit of a logit may
    depend on the shape of the batch that it was computed in. So a table filled in chunks of the same size holds exactly
    these numbers. `context` makes the precision context, `torch.autocast` or nothing.
    """

    def __init__(self, network: nn.Module, chunk: int, context) -> None:
        self.network = freeze(network)
        self.chunk = chunk
        self.context = context

    def __call__(self, batch: Batch) -> Outputs:
        return self.outputs(batch.image)

    def outputs(self, image: Tensor) -> Outputs:
        """image [B, C, H, W] normalised, any B; logits and features in the precision of the network."""
        size = len(image)
        with torch.no_grad(), self.context():
            parts = [self._whole(piece) for piece in image.split(self.chunk)]
        if len(parts) == 1:
            return _first(parts[0], size)
        features = {key: torch.cat([p.features[key] for p in parts])[:size] for key in parts[0].features}
        return Outputs(torch.cat([p.logits for p in parts])[:size], features)

    def _whole(self, image: Tensor) -> Outputs:
        missing = self.chunk - len(image)
        if missing:
            padding = image.new_zeros(missing, *image.shape[1:])
            image = torch.cat([image, padding]).contiguous(memory_format=_layout(image))
        return self.network(image)


def _layout(image: Tensor) -> torch.memory_format:
    last = image.ndim == 4 and image.is_contiguous(memory_format=torch.channels_last) and not image.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def _first(outputs: Outputs, size: int) -> Outputs:
    if len(outputs.logits) == size:
        return outputs
    return Outputs(outputs.logits[:size], {key: value[:size] for key, value in outputs.features.items()})
