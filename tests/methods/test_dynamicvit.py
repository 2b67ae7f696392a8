"""DynamicViT: numbers of tokens, choices, the masked training pass, and the ratio loss."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import vtr
import vtr.zoo
from tests.methods import plain_vit
from tests.methods.plain_vit import Array
from tests.tiny import images, spread, vit
from vtr.methods.dynamicvit import DynamicViTModules

LAYERS = (1, 3, 4)


def chances(predictor: Any, x: Array) -> Array:
    """(N, 2) logits of a predictor for tokens x (N, C), all of them active."""
    first = predictor.embed
    h = plain_vit.gelu(plain_vit.linear(first[1], plain_vit.norm(first[0], x)))
    half = h.shape[1] // 2
    h = np.concatenate([h[:, :half], np.broadcast_to(h[:, half:].mean(0), h[:, half:].shape)], 1)
    head = predictor.head
    h = plain_vit.gelu(plain_vit.linear(head[0], h))
    return plain_vit.linear(head[4], plain_vit.gelu(plain_vit.linear(head[2], h)))


def modules(trained: bool = True) -> Any:
    made = spread(DynamicViTModules(48, 3), 3)
    made.batches.fill_(int(trained))  # type: ignore[operator, union-attr]
    return made


def test_numbers_are_those_of_the_authors_code() -> None:
    assert vtr.DynamicViT().numbers(196, 3) == (137, 96, 67)
    assert vtr.DynamicViT(0.5).numbers(196, 3) == (98, 49, 24)
    for n in (49, 64, 100, 196, 576):
        for rate in (0.3, 0.5, 0.7, 0.9):
            wanted = tuple(int(n * r) for r in (rate, rate**2, rate**3))
            assert vtr.DynamicViT(rate).numbers(n, 3) == wanted
    assert vtr.DynamicViT(9).numbers(64, 3)[-1] == 9
    assert vtr.DynamicViT((0.5, 0.25, 9)).numbers(64, 3) == (32, 16, 9)
    assert vtr.DynamicViT(0.01).numbers(64, 3) == (1, 1, 1)


def test_choices_and_classes() -> None:
    model, x, made = vit(), images(3), modules()
    with vtr.apply(model, vtr.DynamicViT(0.6), modules=made) as handle, torch.no_grad():
        got = model(x)
    numbers = vtr.DynamicViT(0.6).numbers(64, 3)
    assert [s.layer for s in handle.trace.stages] == [layer - 1 for layer in LAYERS]
    for b in range(3):
        h, left = plain_vit.embedded(model, x[b]), list(range(64))
        for i, module in enumerate(model.blocks):
            if i in LAYERS:
                stage = LAYERS.index(i)
                score = chances(made.predictors[stage], h[1:])
                order = np.argsort(score[:, 1] - score[:, 0], kind="stable")  # likeliest first
                keep = sorted(order[: numbers[stage]].tolist())
                left = [left[j] for j in keep]
                assert handle.trace.stages[stage].total.kept[b].tolist() == left
                h = h[[0, *(j + 1 for j in keep)]]
            h, _, _ = plain_vit.block(module, h)
        np.testing.assert_allclose(
            got[b].numpy(), plain_vit.classes(model, h[0]), atol=3e-4, rtol=3e-4
        )


def test_decisions_in_training_are_hard_nested_and_drawn() -> None:
    model, x = vit().train(), images(4)
    drawn = []
    with vtr.apply(model, vtr.DynamicViT(), modules=modules(False)) as handle:
        for seed in (0, 1, 0):
            torch.manual_seed(seed)
            model(x)
            drawn.append([r.policy.detach() for r in handle.trace.policies])  # type: ignore[union-attr]
        held: Any = handle.modules[0]
        assert held.trained and int(held.batches) == 3
    for masks in drawn:
        assert all(((m == 0) | ((m - 1).abs() < 1e-6)).all() for m in masks)
        for before, after in pairwise(masks):
            assert (after[before == 0] == 0).all() and after.sum() < before.sum()
    assert torch.equal(drawn[0][2], drawn[2][2]) and not torch.equal(drawn[0][0], drawn[1][0])


def test_the_masked_training_pass_is_the_cut_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the decisions of inference: a dropped token is no key for others, and not in the mean of a predictor."""
    model, x, made = vit(), images(3), modules()
    with vtr.apply(model, vtr.DynamicViT(0.6), modules=made) as handle:
        with torch.no_grad():
            short = model.eval()(x)
        kept = [(s.total.source >= 0).float() for s in handle.trace.stages]
        decided = iter(kept)

        def gumbel(logits: torch.Tensor, tau: float, hard: bool) -> torch.Tensor:
            assert tau == 1.0 and hard
            mask = next(decided)
            return torch.stack([mask, 1 - mask], -1) + 0 * logits

        monkeypatch.setattr("torch.nn.functional.gumbel_softmax", gumbel)
        long = model.train()(x)
    torch.testing.assert_close(long, short, atol=3e-4, rtol=3e-4)


