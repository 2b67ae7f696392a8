"""Adaptive Sparse ViT: scores from whole attention maps, thresholds, gradients, and counts of each image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import vtr
import vtr.zoo
from tests.methods import plain_vit
from tests.methods.plain_vit import Array
from tests.tiny import images, vit
from vtr.methods.common.token_thresholds import TokenThresholds, head_weighted, masked_row

CUTS = (1, 3)
THETA = (0.008, 0.014)


def scored(attention: Array, outputs: Array) -> Array:
    """sum_h A_h[cls, j] |o_hj| / (sum_h' |o_h'j| + 1e-8), of the patches."""
    size = np.sqrt((outputs**2).sum(-1))[:, 1:]
    share = size / (size.sum(0) + 1e-8)
    total: Array = (attention[:, 0, 1:] * share).sum(0)
    return total


def literal(
    model: Any, image: torch.Tensor, theta: tuple[float, ...], accumulate: str = "none"
) -> tuple[list[list[int]], Array]:
    """The patches left after each cut, and the logits."""
    h, left = plain_vit.embedded(model, image), list(range(64))
    history: list[list[int]] = []
    total: Array | None = None
    for i, module in enumerate(model.blocks):
        h, attention, outputs = plain_vit.block(module, h)
        now = scored(attention, outputs)
        if accumulate != "none" and i >= 1:
            if total is not None:
                now = total + now if accumulate == "sum" else 0.99 * total + 0.01 * now
            total = now
        if i in CUTS:
            keep = [j for j, s in enumerate(now) if s > theta[len(history)]] or [int(now.argmax())]
            left = [left[j] for j in keep]
            history.append(left)
            h = h[[0, *(j + 1 for j in keep)]]
            total = None if total is None else total[keep]
    return history, plain_vit.classes(model, h[0])


@pytest.mark.parametrize("accumulate", ["none", "sum", "ema"])
def test_kept_tokens_and_classes(accumulate: str) -> None:
    model, x = vit(), images(4)
    theta = (0.008, 0.03) if accumulate == "sum" else THETA
    method = vtr.AdaptiveSparseViT(layers=CUTS, thresholds=theta, accumulate=accumulate)
    with vtr.apply(model, method) as handle, torch.no_grad():
        got = model(x)
    numbers = [s.total.valid.sum(1).tolist() for s in handle.trace.stages]
    assert all(len(set(row)) > 1 for row in numbers), "all images keep the same number"
    for b in range(4):
        history, logits = literal(model, x[b], theta, accumulate)
        for stage, left in zip(handle.trace.stages, history, strict=True):
            kept = stage.total.kept[b]
            assert kept[kept >= 0].tolist() == left
        np.testing.assert_allclose(got[b].numpy(), logits, atol=2e-4, rtol=2e-4)


def test_a_batch_equals_its_images_alone() -> None:
    model, x = vit(), images(3)
    with vtr.apply(model, vtr.AdaptiveSparseViT(layers=CUTS, thresholds=THETA)), torch.no_grad():
        together = model(x)
        for b in range(3):
            torch.testing.assert_close(model(x[b : b + 1])[0], together[b], atol=1e-4, rtol=1e-4)


def test_a_threshold_of_zero_keeps_all() -> None:
    model, x = vit(), images()
    with torch.no_grad():
        bare = model(x)
        with vtr.apply(model, vtr.AdaptiveSparseViT(layers=(1, 2), thresholds=(0, 0))) as handle:
            assert torch.equal(model(x), bare) and not handle.trace.stages


@pytest.mark.parametrize("least", [0, 1, 5])
def test_a_huge_threshold_keeps_the_class_token_alone(least: int) -> None:
    model, x = vit(), images()
    method = vtr.AdaptiveSparseViT(layers=(1,), thresholds=(9.0,), least=least)
    with vtr.apply(model, method) as handle, torch.no_grad():
        assert model.forward_features(x).shape == (2, 1 + least, 48)
        assert model(x).isfinite().all()
    assert handle.trace.stages[0].tokens_out == least
    for b in range(2):  # the best tokens
        h = plain_vit.embedded(model, x[b])
        for module in model.blocks[:2]:
            h, attention, outputs = plain_vit.block(module, h)
        best = np.argsort(-scored(attention, outputs), kind="stable")[:least]
        assert handle.trace.stages[0].total.kept[b].tolist() == sorted(best.tolist())


def test_start_values() -> None:
    def theta(model: Any, **options: Any) -> list[float]:
        with vtr.apply(model, vtr.AdaptiveSparseViT(**options)) as handle:
            found: list[float] = handle.modules[0].theta.tolist()  # type: ignore[operator, union-attr]
        return found

    deep = vit(depth=12)
    scale = 196 / 64
    assert theta(deep) == pytest.approx([0.001 * scale, 0.002 * scale, 0.003 * scale])
    assert theta(deep, accumulate="sum") == pytest.approx(
        [0.004 * scale, 0.012 * scale, 0.02 * scale]
    )
    assert theta(deep, accumulate="ema") == theta(deep)
    with vtr.apply(deep, vtr.AdaptiveSparseViT()) as handle:
        assert [s.layer for s in handle.methods[0].stages(handle._wrapping.info)] == [3, 6, 9]


def test_the_masked_training_pass_is_the_cut_one() -> None:
    model, x = vit(), images(4)
    for least in (1, 30):
        method = vtr.AdaptiveSparseViT(layers=CUTS, thresholds=THETA, least=least)
        with vtr.apply(model, method) as handle:
            with torch.no_grad():
                short = model.eval()(x)
                kept = [s.total.source >= 0 for s in handle.trace.stages]
            long = model.train()(x)
            policies = [r.policy for r in handle.trace.policies]
            modules: Any = handle.modules[0]
        for policy, mask in zip(policies, kept, strict=True):
            assert policy is not None and torch.equal(policy > 0.5, mask)
            assert torch.equal(policy == 0, ~mask)
        torch.testing.assert_close(long, short, atol=3e-4, rtol=3e-4)
        assert modules.share.tolist() == pytest.approx([float(m.float().mean()) for m in kept])
        model.eval()


def test_gradients_of_the_thresholds_are_those_of_the_soft_mask() -> None:
    """With tau = 0.1 by finite differences in float64 of the sum over weights of sigmoid((s - theta) / tau)."""
    generator = torch.Generator().manual_seed(0)
    score = torch.rand(3, 20, generator=generator, dtype=torch.float64) * 0.2
    weight = torch.randn(3, 20, generator=generator, dtype=torch.float64)
    modules = TokenThresholds((0.05, 0.11)).double()
    for stage in range(2):
        modules.zero_grad()
        mask = modules.hard(stage, score, 0.1)
        assert ((mask == 0) | ((mask - 1).abs() < 1e-12)).all()
        assert torch.equal(mask > 0.5, score > modules.theta[stage])
        (mask * weight).sum().backward()

        def soft(theta: float) -> float:
            values = 1 / (1 + np.exp(-(score.numpy() - theta) / 0.1))
            return float((values * weight.numpy()).sum())

        at, step = modules.theta[stage].item(), 1e-6
        wanted = (soft(at + step) - soft(at - step)) / (2 * step)
        assert modules.theta.grad is not None
        assert float(modules.theta.grad[stage]) == pytest.approx(wanted, rel=1e-6)


def test_gradients_reach_thresholds_and_model() -> None:
    model, x = vit().train(), images()
    method = vtr.AdaptiveSparseViT(layers=CUTS, thresholds=THETA, tau=0.01)
    with vtr.apply(model, method) as handle:
        model(x).square().sum().backward()
        modules: Any = handle.modules[0]
    assert (modules.theta.grad != 0).all() and modules.theta.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_rows_of_the_masked_softmax() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 3, 9, generator=generator, dtype=torch.float64)
    mask = (torch.rand(2, 8, generator=generator) > 0.5).double()
    got = masked_row(logits.softmax(-1)[..., 1:], mask)
    gate = np.concatenate([np.ones((2, 1)), mask.numpy()], 1)[:, None]
    weights = np.exp(logits.numpy()) * gate
    wanted = (weights / weights.sum(-1, keepdims=True))[..., 1:]
    np.testing.assert_allclose(got.numpy(), wanted, atol=1e-12)
    outputs = torch.randn(2, 3, 8, 5, generator=generator)
    row = torch.rand(2, 3, 8, generator=generator)
    for b in range(2):
        whole = np.concatenate([np.zeros((3, 1, 5)), outputs[b].double().numpy()], 1)
        first = np.concatenate([np.zeros((3, 1)), row[b].double().numpy()], 1)[:, None]
        np.testing.assert_allclose(
            head_weighted(row, outputs)[b].numpy(), scored(first, whole), rtol=1e-5
        )


def test_calibrated_counts_are_the_mean_of_training(tmp_path: Path) -> None:
    model, x = vit(), images(4)
    method = vtr.AdaptiveSparseViT(layers=CUTS, thresholds=THETA, counts="calibrated")
    with vtr.apply(model, method) as handle:
        with pytest.raises(ValueError, match="counts='calibrated' needs the mean numbers"):
            model(x)
        model.train()(x)
        share = [r.policy.mean().item() for r in handle.trace.policies]  # type: ignore[union-attr]
        with torch.no_grad():
            out = model.eval()(x)
        numbers = [s.total.valid.sum(1).tolist() for s in handle.trace.stages]
        assert numbers == [[round(64 * s)] * 4 for s in share]
        assert not method.data_dependent and not handle.trace.stages[0].total.has_padding
        modules: Any = handle.modules[0]
        assert modules.trained
        path = str(tmp_path / "thresholds.safetensors")
        save_file(modules.state_dict(), path)
    again = vtr.AdaptiveSparseViT(layers=CUTS, weights=path, counts="calibrated")
    with vtr.apply(model, again), torch.no_grad():
        assert torch.equal(model(x), out)
    with pytest.raises(ValueError, match="trained for another width or number of stages"):
        vtr.apply(model, vtr.AdaptiveSparseViT(layers=(1,), weights=path))


def test_the_built_in_thresholds_leave_each_image_its_own_number() -> None:
    model = vtr.zoo.load("digits-vit")
    x, labels = vtr.zoo.samples("digits-vit", n=16, seed=3)
    method = vtr.AdaptiveSparseViT(weights="digits-adaptive")
    with vtr.apply(model, method) as handle, torch.no_grad():
        right = (model(x).argmax(1) == labels).float().mean()
        assert right > 0.85
        numbers = handle.trace.stages[-1].total.valid.sum(1)
    assert len(set(numbers.tolist())) > 4 and numbers.float().mean() < 36
    assert "thresholds" in vtr.zoo.card("digits-adaptive")


def test_a_model_in_half_precision() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        model, x = vit().to(dtype), images(2).to(dtype)
        method = vtr.AdaptiveSparseViT(layers=CUTS, thresholds=THETA)
        with vtr.apply(model, method) as handle, torch.no_grad():
            assert model(x).dtype == dtype and model(x).isfinite().all()
            assert handle.modules[0].theta.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"counts": "mean"}, "counts must be 'own' or 'calibrated', got 'mean'"),
        ({"accumulate": "all"}, "accumulate must be one of none, ema, sum, got 'all'"),
        ({"least": -1}, "least must be an int >= 0"),
        ({"tau": 0.0}, "tau must be a number in"),
        ({"thresholds": (-0.1,)}, "thresholds must be a number in"),
        ({"thresholds": (0.1,), "layers": (1, 2)}, "thresholds must have one number per layer"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        vtr.AdaptiveSparseViT(**options)


def test_models_that_are_refused() -> None:
    with pytest.raises(ValueError, match="thresholds has 1 entries for the 3 layers"):
        vtr.apply(vit(), vtr.AdaptiveSparseViT(thresholds=(0.1,)))
    with pytest.raises(vtr.UnsupportedMethodError, match="cls_attention"):
        vtr.apply(vit(class_token=False, global_pool="avg"), vtr.AdaptiveSparseViT())
    handle = vtr.apply(vit(), vtr.Random(keep=0.5))
    info = handle._wrapping.info
    object.__setattr__(info, "tokens", None)
    with pytest.raises(vtr.UnsupportedMethodError, match="does not say how many tokens"):
        vtr.AdaptiveSparseViT().check(info)
