"""VFlowOpt: the importance map, the recycling and the progressive schedule, recomputed slowly."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import vtr
from tests.tiny import site as make_site
from tests.vision.vlm import videos
from tests.vision.vlm.models import (
    internvl,
    llava,
    llava_next,
    llava_onevision,
    noise,
    prompts,
    qwen2_vl,
)
from vtr.core.site import rows_at_once
from vtr.core.tokens import TokenMap
from vtr.methods.vflowopt import calibrated_context, cells, patch_entropy, recycle, tuned

from .slow import Seen, Sequence, Tower, best, features, run, samples


def slow_context(attention: torch.Tensor, threshold: float) -> list[float]:
    """attention (N, N), rows are queries; straight from the formula."""
    n = attention.shape[0]
    received = [sum(float(attention[i, j]) for i in range(n)) / n for j in range(n)]
    tau = threshold * sum(received) / n
    chosen = [j for j in range(n) if received[j] > tau] or list(range(n))
    return [sum(float(attention[k, i]) for k in chosen) / len(chosen) for i in range(n)]


@pytest.mark.parametrize("threshold", [0.0, 1.1, 50.0])
@pytest.mark.parametrize("prefix", [0, 1])
def test_importance_is_the_attention_of_attractive_tokens(threshold: float, prefix: int) -> None:
    kept = torch.arange(13).repeat(2, 1)
    kept[1, 9:] = -1
    site = make_site(n=13, prefix=prefix, map=TokenMap.keep(kept, 13, has_padding=True))
    got = calibrated_context(site, threshold, chunk=4)
    q, k, _ = (t.double() for t in site.qkv)
    for row, size in enumerate((13, 9)):
        logits = q[row] @ k[row].transpose(1, 2) / math.sqrt(q.shape[-1])
        maps = logits[..., : prefix + size].softmax(-1).mean(0)[prefix:, prefix:][:size]
        expected = slow_context(maps, threshold)
        assert got[row, :size].tolist() == pytest.approx(expected, abs=1e-6)


def slow_recycle(importance: list[float], cell: list[int], target: int) -> dict[int, int]:
    """token -> its representative, for the tokens that are left."""
    ascending = sorted(range(len(importance)), key=lambda j: importance[j])
    groups: dict[int, list[int]] = {}
    for m in range(len(ascending) + 1):
        groups = {}
        for j in ascending[:m]:
            groups.setdefault(cell[j], []).append(j)
        if len(ascending) - m + len(groups) <= target:
            break
    stands = {j: j for j in ascending[m:]}
    for members in groups.values():
        head = max(members, key=lambda j: importance[j])
        stands.update(dict.fromkeys(members, head))
    heads = sorted(set(stands.values()), key=lambda j: -importance[j])[:target]
    return {j: head for j, head in stands.items() if head in heads}


@pytest.mark.parametrize("seed", range(8))
def test_recycling_merges_the_least_important_by_cells(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sizes = (18, 12, 5)
    importance = torch.rand(3, 18, generator=generator)
    cell = torch.randint(0, 6, (3, 18), generator=generator)
    valid = torch.arange(18) < torch.tensor(sizes)[:, None]
    target = torch.tensor([int(torch.randint(1, n + 1, (1,), generator=generator)) for n in sizes])
    got = recycle(importance, cell, target, valid)
    assert got.valid.sum(1).tolist() == target.tolist()
    for row, n in enumerate(sizes):
        stands = slow_recycle(
            importance[row, :n].tolist(), cell[row, :n].tolist(), int(target[row])
        )
        kept = sorted(set(stands.values()))
        assert got.kept[row, : len(kept)].tolist() == kept
        for j in range(18):
            slot = kept.index(stands[j]) if j in stands else -1
            assert int(got.source[row, j]) == slot


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize(("keep", "side"), [((0.6, 0.7, 0.5), 2.0), (0.4, 1.5), (5, 4.0)])
def test_equals_the_model_by_hand(keep: Any, side: float, merge: bool) -> None:
    model, inputs = llava(2)
    layers = (1, 3)
    method = vtr.VFlowOpt(keep=keep, threshold=1.1, cell=side, layers=layers, merge=merge)
    with torch.no_grad(), vtr.apply(model, method) as handle:
        logits = model(**inputs).logits
    images, pixels, at = features(model, inputs), inputs["pixel_values"], 0
    tower = Tower(model)
    for b, ids in enumerate(samples(inputs)):
        count = len(images[b])
        importance: list[float] = []
        for image in pixels[at : at + count // 16]:
            x = tower.start(image)
            for layer in range(tower.last + 1):
                x, maps, _, _ = tower.step(layer, x)
            importance += slow_context(maps.mean(0)[1:, 1:], 1.1)
        at += count // 16
        cell = [
            (i // 16) * 100 + int(i % 16 // 4 / side) * 10 + int(i % 4 / side) for i in range(count)
        ]
        share = keep * (count // 16) / count if isinstance(keep, int) else keep
        rates = keep if isinstance(keep, tuple) else method.rates(share, 4, layers)
        sizes, n = [], count
        for rate in rates:
            n -= round(n * (1 - rate))
            sizes.append(n)

        def entry(
            sequence: Sequence,
            seen: object,
            importance: list[float] = importance,
            cell: list[int] = cell,
            size: int = sizes[0],
            x: torch.Tensor = images[b],
        ) -> None:
            if not merge:
                sequence.keep(best(torch.tensor(importance), size), compact=True)
                return
            stands = slow_recycle(importance, cell, size)
            values = {}
            for head in set(stands.values()):
                members = [j for j, h in stands.items() if h == head]
                weight = torch.tensor([importance[j] for j in members])
                values[head] = (weight[:, None] / weight.sum() * x[members]).sum(0)
            sequence.keep(sorted(values), True, values)

        def later(
            sequence: Sequence,
            seen: dict[int, Seen],
            importance: list[float] = importance,
            sizes: list[int] = sizes,
        ) -> None:
            ranked = torch.tensor([importance[j] for j in sequence.alive.tolist()])
            sequence.keep(best(ranked, sizes[1 + layers.index(max(seen))]), compact=False)

        def first(sequence: Sequence, seen: dict[int, Seen], entry: Any = entry) -> None:
            entry(sequence, seen)

        expected, alive = run(model, ids, images[b], {0: first, 1: later, 3: later})
        kept = handle.trace.kept[b]
        assert kept[kept >= 0].tolist() == alive and len(alive) == sizes[-1]
        torch.testing.assert_close(logits[b, -1], expected, atol=3e-5, rtol=2e-4)


@pytest.mark.parametrize("keep", [0.05, 0.25, 0.5, 0.9, 0.97, 1.0])
def test_rates_meet_the_budget_on_average(keep: float) -> None:
    layers = (9, 18)
    r1, r2, r3 = vtr.VFlowOpt(keep=keep).rates(keep, 28, layers)
    assert 0 < r1 <= 1 and 0 < r2 <= 1 and 0 < r3 <= 1
    assert (r1 * 9 + r1 * r2 * 9 + r1 * r2 * r3 * 10) / 28 == pytest.approx(keep)


# The authors' file for LLaVA-OneVision-7B: (R1, R2, R3), t, a by budget.
AUTHORS = {
    0.5: ((0.7233201448753168, 0.748747637472693, 0.487), 28.683047941520474, 11.756787150848968),
    0.25: ((0.2651026358526424, 0.9833433139039235, 0.8773258179532721), 34.759552803070484, 15.580797034937687),
    0.1: ((0.11661529508161146, 1.0, 0.6011), 39.26492840997221, 17.386981849158786),
}  # fmt: skip


@pytest.mark.parametrize("share", AUTHORS)
def test_the_released_values_are_those_of_the_budget(share: float) -> None:
    rates, threshold, cell = AUTHORS[share]
    preset = vtr.VFlowOpt.preset(f"llava-onevision-7b/{share:.0%}")
    assert preset == vtr.VFlowOpt.released(f"{share:.0%}")
    assert preset.keep == pytest.approx(rates, abs=1e-6) and preset.alpha == 0.0
    assert (preset.threshold, preset.cell) == pytest.approx((threshold, cell), abs=1e-4)
    r1, r2, r3 = preset.keep  # type: ignore[misc]
    assert (r1 * 9 + r1 * r2 * 9 + r1 * r2 * r3 * 10) / 28 == pytest.approx(share, abs=2e-3)
    # A budget alone takes all but R1, which meets it exactly.
    found = tuned(share)
    assert found.rates == pytest.approx(rates, abs=1e-6)
    assert (found.threshold, found.cell) == pytest.approx((threshold, cell), abs=1e-4)
    assert vtr.VFlowOpt(keep=share).rates(share, 28, (9, 18)) == pytest.approx(rates, abs=2e-3)


def test_between_two_budgets_the_released_values_are_interpolated() -> None:
    for share, low, part in ((0.2, 0.1, 2 / 3), (0.3, 0.25, 0.2), (0.05, 0.1, 0), (0.9, 0.25, 1)):
        high = {0.1: 0.25, 0.25: 0.5}[low]
        a, b = ((*AUTHORS[k][0], *AUTHORS[k][1:]) for k in (low, high))
        found = tuned(share)
        wanted = [x + part * (y - x) for x, y in zip(a, b, strict=True)]
        assert [*found.rates, *found[1:]] == pytest.approx(wanted, abs=1e-4)


def test_a_budget_in_tokens_takes_the_values_of_its_share(monkeypatch: Any) -> None:
    """Of the image's patches in the tower, of its tokens in the language model."""
    seen: dict[str, Any] = {}

    def context(site: Any, threshold: Any, chunk: Any = None) -> Any:
        seen["threshold"] = threshold
        return calibrated_context(site, threshold, chunk)

    def squares(group: Any, row: Any, column: Any, side: Any) -> Any:
        seen["cell"] = side
        return cells(group, row, column, side)

    monkeypatch.setattr("vtr.methods.vflowopt.calibrated_context", context)
    monkeypatch.setattr("vtr.methods.vflowopt.cells", squares)
    model, inputs = llava_next(2)  # 5 crops of 16 patches and 88 tokens; 3 crops and 52 tokens
    keep = 20
    for rows in ([0], [1], [0, 1]):
        with torch.no_grad(), vtr.apply(model, vtr.VFlowOpt(keep=keep, layers=(1, 2))):
            model(**{k: v[rows] for k, v in inputs.items()})
        crops, tokens = ([5, 3][r] for r in rows), ([88, 52][r] for r in rows)
        thresholds = [tuned(keep / (16 * n)).threshold for n in crops for _ in range(n)]
        assert torch.as_tensor(seen["threshold"]).flatten().tolist() == pytest.approx(
            thresholds if len(rows) > 1 else thresholds[:1]
        )
        assert seen["cell"].flatten().tolist() == pytest.approx(
            [tuned(keep / n).cell for n in tokens]
        )
    with torch.no_grad(), vtr.apply(model, vtr.VFlowOpt(keep=0.4, layers=(1, 2))):
        model(**inputs)
    assert seen["threshold"] == tuned(0.4).threshold
    with pytest.raises(ValueError, match="budget must be one of 50%, 25%, 10%"):
        vtr.VFlowOpt.released("75%")


