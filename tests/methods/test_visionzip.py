"""VisionZip: dominant and contextual tokens, recomputed by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import vtr
from tests.tiny import site as make_site
from tests.vision.vlm.models import internvl, llava, llava_next, llava_onevision
from vtr.methods.visionzip import contextual_groups, dominant

from .slow import Sequence, Tower, features, run, samples


def slow_split(
    score: list[float], keys: torch.Tensor, d: int, c: int
) -> tuple[list[int], dict[int, list[int]]]:
    """Dominant indices, and target -> the tokens assigned to it, for one sample."""
    n = len(score)
    main = sorted(sorted(range(n), key=lambda j: -score[j])[:d])
    rest = [j for j in range(n) if j not in main]
    step = max(1, len(rest) // c)
    targets = rest[::step][:c]
    groups: dict[int, list[int]] = {t: [] for t in targets}
    for j in rest:
        if j not in targets:
            likeness = {t: float(F.cosine_similarity(keys[j], keys[t], dim=0)) for t in targets}
            groups[max(likeness, key=lambda t: likeness[t])].append(j)
    return main, groups


@pytest.mark.parametrize("seed", range(4))
def test_split_equals_the_formula(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sizes, d, c = (30, 21, 12), (9, 6, 5), (4, 3, 5)
    score = torch.rand(3, 30, generator=generator)
    keys = torch.randn(3, 30, 6, generator=generator)
    valid = torch.arange(30) < torch.tensor(sizes)[:, None]
    main = dominant(score, torch.tensor(d), valid)
    stands, targets = contextual_groups(keys, valid & ~main, torch.tensor(c))
    for row, n in enumerate(sizes):
        best, groups = slow_split(score[row, :n].tolist(), keys[row, :n].double(), d[row], c[row])
        assert main[row].nonzero()[:, 0].tolist() == best
        assert targets[row].nonzero()[:, 0].tolist() == list(groups)
        for target, members in groups.items():
            assert (stands[row] == target).nonzero()[:, 0].tolist() == sorted([target, *members])


@pytest.mark.parametrize(("keep", "c"), [(6, 2), (0.5, 0.25), (5, 0)])
def test_equals_the_model_by_hand(keep: Any, c: Any) -> None:
    model, inputs = llava(2)
    method = vtr.VisionZip(keep=keep, contextual=c)
    with torch.no_grad(), vtr.apply(model, method) as handle:
        logits = model(**inputs).logits
    pixels, at = inputs["pixel_values"], 0
    tower = Tower(model)
    total = keep if isinstance(keep, int) else int(keep * 16)
    merged = c if isinstance(c, int) else round(c * total)
    for b, ids in enumerate(samples(inputs)):
        number = int((ids == 150).sum()) // 16
        wanted: list[int] = []
        images = torch.zeros(16 * number, 64)
        for i in range(number):
            x = tower.start(pixels[at + i])
            for layer in range(tower.last + 1):
                x, maps, k, _ = tower.step(layer, x)
            score, keys, x = maps[:, 0, 1:].mean(0).tolist(), k.mean(0)[1:], x[1:].clone()
            main, groups = slow_split(score, keys, total - merged, merged or 1)
            before = x.clone()
            for target, members in groups.items() if merged else ():
                if members:
                    x[target] = before[target] + before[members].mean(0)
            chosen = sorted([*main, *(groups if merged else ())])
            places = [16 * i + j for j in chosen]
            images[places] = tower.project(x[chosen])
            wanted += places
        at += number
        kept = handle.trace.kept[b]
        assert kept[kept >= 0].tolist() == wanted and len(wanted) == total * number
        if merged:
            assert float(handle.trace.stages[-1].map.size[b].sum()) == 16 * number

        def cut(sequence: Sequence, seen: object, wanted: list[int] = wanted) -> None:
            sequence.keep(wanted, True)

        expected, _ = run(model, ids, images, {0: cut})
        torch.testing.assert_close(logits[b, -1], expected, atol=3e-5, rtol=2e-4)


@pytest.mark.parametrize(("keep", "c"), [(20, 4), (0.3, 0.25)])
def test_tiles_share_the_budget_and_merge_at_the_prompt(keep: Any, c: Any) -> None:
    model, inputs = llava_next(2)
    method = vtr.VisionZip(keep=keep, contextual=c)
    seen = {}

    class Look(vtr.VisionZip):
        def reduce(self, site: vtr.Site) -> vtr.Reduction | None:
            if site.site == "prompt":
                seen["score"] = site.spread(site.memory["score"])  # type: ignore[attr-defined]
                seen["keys"] = site.spread(site.memory["keys"], 0.0)  # type: ignore[attr-defined]
            return super().reduce(site)

    with torch.no_grad(), vtr.apply(model, Look(keep=keep, contextual=c)):
        model(**inputs)
    with torch.no_grad(), vtr.apply(model, method) as handle:
        logits = model(**inputs).logits
    images = features(model, inputs)
    for b, ids in enumerate(samples(inputs)):
        n = len(images[b])
        total = keep if isinstance(keep, int) else math.ceil(keep * n)
        merged = c if isinstance(c, int) else round(c * total)
        main, groups = slow_split(
            seen["score"][b, :n].tolist(), seen["keys"][b, :n], total - merged, merged
        )
        values = {}
        for target, members in groups.items():
            values[target] = (
                images[b][target] + images[b][members].mean(0) if members else images[b][target]
            )
        wanted = sorted([*main, *values])
        kept = handle.trace.kept[b]
        assert kept[kept >= 0].tolist() == wanted and len(wanted) == total

        def cut(
            sequence: Sequence,
            seen: object,
            wanted: list[int] = wanted,
            values: dict[int, torch.Tensor] = values,
        ) -> None:
            sequence.keep(wanted, True, values)

        expected, _ = run(model, ids, images[b], {0: cut})
        torch.testing.assert_close(logits[b, -1], expected, atol=3e-5, rtol=2e-4)


def test_without_a_class_token_received_attention_ranks() -> None:
    site = make_site(n=12, prefix=0, has_cls=False)
    assert site.info.tokens is None
    vtr.VisionZip().reduce(site)
    q, k, _ = site.qkv
    maps = (q.double() @ k.double().transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1)
    expected = maps.mean(1).mean(1)
    torch.testing.assert_close(site.memory["score"].double(), expected, atol=1e-6, rtol=1e-5)
    model, inputs = llava_onevision(2)
    with torch.no_grad(), vtr.apply(model, vtr.VisionZip(keep=8)) as handle:
        model(**inputs)
    assert (handle.trace.kept >= 0).sum(1).tolist() == [8, 8]


def test_the_released_splits() -> None:
    for keep, merged in ((64, 10), (128, 20), (192, 30)):
        assert vtr.VisionZip(keep=keep)._contextual(torch.tensor([keep])).tolist() == [merged]


@pytest.mark.parametrize(
    "options",
    [
        {"keep": 0},
        {"contextual": -1},
        {"contextual": 1.0},
        {"contextual": 64},
        {"contextual": True},
    ],
)
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        vtr.VisionZip(**options)


@pytest.mark.parametrize("family", [llava, llava_next, llava_onevision, internvl])
def test_features_take_the_way_of_scores(family: Any) -> None:
    model, inputs = family(2)
    seen = {}

    class Look(vtr.VisionZip):
        def reduce(self, site: vtr.Site) -> vtr.Reduction | None:
            if site.site == "encoder":
                keys = site.key_mean()
                site.memory["keys"] = keys
                return None
            keys = site.memory["keys"]
            seen["whole"] = site.spread(keys, 7.0)  # type: ignore[attr-defined]
            parts = [site.spread(k, 7.0) for k in keys.unbind(-1)]  # type: ignore[attr-defined]
            seen["parts"] = torch.stack(parts, -1)
            return None

    with torch.no_grad(), vtr.apply(model, Look()):
        model(**inputs)
    assert seen["whole"].shape[:2] == (2, int((inputs["input_ids"] == 150).sum(1).max()))
    torch.testing.assert_close(seen["whole"], seen["parts"])
