"""What the methods that merge around blocks share: kept maps, merges that keep norms, dropped sources,
merging by a matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import vtr
from tests.diffusion.models import CASES
from tests.methods.sites import block
from tests.tiny import images, vit
from vtr.core.tokens import TokenMap
from vtr.methods.base import Reduction
from vtr.methods.common.merging import CellMerging

GRID = (1, 8, 8)


def mlerp(x, source, slots):
    """(slots, C): the direction of the mean, the largest norm; a single token as it is."""
    rows = []
    for s in range(slots):
        group = x[source == s].double()
        mean = group.mean(0)
        rows.append(group[0] if len(group) == 1 else mean / mean.norm() * group.norm(dim=1).max())
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_merging_that_keeps_the_norm(dtype):
    x = torch.randn(2, 9, 6).to(dtype)
    source = torch.tensor([[0, 0, 1, 2, 2, 2, 3, 0, 1], [0, 1, 2, 3, 3, 2, 1, 0, 0]])
    kept = torch.tensor([[0, 2, 3, 6], [0, 1, 2, 3]])
    map = TokenMap.merged(kept, source)
    found = map.merge(x, torch.ones(2, 9), keep_norm=True)
    assert found.dtype == dtype
    for b in range(2):
        wanted = mlerp(x[b], source[b], 4)
        tolerance = {torch.bfloat16: 2e-2, torch.float16: 2e-3}.get(dtype, 1e-5)
        torch.testing.assert_close(found[b].double(), wanted, atol=tolerance, rtol=tolerance)
    assert torch.equal(found[0, 3], x[0, 6]), "one token alone is not touched"


def test_dropped_and_padding_tokens_have_no_norm():
    x = torch.randn(1, 5, 3) * torch.tensor([1.0, 1.0, 100.0, 1.0, 100.0])[:, None]
    source = torch.tensor([[0, 0, -1, 1, -1]])
    map = TokenMap.merged(torch.tensor([[0, 3, -1]]), source, has_padding=True)
    found = map.merge(x, torch.ones(1, 5), keep_norm=True)
    wanted = torch.cat([mlerp(x[0], source[0], 2), torch.zeros(1, 3).double()])
    torch.testing.assert_close(found[0].double(), wanted, atol=1e-5, rtol=1e-5)


def test_gradients_flow_through_the_norm():
    x = torch.randn(1, 4, 3, dtype=torch.float64, requires_grad=True)
    map = TokenMap.merged(torch.tensor([[0, 2]]), torch.tensor([[0, 0, 1, 1]]))
    torch.autograd.gradcheck(lambda t: map.merge(t, torch.ones(1, 4), keep_norm=True), (x,))


def test_early_blocks_drop_and_later_ones_merge():
    hidden = torch.randn(1, 64, 8)
    method = vtr.ToMeSD(0.5, drop_layers=2, keep_norm=True)
    early, late = (method.reduce(block(hidden, GRID, layer=n)) for n in (1, 2))
    assert early.weights is None and late.weights is not None and late.keep_norm
    named = vtr.ToMeSD(0.5, drop_layers=(2,))
    assert named.reduce(block(hidden, GRID, layer=1)).weights is not None
    assert named.reduce(block(hidden, GRID, layer=2)).weights is None
    assert torch.equal(early.map.gather(hidden)[0], hidden[0, early.map.kept[0]])


@torch.no_grad()
def test_token_fusion_in_an_encoder():
    """The first block gathers the B tokens; the second gives each group its largest norm."""
    model, x = vit(), images(2)
    seen = {}
    for n, each in enumerate(model.blocks):
        each.norm2.register_forward_pre_hook(lambda m, a, n=n: seen.__setitem__(n, a[0]))
    found = []
    for method in (vtr.ToMe(r=4, drop_layers=1, keep_norm=True), vtr.ToMe(r=4)):
        with vtr.apply(model, method) as handle:
            model(x)
            found.append((dict(seen), [s.map for s in handle.trace.stages]))
    (fused, maps), (mean, same) = found
    first = maps[0]
    assert torch.equal(first.source, same[0].source), "the same pairs in the first block"
    with vtr.apply(model, vtr.ToMe(r=0)):
        model(x)
    whole = seen[0]  # in front of the cut of the first block
    for b in range(2):
        kept = whole[b, 1:][first.kept[b]]
        torch.testing.assert_close(fused[0][b, 1:], kept, atol=1e-5, rtol=1e-5)
    assert (fused[0] - mean[0]).abs().max() > 1e-3
    norms = fused[1].norm(dim=-1).amax(1)
    assert (norms - mean[1].norm(dim=-1).amax(1)).abs().max() > 1e-4


def line(method, when, **given):
    state, found = {}, []
    for step in when:
        torch.manual_seed(step)
        found.append(method.reduce(
            block(torch.randn(2, 64, 8), GRID, step=step, state=state, **given)
        ).map)  # fmt: skip
    return found, state


@pytest.mark.parametrize("cls", [vtr.ToMeSD, vtr.SiTo])
def test_a_map_is_kept_for_some_steps(cls):
    found, state = line(cls(refresh=3), range(8), steps=8)
    assert [a is b for a, b in zip(found[1:], found, strict=False)] == [
        True, True, False, True, True, False, True,
    ]  # fmt: skip
    assert not torch.equal(found[2].source, found[3].source)
    assert state == {}, "the last step lets go of it"
    found, state = line(cls(refresh=3), [0, 2, 3, 7])
    assert found[0] is found[1] and len({id(m) for m in found}) == 3 and state
    found, state = line(cls(), range(3))
    assert len({id(m) for m in found}) == 3 and not state


def test_a_kept_map_is_of_its_batch_grid_and_run():
    method, state = vtr.ToMeSD(refresh=9), {}
    whole = method.reduce(block(torch.randn(2, 64, 8), GRID, state=state)).map
    half = method.reduce(block(torch.randn(1, 64, 8), GRID, step=1, state=state)).map
    assert (whole.batch, half.batch) == (2, 1)
    wide = method.reduce(block(torch.randn(1, 64, 8), (1, 4, 16), step=2, state=state)).map
    assert not torch.equal(wide.source, half.source)
    found, state = line(method, [0, 0], training=True)
    assert found[0] is not found[1] and not state


@torch.no_grad()
def test_guidance_that_ends_in_a_run_and_two_runs():
    """Batched guidance, then one row: found anew. The next run starts without the maps of the last."""
    case = CASES["pixart"]
    model = case.build()
    given = [
        case.call(batch=b, time=t) for b, t in ((2, 900.0), (2, 800.0), (1, 700.0), (1, 600.0))
    ]
    with vtr.apply(model, vtr.ToMeSD(refresh=9, seed=None), steps=4) as handle:
        runs = []
        for _ in range(2):
            maps = []
            for each in given:
                model(**each)
                maps.append(handle.trace.stages[0].map)
            runs.append(maps)
            assert not any(handle._wrapping.run.states.values()), "let go of"
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a.source, b.source)
    assert runs[0][0] is runs[0][1] and runs[0][2] is runs[0][3] and runs[0][2] is not runs[0][1]


class Indicator:
    """The merging of a map, by a matrix, its slots in another order."""

    def __init__(self, map):
        order = torch.randperm(map.n_out)
        self.kept = map.kept[:, order]
        member = torch.nn.functional.one_hot(map.source, map.n_out).float()[..., order]
        self.weights, self.back = (member / member.sum(1, keepdim=True)).mT, member

    def merge(self, x):
        return self.weights @ x

    def restore(self, y):
        return self.back @ y


@dataclass(frozen=True, kw_only=True)
class ByMatrix(CellMerging):
    name: ClassVar[str] = "by-matrix"
    paper: ClassVar[str] = "none"

    def find(self, site):
        map = vtr.ToMeSD(self.ratio, seed=None).find(site).map
        return Reduction(map, merging=Indicator(map))


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_a_matrix_that_says_what_a_map_says(name):
    """In every family: text first or last, rotary factors with and without an axis for samples."""
    case = CASES[name]
    model, given = case.build(), case.call()
    for mlp in (False, True):
        try:
            with vtr.apply(model, vtr.ToMeSD(0.5, seed=None, merge_mlp=mlp)):
                wanted = model(**given)[0]
        except vtr.UnsupportedMethodError as error:
            if mlp:
                continue
            pytest.skip(str(error))
        with vtr.apply(model, ByMatrix(ratio=0.5, merge_mlp=mlp)):
            found = model(**given)[0]
        torch.testing.assert_close(found, wanted, atol=5e-5, rtol=5e-5)
    assert (found - model(**given)[0]).abs().max() > 1e-3


@torch.no_grad()
def test_token_fusion_in_a_diffusion_transformer():
    """Inputs of attention by hand: gathered in the first block, with the largest norm in the others."""
    case = CASES["pixart"]
    model, given = case.build(), case.call()
    seen = {}
    for n, each in enumerate(model.transformer_blocks):
        each.attn1.to_q.register_forward_pre_hook(lambda m, a, n=n: seen.__setitem__(n, a[0]))
        each.norm1.register_forward_hook(lambda m, a, o, n=n: seen.__setitem__(("norm", n), o))
    with vtr.apply(model, vtr.ToMeSD(0.5, seed=None, drop_layers=1, keep_norm=True)) as handle:
        model(**given)
        stages = handle.trace.stages
        ada = model.transformer_blocks[0].scale_shift_table
        shift, scale, *_ = (ada[None] + _time(model, given)).chunk(6, dim=1)
        x = seen["norm", 0] * (1 + scale) + shift
        for b in range(2):
            torch.testing.assert_close(seen[0][b], x[b][stages[0].map.kept[b]])
        last = len(stages) - 1
        ada = model.transformer_blocks[last].scale_shift_table
        shift, scale, *_ = (ada[None] + _time(model, given)).chunk(6, dim=1)
        x, map = seen["norm", last] * (1 + scale) + shift, stages[last].map
        for b in range(2):
            wanted = mlerp(x[b], map.source[b], map.n_out)
            torch.testing.assert_close(seen[last][b].double(), wanted, atol=1e-5, rtol=1e-5)


def _time(model, given):
    time, _ = model.adaln_single(
        given["timestep"], {"resolution": None, "aspect_ratio": None}, batch_size=2,
        hidden_dtype=torch.float32,
    )  # fmt: skip
    return time.reshape(2, 6, -1)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: vtr.ToMeSD(drop_layers=-1), "drop_layers must be a number of first layers"),
        (lambda: vtr.ToMeSD(keep_norm=2), "keep_norm must be"),
        (lambda: vtr.ToMe(drop_layers=0.5), "drop_layers must be a number of first layers"),
        (lambda: vtr.ToMe(keep_norm=None), "keep_norm must be"),
        (lambda: vtr.apply(CASES["pixart"].build(), vtr.ToMeSD(drop_layers=(9,))), "do not exist"),
        (lambda: vtr.apply(vit(), vtr.ToMe(drop_layers=(6,))), "do not exist"),
    ],
)
def test_bad_options_say_what_to_do(make, words):
    with pytest.raises(ValueError, match=words):
        make()
