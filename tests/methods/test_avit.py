"""A-ViT: halting and mixing written out with masks, the same with tokens that leave, and the two losses."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

import vtr
from tests.methods import plain_vit
from tests.methods.plain_vit import Array
from tests.tiny import images, vit
from vtr.methods.common.halting import Halting, prior, prior_distance

GATE: dict[str, Any] = {"scale": 1.0, "center": 0.5}


def literal(model: Any, image: torch.Tensor, seen_front: bool = True) -> tuple[Array, Array, Array]:
    """Tokens mixed over the layers (T, C), layers and remainder of each (T,), and the mean scores of layers.

    All tokens go through all blocks; halted patches are no keys for others.
    """
    h = plain_vit.embedded(model, image)
    tokens, depth = len(h), len(model.blocks)
    out, spent, ponder = np.zeros_like(h), np.zeros(tokens), np.zeros(tokens)
    running, means = np.ones(tokens, dtype=bool), []
    for i, module in enumerate(model.blocks):
        seen = running.copy()
        seen[0] |= seen_front
        h, _, _ = plain_vit.block(module, h, seen)
        score = 1 / (1 + np.exp(-(GATE["scale"] * h[:, 0] - GATE["center"])))
        means.append(np.where(running, score, 0.0).sum() / tokens)
        if i == depth - 1:
            score = np.ones(tokens)
        for j in range(tokens):
            if not running[j]:
                continue
            ponder[j] += 1
            if spent[j] + score[j] >= 1 - 0.01:
                out[j] += (1 - spent[j]) * h[j]
                ponder[j] += 1 - spent[j]
                running[j] = False
            else:
                out[j] += score[j] * h[j]
                spent[j] += score[j]
    return out, ponder, np.array(means)


def test_the_cut_sequence_is_the_masked_one() -> None:
    model, x = vit(), images(3)
    with vtr.apply(model, vtr.AViT(**GATE)) as handle, torch.no_grad():
        got = model.forward_features(x)
        logits = model(x)
    left = [s.tokens_out for s in handle.trace.stages]
    assert left[-1] == 64 and left[0] < 64 and left[-2] < left[0]
    counts = handle.trace.stages[1].total.valid.sum(1).tolist()
    assert len(set(counts)) > 1, "the images keep the same number: nothing was tested"
    for b in range(3):
        mixed, _, _ = literal(model, x[b])
        wanted = plain_vit.norm(model.norm, mixed)
        np.testing.assert_allclose(got[b].numpy(), wanted, atol=3e-4, rtol=3e-4)
        np.testing.assert_allclose(
            logits[b].numpy(), plain_vit.classes(model, mixed[0]), atol=3e-4, rtol=3e-4
        )


def test_the_class_token_is_that_of_the_authors_masks() -> None:
    """Theirs also masks a class token that has halted; the class token's own output is the same."""
    model, x = vit(), images(3)
    for b in range(3):
        ours, theirs = literal(model, x[b])[0], literal(model, x[b], seen_front=False)[0]
        np.testing.assert_allclose(ours[0], theirs[0], atol=1e-12)


