"""The random baseline: uniform, seeded, shared by a batch."""

from __future__ import annotations

import torch

import vtr
from tests.tiny import images, site, vit


def kept(method: vtr.Random, n: int = 20, layer: int = 0) -> list[int]:
    got = method.reduce(site(n=n, layer=layer))
    assert got is not None and got.map is not None
    assert torch.equal(got.map.kept[0], got.map.kept[1]), "one subset for the batch"
    return got.map.kept[0].tolist()


def test_a_seed_fixes_the_subset() -> None:
    assert kept(vtr.Random(keep=5, seed=1)) == kept(vtr.Random(keep=5, seed=1))
    assert len({tuple(kept(vtr.Random(keep=5, seed=i))) for i in range(40)}) > 35
    different = vtr.Random(keep=(10, 5), layers=(0, 1), seed=1)
    assert kept(different, layer=0)[:5] != kept(different, layer=1)
    assert kept(vtr.Random(keep=5, seed=-7)) == kept(vtr.Random(keep=5, seed=-7))


def test_without_a_seed_the_global_generator_decides() -> None:
    method = vtr.Random(keep=5)
    torch.manual_seed(3)
    first = kept(method)
    second = kept(method)
    torch.manual_seed(3)
    assert kept(method) == first != second


def test_every_token_is_as_likely() -> None:
    """Both sources, 3000 draws of 5 of 20: each token 750 times, standard deviation 24."""
    torch.manual_seed(0)
    for draw in (lambda i: vtr.Random(keep=5, seed=i), lambda i: vtr.Random(keep=5)):
        times = torch.zeros(20)
        pairs = torch.zeros(20, 20)
        for i in range(3000):
            chosen = kept(draw(i))
            times[chosen] += 1
            pairs[chosen[0], chosen[1:]] += 1
        assert (times - 750).abs().max() < 5 * 24
        assert (pairs > 0).sum() > 150  # no fixed companions


def test_random_cuts_where_asked() -> None:
    model = vit()
    with (
        vtr.apply(model, vtr.Random(keep=(32, 7), layers=(1, 4), seed=0)) as handle,
        torch.no_grad(),
    ):
        model(images(3))
    assert [(s.layer, s.tokens_out) for s in handle.trace.stages] == [(1, 32), (4, 7)]
