"""VisionZip: dominant and contextual tokens, recomputed by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vtr.methods.visionzip import contextual_groups, dominant


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
