"""The fusion of a generalist and its specialists: closed form, gradient descent, and what must hold of any answer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kdbench.models.fusion import Fused, fuse
from kdbench.types import Outputs

CLASSES, BATCH = 9, 12


def problem(seed: int, specialists: int, overlap: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """general [B, C], special [B, M, C], dustbin [B, M], covers [M, C], float64; sharp to flat distributions."""
    generator = torch.Generator().manual_seed(seed)
    covers = torch.zeros(specialists, CLASSES, dtype=torch.bool)
    for m in range(specialists):
        first = 2 * m if overlap else 3 * m
        covers[m, first : first + 3] = True
    sharp = 4 * torch.rand(BATCH, 1, generator=generator, dtype=torch.float64)
    general = (sharp * torch.randn(BATCH, CLASSES, generator=generator, dtype=torch.float64)).softmax(1)
    answers = (
        sharp[:, :, None] * torch.randn(BATCH, specialists, 4, generator=generator, dtype=torch.float64)
    ).softmax(2)
    special = torch.zeros(BATCH, specialists, CLASSES, dtype=torch.float64)
    for m in range(specialists):
        special[:, m, covers[m]] = answers[:, m, :3]
    return general, special, answers[:, :, 3], covers


def objective(q: Tensor, general: Tensor, special: Tensor, dustbin: Tensor, covers: Tensor, active: Tensor) -> Tensor:
    """Equation 5 of Hinton et al. 2015, written out: [B]."""
    total = (torch.xlogy(general, general) - general * q.log()).sum(1)
    for m in range(len(covers)):
        mass = (q * ~covers[m]).sum(1)
        inside = (torch.xlogy(special[:, m], special[:, m]) - special[:, m] * q.log()).sum(1)
        outside = torch.xlogy(dustbin[:, m], dustbin[:, m]) - dustbin[:, m] * mass.log()
        total = total + active[:, m] * (inside + outside)
    return total


def closed_form(general: Tensor, special: Tensor, dustbin: Tensor, covers: Tensor) -> Tensor:
    """The minimum for one active specialist.

    general [B, C], special [B, C], dustbin [B], covers [B, C] or [C].
    Inside of its classes the mean of both; outside, the mean of both masses, spread as the generalist spreads its own.
    """
    inside = (general + special) / 2
    mass = torch.where(covers, 0.0, general).sum(1, keepdim=True)
    shared = general * ((mass + dustbin[:, None]) / (2 * mass).clamp_min(torch.finfo(general.dtype).tiny))
    return torch.where(covers, inside, shared)


def by_gradient(*parts: Tensor) -> Tensor:
    """The paper's own way: gradient descent on the logits of q (here with L-BFGS), image by image in one sum."""
    logits = parts[0].log().clone().requires_grad_(True)
    limits = {"max_iter": 400, "tolerance_grad": 1e-12, "tolerance_change": 1e-15, "history_size": 30}
    optimizer = torch.optim.LBFGS([logits], lr=1.0, line_search_fn="strong_wolfe", **limits)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = objective(logits.softmax(1), *parts).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return logits.detach().softmax(1)


def test_one_active_specialist_is_the_closed_form():
    general, special, dustbin, covers = problem(0, 1, overlap=False)
    active = torch.ones(BATCH, 1, dtype=torch.bool)
    closed = closed_form(general, special[:, 0], dustbin[:, 0], covers[0])
    assert (fuse(general, special, dustbin, covers, active) - closed).abs().max() < 1e-9
    assert (by_gradient(general, special, dustbin, covers, active) - closed).abs().max() < 1e-5


def test_no_active_specialist_leaves_the_generalist():
    general, special, dustbin, covers = problem(1, 3, overlap=True)
    active = torch.zeros(BATCH, 3, dtype=torch.bool)
    assert torch.equal(fuse(general, special, dustbin, covers, active), general)


def test_several_active_specialists_agree_with_gradient_descent():
    general, special, dustbin, covers = problem(2, 4, overlap=True)
    active = torch.rand(BATCH, 4, generator=torch.Generator().manual_seed(3)) < 0.7
    parts = (general, special, dustbin, covers, active)
    q = fuse(*parts)
    assert torch.allclose(q.sum(1), torch.ones(BATCH, dtype=torch.float64), atol=1e-14)
    assert q.min() > 0
    descended = by_gradient(*parts)
    assert (q - descended).abs().max() < 1e-4
    assert (objective(q, *parts) <= objective(descended, *parts) + 1e-12).all()


def test_the_answer_is_a_stationary_point():
    general, special, dustbin, covers = problem(4, 4, overlap=True)
    active = torch.ones(BATCH, 4, dtype=torch.bool)
    logits = fuse(general, special, dustbin, covers, active).log().requires_grad_(True)
    objective(logits.softmax(1), general, special, dustbin, covers, active).sum().backward()
    assert logits.grad is not None and logits.grad.abs().max() < 1e-8


def test_a_specialist_that_says_what_the_generalist_says_changes_nothing():
    general, _, _, covers = problem(5, 3, overlap=True)
    special = torch.where(covers, general[:, None, :], 0.0)
    dustbin = 1 - special.sum(2)
    q = fuse(general, special, dustbin, covers, torch.ones(BATCH, 3, dtype=torch.bool))
    assert (q - general).abs().max() < 1e-9


class Says(nn.Module):
    """A network with fixed logits: images are their own row numbers."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.table = logits

    def forward(self, image: Tensor) -> Outputs:
        return Outputs(self.table[image[:, 0, 0, 0].long()], {})


def test_the_fused_network_corrects_the_dustbin_and_leaves_uncovered_images_alone():
    generator = torch.Generator().manual_seed(6)
    general = 3 * torch.randn(BATCH, CLASSES, generator=generator)
    sets = [[4, 1], [7, 2, 5]]
    special = [torch.randn(BATCH, len(s) + 1, generator=generator) for s in sets]
    offsets = [1.5, -0.7]
    network = Fused(Says(general), [Says(z) for z in special], sets, offsets, CLASSES)
    logits = network(torch.arange(BATCH, dtype=torch.float32).view(-1, 1, 1, 1)).logits
    top = general.argmax(1)
    for row in range(BATCH):
        p = general[row].double().softmax(0)
        m = next((m for m, s in enumerate(sets) if int(top[row]) in s), None)
        if m is not None:
            answer = special[m][row].double()
            answer[-1] += offsets[m]
            answer = answer.softmax(0)
            spread = torch.zeros(CLASSES, dtype=torch.float64)
            spread[sets[m]] = answer[:-1]
            covers = torch.zeros(CLASSES, dtype=torch.bool)
            covers[sets[m]] = True
            p = closed_form(p[None], spread[None], answer[-1:], covers)[0]
        assert (logits[row].double().exp() - p).abs().max() < 1e-6
