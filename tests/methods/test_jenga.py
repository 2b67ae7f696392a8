"""Jenga's blocks against its rule, token by token, and against RectifiedSparse without rectification."""

from __future__ import annotations

import pytest
import torch

import vtr
from tests.methods.block_masks import TEXTS, check, consecutive, means, softmax, touch
from tests.methods.sites import TOLERANCE, Run, attention, tensors
from vtr.core.registry import create
from vtr.kernels.masks.budgets import top_k, top_p
from vtr.kernels.masks.gilbert import gilbert_frames, gilbert_order

GRID = (3, 5, 6)


def choose(drop, p, *, order=gilbert_order, near=True, first_frame=False, grid=GRID, block=16):
    def found(q, k, words, scale):
        blocks = consecutive(order(grid), block)
        keys = means(k, blocks)
        pairs = []
        for number, (rows, row) in enumerate(zip(blocks, means(q, blocks), strict=True)):
            share = softmax([float(scale * (row @ key)) for key in keys])
            falling = sorted(range(len(blocks)), key=lambda j: -share[j])
            running, count = 0.0, 1
            for j in falling:
                running += share[j]
                count += running <= p
            live = set(falling[: max(count, int((1 - drop) * len(blocks) + 1e-9))])
            if near:
                live |= {j for j, part in enumerate(blocks) if touch(grid, rows, part)}
            if first_frame:
                first = len(blocks) // grid[0]
                live |= {number} | (set(range(first)) if number < first else set())
            pairs.append((rows, [j for n in sorted(live) for j in blocks[n]]))
        return pairs

    return found


@pytest.mark.parametrize("case", TEXTS)
def test_equals_the_rule_token_by_token(case):
    method = vtr.Jenga(0.8, p=0.3, neighbours=False, block=16)
    assert check(method, choose(0.8, 0.3, near=False), **TEXTS[case]) < 0.6


@pytest.mark.parametrize("text", [0, 7])
def test_blocks_that_touch_and_the_first_frame(text):
    grid = (6, 6, 8)
    for near, first in ((True, False), (True, True), (False, True)):
        method = vtr.Jenga(
            0.9, p=0.1, order="gilbert-frames", neighbours=near, first_frame=first, block=16
        )
        rule = choose(0.9, 0.1, order=gilbert_frames, near=near, first_frame=first, grid=grid)
        check(method, rule, grid, text=text, heads=2)


@pytest.mark.parametrize("case", [case for case in TEXTS if case != "video only"])
def test_raised_text(case):
    """The weights of text are multiplied by 2 ** gain; text rows stay as they are."""
    method = vtr.Jenga(0.8, p=0.3, neighbours=False, text_gain=1.5, block=16)
    check(method, choose(0.8, 0.3, near=False), gain=2**1.5, **TEXTS[case])


def test_a_gain_without_text_changes_nothing():
    qkv = tensors(GRID)
    found = [Run(vtr.Jenga(0.8, text_gain=gain, block=16), GRID)(qkv) for gain in (0.0, 2.0)]
    assert torch.equal(*found)


def test_gradients_with_raised_text():
    method = vtr.Jenga(0.8, p=0.3, neighbours=False, text_gain=0.5, block=16)
    q, k, v = (t.double().requires_grad_() for t in tensors((1, 4, 5), 3, batch=1, heads=1, dim=2))
    run = Run(method, (1, 4, 5))
    assert torch.autograd.gradcheck(lambda *qkv: run(qkv), (q, k, v), fast_mode=True)


def test_the_block_that_crosses_the_share_is_kept():
    """The sheet's example: of .5 .3 .15 .05 and p = .6 two are kept; the number is a union of two rules."""
    mass = torch.tensor([[0.15, 0.5, 0.05, 0.3]])
    assert top_p(mass, 0.6).tolist() == [[False, True, False, True]]
    assert top_p(mass, 0.4).sum() == 1 and top_p(mass, 0.85).sum() == 3
    assert (top_p(mass, 0.4) | top_k(mass, 3)).tolist() == [[True, True, False, True]]


def test_rectified_sparse_without_rectification_is_the_same_rule():
    """Without text, and on whole blocks, where both have the same P."""
    grid = (4, 4, 8)
    qkv = tensors(grid)
    for first in (False, True):
        jenga = vtr.Jenga(0.8, p=0.2, first_frame=first, block=16)
        other = vtr.RectifiedSparse(
            0.8, p=0.2, order="gilbert", first_frame=first, rectify=False, block=16
        )
        assert torch.equal(Run(jenga, grid)(qkv), Run(other, grid)(qkv))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("gain", [0.0, 1.0])
def test_everything_is_dense(dtype, gain):
    qkv = tensors(GRID, 5, dtype=dtype)
    out = Run(vtr.Jenga(0.0, text_gain=gain, block=16), GRID, text_first=True)(qkv)
    assert out.dtype == dtype
    expected, _ = attention(*qkv, torch.ones(95, dtype=torch.bool), 0.25)
    rows = slice(0, 5) if gain else slice(None)
    torch.testing.assert_close(
        out[:, :, rows].double(), expected[:, :, rows], atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
    )


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"drop": 1.5}, "drop must be"),
        ({"p": -1}, "p must be"),
        ({"order": "snake"}, '"gilbert-frames" or a tile'),
        ({"neighbours": 1}, "neighbours must be"),
        ({"first_frame": None}, "first_frame must be"),
        ({"text_gain": -0.5}, "text_gain must be a number in"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(ValueError, match=match):
        vtr.Jenga(**options)


def test_the_authors_settings():
    made = {name: vtr.Jenga.preset(name) for name in vtr.Jenga.PRESETS}
    assert made["hunyuanvideo"] == vtr.Jenga(0.75, p=0.3)
    for name, (drop, p) in {"wan2.1-t2v-1.3b": (0.75, 0.9), "wan2.1-t2v-14b": (0.7, 0.8)}.items():
        found = made[name]
        assert (found.drop, found.p, found.first_frame, found.dense_steps) == (drop, p, True, 2)
        assert found.order == "gilbert-frames" and create(**found.to_dict()) == found
