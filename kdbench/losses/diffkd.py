"""DiffKD: what the student's feature has more of than the teacher's is noise, and a diffusion model takes it out."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from kdbench.arguments.ranges import Count, Positive, Width
from kdbench.losses.adapters import BatchNorm
from kdbench.losses.base import Smoothing, Weights, number
from kdbench.losses.features import FeatureLoss, OneLayer, one, same_size
from kdbench.losses.functional import kl_rows, log_probs, real
from kdbench.types import LossTerms, Outputs, Target

TRAINED = 1000  # steps of the diffusion
EMBEDDED = 1280  # rows of the steps' embedding, as the authors have it


def kept_shares() -> Tensor:
    """prod (1 - beta) up to each step [1000], beta from 0.0001 to 0.02 linearly (Ho et al. 2020)."""
    return torch.cumprod(1 - torch.linspace(0.0001, 0.02, TRAINED, dtype=torch.float32), dim=0)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution with batch norm, `reduction` times narrower in the middle, around a shortcut."""

    def __init__(self, width: int, reduction: int = 4) -> None:
        super().__init__()
        middle = max(1, width // reduction)
        self.block = nn.Sequential(
            nn.Conv2d(width, middle, 1), BatchNorm(middle), nn.ReLU(),
            nn.Conv2d(middle, middle, 3, padding=1), BatchNorm(middle), nn.ReLU(),
            nn.Conv2d(middle, width, 1), BatchNorm(width),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) + x


class Denoiser(nn.Module):
    """The noise in a map [B, D, H, W] at a step of the diffusion [B] or 0-dim; `vectors`: 1x1 convolutions alone."""

    def __init__(self, width: int, vectors: bool) -> None:
        super().__init__()
        self.time = nn.Embedding(EMBEDDED, width)
        if vectors:
            wide = 4 * width
            layers: list[nn.Module] = [
                nn.Conv2d(width, wide, 1), BatchNorm(wide), nn.ReLU(), nn.Conv2d(wide, width, 1), BatchNorm(width),
                nn.Conv2d(width, wide, 1), BatchNorm(wide), nn.ReLU(), nn.Conv2d(wide, width, 1),
            ]  # fmt: skip
        else:
            layers = [Bottleneck(width), Bottleneck(width), nn.Conv2d(width, width, 1), BatchNorm(width)]
        self.layers = nn.Sequential(*layers)

    def forward(self, noisy: Tensor, step: Tensor) -> Tensor:
        return self.layers(noisy + self.time(step)[..., None, None])


class Level(nn.Module):
    """How much of a map is signal, in [0, 1] a sample [B]: it is given so much noise that the diffusion can take out.
    """

    def __init__(self, width: int, vectors: bool) -> None:
        super().__init__()
        wide = 2 * width
        mixed = nn.Sequential(
            nn.Conv2d(width, wide, 1), BatchNorm(wide), nn.ReLU(), nn.Conv2d(wide, width, 1), BatchNorm(width)
        )  # fmt: skip
        self.feature = mixed if vectors else nn.Sequential(Bottleneck(width, 8), nn.AdaptiveAvgPool2d(1))
        self.share = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.share(self.feature(x).flatten(1)).softmax(1)[:, 0]


class Diffusion(nn.Module):
    """A diffusion model of the teacher's feature, and the student's as it comes out of it (Huang et al. 2023, diffusion
    terms).

    `forward` gives (the student's feature denoised, the teacher's, the model's own loss, that of the teacher's
    autoencoder or 0).
    """

    kept: Tensor

    def __init__(self, student: int, teacher: int, latent: int | None, steps: int) -> None:
        super().__init__()
        vectors, width = latent is None, latent or teacher
        self.steps = steps
        self.encoder: nn.Module = nn.Identity()
        self.decoder: nn.Module = nn.Identity()
        if latent is not None:
            self.encoder = nn.Sequential(nn.Conv2d(teacher, latent, 1), BatchNorm(latent))
            self.decoder = nn.Conv2d(latent, teacher, 1)
        self.transform = nn.Conv2d(student, width, 1)
        self.denoiser = Denoiser(width, vectors)
        self.level = Level(width, vectors)
        self.project = nn.Sequential(nn.Conv2d(width, width, 1), BatchNorm(width))
        self.register_buffer("kept", kept_shares(), persistent=False)

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        own = self.transform(student)
        hidden = self.encoder(teacher)
        rebuilt = (teacher - self.decoder(hidden)).square().mean()
        hidden = hidden.detach()
        return self.project(self.denoised(own)), hidden, self.own_loss(hidden), rebuilt

    def denoised(self, feature: Tensor) -> Tensor:
        """The last `steps` of twice as many steps of DDIM (Song et al. 2021, its sampling, deterministic)."""
        share = self.level(feature)[:, None, None, None]
        noise = torch.randn(feature.shape, device=feature.device, dtype=feature.dtype)
        x = share * feature + (1 - share) * noise
        stride = TRAINED // (2 * self.steps)
        for step in range((self.steps - 1) * stride, -1, -stride):
            error = self.denoiser(x, torch.full((), step, device=x.device))
            kept = self.kept[step].to(x)
            before = self.kept[step - stride].to(x) if step >= stride else torch.ones_like(kept)
            clean = (x - (1 - kept).sqrt() * error) / kept.sqrt()
            x = before.sqrt() * clean + (1 - before).sqrt() * error
        return x

    def own_loss(self, feature: Tensor) -> Tensor:
        """Mean squared error of the noise that was put into the teacher's feature at steps drawn evenly."""
        noise = torch.randn(feature.shape, device=feature.device, dtype=feature.dtype)
        step = torch.randint(0, TRAINED, (len(feature),), device=feature.device)
        kept = self.kept[step].to(feature)[:, None, None, None]
        return (self.denoiser(kept.sqrt() * feature + (1 - kept).sqrt() * noise, step) - noise).square().mean()


class DiffKD(FeatureLoss):
    """weights.task CE(y, s) + weights.feature mean (D(f_s) - f_t)^2 + weights.logits KL(t || D'(s)) + weights.diffusion
    (the losses of the two diffusion models) + weights.rebuild (that of the autoencoder that makes f_t of the teacher's
    map), D and D' the last `steps` denoising steps of models of the teacher's map and logits, which train with the
    student (Huang et al. 2023, diffusion terms). All weights are 1 as published.

    `latent`: channels of f_t (1024 for ImageNet), null: half of the teacher's. The student's outputs get as much noise
    as a learned level says. The larger map is averaged down. Draws noise: a loss of the same batch differs each time.
    """

    maps_only: ClassVar[bool] = True
    terms: ClassVar[tuple[str, ...]] = ("task", "feature", "logits", "diffusion", "rebuild")
    paper: ClassVar[str] = "Huang et al. 2023 (DiffKD), diffusion terms"

    def __init__(
        self,
        weights: Weights,
        layer: OneLayer = "last",
        latent: Width | None = None,
        steps: Count = 5,
        tau: Positive = 1.0,
        label_smoothing: Smoothing = 0.0,
    ) -> None:
        super().__init__(weights, one(layer), label_smoothing, "layer")
        self.latent, self.denoising_steps, self.tau = latent, steps, tau
        self.maps_model: nn.Module = nn.Identity()
        self.logits_model: nn.Module = nn.Identity()

    @property
    def formula(self) -> str:
        text = self.written(
            task=self.task_text, feature="mean (D(f_s) - f_t)^2", logits="tau^2 KL(t/tau || D'(s)/tau)",
            diffusion="(noise of D and D')", rebuild="mean (d(f_t) - map_t)^2",
        )  # fmt: skip
        kind = f"D and D' the last {self.denoising_steps} of {2 * self.denoising_steps} steps of learned diffusions"
        return f"{text}, {kind}, tau = {number(self.tau)}, f = {self.layers_text}"

    def setup(self, student: Outputs, teacher: Outputs | None) -> None:
        super().setup(student, teacher)
        s, t = self.map(student, teacher)
        device, classes = student.logits.device, student.logits.shape[1]
        latent = self.latent or max(1, t.shape[1] // 2)
        self.maps_model = Diffusion(s.shape[1], t.shape[1], latent, self.denoising_steps).to(device)
        self.logits_model = Diffusion(classes, classes, None, self.denoising_steps).to(device)

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        s, t = same_size(*self.map(student, teacher))
        assert teacher is not None
        own, aim, noise, rebuilt = self.maps_model(s, t)
        logits = [real(z)[:, :, None, None] for z in (student.logits, teacher.logits.detach())]
        answer, truth, more, _ = self.logits_model(*logits)
        p, q = (log_probs(z.flatten(1), self.tau) for z in (truth, answer))
        return self.combine(
            task=self.task(student.logits, target.label),
            feature=(own - aim).square().mean(),
            logits=self.tau**2 * kl_rows(p, q).mean(),
            diffusion=noise + more,
            rebuild=rebuilt,
        )
