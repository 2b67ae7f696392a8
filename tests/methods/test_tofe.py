"""ToFe: freezing, free scores, return of frozen tokens, and the learned modules, written out."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vtr
from tests.tiny import images, spread, vit
from vtr.methods.common.predictor import Predictor
from vtr.methods.tofe import Approximator, ToFeModules


def policies(handle: Any) -> list[Tensor]:
    """The masks of a training call, (B, N) each, in order."""
    return [r.policy for r in handle.trace.policies if r.policy is not None]


def attention(block: Any, h: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Attention branch output of tokens h (T, C), and the class token's mean row over ``keys`` (M, C).

    Both come from features before the block's norm.
    """
    tokens, width = h.shape
    q, k, v = block.attn.qkv(block.norm1(h)).reshape(tokens, 3, 3, -1).permute(1, 2, 0, 3)
    out = (q @ k.transpose(-1, -2) * (width // 3) ** -0.5).softmax(-1) @ v
    out = block.attn.proj(out.transpose(0, 1).reshape(tokens, width))
    other = block.attn.qkv(block.norm1(keys)).reshape(len(keys), 3, 3, -1)[:, 1].permute(1, 0, 2)
    row = (q[:, :1] @ other.transpose(-1, -2) * (width // 3) ** -0.5).softmax(-1)[:, 0].mean(0)
    return out, row


def literal(
    model: Any, x: Tensor, keeps: list[int], layers: list[int], modules: ToFeModules | None
) -> tuple[list[list[int]], Tensor]:
    """One image: the active tokens of each stage, and the full-length features after the last block."""
    h = model._pos_embed(model.patch_embed(x))[0]
    buffer = h[1:].clone()  # newest known feature of every token
    cls, active = h[0], list(range(64))
    frozen_with = buffer.clone()  # features at the decision that froze a token
    history = []
    for i, block in enumerate(model.blocks):
        sequence = torch.cat([cls[None], buffer[active]])
        gone = [j for j in range(64) if j not in active]
        keys = torch.cat([sequence, frozen_with[gone]])
        branch, row = attention(block, sequence, keys)
        sequence = sequence + branch
        sequence = sequence + block.mlp(block.norm2(sequence))
        cls = sequence[0]
        buffer[active] = sequence[1:]
        last = i == len(model.blocks) - 1
        if i + 1 in layers or last:
            stage = len(layers) if last else layers.index(i + 1)
            if gone and modules is not None:  # the stage is over
                buffer[gone] = modules.approximators[stage - 1](frozen_with[gone])
            if last:
                break
            if modules is None:
                score = torch.zeros(64)
                score[active] = row[1 : 1 + len(active)]
                score[gone] = row[1 + len(active) :]
            else:
                mask = torch.zeros(1, 64)
                mask[0, active] = 1
                score = modules.predictors[stage](buffer[None], mask)[0, :, 0]
            active = sorted(sorted(range(64), key=lambda j: -float(score[j]))[: keeps[stage]])
            history.append(active)
            frozen_with = buffer.clone()
    return history, torch.cat([cls[None], buffer])


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("keeps", [[20, 20, 20], [40, 9, 30]])
def test_decisions_and_features(trained: bool, keeps: list[int]) -> None:
    model, x = vit(depth=8), images(2)
    layers = [2, 4, 6]
    modules = spread(ToFeModules(48, 3)) if trained else None
    method = vtr.ToFe(keep=tuple(keeps), layers=tuple(layers), trained=trained)
    with vtr.apply(model, method, modules=modules) as handle, torch.no_grad():
        got = model.forward_features(x)
    stages = handle.trace.stages
    assert [s.layer for s in stages] == [1, 3, 5, 7]
    assert [s.tokens_out for s in stages] == [*keeps, 64]
    for b in range(2):
        with torch.no_grad():
            history, features = literal(model, x[b : b + 1], keeps, layers, modules)
        for s, active in zip(stages, history, strict=False):
            assert s.total.kept[b].tolist() == active
            assert s.total.frozen is not None
            assert s.total.frozen[b].nonzero()[:, 0].tolist() == [
                j for j in range(64) if j not in active
            ]
        torch.testing.assert_close(got[b], model.norm(features), atol=3e-4, rtol=3e-4)


def test_frozen_tokens_come_back() -> None:
    model, x = vit(depth=8), images(4)
    with vtr.apply(model, vtr.ToFe(keep=0.3)) as handle, torch.no_grad():
        model(x)
    sets = [[set(row.tolist()) for row in s.total.kept] for s in handle.trace.stages[:-1]]
    back = [sets[i + 1][b] - sets[i][b] for i in range(len(sets) - 1) for b in range(4)]
    assert any(back), "no token came back: nothing was tested"


def test_without_rejoining_the_active_tokens_go_on() -> None:
    model, x = vit(), images()
    with vtr.apply(model, vtr.ToFe(keep=9, final_rejoin=False)) as handle, torch.no_grad():
        assert model.forward_features(x).shape == (2, 10, 48)
        short = model(x)
    assert len(handle.trace.stages) == 3
    with vtr.apply(model, vtr.ToFe(keep=9)), torch.no_grad():
        torch.testing.assert_close(
            model(x), short, atol=1e-5, rtol=1e-5
        )  # the class token is pooled


@pytest.mark.parametrize("batch", [1, 3])
def test_adaptive_counts(batch: int) -> None:
    model, x = vit(depth=8), images(batch)
    method = vtr.ToFe(trained=True, adaptive=True, layers=(2, 5))
    with vtr.apply(model, method) as handle, torch.no_grad():
        modules: Any = spread(handle.modules)[0]  # type: ignore[index]
        for predictor in modules.predictors:  # centred, so that both answers occur
            predictor.head[-1].bias.zero_()
        seen: list[Tensor] = []
        for predictor in modules.predictors:
            predictor.register_forward_hook(lambda m, a, y: seen.append(y[..., 0]))
        out = model(x)
        for chance, stage in zip(seen, handle.trace.stages, strict=False):
            for b in range(batch):
                chosen = (chance[b] > 0.5).nonzero()[:, 0].tolist() or [int(chance[b].argmax())]
                kept = stage.total.kept[b]
                assert kept[kept >= 0].tolist() == chosen
        for b in range(batch):
            torch.testing.assert_close(model(x[b : b + 1]), out[b : b + 1], atol=2e-4, rtol=2e-4)


def test_predictor_written_out() -> None:
    module = spread(Predictor(8))
    x = torch.randn(1, 5, 8)
    active = torch.tensor([[1.0, 0, 1, 1, 0]])
    got = module(x, active)
    norm, first = module.embed[0], module.embed[1]  # type: ignore[index]
    rows = [F.gelu(first(norm(x[0, j]))) for j in range(5)]
    shared = sum(rows[j][4:] for j in (0, 2, 3)) / 3
    for j in range(5):
        h = torch.cat([rows[j][:4], shared])
        for layer in module.head:  # type: ignore[union-attr]
            h = layer(h)
        torch.testing.assert_close(got[0, j], h.softmax(-1))
    assert (
        sum(p.numel() for p in Predictor(384).parameters()) == 768 + 147_840 + 73_920 + 18_528 + 194
    )


def test_a_new_approximator_is_the_identity() -> None:
    x = torch.randn(2, 5, 48)
    assert torch.equal(Approximator(48)(x), x)
    module = spread(Approximator(8))
    y = torch.randn(3, 8)
    expected = y + module.up(F.gelu(module.down(module.norm(y))))  # type: ignore[operator]
    assert torch.equal(module(y), expected)


def test_untrained_approximators_freeze_by_identity() -> None:
    model, x = vit(), images(1)
    modules: Any = ToFeModules(48, 3)
    spread(modules.predictors)
    with (
        vtr.apply(model, vtr.ToFe(keep=20, trained=True), modules=modules) as handle,
        torch.no_grad(),
    ):
        got = model.forward_features(x)
        plain: Any = SimpleNamespace(predictors=modules.predictors, approximators=[lambda y: y] * 3)
        history, features = literal(model, x, [20, 20, 20], [1, 3, 4], plain)
    assert [s.total.kept[0].tolist() for s in handle.trace.stages[:3]] == history
    torch.testing.assert_close(got[0], model.norm(features), atol=3e-4, rtol=3e-4)


# ---- training -------------------------------------------------------------------------------


def train_reference(
    model: Any, x: Tensor, masks: list[Tensor], modules: ToFeModules, layers: list[int]
) -> Tensor:
    """All tokens through the blocks; frozen ones are no keys; frozen rows are approximated at the end
    of their stage."""
    h = model._pos_embed(model.patch_embed(x))
    before = h[:, 1:]
    mask: Tensor | None = None
    for i, block in enumerate(model.blocks):
        batch, tokens, width = h.shape
        q, k, v = (
            block.attn.qkv(block.norm1(h)).reshape(batch, tokens, 3, 3, -1).permute(2, 0, 3, 1, 4)
        )
        weights = (q @ k.transpose(-1, -2) * (width // 3) ** -0.5).exp()
        if mask is not None:
            keys = torch.cat([torch.ones(batch, 1), mask], 1)[:, None, None, :]
            own = torch.eye(tokens)
            weights = weights * (keys * (1 - own) + own)
        weights = weights / weights.sum(-1, keepdim=True)
        h = h + block.attn.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, width))
        h = h + block.mlp(block.norm2(h))
        last = i == len(model.blocks) - 1
        if i + 1 in layers or last:
            stage = len(layers) if last else layers.index(i + 1)
            if mask is not None:
                approximate = modules.approximators[stage - 1](before)
                m = mask[..., None]
                h = torch.cat([h[:, :1], m * h[:, 1:] + (1 - m) * approximate], 1)
            if not last:
                mask, before = masks[stage], h[:, 1:]
    return model.norm(h)


def test_training_forward_written_out() -> None:
    model, x = vit().train(), images()
    layers = [1, 3, 4]
    modules: Any = spread(ToFeModules(48, 3)).train()
    with vtr.apply(model, vtr.ToFe(trained=True), modules=modules) as handle:
        torch.manual_seed(1)
        got = model.forward_features(x)
        masks = policies(handle)
    assert len(masks) == 3
    for mask in masks:
        assert mask.shape == (2, 64) and ((mask == 0) | ((mask - 1).abs() < 1e-6)).all()
        assert 0 < mask.mean() < 1
    expected = train_reference(model, x, masks, modules, layers)
    torch.testing.assert_close(got, expected, atol=3e-4, rtol=3e-4)


def test_training_and_evaluation_agree_on_the_class_token() -> None:
    """Masked keys in training are dropped keys in evaluation, if both decide alike."""
    model, x = vit(), images()
    modules: Any = spread(ToFeModules(48, 3))
    method = vtr.ToFe(keep=(30, 20, 25), trained=True)
    with vtr.apply(model, method, modules=modules) as handle, torch.no_grad():
        short = model.forward_features(x)
        masks = []
        for s in handle.trace.stages[:3]:
            masks.append((s.total.source >= 0).float())
        expected = train_reference(model, x, masks, modules, [1, 3, 4])
    torch.testing.assert_close(short, expected, atol=3e-4, rtol=3e-4)


@pytest.mark.parametrize("rejoin", [True, False])
@pytest.mark.parametrize("pool", ["token", "avg", "max", "map"])
def test_training_and_evaluation_agree_on_the_classes(
    pool: str, rejoin: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With decisions by the likelier side in both, also where the head pools over tokens."""
    model, x = vit(global_pool=pool, class_token=pool == "token"), images(3)
    modules: Any = spread(ToFeModules(48, 3), 5)
    with torch.no_grad():  # decisions that are not all the same
        for layer in modules.predictors.modules():
            if isinstance(layer, nn.Linear):
                layer.bias.zero_()
    monkeypatch.setattr(
        F,
        "gumbel_softmax",
        lambda logits, **_: F.one_hot(logits.argmax(-1), 2).float() + logits * 0,
    )
    method = vtr.ToFe(trained=True, adaptive=True, final_rejoin=rejoin)
    with vtr.apply(model, method, modules=modules) as handle:
        with torch.no_grad():
            expected = model(x)
            numbers = handle.trace.stages[2].total.valid.sum(1)
        assert len(set(numbers.tolist())) > 1
        got = model.train()(x)
        assert torch.equal(policies(handle)[2].sum(1), numbers)
        torch.testing.assert_close(got, expected, atol=3e-4, rtol=3e-4)
        got.square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in modules.parameters())


def test_decisions_in_training_are_drawn_and_may_bring_tokens_back() -> None:
    model, x = vit().train(), images(4)
    with vtr.apply(model, vtr.ToFe(trained=True)) as handle:
        draws = []
        for seed in range(2):
            torch.manual_seed(seed)
            model(x)
            draws.append([m.detach().clone() for m in policies(handle)])
    assert not torch.equal(draws[0][0], draws[1][0])
    first, second = draws[0][0], draws[0][1]
    assert ((first == 0) & (second > 0)).any() and ((first > 0) & (second == 0)).any()


def test_straight_through_gradients() -> None:
    model, x = vit().train(), images()
    modules: Any = spread(ToFeModules(48, 3))
    with vtr.apply(model, vtr.ToFe(trained=True), modules=modules) as handle:
        model(x)
        masks = policies(handle)
        sum(m.mean() for m in masks).backward()
        for predictor in modules.predictors:
            assert all(
                p.grad is not None and p.grad.abs().sum() > 0 for p in predictor.parameters()
            )


def test_weights_that_do_not_fit(tmp_path: Any) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "modules.safetensors"
    save_file(ToFeModules(32, 3).state_dict(), str(path))
    with pytest.raises(ValueError, match="trained for another width or number of stages"):
        vtr.apply(vit(), vtr.ToFe(weights=str(path)))
    good: nn.Module = spread(ToFeModules(48, 3))
    save_file(good.state_dict(), str(path))
    model, x = vit(), images()
    with vtr.apply(model, vtr.ToFe(weights=str(path))) as handle, torch.no_grad():
        assert handle.methods[0].learned
        loaded = model(x)
    with vtr.apply(model, vtr.ToFe(trained=True), modules=good), torch.no_grad():
        assert torch.equal(model(x), loaded)
    assert math.isfinite(float(loaded.sum()))


def test_modules_that_had_nothing_to_do_cost_nothing() -> None:
    model, x = vit(), images()
    with torch.no_grad():
        for keep in (1.0, 0.5):
            with vtr.apply(model, vtr.ToFe(keep=keep, trained=True)) as handle:
                model(x)
                flops = handle.report().flops["encoder"]
                blocks = handle.trace.tokens["encoder"]
                assert (flops[0] == flops[1]) is (keep == 1.0), blocks
