"""The plain module: its loss by hand, its parts, and what other loops need of it."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

import vtr
from tests.tiny import ours
from tests.train.tiny_run import batch, classifier
from tests.vision import towers
from vtr.core.module_files import ModuleFile
from vtr.train.losses import TokenLoss
from vtr.train.modules import Student

TOFE = vtr.ToFe(layers=(1, 2), trained=True)


def student(method=TOFE, loss=None, model=None, **options):
    model = classifier(drop=0.0) if model is None else model
    return Student(model, method, loss or TokenLoss(target=0.5), **options).train()


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.mark.parametrize("kind", ["timm", "transformers"])
def test_terms_by_hand(kind):
    """Every term from the logits, tokens and policies of the call, in float64."""
    build = {
        "timm": lambda: classifier(drop=0.0),
        "transformers": lambda: towers.build("vit-classes"),
    }
    dense, model = build[kind]().eval(), build[kind]()
    dense.load_state_dict(model.state_dict())
    images, labels = batch(0)
    weights = TokenLoss(target=0.4, budget=3.0, logits=0.7, tokens=0.2, temperature=2.0)
    one = student(vtr.DynamicViT(keep=0.6, layers=(1, 2)), weights, model)
    torch.manual_seed(1)
    tokens = last_tokens(one.model, images)
    torch.manual_seed(1)
    logits = one(images)  # the same draws as in the call before
    policies = [r.policy.detach().double().numpy() for r in one.handle.trace.policies]
    terms = one.terms(logits, labels)
    with torch.no_grad():
        wanted = dense(images)
        wanted = getattr(wanted, "logits", wanted).double().numpy()
        features = last_tokens(dense, images).double().numpy()
    own = log_softmax(logits.detach().double().numpy())
    hand = {"classes": -own[range(4), labels].mean()}
    p, q = log_softmax(wanted / 2), log_softmax(logits.detach().double().numpy() / 2)
    hand["logits"] = 0.7 * 4 * (np.exp(p) * (p - q)).sum() / 4
    kept = policies[-1]
    error = ((tokens.detach().double().numpy() - features) ** 2).mean(-1)[:, 1:]
    hand["tokens"] = 0.2 * (error * kept).sum() / kept.sum()
    hand["ratio"] = 2 * np.mean(
        [((m.mean(1) - r) ** 2).mean() for m, r in zip(policies, (0.6, 0.36), strict=True)]
    )
    cost = one._cost
    share = cost.expected(one.handle.trace.policies).double().mean().item() / cost.dense(
        kept.shape[1]
    )
    hand["budget"] = 3 * (share - 0.4) ** 2
    assert terms.keys() == hand.keys()
    for name, value in hand.items():
        assert terms[name].item() == pytest.approx(value, rel=2e-4, abs=1e-6), name
    assert one.facts["cost"].item() == pytest.approx(share, rel=1e-5)
    right = (own.argmax(1) == labels.numpy()).mean()
    assert one.facts["accuracy"].item() == pytest.approx(right)


def last_tokens(model, images):
    if hasattr(model, "forward_features"):
        return model.forward_features(images)
    return model.vit(images).last_hidden_state


def test_loops_may_take_the_loss_from_the_model_or_from_a_function():
    images, labels = batch(0)
    one = student()
    torch.manual_seed(0)
    given = one(pixel_values=images, labels=labels)
    torch.manual_seed(0)
    logits = one(images)
    assert torch.equal(given["logits"], logits)
    assert one.loss(logits, labels) == given["loss"]
    mixed = torch.nn.functional.one_hot(labels, 5).float()
    torch.manual_seed(0)
    assert one.loss(one(images), mixed).item() == pytest.approx(given["loss"].item(), rel=1e-5)


def test_in_eval_mode_the_method_cuts_and_the_loss_is_cross_entropy():
    images, labels = batch(0)
    one = student(vtr.ToFe(keep=0.5, layers=(1, 2), trained=True, final_rejoin=False)).eval()
    with torch.no_grad():
        found = one(images, labels)
        assert one.handle.trace.stages[-1].tokens_out == 8
        wanted = torch.nn.functional.cross_entropy(one(images), labels)
    assert found["loss"].item() == pytest.approx(wanted.item())
    with pytest.raises(RuntimeError, match="a call in training mode, once"):
        one.loss(found["logits"], labels)


def test_the_loss_of_a_call_is_computed_once():
    images, labels = batch(0)
    one = student()
    logits = one(images)
    one.loss(logits, labels)
    with pytest.raises(RuntimeError, match="once"):
        one.loss(logits, labels)


def test_parameters_are_the_models_and_the_methods_and_not_the_teachers():
    model = classifier()
    own = {f"model.{name}" for name in model.state_dict()}
    one = student(model=model)
    learned = {f"learned.{name}" for name in one.learned.state_dict()}
    assert set(one.state_dict()) == own | learned
    assert one.learned is one.handle.modules[0]
    assert one.teacher is not model and not one.teacher.training
    assert not any(p.requires_grad for p in one.teacher.parameters())
    before = [p.clone() for p in one.teacher.parameters()]
    one.double()
    assert all(p.dtype == torch.float64 for p in one.teacher.parameters())
    images, labels = batch(0)
    one(images.double(), labels)["loss"].backward()
    assert all(p.grad is not None for p in one.learned.parameters())
    assert all(
        torch.equal(p, q.double()) for p, q in zip(one.teacher.parameters(), before, strict=True)
    )
    one.remove()
    one.remove()
    assert ours(model) == []


def test_without_distillation_there_is_no_teacher():
    one = student(loss=TokenLoss(target=0.5, logits=0, tokens=0))
    images, labels = batch(0)
    assert one.teacher is None
    assert set(one.terms(one(images), labels)) == {"classes", "budget"}


def test_a_copy_is_a_student_of_its_own():
    """Averaged weights of other loops are those of a deep copy."""
    images, labels = batch(0)
    one = student()
    other = copy.deepcopy(one)
    assert other.handle._wrapping.root is other.model and other.learned is other.handle.modules[0]
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1.0)
    torch.manual_seed(0)
    first = one(images, labels)["loss"]
    torch.manual_seed(0)
    assert one(images, labels)["loss"] == first
    assert other(images, labels)["loss"] != first
    one.remove()
    assert ours(one.model) == [] and ours(other.model) != []


def test_another_teacher_gives_its_classes():
    images, labels = batch(0)
    large = classifier(drop=0.0, embed_dim=64)
    one = student(loss=TokenLoss(target=0.5, tokens=0), teacher=large)
    assert "logits" in one.terms(one(images), labels)
    one = student(teacher=large)
    with pytest.raises(ValueError, match=r"teacher of the same shape, or TokenLoss\(tokens=0\)"):
        one(images, labels)


def test_options_change_and_modules_stay():
    one = student()
    learned = one.learned
    one.change(TOFE.replace(keep=0.25))
    assert one.method.keep == 0.25 and one.handle.modules[0] is learned
    before = one.handle
    one.change(TOFE.replace(keep=0.25))
    assert one.handle is before


def test_modules_are_written_for_other_models(tmp_path):
    images, _ = batch(0)
    model = classifier()
    one = student(model=model).eval()
    file = tmp_path / "mine.safetensors"
    one.save(file)
    with torch.no_grad():
        wanted = one(images)
        assert ModuleFile.read(file).method["name"] == "tofe"
        with vtr.apply(classifier().eval(), TOFE.replace(weights=str(file))) as handle:
            assert torch.equal(handle.target(images), wanted)
    with pytest.raises(ValueError, match=r"EViT\(\) has no modules to write"):
        student(vtr.EViT(), TokenLoss()).save(file)


def test_models_that_are_no_classifiers_are_refused():
    features = classifier(num_classes=0, global_pool="")
    one = student(model=features)
    with pytest.raises(vtr.UnsupportedModelError, match=r"no logits \(B, classes\)"):
        one(batch(0)[0])
    one.remove()
    with pytest.raises(vtr.UnsupportedModelError, match="no adapter"):
        student(model=torch.nn.Linear(2, 2))


def test_a_model_that_shows_no_tokens(monkeypatch):
    model = towers.build("vit-classes")
    one = student(model=model)
    one._classifier[0].close()
    images, labels = batch(0)
    with pytest.raises(ValueError, match=r"shows no tokens of its last layer"):
        one(images, labels)
