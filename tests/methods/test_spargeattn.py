"""SpargeAttn's mask against its rule in loops, token by token."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import vtr
from tests.methods.block_masks import TEXTS, check, consecutive, means, softmax
from tests.methods.sites import TOLERANCE, Run, attention, tensors
from vtr.core.registry import create
from vtr.kernels.masks.budgets import top_p
from vtr.kernels.masks.curves import hilbert_order
from vtr.kernels.masks.scores import self_similarity

GRID = (3, 5, 6)


def similarity(x, part):
    """The mean cosine of all pairs of tokens of a block, in a loop; a token of zeros is in no pair."""
    rows = [x[i] / np.linalg.norm(x[i]) for i in part if np.linalg.norm(x[i]) > 0]
    return float(np.mean([a @ b for a in rows for b in rows])) if rows else 1.0


def choose(*, density=None, cdf=None, least=-0.1, smooth=True, order=None, sides=(32, 16)):
    def found(q, k, words, scale):
        order_ = range(len(q)) if order is None else order
        rows, columns = (consecutive(order_, side) for side in sides)
        centred = k - k.mean(0) if smooth else k
        keys = means(k, columns)
        alike = [similarity(centred, part) > least for part in columns]
        pairs = []
        for part, row in zip(rows, means(q, rows), strict=True):
            live = {j for j, same in enumerate(alike) if not same}
            judged = [j for j, same in enumerate(alike) if same]
            share = (
                dict(
                    zip(
                        judged,
                        softmax([float(scale * (row @ keys[j])) for j in judged]),
                        strict=True,
                    )
                )
                if judged
                else {}
            )
            falling = sorted(judged, key=lambda j: -share[j])
            if cdf is None:
                count = max(1, int(density * len(columns)))
            else:
                sums = np.cumsum([share[j] for j in falling])
                count = max(1, int(np.searchsorted(sums, cdf, side="right")))
            live |= set(falling[:count])
            if similarity(q, part) <= least:
                live = set(range(len(columns)))
            pairs.append((part, [j for n in sorted(live) for j in columns[n]]))
        return pairs

    return found


@pytest.mark.parametrize("case", TEXTS)
@pytest.mark.parametrize("options", [{"density": 0.4}, {"cdf": 0.6}], ids=str)
def test_equals_the_rule_token_by_token(case, options):
    method = vtr.SpargeAttn(**options, block=32, key_block=16)
    assert check(method, choose(**options), **TEXTS[case]) < 0.7


@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize("options", [{"density": 0.2}, {"cdf": 0.3}], ids=str)
@pytest.mark.parametrize("least", [0.02, 0.04, 0.06, 1.0])
def test_blocks_that_are_not_similar_are_whole_rows_and_columns(options, least, smooth):
    """Random tokens: the self-similarity of a block of n is about 1 / n; with 1.0 none is similar."""
    method = vtr.SpargeAttn(**options, similarity=least, smooth=smooth, block=32, key_block=16)
    share = check(method, choose(**options, least=least, smooth=smooth), text=7)
    assert share == 1.0 if least == 1.0 else share < 1.0


@pytest.mark.parametrize("sides", [(128, 64), (16, 64), (64, 64)])
def test_other_sides_and_orders(sides):
    grid = (3, 8, 12)
    method = vtr.SpargeAttn(0.4, order="hilbert", block=sides[0], key_block=sides[1])
    check(method, choose(density=0.4, order=hilbert_order(grid), sides=sides), grid, heads=2)


def test_self_similarity_of_known_blocks():
    """A constant block has 1, whatever the lengths of its tokens; opposite tokens 0; zeros do not count."""
    one = torch.tensor([3.0, 4.0])
    blocks = torch.stack([
        torch.stack([one, 2 * one, one / 3, one]),
        torch.stack([one, -one, one, -one]),
        torch.stack([one, 0 * one, one, 0 * one]),
        torch.zeros(4, 2),
    ])  # fmt: skip
    torch.testing.assert_close(
        self_similarity(blocks.flatten(0, 1), 4), torch.tensor([1.0, 0.0, 1.0, 1.0])
    )
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 22, 5, generator=g)
    found = self_similarity(x, 8)
    for b, h in np.ndindex(2, 3):
        expected = [
            similarity(x[b, h].double().numpy(), range(i, min(i + 8, 22))) for i in (0, 8, 16)
        ]
        np.testing.assert_allclose(found[b, h], expected, atol=1e-6)


def test_tokens_of_zeros_do_not_make_a_block_dense():
    """As padded tokens do in the authors' code, where they have no cosine."""
    grid = (1, 8, 12)
    q, k, v = tensors(grid, heads=1)
    q, k = q[:, :, :1].expand_as(q).clone(), k[:, :, :1].expand_as(k).clone()
    q[:, :, 40:50], k[:, :, 40:50] = 0, 0
    method = vtr.SpargeAttn(0.4, similarity=0.9, smooth=False, block=16, key_block=16)
    live = method.chosen(method.view(Run(method, grid).site((q, k, v)))).live
    assert (live.sum(-1) == 2).all()  # int(0.4 x 6)


def test_the_block_that_crosses_the_share_is_left_out():
    """The sheet's example: of .5 .3 .15 .05 and a share of .6 one is kept, and at least one always."""
    mass = torch.tensor([[0.15, 0.5, 0.05, 0.3]])
    assert top_p(mass, 0.6, crossing=False).tolist() == [[False, True, False, False]]
    assert top_p(mass, 0.0, crossing=False).tolist() == [[False, True, False, False]]
    assert top_p(mass, 0.97, crossing=False).sum() == 3 and top_p(mass, 1.0, crossing=False).all()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("options", [{"density": 1.0}, {"cdf": 1.0}, {"similarity": 1.0}], ids=str)
def test_everything_is_dense(dtype, options):
    qkv = tensors(GRID, 5, dtype=dtype)
    out = Run(vtr.SpargeAttn(**options, block=32, key_block=16), GRID, text_first=True)(qkv)
    expected, _ = attention(*qkv, torch.ones(95, dtype=torch.bool), 0.25)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"density": 0}, "density must be in"),
        ({"cdf": 1.1}, "cdf must be a number from 0 to 1"),
        ({"similarity": 2}, "similarity must be a number in"),
        ({"key_block": 48}, "key_block must be 16, 32, 64 or 128"),
        ({"smooth": "yes"}, "smooth must be True or False"),
        ({"order": 3}, "order must be"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(ValueError, match=match):
        vtr.SpargeAttn(**options)


def test_the_authors_settings():
    assert vtr.SpargeAttn.preset("topk") == vtr.SpargeAttn(0.5, similarity=-0.1)
    method = vtr.SpargeAttn.preset("cdf")
    assert (method.cdf, method.similarity, method.sides) == (0.98, 0.6, (128, 64))
    assert create(**method.to_dict()) == method
