"""SiTo and OptiPrune: base tokens, pruned tokens and their keepers against plain loops."""

from __future__ import annotations

import pytest
import torch

import vtr
from tests.methods.sites import block
from vtr.methods.common.cells import cells, prune_map

GRIDS = [(1, 4, 6), (2, 4, 4), (3, 5, 7), (1, 1, 9)]


def by_loops(hidden, grid, cell, ratio, noise):
    """The keeper of every token of one sample, itself if it stays."""
    n = hidden.shape[0]
    unit = hidden.double() / hidden.double().norm(dim=1, keepdim=True)
    like = [[float(unit[i] @ unit[j]) for j in range(n)] for i in range(n)]
    score = [sum(like[i]) + float(noise[i]) for i in range(n)]
    base = {}
    for i in range(n):
        place = torch.unravel_index(torch.tensor(i), grid)
        where = tuple(int(p) // c for p, c in zip(place, cell, strict=True))
        if where not in base or score[i] > score[base[where]]:
            base[where] = i
    bases = set(base.values())
    most = {i: max(like[i][b] for b in bases) for i in range(n) if i not in bases}
    gone = sorted(most, key=lambda i: -most[i])[: int(ratio * n)]
    stay = [i for i in range(n) if i not in gone]
    return [i if i in stay else max(stay, key=lambda j: like[i][j]) for i in range(n)]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("cell", [(1, 2, 2), (2, 2, 2), (1, 3, 2)])
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.9])
def test_equals_plain_loops(grid, cell, ratio):
    n = torch.Size(grid).numel()
    hidden, noise = torch.randn(2, n, 8), torch.randn(n) * 0.1
    found = prune_map(hidden, grid, cell, ratio, noise)
    places = cells(grid, cell)
    assert sorted(places[places >= 0].tolist()) == list(range(n))
    for b in range(2):
        keeper = by_loops(hidden[b], grid, cell, ratio, noise)
        assert found.kept[b, found.source[b]].tolist() == keeper
        assert found.kept[b].tolist() == sorted(set(keeper))
    alone = prune_map(hidden[1:], grid, cell, ratio, noise)
    assert torch.equal(alone.source[0], found.source[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_pruned_token_has_the_output_of_its_keeper(dtype):
    hidden = torch.randn(2, 105, 6).to(dtype)
    reduction = vtr.SiTo(0.5, noise=1.0).find(block(hidden, (3, 5, 7), step=3, layer=1))
    map = reduction.map
    assert reduction.weights is None and map.n_out == 105 - 52
    out = torch.randn(2, map.n_out, 6).to(dtype)
    whole = map.restore(out)
    for b in range(2):
        assert torch.equal(map.gather(hidden)[b], hidden[b, map.kept[b]]), "nothing is averaged"
        for i in range(105):
            assert torch.equal(whole[b, i], out[b, map.source[b, i]])


def test_scores_are_summed_in_full_precision():
    """In float16 a sum over 4096 tokens that are alike has a spacing of 2 to 4."""
    hidden = torch.ones(1, 4096, 4) + torch.rand(1, 4096, 4) * 0.02
    unit = torch.nn.functional.normalize(hidden.double(), dim=-1)
    score = (unit @ unit.sum(1)[..., None])[0, :, 0]
    assert score.max() - score.min() < 1
    best = score[cells((1, 64, 64), (1, 2, 2))].max(1).values
    found = prune_map(hidden, (1, 64, 64), (1, 2, 2), 0.75)
    assert torch.allclose(score[found.kept[0]].sort().values, best.sort().values, atol=2e-3)


def test_noise_comes_from_the_seed():
    hidden = torch.ones(1, 96, 8) + torch.rand(1, 96, 8) * 1e-3

    def kept(method, step=0, layer=0):
        return method.find(block(hidden, (1, 8, 12), step=step, layer=layer)).map.kept.tolist()

    method = vtr.SiTo(0.75, noise=10.0)
    assert kept(method) == kept(method) == kept(vtr.OptiPrune(0.75, noise=10.0))
    assert kept(method) != kept(method, step=1) != kept(method, layer=1)
    assert kept(vtr.SiTo(0.75, seed=None)) == kept(vtr.SiTo(0.75, noise=0.0), step=7)


def test_nothing_is_pruned_at_zero():
    assert vtr.SiTo(0.0).reduce(block(torch.randn(1, 24, 8), (1, 4, 6))) is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ratio": 0.8}, "ratio must be from 0 to 0.75"),
        ({"cell": (2, 2)}, "cell must be"),
        ({"noise": -1.0}, "noise must be a number"),
        ({"refresh": 0}, "refresh must be an int >= 1"),
        ({"merge_attn": False}, "nothing would be merged"),
    ],
)
def test_bad_options_say_what_to_do(options, words):
    with pytest.raises(ValueError, match=words):
        vtr.SiTo(**options)