def test_a_video_is_cut_and_not_recycled() -> None:
    model, inputs = videos.llava_onevision(2)
    found = {}
    for merge in (None, False, True):
        method = vtr.VFlowOpt(keep=(0.5, 1.0, 1.0), threshold=1.0, cell=2.0, merge=merge)
        with torch.no_grad(), vtr.apply(model, method) as handle:
            found[merge] = (model(**inputs).logits, int(handle.trace.stages[0].map.size.max()))
    assert torch.equal(found[None][0], found[False][0]) and found[None][1] == 1
    assert found[True][1] > 1


def test_images_are_recycled_beside_a_sample_with_a_video() -> None:
    model, _ = llava_onevision(1)
    image = {"pixel_values": noise(1, 5, 3, 28, 28), "image_sizes": torch.tensor([[50, 50]])}
    video = {"pixel_values_videos": videos.frames(1, 3)}
    counts = [[88], [videos.video(13)]]
    method = vtr.VFlowOpt(keep=(0.5, 1.0, 1.0), threshold=1.0, cell=2.0)
    rows = []
    for parts in ({**image, **video, **prompts(counts)}, {**image, **prompts(counts[:1])}):
        with torch.no_grad(), vtr.apply(model, method) as handle:
            model(**parts)
        rows.append(handle.trace.stages[0].map)
    both, alone = rows
    n, left = alone.n_in, alone.n_out
    assert int(both.size[0].max()) > 1 and int(both.size[1].max()) == 1
    assert torch.equal(both.source[0, :n], alone.source[0])
    assert torch.equal(both.kept[0, :left], alone.kept[0])


