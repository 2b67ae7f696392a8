"""The baselines of learned selection in the encoder of a detector."""

from __future__ import annotations

import math

import pytest
import torch

from tests.methods.detector_sites import info, site
from tests.methods.test_sparse_detr import TWO, N
from vtr import Objectness, Random, UnsupportedMethodError


@pytest.mark.parametrize("by", ["norm", "class"])
def test_the_best_of_each_image_by_hand(by):
    weights = torch.randn(16, 5, generator=torch.Generator().manual_seed(1))
    place = site(1, valid=TWO, classes=lambda x: x @ weights)
    kept = Objectness(keep=0.4, layers=(1,), by=by).reduce(place).map.kept
    for b in range(2):
        seen = TWO[b].nonzero()[:, 0].tolist()
        x = place.hidden[b]
        score = x.pow(2).sum(1) if by == "norm" else (x @ weights).max(1).values
        best = sorted(sorted(seen, key=lambda j: -float(score[j]))[: math.ceil(0.4 * len(seen))])
        assert [j for j in kept[b].tolist() if j >= 0] == best


def test_several_layers_reach_the_budget_by_one_ratio_of_each_image():
    method = Objectness(keep=0.25, layers=(0, 2))
    for layer, share in ((0, 0.5), (2, 0.25)):
        kept = method.reduce(site(layer, valid=TWO)).map.kept
        wanted = [math.ceil(share * int(row.sum()) - 1e-9) for row in TWO]
        last = [math.ceil(0.25 * int(row.sum()) - 1e-9) for row in TWO]
        ratio = [(end / int(row.sum())) ** 0.5 for end, row in zip(last, TWO, strict=True)]
        if layer == 0:
            wanted = [
                math.ceil(int(row.sum()) * r - 1e-9) for row, r in zip(TWO, ratio, strict=True)
            ]
        assert (kept >= 0).sum(1).tolist() == wanted


def test_random_keeps_valid_tokens_alone():
    kept = Random(keep=5, seed=2, site="detector").reduce(site(valid=TWO)).map.kept
    assert kept.shape == (2, 5) and all(TWO[b, j] for b in range(2) for j in kept[b].tolist())
    assert Random(keep=1.0, seed=2, site="detector").reduce(site(valid=TWO)) is None
    assert len(Random(keep=N, seed=2).reduce(site()) or ()) == 0


def test_the_class_head_is_asked_for():
    bare = info()
    bare.signals["detector"] = frozenset({"hidden"})
    Objectness().check(bare)
    with pytest.raises(UnsupportedMethodError, match="objectness needs class_logits"):
        Objectness(by="class").check(bare)
    with pytest.raises(RuntimeError, match="has no class head"):
        site().class_logits()
    with pytest.raises(ValueError, match="by must be one of norm, class"):
        Objectness(by="score")