def test_the_ratio_loss_written_out() -> None:
    model, x = vit().train(), images(4)
    method = vtr.DynamicViT(0.7, ratio_weight=5.0)
    with vtr.apply(model, method, modules=modules()) as handle:
        model(x)
        loss = method.training_losses(handle.trace, handle.modules[0])
        masks = [r.policy.detach().numpy() for r in handle.trace.policies]  # type: ignore[union-attr]
        total = 0.0
        for stage, mask in enumerate(masks):
            for b in range(4):
                total += (mask[b].sum() / 64 - 0.7 ** (stage + 1)) ** 2 / 4 / 3
        assert set(loss) == {"ratio"}
        assert float(loss["ratio"]) == pytest.approx(5.0 * total, rel=1e-5)
        loss["ratio"].backward()
        held: Any = handle.modules[0]
        for predictor in held.predictors:
            assert all(
                p.grad is not None and p.grad.abs().sum() > 0 for p in predictor.parameters()
            )
        with torch.no_grad():
            model.eval()(x)
        assert method.training_losses(handle.trace, handle.modules[0]) == {}


def test_new_predictors_are_refused_outside_of_training() -> None:
    model, x = vit(), images()
    with vtr.apply(model, vtr.DynamicViT()) as handle, torch.no_grad():
        with pytest.raises(vtr.UnsupportedMethodError, match="these are new: give weights= or"):
            model(x)
        model.train()(x)
        assert model.eval()(x).isfinite().all() and handle.trace.stages
    with vtr.apply(model, vtr.DynamicViT(untrained=True)), torch.no_grad():
        assert model(x).isfinite().all()


def test_weights_and_checkpoints_of_the_authors(tmp_path: Path) -> None:
    model, x, made = vit(), images(), modules()
    path = str(tmp_path / "predictors.safetensors")
    save_file(made.state_dict(), path)
    with vtr.apply(model, vtr.DynamicViT(weights=path)) as handle, torch.no_grad():
        loaded = model(x)
        info = handle._wrapping.info
    # Their names: score_predictor.T.in_conv (LayerNorm, Linear, GELU) and out_conv (Linear, GELU, ...).
    theirs = {}
    for stage, predictor in enumerate(made.predictors):
        for name, part in (("in_conv", predictor.embed), ("out_conv", predictor.head)):
            for key, value in part.state_dict().items():
                theirs[f"score_predictor.{stage}.{name}.{key}"] = value
    theirs["blocks.0.norm1.weight"] = torch.ones(48)
    taken = vtr.DynamicViT().from_authors(theirs, info)
    with vtr.apply(model, vtr.DynamicViT(), modules=taken), torch.no_grad():
        assert torch.equal(model(x), loaded)
    with pytest.raises(ValueError, match="state holds no predictors"):
        vtr.DynamicViT().from_authors({"blocks.0.norm1.weight": torch.ones(48)}, info)
    with pytest.raises(ValueError, match="trained for another width or number of stages"):
        vtr.apply(vit(embed_dim=36), vtr.DynamicViT(weights=path))


def test_the_built_in_predictors_find_the_digit() -> None:
    model = vtr.zoo.load("digits-vit")
    x, labels = vtr.zoo.samples("digits-vit", n=16, seed=3)
    method = vtr.DynamicViT(keep=(0.25, 0.15, 0.1), weights="digits-dynamicvit")
    with vtr.apply(model, method) as handle, torch.no_grad():
        assert (model(x).argmax(1) == labels).float().mean() > 0.8
        assert [s.tokens_out for s in handle.trace.stages] == [36, 21, 14]
    assert "predictors" in vtr.zoo.card("digits-dynamicvit")


def test_predictors_are_counted() -> None:
    """Each sees what the stage before it has left."""
    model, x, made = vit(), images(1), modules()
    seen: list[int] = []

    def count(module: nn.Linear, args: tuple[torch.Tensor], out: torch.Tensor) -> None:
        seen.append(2 * out[..., 0].numel() * module.in_features * module.out_features)

    for layer in made.predictors.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(count)
    with vtr.apply(model, vtr.DynamicViT(), modules=made.eval()) as handle, torch.no_grad():
        model(x)
        blocks = handle._wrapping.session  # type: ignore[attr-defined]
        tokens = handle.trace.tokens["encoder"]
        alone = sum(
            r.flops(tokens[i][0] + 1, tokens[i][1] + 1) for i, r in enumerate(blocks.runners)
        )
        assert handle.report().flops["encoder"][1] == alone + sum(seen)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layers": (0, 2)}, "layers must be >= 1: decisions are between two blocks"),
        ({"keep": 0.0}, "keep must be an int >= 1"),
        ({"keep": (0.3, 0.5)}, "keep must not grow"),
        ({"keep": (0.3,), "layers": (1, 2)}, "keep must have one entry per stage"),
        ({"ratio_weight": -1.0}, "ratio_weight must be a number in"),
        ({"untrained": 1}, "untrained must be True or False"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        vtr.DynamicViT(**options)


def test_a_number_of_entries_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"keep has 2 entries for the 3 layers \(1, 3, 4\)"):
        vtr.apply(vit(), vtr.DynamicViT((0.5, 0.3)))
