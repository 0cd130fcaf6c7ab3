"""A generalist and specialists as one teacher: the distribution that is nearest to all of theirs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdbench.models.base import MadeWith
from kdbench.types import Outputs

FLOOR = 1e-10  # the least probability that counts: below it, q cannot be told from 0 in float64


def fuse(general: Tensor, special: Tensor, dustbin: Tensor, covers: Tensor, active: Tensor, steps: int = 60) -> Tensor:
    """The q [B, C] that minimises KL(general || q) + sum over active m of KL(specialist m || q as m sees it).

    general [B, C] the generalist's probabilities; special [B, M, C] the specialists', 0 outside of their classes;
    dustbin [B, M] their mass on all other classes; covers [M, C] bool their classes; active [B, M] bool (Hinton et al.
    2015, inference with specialists: the mass of q on a specialist's other classes is summed before it is compared).

    The paper runs gradient descent on the logits of q. Here the dual is solved, which has one unknown a specialist
    instead of one a class: with a = general + sum of special, q = a / (L - sum of r_m over the m that do not cover the
    class), L = 1 + number of active specialists, and r maximises the concave sum_i a_i log(a_i / q_i) + sum_m
    dustbin_m log r_m. Newton with backtracking; one active specialist starts at its closed form, r = L dustbin /
    (sum of a outside + dustbin), which is the solution. No active specialist: q is `general` itself. Where some are,
    the generalist's probabilities count as FLOOR at least, and a smaller dustbin as empty: a specialist may be sure of
    what the generalist rules out.
    """
    on = active.to(general.dtype)
    dust = torch.where(dustbin > FLOOR, dustbin, 0.0) * on
    a = general.clamp_min(FLOOR)
    a = a / a.sum(1, keepdim=True) + (special * on[..., None]).sum(1)  # [B, C]
    level = a.sum(1, keepdim=True) + dust.sum(1, keepdim=True)  # [B, 1]: 1 + the number of active ones
    outside = (~covers).to(general.dtype)  # [M, C]
    r = _start(a, dust, level, outside)
    alone = on.sum(1, keepdim=True) <= 1
    for _ in range(steps):
        direction, gain = _newton(a, dust, level, outside, r)
        step = torch.where(alone, 0.0, _damped(a, dust, level, outside, r, direction, gain))
        r = r + step * direction
        if not bool((gain * ~alone > 1e-18).any()):
            break
    q = a / (level - r @ outside)
    return torch.where(on.any(1, keepdim=True), q / q.sum(1, keepdim=True), general)


def _start(a: Tensor, dust: Tensor, level: Tensor, outside: Tensor) -> Tensor:
    """r [B, M]: the closed form where one specialist is active, else its share, which leaves room for the others."""
    closed = level * dust / (a @ outside.T + dust).clamp_min(torch.finfo(a.dtype).tiny)
    return torch.where((dust > 0).sum(1, keepdim=True) <= 1, closed, dust)


def _newton(a: Tensor, dust: Tensor, level: Tensor, outside: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """The Newton direction [B, M] of the dual at r, and its slope along it [B, 1]; 0 where a specialist has no say."""
    free = dust > 0
    safe = torch.where(free, r, 1.0)
    room = level - r @ outside
    gradient = torch.where(free, dust / safe - (a / room) @ outside.T, 0.0)
    curvature = torch.einsum("bc,mc,nc->bmn", a / room.square(), outside, outside)
    both = free[:, :, None] & free[:, None, :]
    curvature = torch.where(both, curvature, 0.0)
    curvature = curvature + torch.diag_embed(torch.where(free, dust / safe.square(), 1.0))
    direction = torch.linalg.solve(curvature, gradient.unsqueeze(-1)).squeeze(-1)
    return direction, (direction * gradient).sum(1, keepdim=True)


def _damped(
    a: Tensor, dust: Tensor, level: Tensor, outside: Tensor, r: Tensor, direction: Tensor, gain: Tensor
) -> Tensor:
    """Step lengths [B, 1] that stay inside of the dual's domain and do not lower it (Armijo)."""
    here = _dual(a, dust, level, outside, r)
    step = torch.ones_like(level)
    for _ in range(40):
        there = _dual(a, dust, level, outside, r + step * direction)
        good = there >= here + 1e-4 * step * gain - 1e-13
        if bool(good.all()):
            break
        step = torch.where(good, step, step / 2)
    return step


def _dual(a: Tensor, dust: Tensor, level: Tensor, outside: Tensor, r: Tensor) -> Tensor:
    """[B, 1]; minus infinity outside of its domain."""
    room = level - r @ outside
    value = (a * room.clamp_min(1e-300).log()).sum(1) + torch.xlogy(dust, r.clamp_min(0)).sum(1)
    inside = (room > 0).all(1) & ((r > 0) | (dust == 0)).all(1)
    return torch.where(inside, value, -torch.inf)[:, None]


class Fused(MadeWith):
    """A generalist and its specialists as one network: logits are log q of `fuse`, and no features.

    A specialist's network has its classes `sets[m]` in this order and the dustbin last. `offsets` [M] are added to the
    dustbin's logit: log of how much more often the specialist saw its classes than they occur. A specialist is active
    where the generalist's `top` most probable classes hold one of its own. One forward costs those of all networks.
    """

    def __init__(
        self,
        generalist: nn.Module,
        specialists: Sequence[nn.Module],
        sets: Sequence[Sequence[int]],
        offsets: Sequence[float],
        num_classes: int,
        top: int = 1,
    ) -> None:
        super().__init__()
        self.generalist, self.specialists = generalist, nn.ModuleList(specialists)
        self.sets, self.top = [list(classes) for classes in sets], top
        covers = torch.zeros(len(sets), num_classes, dtype=torch.bool)
        for row, classes in zip(covers, self.sets, strict=True):
            row[classes] = True
        self.covers: Tensor
        # Known before any image: at most one specialist is ever active, and the solver has nothing to do.
        self.closed = top == 1 and bool((covers.sum(0) <= 1).all())
        self.register_buffer("covers", covers)
        # Plain numbers in the forward, out of reach of what networks are cast to; a copy for the hash.
        self.offsets = list(offsets)
        self.keep([float(top), *offsets])
        for m, classes in enumerate(self.sets):
            self.register_buffer(f"classes{m}", torch.tensor(classes))

    def forward(self, input: Tensor) -> Outputs:
        """input [B, ...] -> log q [B, C] float32."""
        general = _probabilities(self.generalist(input).logits)
        batch = input.shape[0]
        special = general.new_zeros(batch, len(self.sets), general.shape[1])
        dustbin = general.new_zeros(batch, len(self.sets))
        for m, (network, offset) in enumerate(zip(self.specialists, self.offsets, strict=True)):
            logits = network(input).logits.to(general.dtype)
            answer = F.softmax(torch.cat([logits[:, :-1], logits[:, -1:] + offset], 1), 1)
            special[:, m, self.get_buffer(f"classes{m}")] = answer[:, :-1]
            dustbin[:, m] = answer[:, -1]
        q = fuse(general, special, dustbin, self.covers, self.active(general), 0 if self.closed else 60)
        return Outputs(q.clamp_min(1e-30).log().float(), {})

    def active(self, general: Tensor) -> Tensor:
        """[B, M] bool: the specialists that have one of the generalist's `top` most probable classes."""
        chosen = torch.zeros_like(general, dtype=torch.bool).scatter(1, general.topk(self.top, 1).indices, True)
        return (chosen[:, None, :] & self.covers).any(2)


def _probabilities(logits: Tensor) -> Tensor:
    """float64, where the device has it: the solver's last digits."""
    return F.softmax(logits.to(torch.float32 if logits.device.type == "mps" else torch.float64), 1)