def test_equal_tokens_go_in_the_order_of_a_plain_cut() -> None:
    """Merged or dropped, of equally important tokens the later go first."""
    importance = torch.tensor([[0.5, 0.5, 0.5, 0.5, 0.5, 0.5]])
    alone = torch.arange(6)[None]
    valid = torch.ones(1, 6, dtype=torch.bool)
    assert recycle(importance, alone, torch.tensor([4]), valid).kept.tolist() == [[0, 1, 2, 3]]
    together = torch.zeros(1, 6, dtype=torch.long)
    assert recycle(importance, together, torch.tensor([4]), valid).kept.tolist() == [[0, 1, 2, 3]]


def test_rows_of_many_frames_are_made_a_few_at_a_time(monkeypatch: Any) -> None:
    batch = 48
    site = make_site(n=150, prefix=0, batch=batch, has_cls=False)
    sizes, rows = [], site.attention_from

    def spy(queries: torch.Tensor, mask: Any = None) -> torch.Tensor:
        sizes.append(queries.shape[0] * queries.shape[2])
        return rows(queries, mask)

    monkeypatch.setattr(site, "attention_from", spy)
    got = calibrated_context(site, 0.0)  # every token is a query in the second pass, too
    assert max(sizes) <= 4096 and sum(sizes) == 2 * batch * 150
    torch.testing.assert_close(got, calibrated_context(site, 0.0, chunk=150))
    assert [rows_at_once(b) for b in (1, 16, 17, 32, 8192)] == [256, 256, 240, 128, 1]


