"""A distillation token for any ViT of timm (Touvron et al. 2021, DeiT)."""

from __future__ import annotations

from typing import Any

import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn


class DistillationToken:
    """A second learned token of a ViT of timm, which attends as the class token does, with a classifier of its own,
    `head_dist`. It answers as timm's VisionTransformerDistilled: the mean of both heads' logits, and with
    `distilled_training` in training mode the pair.

    The token stands behind the class token, and first where there is none. It has no entry in the position embedding:
    its position never changes, so that a vector added to it would be part of the token itself. Whatever the ViT pools
    (class token, mean of the patches, attention), the second head reads this token alone, after the same norm.
    """

    distilled_training = False

    def add_token(self: Any) -> None:
        """Make the token and its head, drawn as timm draws DeiT's (normal with deviation 0.02, bias 0)."""
        self.dist_token = nn.Parameter(torch.empty(1, 1, self.embed_dim))
        self.head_dist = nn.Linear(self.embed_dim, self.num_classes) if self.num_classes > 0 else nn.Identity()
        nn.init.trunc_normal_(self.dist_token, std=0.02)
        if self.num_classes > 0:
            nn.init.trunc_normal_(self.head_dist.weight, std=0.02)
            nn.init.zeros_(self.head_dist.bias)
        self.dist_index = int(self.cls_token is not None)
        self._count_prefix(1)

    def _count_prefix(self: Any, more: int) -> None:
        """Count `more` tokens before the patches, in every part that counts them (rotary attention leaves them out).

        Patch dropout is left alone where it comes before the token does (in timm's Eva).
        """
        early = self.patch_drop if isinstance(self, Eva) else None
        for module in self.modules():
            if module is not early and isinstance(getattr(module, "num_prefix_tokens", None), int):
                module.num_prefix_tokens += more

    def _pos_embed(self: Any, patches: Tensor) -> Any:
        self.num_prefix_tokens -= 1  # so many the position embedding knows of, when it is resized to an image's grid
        try:
            found = super()._pos_embed(patches)  # type: ignore[misc]
        finally:
            self.num_prefix_tokens += 1
        if isinstance(found, tuple):  # with rotary embeddings, which have no entries for tokens before the patches
            return self._with_token(found[0]), *found[1:]
        return self._with_token(found)

    def _with_token(self: Any, tokens: Tensor) -> Tensor:
        own = self.dist_token.expand(tokens.shape[0], -1, -1).to(tokens.dtype)
        return torch.cat((tokens[:, : self.dist_index], own, tokens[:, self.dist_index :]), dim=1)

    def forward_head(self: Any, tokens: Tensor, pre_logits: bool = False) -> Any:
        pooled = super().forward_head(tokens, pre_logits=True)  # type: ignore[misc]
        other = self.head_drop(self.fc_norm(tokens[:, self.dist_index]))
        if pre_logits:
            return (pooled + other) / 2
        logits = self.head(pooled), self.head_dist(other)
        return logits if self.distilled_training and self.training else (logits[0] + logits[1]) / 2

    def get_classifier(self: Any) -> tuple[nn.Module, nn.Module]:
        return self.head, self.head_dist

    def set_distilled_training(self, enable: bool = True) -> None:
        self.distilled_training = enable

    def no_weight_decay(self: Any) -> set[str]:
        return {*super().no_weight_decay(), "dist_token"}  # type: ignore[misc]

    def group_matcher(self: Any, coarse: bool = False) -> dict[str, Any]:
        """timm's groups for layer decay, with the token among the first, as the class token is."""
        groups = super().group_matcher(coarse)  # type: ignore[misc]
        return {**groups, "stem": f"{groups['stem']}|^dist_token"}


class DistilledViT(DistillationToken, VisionTransformer):
    """VisionTransformer with a distillation token."""


class DistilledEva(DistillationToken, Eva):
    """Eva (EVA, EVA-02, DINOv3, PE: ViTs with rotary positions) with a distillation token."""


def with_distillation_token(net: nn.Module) -> nn.Module | None:
    """`net` itself with a token and a head more, drawn anew; its other weights stay. None if it is no such ViT.

    Its class changes in place, as timm has no way to name the class that it builds. Keys of its state_dict: the ViT's,
    `dist_token` and `head_dist.*`.
    """
    kinds: dict[type, Any] = {VisionTransformer: DistilledViT, Eva: DistilledEva}
    if type(net) not in kinds:
        return None
    net.__class__ = kinds[type(net)]
    net.add_token()  # type: ignore[operator]
    return net
