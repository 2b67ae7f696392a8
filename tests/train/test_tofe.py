"""ToFe's training: the cost that the loss steers by, what it changes, and what it leaves alone."""

from __future__ import annotations

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import vtr
from tests.tiny import ours
from tests.vision import towers
from vtr.methods.tofe import ToFeModules
from vtr.train.tofe import ToFeLoss, ToFeTrainer, expected_cost


def tiny() -> VisionTransformer:
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2, num_classes=5
    )
    for block in model.blocks:
        block.attn.fused_attn = False
    return model


def test_expected_cost_is_the_cost_that_a_hard_decision_has():
    model = tiny().eval()
    method = vtr.ToFe(keep=(0.5, 0.25), layers=(1, 3), trained=True)
    with torch.no_grad(), vtr.apply(model, method) as handle:
        model(torch.randn(1, 3, 32, 32))
        dense, reduced = handle.report().flops["encoder"]
        session = handle._wrapping.session
        modules = handle.modules[0]
        masks = [torch.zeros(1, 16).index_fill(1, torch.arange(n), 1.0) for n in (8, 4)]
        got = expected_cost(masks, [1, 3], session.runners, modules, session.prefix)
        # The report counts the approximators for all tokens, the loss for the frozen ones only.
        per_token = sum(
            2 * m.in_features * m.out_features
            for m in modules.approximators[0].children()
            if isinstance(m, torch.nn.Linear)
        )
        extra = per_token * (8 + 4)
    assert got.item() == pytest.approx((reduced - extra) / dense, rel=1e-6)


def test_expected_cost_falls_with_every_token_and_has_gradients():
    model = tiny().eval()
    method = vtr.ToFe(layers=(1, 2), trained=True)
    with vtr.apply(model, method) as handle:
        session, modules = handle._wrapping.session, handle.modules[0]
        masks = [torch.full((2, 16), 0.5, requires_grad=True) for _ in range(2)]
        expected_cost(masks, [1, 2], session.runners, modules, 1).sum().backward()
    assert all((m.grad > 0).all() for m in masks)


def test_training_moves_the_cost_to_the_target_and_only_the_modules():
    model = tiny()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    trainer = ToFeTrainer(
        model, vtr.ToFe(layers=(1, 2), trained=True), ToFeLoss(target=0.5, budget=50.0), lr=3e-3
    )
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8) % 5
    costs = [trainer.step(images, labels)["cost"] for _ in range(40)]
    modules = trainer.close()
    assert abs(sum(costs[-5:]) / 5 - 0.5) < abs(sum(costs[:5]) / 5 - 0.5) / 3
    assert isinstance(modules, ToFeModules)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    assert vtr.handles(model) == []


def test_backbone_learns_when_asked_and_modules_fit_back():
    model = tiny()
    trainer = ToFeTrainer(model, vtr.ToFe(layers=(1, 2), trained=True), backbone_lr=1e-3)
    before = model.blocks[0].mlp.fc1.weight.clone()
    trainer.step(torch.randn(4, 3, 32, 32), torch.arange(4))
    modules = trainer.close()
    assert not torch.equal(model.blocks[0].mlp.fc1.weight, before)
    with vtr.apply(
        model, vtr.ToFe(keep=0.5, layers=(1, 2), trained=True), modules=modules
    ) as handle:
        assert model(torch.randn(2, 3, 32, 32)).isfinite().all()
        assert handle.modules[0] is modules


def test_untrained_method_and_bad_target_are_refused():
    with pytest.raises(ValueError, match="trained=True"):
        ToFeTrainer(tiny(), vtr.ToFe())
    with pytest.raises(ValueError, match=r"target must be in \(0, 1\]"):
        ToFeLoss(target=0.0)


def test_a_model_that_is_no_timm_classifier_is_refused_before_it_is_touched():
    model = towers.build("vit-classes")
    with pytest.raises(TypeError, match="must be a timm classifier"):
        ToFeTrainer(model, vtr.ToFe(trained=True))
    assert ours(model) == [] and all(p.requires_grad for p in model.parameters())
