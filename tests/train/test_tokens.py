"""Training of every token method on classifiers of both libraries, the folder of the result, and refusals."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import vtr
import vtr.train
from tests.tiny import ours
from tests.train.tiny_run import FAST, METHOD, batch, classifier, tuner
from tests.vision import towers
from vtr.core.module_files import FILE
from vtr.train.losses import TokenLoss
from vtr.train.schedules import Shrink
from vtr.train.tokens import MODEL, TokenSettings

MODELS = {"timm": classifier, "transformers": lambda: towers.build("vit-classes")}
METHODS = [
    METHOD,
    vtr.AdaptiveSparseViT(layers=(1, 2)),
    vtr.DynamicViT(keep=0.6, layers=(1, 2)),
    vtr.AViT(),
    vtr.EViT(keep=0.6, layers=(1, 2)),
    vtr.ToMe(r=2),
]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_methods_are_trained_written_and_loaded(method, kind, tmp_path):
    loss = TokenLoss(target=0.5 if method.learned else None)
    settings = dataclasses.replace(FAST, steps=3, loss=loss)
    images, _ = batch(50)
    with tuner(tmp_path, method, settings, model=MODELS[kind]()) as run:
        before = {n: p.detach().clone() for n, p in run.weights.items()}
        news = run.step()
        assert 0 < news["cost"] <= 1.2 and 0 <= news["accuracy"] <= 1
        assert run.run()
        moved = [n for n, p in run.weights.items() if not torch.equal(p, before[n])]
        assert len(moved) > 0.9 * len(before)
        with torch.no_grad(), run.averaged():
            wanted = run.classifier.eval()(images)
    assert (tmp_path / MODEL).exists()
    model = MODELS[kind]()
    found = vtr.train.load(model, tmp_path)
    assert found == method.replace(**({"weights": str(tmp_path / FILE)} if method.learned else {}))
    with torch.no_grad(), vtr.apply(model.eval(), found):
        got = model(images)
    torch.testing.assert_close(getattr(got, "logits", got), wanted, atol=1e-5, rtol=1e-4)


def test_modules_of_a_frozen_backbone_are_a_file_alone(tmp_path):
    settings = dataclasses.replace(FAST, steps=2, backbone_factor=0, ema=None)
    model = classifier()
    with tuner(tmp_path, settings=settings, model=model) as run:
        assert all(name.startswith("learned.") for name in run.weights)
        run.run()
        images = batch(50)[0]
        with torch.no_grad():
            wanted = run.classifier.eval()(images)
    assert not (tmp_path / MODEL).exists()
    fresh = classifier().eval()
    for weights in (tmp_path, tmp_path / FILE):
        with torch.no_grad(), vtr.apply(fresh, METHOD.replace(weights=str(weights))):
            assert torch.equal(fresh(images), wanted)
    other = classifier()
    with torch.no_grad():
        for p in other.parameters():
            p.neg_()
    with pytest.raises(vtr.UnsupportedModelError, match="trained with another model"):
        vtr.train.load(other, tmp_path)
    with (
        vtr.apply(fresh, "evit"),
        pytest.raises(vtr.UnsupportedModelError, match="remove their handles"),
    ):
        vtr.train.load(fresh, tmp_path)
    with pytest.raises(ValueError, match="there is no"):
        vtr.train.load(fresh, tmp_path / "none")


def test_the_weights_of_another_size_are_refused(tmp_path):
    with tuner(tmp_path, settings=dataclasses.replace(FAST, steps=1)) as run:
        run.run()
    with pytest.raises(vtr.UnsupportedModelError, match="trained with another model"):
        vtr.train.load(classifier(embed_dim=64), tmp_path)


def test_groups_have_their_rates_and_vectors_no_decay():
    method = vtr.AdaptiveSparseViT(layers=(1, 2))
    settings = dataclasses.replace(FAST, rate=1e-3, backbone_factor=0.1, weight_decay=0.3)
    with tuner(None, method, settings) as run:
        run.step()
        for group in run.optimizer.param_groups:
            names = [n for n, p in run.weights.items() if any(p is q for q in group["params"])]
            own = all(n.startswith("learned.") for n in names)
            assert own or all(n.startswith("model.") for n in names)
            assert group["lr"] == pytest.approx((1e-3 if own else 1e-4) / settings.warmup)
            plain = {n for n in names if run.weights[n].dim() < 2 or n.endswith("_embed")}
            plain |= {n for n in names if n.endswith("cls_token")}
            assert plain == (set(names) if group["weight_decay"] == 0 else set())
            assert group["weight_decay"] in (0, 0.3)
        assert "learned.theta" in run.weights and len(run.optimizer.param_groups) == 3


def test_the_budget_of_a_method_that_cuts_falls(tmp_path):
    settings = dataclasses.replace(FAST, loss=TokenLoss(), shrink=Shrink(4, "linear", begin=1))
    method = vtr.EViT(keep=0.5, layers=(1, 2), fuse=False)
    with tuner(None, method, settings) as run:
        costs = [(run.step()["cost"], run.classifier.method.keep) for _ in range(7)]
        assert [keep for _, keep in costs] == [1, 1, 0.875, 0.75, 0.625, 0.5, 0.5]
        assert costs[0][0] == costs[1][0] == 1 > costs[3][0] > costs[6][0]
    with pytest.raises(ValueError, match="keep is a share"):
        tuner(None, vtr.AdaptiveSparseViT(), dataclasses.replace(settings, loss=TokenLoss()))


def test_evaluation_cuts_and_takes_the_averages():
    with tuner(None, vtr.EViT(keep=0.25, layers=(1,)), TokenSettings(ema=0.99)) as run:
        run.step()
        run.step()
        found = run.evaluate(batch(n) for n in range(3))
        assert run.classifier.training
        with run.averaged(), torch.no_grad():
            run.classifier.eval()
            right = [
                (run.classifier(x).argmax(1) == y).float().mean() for x, y in map(batch, range(3))
            ]
            dense, reduced = run.classifier.handle.report().flops["encoder"]
        assert found["accuracy"] == pytest.approx(float(sum(right)) / 3)
        assert found["cost"] == pytest.approx(reduced / dense)
        with pytest.raises(ValueError, match="no batches to measure"):
            run.evaluate([])


@pytest.mark.parametrize("kind", MODELS)
def test_gradient_checkpointing_changes_nothing(kind):
    found = []
    for checkpointing in (False, True):
        settings = dataclasses.replace(FAST, checkpointing=checkpointing, ema=None)
        model = MODELS[kind]()
        with tuner(None, settings=settings, model=model) as run:
            run.step()
            run.step()
            found.append({n: p.detach().clone() for n, p in run.weights.items()})
    flags = [
        m.gradient_checkpointing for m in model.modules() if hasattr(m, "gradient_checkpointing")
    ]
    assert not getattr(model, "grad_checkpointing", False) and not any(flags)
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], atol=2e-5, rtol=1e-3)


def test_training_lowers_the_loss_of_a_fixed_batch():
    settings = TokenSettings(steps=30, rate=3e-3, loss=TokenLoss(target=0.6))
    with tuner(None, settings=settings, model=classifier(0.0), data=lambda n: batch(0)) as run:
        losses = [run.step()["loss"] for _ in range(30)]
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])


def test_the_model_comes_back_as_it_was():
    model = classifier().eval()
    model.blocks[0].requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    with tuner(None, model=model) as run:
        assert model.training and "model.blocks.0.mlp.fc1.weight" not in run.weights
        run.step()
    assert ours(model) == [] and not model.training
    assert [p.requires_grad for p in model.parameters()] == flags


@pytest.mark.parametrize("name", ["images", "pixel_values"])
def test_batches_may_be_mappings(name):
    def mapping(number):
        images, labels = batch(number)
        return {name: images, "labels": labels}

    with tuner(None) as one, tuner(None, data=mapping) as other:
        assert one.step()["loss"] == other.step()["loss"]


# ---- refusals ---------------------------------------------------------------------------------------


def test_batches_of_another_kind_are_refused():
    for wrong, message in (
        ({"x": 1, "labels": 2}, "got dict with x, labels"),
        ([torch.zeros(1)], "got list"),
        (7, "got int"),
    ):
        with (
            tuner(None, data=lambda n, w=wrong: w) as run,
            pytest.raises(ValueError, match=message),
        ):
            run.step()
    with tuner(None, data=[]) as run, pytest.raises(ValueError, match="data has no batches"):
        run.step()


def test_a_model_without_checkpointing_is_refused(monkeypatch):
    model = classifier()
    monkeypatch.delattr(type(model), "set_grad_checkpointing")
    with pytest.raises(vtr.UnsupportedModelError, match="has no gradient checkpointing"):
        tuner(None, settings=dataclasses.replace(FAST, checkpointing=True), model=model)
    assert ours(model) == []


def test_a_model_with_methods_is_refused():
    model = classifier()
    with (
        vtr.apply(model, "evit"),
        pytest.raises(vtr.UnsupportedModelError, match="remove their handles"),
    ):
        tuner(None, model=model)


def test_nothing_to_train_is_refused_and_the_model_left_as_it_was():
    model = classifier()
    settings = TokenSettings(backbone_factor=0)
    with pytest.raises(ValueError, match="there is nothing to train"):
        tuner(None, vtr.EViT(), settings, model=model)
    assert ours(model) == [] and all(p.requires_grad for p in model.parameters())
    low = classifier().bfloat16()
    with pytest.raises(ValueError, match=r"in torch.bfloat16.*load the model in float32"):
        tuner(None, model=low)
    assert ours(low) == []


def test_a_budget_for_a_method_that_cuts_by_its_options_is_refused():
    with (
        tuner(None, vtr.EViT(), TokenSettings(loss=TokenLoss(target=0.5))) as run,
        pytest.raises(vtr.UnsupportedMethodError, match="set its budget there"),
    ):
        run.step()


def test_modules_without_gradients_are_refused(monkeypatch):
    with tuner(None) as run:
        run.modules.requires_grad_(False)
        with pytest.raises(RuntimeError, match="no gradient reached the modules"):
            run.step()


def test_steps_without_gradients_are_refused():
    with tuner(None) as run:
        with torch.no_grad(), pytest.raises(RuntimeError, match=r"needs gradients.*no_grad"):
            run.step()
        run.step()
