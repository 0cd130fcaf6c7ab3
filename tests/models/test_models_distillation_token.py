"""A distillation token in any ViT of timm: timm's own numbers, wherever timm has such a network to compare with."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from kdbench.errors import UserError
from kdbench.models.distillation_token import with_distillation_token
from kdbench.models.timm import timm_model

SIZE: dict[str, Any] = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}
VITS: dict[str, dict[str, Any]] = {
    "class": {},
    "mean": {"global_pool": "avg"},
    "no_class": {"class_token": False, "global_pool": "avg"},
    "attention": {"class_token": False, "global_pool": "map"},
    "registers": {"reg_tokens": 2},
    "apart": {"no_embed_class": True},
    "any_size": {"dynamic_img_size": True},
    "dropped": {"patch_drop_rate": 0.5},
}
EVAS: dict[str, dict[str, Any]] = {
    "rotary": {"use_rot_pos_emb": True, "use_abs_pos_emb": False},
    "both": {"use_rot_pos_emb": True},
    "class": {"global_pool": "token"},
    "dropped": {"use_rot_pos_emb": True, "patch_drop_rate": 0.5},
}

ALL = [(VisionTransformer, options) for options in VITS.values()] + [(Eva, options) for options in EVAS.values()]
AS_REGISTERS = [(VisionTransformer, VITS[name]) for name in ("class", "mean", "apart", "any_size")] + ALL[len(VITS) :]


def _drawn(net: nn.Module) -> nn.Module:
    """The same network with every weight drawn anew: nothing stays at zero, where an error could hide."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.3)
    return net.double().eval()


def _image() -> Tensor:
    return torch.randn(3, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def test_the_token_gives_the_logits_of_timms_distilled_vit() -> None:
    """timm's token has an entry in the position embedding, which is added to it: one vector here."""
    theirs: Any = _drawn(VisionTransformerDistilled(**SIZE))
    state = theirs.state_dict()
    positions = state["pos_embed"]
    state["pos_embed"] = positions[:, [0, *range(2, positions.shape[1])]]
    state["dist_token"] = state["dist_token"] + positions[:, 1:2]
    ours: Any = with_distillation_token(VisionTransformer(**SIZE))
    ours.double().eval().load_state_dict(state, strict=True)
    torch.testing.assert_close(ours(_image()), theirs(_image()))
    for net in (ours, theirs):
        net.train().set_distilled_training()
    torch.testing.assert_close(ours(_image()), theirs(_image()))
    for one, other in zip(ours.forward_intermediates(_image())[1], theirs.forward_intermediates(_image())[1]):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("kind", "options"), AS_REGISTERS)
def test_the_first_head_sees_the_token_as_it_would_a_register(kind: Any, options: dict[str, Any]) -> None:
    """A register token behind the class token is what timm has for one token more: rotary positions leave both out."""
    count = {"reg_tokens": 1} if kind is VisionTransformer else {"num_reg_tokens": 1}
    theirs: Any = _drawn(kind(**SIZE, **options, **count))
    state = theirs.state_dict()
    if theirs.pos_embed is not None and not theirs.no_embed_class:
        positions = state["pos_embed"]
        state["reg_token"] = state["reg_token"] + positions[:, 1:2]
        state["pos_embed"] = positions[:, [0, *range(2, positions.shape[1])]]
    ours: Any = with_distillation_token(kind(**SIZE, **options)).double()
    state |= {"dist_token": state.pop("reg_token"), **{k: v for k, v in ours.state_dict().items() if "head_dist" in k}}
    ours.load_state_dict(state, strict=True)
    ours.train().set_distilled_training()
    torch.manual_seed(3)
    first, second = ours(_image())
    torch.manual_seed(3)
    torch.testing.assert_close(first, theirs.train()(_image()))
    assert not torch.allclose(first, second)


@pytest.mark.parametrize(("kind", "options"), ALL)
def test_both_heads_learn_and_the_network_copies(kind: Any, options: dict[str, Any]) -> None:
    net: Any = with_distillation_token(kind(**SIZE, **options)).train()
    net.set_distilled_training()
    twin = copy.deepcopy(net)
    first, second = net(_image().float())
    assert first.shape == second.shape == (3, 5)
    second.sum().backward()
    assert net.dist_token.grad.abs().sum() > 0 and net.head.weight.grad is None
    twin.load_state_dict(net.state_dict(), strict=True)
    assert torch.equal(net.eval()(_image().float()), twin.eval()(_image().float()))


def test_the_token_takes_the_rate_of_the_first_layer_and_no_weight_decay() -> None:
    net: Any = with_distillation_token(VisionTransformer(**SIZE))
    groups = param_groups_layer_decay(
        net, weight_decay=0.1, layer_decay=0.5, no_weight_decay_list=net.no_weight_decay()
    )
    (own,) = [group for group in groups if any(p is net.dist_token for p in group["params"])]
    assert any(p is net.cls_token for p in own["params"]) and own["weight_decay"] == 0


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_a_vit_of_timm_has_the_token_by_one_option(name: str) -> None:
    options = {"distilled": True, "patch_size": 8, "embed_dim": 24, "depth": 4}
    network = timm_model(name, options=options, num_classes=5, image_size=16)
    features = network(torch.zeros(2, 3, 16, 16)).features
    assert features["head"].shape == features["head_dist"].shape == (2, 5) and features["tokens"].shape == (2, 24, 2, 2)


@pytest.mark.parametrize("name", ["test_convnext", "test_resnet"])
def test_a_network_that_cannot_have_the_token_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=rf"^options.distilled = true: must be false: {name} is neither"):
        timm_model(name, options={"distilled": True}, num_classes=5, image_size=64)
