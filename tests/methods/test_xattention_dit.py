"""XAttention without a causal mask against its definition in loops, token by token."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import vtr
from tests.methods.block_masks import TEXTS, VALID, check, consecutive
from tests.methods.sites import TOLERANCE, Run, attention, tensors
from vtr.core.registry import create
from vtr.methods.common import antidiagonal

GRID = (3, 5, 6)


def choose(threshold, stride, block=16, places=None):
    """``places``: of the text's T places those that hold valid text; None if all do."""

    def found(q, k, words, scale):
        text = np.zeros((0, k.shape[1]))
        if len(words):
            at = range(len(words)) if places is None else places(len(words))
            text = np.zeros((max(at) + 1, k.shape[1]))
            text[list(at)] = words
        runs = [part[i : i + stride] for part in (k, text) for i in range(0, len(part), stride)]
        runs = [run for run in runs if np.abs(run).any()]
        blocks = consecutive(range(len(q)), block)
        grid = math.ceil(len(k) / stride)
        pairs = []
        for rows in blocks:
            mass, said = [0.0] * len(blocks), 0.0
            for start in range(0, len(rows), stride):
                own = q[rows[start : start + stride]]
                score = np.zeros(len(runs))
                for number, run in enumerate(runs):
                    for t in range(stride):
                        if stride - 1 - t < len(own) and t < len(run):
                            score[number] += scale / stride * (own[stride - 1 - t] @ run[t])
                weight = np.exp(score - score.max()) / np.exp(score - score.max()).sum()
                for number in range(grid):
                    mass[number * stride // block] += weight[number]
                said += weight[grid:].sum()
            reached, goal, live = said, threshold * (sum(mass) + said), set()
            for j in sorted(range(len(blocks)), key=lambda j: -mass[j]):
                if reached < goal:
                    live.add(j)
                    reached += mass[j]
            if not live and not len(words):
                live = {int(np.argmax(mass))}
            pairs.append((rows, [j for n in sorted(live) for j in blocks[n]]))
        return pairs

    return found


def padded(number):
    """The places of valid text in a sample of ``VALID`` with that many."""
    row = VALID[VALID.sum(1) == number][0]
    return row.nonzero().flatten().tolist()


@pytest.mark.parametrize("case", TEXTS)
@pytest.mark.parametrize("stride", [4, 8])
def test_equals_the_definition_token_by_token(case, stride):
    places = padded if "valid" in TEXTS[case] else None
    method = vtr.XAttentionDiT(0.5, stride=stride, block=16)
    assert check(method, choose(0.5, stride, places=places), **TEXTS[case]) < 0.7


@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.9, 1.0])
def test_thresholds(threshold):
    """With 0 a row that sees text keeps no block, and without text its best one."""
    method = vtr.XAttentionDiT(threshold, stride=4, block=16)
    for text in (0, 7):
        share = check(method, choose(threshold, 4), text=text)
        if threshold in (0.0, 1.0):
            assert (share == 0) == (threshold == 0 and text > 0) and (share == 1) == (
                threshold == 1
            )


def test_a_few_rows_at_a_time(monkeypatch):
    qkv = tensors(GRID, 7)
    method = vtr.XAttentionDiT(0.5, stride=4, block=16)
    wanted = Run(method, GRID, text_valid=VALID)(qkv)
    monkeypatch.setattr(antidiagonal, "_CHUNK", 1)
    assert torch.equal(Run(method, GRID, text_valid=VALID)(qkv), wanted)


def test_padding_of_text_has_no_say():
    """Its values may be anything."""
    q, k, v = tensors(GRID, 7)
    method = vtr.XAttentionDiT(0.5, stride=4, block=16)
    wanted = Run(method, GRID, text_valid=VALID)((q, k, v))
    wild = k.clone()
    wild[:, :, 90:][~VALID[:, None].expand(-1, 2, -1)] = 1e4
    found = Run(method, GRID, text_valid=VALID)((q, wild, v))
    assert torch.equal(found[:, :, :90], wanted[:, :, :90])


def test_a_planted_line_is_found():
    """Pooling loses a diagonal that antidiagonals cross: row i looks at key i - 37."""
    grid = (1, 16, 19)
    k = torch.eye(304)[None, None]
    q = k.roll(37, 2) * 1e3
    method = vtr.XAttentionDiT(0.9, stride=4, block=16)
    live = method.chosen(method.view(Run(method, grid).site((q, k, k)))).live[0, 0]
    for i in range(37, 304):
        assert live[i // 16, (i - 37) // 16]
    assert live.float().mean() < 0.25


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_everything_is_dense(dtype):
    qkv = tensors(GRID, 5, dtype=dtype)
    out = Run(vtr.XAttentionDiT(1.0, block=16), GRID, text_first=True)(qkv)
    expected, _ = attention(*qkv, torch.ones(95, dtype=torch.bool), 0.25)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"threshold": 1.5}, "threshold must be"),
        ({"stride": 3}, "stride must be 2, 4, 8, 16 or 32"),
        ({"stride": 32, "block": 16}, "divide block"),
        ({"stride": True}, "stride must be"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(ValueError, match=match):
        vtr.XAttentionDiT(**options)


def test_the_papers_settings():
    for name, threshold in {"hunyuanvideo": 0.9, "hunyuanvideo-0.95": 0.95}.items():
        found = vtr.XAttentionDiT.preset(name)
        assert (found.threshold, found.stride, found.dense_steps) == (threshold, 8, 5)
        assert create(**found.to_dict()) == found
