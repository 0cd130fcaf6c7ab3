"""Posterior: the true class probabilities of data that knows them, as a teacher (`teacher=posterior`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kdbench.data.bundle import Bundle
from kdbench.errors import UserError
from kdbench.runs.obtain import measured
from kdbench.runs.recipe import Catalogue, NetworkSpec, Recipe, TeacherSpec
from kdbench.runs.taught import TaughtBy
from kdbench.types import Info, Outputs, VectorInfo


@dataclass(frozen=True)
class Posterior:
    """p*(class | input): what a network with endless data would say, and the best supervision that there is (Ren et al.
    2022; Menon et al. 2021)."""

    def describe(self, catalogue: Catalogue) -> NetworkSpec:
        return NetworkSpec("posterior", {}, _sketch, single=False)

    def obtain(self, spec: TeacherSpec, recipe: Recipe, data: Bundle) -> TaughtBy:
        """Raises UserError for data whose probabilities are not known."""
        recipe.refuse_features("teacher posterior")
        if data.posterior is None:
            raise _unknown(data.name)
        return measured("posterior", PosteriorNetwork(data.posterior, data.mean, data.std), None, recipe, data)


class PosteriorNetwork(nn.Module):
    """A posterior of inputs as a dataset holds them, for inputs as networks get them; no features.

    mean, std: what the inputs [B, D] are normalised with, one of each a dimension.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, posterior: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.posterior = posterior
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32))

    def forward(self, inputs: Tensor) -> Outputs:
        return Outputs(self.posterior(inputs * self.std + self.mean), {})


def _sketch(info: Info) -> nn.Module:
    """Its shapes before the data is asked. Raises UserError for images and texts: nobody knows the truth of those."""
    if not isinstance(info, VectorInfo):
        raise _unknown(str(info))
    zeros, ones = (0.0,) * info.dimensions, (1.0,) * info.dimensions
    return PosteriorNetwork(nn.Linear(info.dimensions, info.num_classes), zeros, ones)


def _unknown(data: str) -> UserError:
    allowed = f"a network: the true probabilities of {data} are not known; dataset=gaussian has them"
    return UserError("teacher", "posterior", allowed)
