"""CDPruner: relevance and the greedy subset, recomputed with whole determinants."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vtr
from tests.vision.vlm.models import IMAGE, llava
from vtr.methods.cdpruner import relevance
from vtr.methods.common.dpp import greedy_map

from .slow import Sequence, features, run, samples


def slow_relevance(visual: Tensor, text: Tensor) -> Tensor:
    visual, text = visual.double(), text.double()
    mean = [sum(float(v @ t / (v.norm() * t.norm())) for t in text) / len(text) for v in visual]
    span = max(mean) - min(mean)
    return torch.tensor([(m - min(mean) + 1e-6) / span for m in mean], dtype=torch.float64)


def slow_subset(x: Tensor, quality: Tensor, number: int) -> list[int]:
    """Straight from the definition: the largest determinant of L over the chosen and one more."""
    unit = x.double() / x.double().norm(dim=-1, keepdim=True)
    kernel = quality.double()[:, None] * (unit @ unit.T) * quality.double()
    kernel.diagonal().copy_(quality.double().square())
    chosen: list[int] = []
    while len(chosen) < number:
        rest = [i for i in range(len(x)) if i not in chosen]
        values = [torch.linalg.det(kernel[[*chosen, i]][:, [*chosen, i]]) for i in rest]
        chosen.append(rest[int(torch.stack(values).argmax())])
    return sorted(chosen)


def test_equals_the_greedy_over_determinants() -> None:
    torch.manual_seed(0)
    x, quality = torch.randn(3, 20, 16), torch.rand(3, 20) + 0.05
    sizes, number = (20, 16, 11), torch.tensor([7, 5, 11])
    valid = torch.arange(20) < torch.tensor(sizes)[:, None]
    chosen = greedy_map(x, quality, number, valid)
    for row, size in enumerate(sizes):
        expected = slow_subset(x[row, :size], quality[row, :size], int(number[row]))
        assert chosen[row].nonzero()[:, 0].tolist() == expected


def test_beyond_the_rank_the_rest_is_chosen_by_quality() -> None:
    torch.manual_seed(1)
    x = torch.randn(1, 12, 3).repeat(1, 2, 1)  # three channels, and every token twice
    quality = torch.linspace(0.2, 1.0, 24)[None]
    every = torch.ones(1, 24, dtype=torch.bool)
    three = greedy_map(x, quality, torch.tensor([3]), every)[0]
    assert three.nonzero()[:, 0].tolist() == slow_subset(x[0], quality[0], 3)
    nine = greedy_map(x, quality, torch.tensor([9]), every)[0]
    best = [i for i in range(23, -1, -1) if not three[i]][:6]
    assert set(nine.nonzero()[:, 0].tolist()) == set(three.nonzero()[:, 0].tolist()) | set(best)


def test_tokens_without_relevance_come_last() -> None:
    quality = torch.tensor([[0.0, 1.0, 0.0, 0.5]])
    every = torch.ones(1, 4, dtype=torch.bool)
    x = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(2))
    assert greedy_map(x, quality, torch.tensor([2]), every).tolist() == [[False, True, False, True]]
    assert greedy_map(x, quality, torch.tensor([3]), every).tolist() == [[True, True, False, True]]


def test_relevance_is_the_mean_cosine_of_the_text_in_each_sample() -> None:
    torch.manual_seed(3)
    visual, text = torch.randn(2, 9, 6), torch.randn(2, 5, 6)
    visual_valid = torch.arange(9) < torch.tensor([9, 6])[:, None]
    text_valid = torch.arange(5) < torch.tensor([3, 5])[:, None]
    got = relevance(visual, text, visual_valid, text_valid)
    for b, (n, t) in enumerate(((9, 3), (6, 5))):
        expected = slow_relevance(visual[b, :n], text[b, :t])
        torch.testing.assert_close(got[b, :n].double(), expected, atol=1e-6, rtol=1e-5)
        assert not got[b, n:].any()


@pytest.mark.parametrize("theta", [None, 0, 0.5])
def test_equals_the_model_by_hand(theta: float | None) -> None:
    model, inputs = llava(2)
    method = vtr.CDPruner(keep=6, theta=theta)
    with torch.no_grad(), vtr.apply(model, method) as handle:
        logits = model(**inputs).logits
    images = features(model, inputs)
    for b, ids in enumerate(samples(inputs)):
        first = int((ids == IMAGE).nonzero()[0])
        after = ids[first:][ids[first:] != IMAGE]
        quality = slow_relevance(images[b], model.get_input_embeddings()(after).detach())
        if theta is not None:
            quality = torch.exp(theta / (2 * (1 - theta)) * quality)
        wanted = slow_subset(images[b], quality, 6 * (len(images[b]) // 16))
        kept = handle.trace.kept[b]
        assert kept[kept >= 0].tolist() == wanted

        def cut(sequence: Sequence, seen: object, wanted: list[int] = wanted) -> None:
            sequence.keep(wanted, compact=True)

        expected, _ = run(model, ids, images[b], {0: cut})
        torch.testing.assert_close(logits[b, -1], expected, atol=2e-5, rtol=1e-4)


def test_a_prompt_that_ends_with_its_image_is_refused_unless_relevance_is_left_out() -> None:
    model, inputs = llava(1)
    last = int((inputs["input_ids"][0] == IMAGE).nonzero()[-1]) + 1
    short = {**inputs, **{k: inputs[k][:, :last] for k in ("input_ids", "attention_mask")}}
    with (
        torch.no_grad(),
        vtr.apply(model, vtr.CDPruner(keep=4)),
        pytest.raises(ValueError, match="put the question after the image"),
    ):
        model(**short)
    with torch.no_grad(), vtr.apply(model, vtr.CDPruner(keep=4, theta=0)):
        model(**short)


@pytest.mark.parametrize("options", [{"keep": 0}, {"theta": -0.1}, {"theta": 1}, {"theta": "much"}])
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        vtr.CDPruner(**options)