def test_cells_of_fractional_side() -> None:
    row = torch.arange(6).repeat_interleave(6).float()[None]
    column = torch.arange(6).repeat(6).float()[None]
    group = torch.zeros(1, 36)
    group[0, 35] = -1
    got = cells(group, row, column, 2.5)[0]
    assert int(got.max()) < 36
    for i in range(36):
        for j in range(36):
            together = math.floor(row[0, i] / 2.5) == math.floor(row[0, j] / 2.5) and math.floor(
                column[0, i] / 2.5
            ) == math.floor(column[0, j] / 2.5)
            if 35 in (i, j):
                together = i == j
            assert (got[i] == got[j]) == together


@pytest.mark.parametrize("family", [llava_next, llava_onevision, internvl])
def test_tiled_images_have_the_exact_number(family: Any) -> None:
    model, inputs = family(2)
    n = (inputs["input_ids"] == 150).sum(1).tolist()
    method = vtr.VFlowOpt(keep=(0.5, 1.0, 1.0), threshold=1.0, cell=2.0)
    with torch.no_grad(), vtr.apply(model, method) as handle:
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert (handle.trace.kept >= 0).sum(1).tolist() == [c - round(c / 2) for c in n]
    assert int(handle.trace.stages[0].map.size.max()) > 1, "something was recycled"


def test_entropy_of_patches() -> None:
    pixels = torch.zeros(1, 3, 4, 8)
    pixels[0, :, :, 4:6] = 200.0
    got = patch_entropy(pixels, (1, 2))
    torch.testing.assert_close(got, torch.tensor([[0.0, 1.0]]))


def test_the_entropy_term_reads_the_pixels_that_were_normalised() -> None:
    model, inputs = llava(2)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    plain = torch.randint(0, 256, inputs["pixel_values"].shape).float()
    flat = torch.rand(len(plain), 16) < 0.5  # half of the patches have one colour: no entropy
    side = plain.shape[2] // 4
    for crop, patch in flat.nonzero().tolist():
        row, column = patch // 4 * side, patch % 4 * side
        plain[crop, :, row : row + side, column : column + side] = 90
    shape = (1, 3, 1, 1)
    inputs["pixel_values"] = (plain / 255 - torch.tensor(mean).view(shape)) / torch.tensor(
        std
    ).view(shape)
    method = vtr.VFlowOpt(
        keep=(0.5, 1.0, 1.0), threshold=1.0, cell=1.0, alpha=1.0, pixel_mean=mean, pixel_std=std,
        layers=(1, 2), merge=False,
    )  # fmt: skip
    without = method.replace(alpha=0.0)
    with torch.no_grad(), vtr.apply(model, method) as handle:
        model(**inputs)
    with torch.no_grad(), vtr.apply(model, without) as other:
        model(**inputs)
    at, lively = 0, [0, 0]
    for b in range(2):
        count = int((inputs["input_ids"][b] == 150).sum())
        bare = flat[at : at + count // 16].flatten()
        at += count // 16
        for which, trace in enumerate((handle.trace, other.trace)):
            kept = trace.kept[b]
            lively[which] += int((~bare[kept[kept >= 0]]).sum())
    assert lively[0] > lively[1]
    torch.testing.assert_close(method._denormalised(inputs["pixel_values"]), plain)


def test_the_entropy_term_needs_pixels() -> None:
    model, _ = qwen2_vl(1)
    statistics = {"pixel_mean": (0.5,), "pixel_std": (0.5,)}
    with pytest.raises(vtr.UnsupportedMethodError, match="pixels"):
        vtr.apply(model, vtr.VFlowOpt(alpha=0.5, **statistics))
    with pytest.raises(ValueError, match="alpha needs pixel_mean"):
        vtr.VFlowOpt(alpha=0.5)
    with pytest.raises(ValueError, match="pixel_std"):
        vtr.VFlowOpt(alpha=0.5, pixel_mean=(0.5,), pixel_std=(0.0,))


@pytest.mark.parametrize(
    "options",
    [
        {"keep": 0},
        {"keep": (0.5, 0.5)},
        {"keep": (0.5, 0.0, 0.5)},
        {"later": (0.5,)},
        {"threshold": float("nan")},
        {"cell": 0.5},
        {"alpha": 2.0},
        {"layers": (0, 2)},
        {"layers": (1,)},
        {"merge": 1},
    ],
)
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        vtr.VFlowOpt(**options)