def test_training_is_the_same_function() -> None:
    model, x = vit(), images(3)
    with vtr.apply(model, vtr.AViT(**GATE)) as handle:
        with torch.no_grad():
            short = model.eval().forward_features(x)
            ponder = handle.trace.notes["avit_ponder"]
        long = model.train().forward_features(x)
        assert len(handle.trace.policies) == 6 and handle.trace.policies[-1].policy is None
        torch.testing.assert_close(long, short, atol=3e-4, rtol=3e-4)
        torch.testing.assert_close(handle.trace.notes["avit_ponder"], ponder, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_all_tokens_may_halt_early(pool: str) -> None:
    model, x = vit(global_pool=pool, class_token=pool == "token"), images()
    method = vtr.AViT(scale=0.0, center=0.0, eps=0.01)  # score 1/2: all halt behind block 1
    with vtr.apply(model, method) as handle, torch.no_grad():
        got = model(x)
        assert handle.trace.tokens["encoder"][1] == (64, 64)
        assert handle.trace.tokens["encoder"][5] == (int(pool == "avg"),) * 2
        layers: list[torch.Tensor] = []
        hooks = [
            b.register_forward_hook(lambda m, a, y: layers.append(y)) for b in model.blocks[:2]
        ]
        handle.pause()
        model(x)
        for hook in hooks:
            hook.remove()
        mean = (layers[0] + layers[1]) / 2
        wanted = model.forward_head(model.norm(mean))
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


def test_a_center_out_of_reach_leaves_the_model_as_it_is() -> None:
    model, x = vit(), images()
    with torch.no_grad():
        bare = model(x)
        with vtr.apply(model, vtr.AViT(center=1e4)) as handle:
            torch.testing.assert_close(model(x), bare)
    assert [s.tokens_out for s in handle.trace.stages] == [64]


def test_losses_written_out() -> None:
    model, x = vit().train(), images(4)
    method = vtr.AViT(**GATE)
    with vtr.apply(model, method) as handle:
        model(x)
        losses = method.training_losses(handle.trace, None)
    plain = [literal(model, x[b]) for b in range(4)]
    ponder = np.mean([p for _, p, _ in plain])
    assert float(losses["ponder"].detach()) == pytest.approx(5e-4 * ponder, rel=1e-4)
    means = np.mean([m for _, _, m in plain], 0)
    share = np.clip(means / means.sum(), 0.01, 0.99)
    wanted = np.array([math.exp(-0.5 * (i - 4) ** 2) / math.sqrt(2 * math.pi) for i in range(6)])
    wanted *= 0.98 / wanted[:4].sum()
    distance = max(0.0, (wanted * (np.log(wanted) - np.log(share))).sum() / 6)
    assert float(losses["prior"].detach()) == pytest.approx(1e-3 * distance, rel=1e-3)
    sum(losses.values()).backward()  # type: ignore[union-attr]
    assert model.blocks[0].mlp.fc2.weight.grad.abs().sum() > 0


def test_the_prior_of_twelve_layers() -> None:
    found = prior(12, 8)
    assert sum(found[:8]) == pytest.approx(0.98) and max(found) == found[8]
    assert found[7] / found[8] == pytest.approx(math.exp(-0.5))
    means = torch.tensor([0.0, 0.1, 0.3, 0.6])
    assert float(prior_distance(means, 3)) == pytest.approx(float(prior_distance(means * 2, 3)))


def test_halting_by_finite_differences() -> None:
    """Gradients of mixed outputs and ponder cost in the scores, in float64."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2, 5, 4, generator=generator, dtype=torch.float64)
    scores = 0.6 * torch.rand(3, 2, 5, generator=generator, dtype=torch.float64)
    weight = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64)

    def total(given: torch.Tensor) -> torch.Tensor:
        zeros = torch.zeros(2, 5, dtype=torch.float64)
        state = Halting(zeros, zeros[..., None].expand(2, 5, 4), zeros, zeros == 0)
        for layer in range(3):
            last = torch.ones_like(zeros) if layer == 2 else given[layer]
            state = state.step(x[layer], last, 0.01)
        assert not state.running.any()
        return (state.out * weight).sum() + state.ponder.sum()

    assert torch.autograd.gradcheck(total, scores.requires_grad_(True))


def test_presets_and_options() -> None:
    assert vtr.AViT.preset("deit-small").center == 75.0
    refused: Any = (
        ({"eps": 0.9}, r"eps must be a number in \[0.0, 0.5\]"),
        ({"scale": -1.0}, "scale must be a number in"),
        ({"prior_layer": 0}, "prior_layer must be an int >= 1 or None"),
    )
    for options, words in refused:
        with pytest.raises(ValueError, match=words):
            vtr.AViT(**options)
    with pytest.raises(ValueError, match=r"prior_layer must be in 1\.\.5 for a model of 6 layers"):
        vtr.apply(vit(), vtr.AViT(prior_layer=6))
    with pytest.raises(ValueError, match="cannot be combined with evit"):
        vtr.apply(vit(), [vtr.AViT(), vtr.EViT()])
