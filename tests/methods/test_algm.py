"""ALGM against loops over windows and pairs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import vtr
from tests.tiny import images, site, vit
from vtr.methods.common.alike import merge_pairs, merge_windows


def smooth(batch: int, side: int, seed: int) -> Tensor:
    """Features that are alike in some windows: (batch, side * side, 12)."""
    draw = torch.Generator().manual_seed(seed)
    base = torch.randn(batch, side // 2, side // 2, 12, generator=draw)
    base = base.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1, 2)
    loud = torch.rand(batch, side * side, 1, generator=draw)
    return base + loud * torch.randn(batch, side * side, 12, generator=draw)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def windows(x: np.ndarray, side: int, threshold: float) -> tuple[list[list[int]], list[float]]:
    """The groups of one image in the authors' order: merged windows by falling similarity, then single tokens."""
    found, single = [], []
    for i in range(0, side, 2):
        for j in range(0, side, 2):
            members = [(i + a) * side + j + b for a in (0, 1) for b in (0, 1)]
            pairs = [cosine(x[p], x[q]) for p in members for q in members if p != q]
            if np.mean(pairs) >= threshold:
                found.append((float(np.mean(pairs)), members))
            else:
                single += [[p] for p in members]
    found.sort(key=lambda each: -each[0])
    return [members for _, members in found] + sorted(single), [a for a, _ in found]


def pairs(x: np.ndarray, sizes: list[int], number: int, prefix: int) -> list[list[int]]:
    """Groups of the rows of x, in the order that is split."""
    rows = list(range(len(x)))
    a, b = rows[prefix % 2 :: 2], rows[1 - prefix % 2 :: 2]
    best = [max((cosine(x[i], x[j]), -j) for j in b) for i in a]
    values = np.array([value for value, _ in best])
    limit = values.mean() + values.std(ddof=1) / number
    groups = {j: [j] for j in b}
    for i, (value, j) in zip(a, best, strict=True):
        if value >= limit:
            groups[-j].append(i)
        else:
            groups[i] = [i]
    return list(groups.values())


@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_both_merges_are_the_papers(prefix: int) -> None:
    for seed in range(4):
        x = smooth(2, 8, seed)
        first = site(n=64, prefix=prefix, batch=2)
        first.hidden, first.grid = x.double(), (8, 8)
        step, order = merge_windows(first, 2, 0.6, together=False)
        assert step is not None and order is not None
        merged = step.merge(x.double(), first.size)
        second = site(n=step.n_out, prefix=prefix, batch=2, map=step)
        second.hidden = merged
        again = merge_pairs(second, order, 5, together=False)
        assert again is not None
        out = again.merge(merged, step.size)
        total = step.then(again)
        for image in range(2):
            rows = x[image].double().numpy()
            groups, _ = windows(rows, 8, 0.6)
            assert 0 < len(groups) < 64
            means = np.stack([rows[g].mean(0) for g in groups])
            sizes = [len(g) for g in groups]
            wanted = set()
            for joined in pairs(means, sizes, 5, prefix):
                wanted.add(tuple(sorted(i for g in joined for i in groups[g])))
            found: dict[int, list[int]] = {}
            for token, slot in enumerate(total.source[image].tolist()):
                found.setdefault(slot, []).append(token)
            assert {tuple(g) for g in found.values()} == wanted
            for slot, members in found.items():  # a mean over all input tokens, each counted once
                np.testing.assert_allclose(
                    out[image, slot].numpy(), rows[members].mean(0), atol=1e-12
                )


def test_the_batch_merges_alike() -> None:
    x = smooth(3, 8, 7)
    here = site(n=64, batch=3)
    here.hidden, here.grid = x, (8, 8)
    step, order = merge_windows(here, 2, 0.6, together=True)
    least = min(len(windows(i.double().numpy(), 8, 0.6)[1]) for i in x)
    assert step is not None and not step.has_padding and step.n_out == 64 - 3 * least
    second = site(n=step.n_out, batch=3)
    second.hidden = step.merge(x)
    again = merge_pairs(second, order, 5, together=True)
    assert again is not None and not again.has_padding


def test_images_keep_their_own_numbers() -> None:
    model = vit()
    x = torch.cat([images(1), images(1) * 0.1 + 1, images(1) * 0])
    method = vtr.ALGM(threshold=0.5)
    with vtr.apply(model, method, output="restored") as handle, torch.no_grad():
        both = model.forward_features(x)
        left = handle.trace.stages[-1].total.valid.sum(1)
        assert len(set(left.tolist())) > 1
        for i, image in enumerate(x):
            alone = model.forward_features(image[None])
            assert handle.trace.stages[-1].tokens_out == left[i]
            torch.testing.assert_close(both[i : i + 1], alone, atol=2e-5, rtol=1e-4)


def test_a_threshold_that_nothing_reaches_leaves_the_windows() -> None:
    here = site(n=16, batch=1)
    here.grid = (4, 4)
    step, order = merge_windows(here, 2, 1.5, together=False)
    assert step is not None and step.n_out == 16
    assert order is not None and order[0].tolist() == list(range(16))


def test_too_few_tokens_to_compare_are_left() -> None:
    few = site(n=2, prefix=0, batch=1)
    assert merge_pairs(few, None, 5, together=False) is None


def test_errors() -> None:
    with pytest.raises(ValueError, match="counts must be 'own' or 'batch'"):
        vtr.ALGM(counts="mean")
    with pytest.raises(ValueError, match="layers must be two"):
        vtr.ALGM(layers=(1,))
    with pytest.raises(ValueError, match="window must be"):
        vtr.ALGM(window=1)
    model = vit()
    with (
        vtr.apply(model, vtr.ALGM(window=3)),
        pytest.raises(ValueError, match="must divide the grid"),
    ):
        model(images(1))
    both = [vtr.Random(keep=0.5, layers=(0,)), vtr.ALGM(layers=(1, 2))]
    with vtr.apply(model, both), pytest.raises(ValueError, match="windows of the whole grid"):
        model(images(1))
