"""Several teachers as one: how their answers are averaged, and how much of their common gain a student has kept."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdbench.arguments import checked
from kdbench.arguments.ranges import Positive, Range, listed
from kdbench.errors import UserError
from kdbench.models.base import MadeWith
from kdbench.types import MEMBERS, Outputs

Mean = Literal["arithmetic", "geometric"]
Tau = Annotated[float, Range("above 0 (inf: the geometric mean)", lambda tau: tau > 0)]
Weights = Annotated[list[Positive], listed(2)]  # one a member


def ensemble_logits(
    logits: Sequence[Tensor],
    weights: Sequence[float] | None = None,
    mean: Mean = "arithmetic",
    tau: float = 1.0,
) -> Tensor:
    """One answer [B, C] float32 of K members' logits, each [B, C].

    arithmetic: tau log sum_k w_k softmax(z_k / tau). Its softmax at temperature tau is exactly the weighted mean of the
    members' distributions at tau, and at no other temperature; in the limit tau = inf it is the geometric mean.
    geometric: sum_k w_k z_k, whose softmax at any temperature is the members' weighted geometric mean, normalised
    (both means: Hinton et al. 2015, section 2). `weights` are normalised to sum to 1; None: equal.
    """
    shares = normalised_weights(weights, len(logits))
    answers = [z.to(torch.float32) for z in logits]
    if mean == "geometric" or math.isinf(tau):
        return torch.stack([share * z for share, z in zip(shares, answers, strict=True)]).sum(0)
    logs = [F.log_softmax(z / tau, -1) + math.log(share) for share, z in zip(shares, answers, strict=True)]
    return tau * torch.logsumexp(torch.stack(logs), 0)


def normalised_weights(weights: Sequence[float] | None, members: int) -> list[float]:
    """Positive, summing to 1. Raises UserError unless there is one positive number for each member."""
    if weights is None:
        return [1 / members] * members
    if len(weights) != members or any(not 0 < w < math.inf for w in weights):
        raise UserError("weights", list(weights), f"{members} numbers above 0, one a member")
    return [w / sum(weights) for w in weights]


@checked
class Ensemble(MadeWith):
    """Frozen members that answer as one network: logits by `ensemble_logits`, and the members' own side by side as the
    feature "members" [B, K, C]; no others, which have no mean.

    One forward costs the forwards of all members. What the mean is made with lies in buffers, so that the weight hash
    tells ensembles of the same members apart.
    """

    def __init__(
        self,
        members: Sequence[nn.Module],
        weights: Weights | None = None,
        mean: Mean = "arithmetic",
        tau: Tau = 1.0,
    ) -> None:
        super().__init__()
        self.last_layer_name = ""  # there is no single classifier
        self.members = nn.ModuleList(members)
        self.mean, self.tau = mean, float(tau)
        self.weights = normalised_weights(weights, len(members))
        # Where the temperature has no effect it does not count: the same teacher keeps the same hash.
        made_with = [math.inf if mean == "geometric" else self.tau, *self.weights]
        self.keep(made_with)

    def forward(self, input: Tensor) -> Outputs:
        """input [B, ...] -> logits [B, C] float32."""
        answers = [member(input).logits for member in self.members]
        return Outputs(ensemble_logits(answers, self.weights, self.mean, self.tau), {MEMBERS: torch.stack(answers, 1)})


def at_temperature_1(ensemble: Ensemble) -> Ensemble:
    """The same members, whose softmax is the mean of their predictions; weights are shared."""
    same = copy.copy(ensemble)
    same.tau = 1.0
    return same.eval()


def share_recovered(student: float, members: float, ensemble: float) -> float | None:
    """(student - members' mean) / (ensemble - members' mean): 1 if the student is as good as the ensemble, 0 if it is
    no better than a member (Hinton et al. 2015, section 4: above 80 %). None where the ensemble gains nothing."""
    return (student - members) / (ensemble - members) if ensemble > members else None


def mean_metrics(members: Sequence[Mapping[str, float | None]]) -> dict[str, float]:
    """The mean over members of every number that all of them have."""
    numbers = [{key: value for key, value in member.items() if value is not None} for member in members]
    common = [key for key in numbers[0] if all(key in other for other in numbers)]
    return {key: sum(member[key] for member in numbers) / len(members) for key in common}
