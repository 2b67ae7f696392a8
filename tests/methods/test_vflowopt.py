"""VFlowOpt: the importance map, the recycling and the progressive schedule, recomputed slowly."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import site as make_site

from vtr.methods.vflowopt import calibrated_context, recycle
from vtr.tokens import TokenMap


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
    site = make_site(n=13, prefix=prefix, map=TokenMap.keep(kept, 13, padded=True))
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
        stands = slow_recycle(importance[row, :n].tolist(), cell[row, :n].tolist(), int(target[row]))
        kept = sorted(set(stands.values()))
        assert got.kept[row, : len(kept)].tolist() == kept
        for j in range(18):
            slot = kept.index(stands[j]) if j in stands else -1
            assert int(got.source[row, j]) == slot
