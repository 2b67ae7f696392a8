"""ToFe's training: the loss steers the cost, and a frozen backbone stays as it was."""

from __future__ import annotations

import dataclasses

import torch

import vtr
from recipes.train_tofe import Recipe, Trainer
from tests.train.tiny_run import classifier, tuner
from vtr.methods.tofe import ToFeModules
from vtr.train.tofe import LOSS
from vtr.train.tokens import TokenSettings

METHOD = vtr.ToFe(layers=(1, 2), trained=True)


def test_training_moves_the_cost_to_the_target_and_only_the_modules():
    model = classifier(drop=0.0)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    settings = TokenSettings(
        steps=40, rate=3e-3, backbone_factor=0, loss=dataclasses.replace(LOSS, target=0.5, budget=50.0)
    )  # fmt: skip
    fixed = (
        torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1)),
        torch.arange(8) % 5,
    )
    with tuner(None, METHOD, settings, model=model, data=lambda number: fixed) as run:
        costs = [run.step()["cost"] for _ in range(40)]
        modules = run.modules
    assert abs(sum(costs[-5:]) / 5 - 0.5) < abs(sum(costs[:5]) / 5 - 0.5) / 3
    assert isinstance(modules, ToFeModules)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    assert vtr.handles(model) == []


def test_the_backbone_learns_when_asked_and_modules_fit_back():
    model = classifier()
    before = model.blocks[0].mlp.fc1.weight.clone()
    with tuner(None, METHOD, TokenSettings(rate=1e-3, loss=LOSS), model=model) as run:
        run.step()
        modules = run.modules
    assert not torch.equal(model.blocks[0].mlp.fc1.weight, before)
    method = METHOD.replace(keep=0.5)
    with vtr.apply(model.eval(), method, modules=modules) as handle:
        assert model(torch.randn(2, 3, 32, 32)).isfinite().all()
        assert handle.modules[0] is modules


def test_the_recipe_continues_bit_for_bit():
    recipe = Recipe(steps=3, batch=2)
    whole = Trainer(recipe)
    first = whole.step()
    assert first["rate"] == recipe.learning_rate / recipe.warmup
    state = {name: tensor.clone() for name, tensor in whole.state().items()}
    second = whole.step()
    other = Trainer(recipe)
    other.load_state(state)
    assert other.position == 1 and other.step() == second
    names = {name.split(".")[0] for name in state}
    assert names == {"position", "weights", "moments"}
    assert all(
        torch.equal(p, q) for p, q in zip(whole.result().parameters(), other.result().parameters(), strict=True)
    )  # fmt: skip
