"""The frame of methods that choose blocks at run time, against masks written out token by token."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path

import pytest
import torch

from tests.methods.sites import Run, attention, tensors, visible
from vtr.core import registry
from vtr.kernels.masks import always, layouts, schedule
from vtr.kernels.masks.budgets import number_of, top_k, top_p
from vtr.kernels.masks.chosen import chosen_blocks, key_places
from vtr.kernels.masks.layouts import Layout
from vtr.kernels.masks.scores import pooled
from vtr.methods.base import DynamicAttention

GRID = (3, 5, 6)


class Best(DynamicAttention):
    """Two key blocks of each row, by pooled scores; what differs is given by a test."""

    name = "best"
    shape = (16, 32)
    number = 2
    make = staticmethod(layouts.raster)

    @property
    def sides(self):
        return self.shape

    def layout(self, grid):
        return self.make(grid, self.sides)

    def scores(self, view):
        return pooled(view.q_means, view.k_means, scale=view.scale, counts=view.counts_k)

    def budget(self, scores, view):
        return top_k(scores, self.number) if self.number else torch.zeros_like(scores).bool()


def best(shape=(16, 32), number=2, make=layouts.raster):
    kind = type("Best", (Best,), {"shape": shape, "number": number, "make": staticmethod(make)})
    return kind(backend="sdpa")


def tiles(grid, sides):
    return layouts.tiled(grid, (2, 2, 2), sides, whole=True)


MAKERS = {"raster": layouts.raster, "hilbert": layouts.curve, "tiles with room": tiles}


def oracle(qkv, layout, number, text, text_first, valid, scale):
    """The output with two blocks per row, all in float64 and in loops over blocks."""
    q, k, v = (t.double() for t in qkv)
    batch, heads, length, _ = q.shape
    tokens = length - text
    first = text if text_first else 0
    parts = []
    for side in layout.sides:
        cut = [layout.order[i : i + side].tolist() for i in range(0, layout.places, side)]
        parts.append([[first + t for t in block if t >= 0] for block in cut])
    rows, columns = parts
    seen = torch.zeros(batch, heads, length, length, dtype=torch.bool)
    words = [t for t in range(length) if not first <= t < first + tokens]
    seen[:, :, words] = True
    seen[:, :, :, words] = True
    for b, h in itertools.product(range(batch), range(heads)):
        for row in rows:
            score = [
                scale * float(q[b, h, row].mean(0) @ k[b, h, c].mean(0)) if c and row else -math.inf
                for c in columns
            ]
            for c in sorted(range(len(columns)), key=lambda j: -score[j])[:number]:
                seen[b, h, torch.tensor(row, dtype=torch.int64)[:, None],
                         torch.tensor(columns[c], dtype=torch.int64)] = True  # fmt: skip
    seen = seen & visible(GRID, text, text_first, valid, batch)[:, None, None]
    return attention(q, k, v, seen, scale)[0], seen


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("shape", [(16, 16), (16, 32), (32, 16)], ids=str)
@pytest.mark.parametrize("text", ["", "last", "first"])
def test_equals_the_mask_token_by_token(make, shape, text):
    words = 7 if text else 0
    valid = None
    if text:
        valid = torch.ones(2, 7, dtype=torch.bool)
        valid[1, 3:] = False
    method = best(shape, make=MAKERS[make])
    run = Run(method, GRID, text_first=text == "first", text_valid=valid)
    qkv = tensors(GRID, words)
    layout = MAKERS[make](GRID, shape)
    expected, seen = oracle(qkv, layout, 2, words, text == "first", valid, 0.25)
    out = method.attend(run.site(qkv))
    rows = visible(GRID, words, text == "first", valid, 2)[:, None, :, None]
    torch.testing.assert_close(out.double() * rows, expected * rows, atol=1e-5, rtol=1e-5)
    # Work is counted in whole blocks, places without a token and padded text among them.
    assert float(run.notes["density"]) >= float(seen.float().mean()) - 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_other_dtypes_and_fewer_key_heads(dtype):
    method = best()
    q, k, v = tensors(GRID, 5, heads=4, key_heads=2)
    want = Run(method, GRID)((q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)))
    torch.testing.assert_close(Run(method, GRID)((q, k, v)), want)
    low = [t.to(dtype) for t in (q, k, v)]
    out = Run(method, GRID)(low)
    again = Run(method, GRID)([t.float() for t in low])
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), again, atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("text", [0, 6])
def test_a_row_that_would_see_nothing_keeps_its_best_block(text):
    valid = None if not text else torch.zeros(2, text, dtype=torch.bool)
    method = best(number=0)
    run = Run(method, GRID, text_valid=valid)
    qkv = tensors(GRID, text)
    out = method.attend(run.site(qkv))
    expected, _ = oracle(qkv, layouts.raster(GRID, (16, 32)), 1, text, False, valid, 0.25)
    assert not out.isnan().any()
    torch.testing.assert_close(out[:, :, :90].double(), expected[:, :, :90], atol=1e-5, rtol=1e-5)


def test_a_row_of_text_alone_sees_text_alone():
    method = best(number=0)
    qkv = tensors(GRID, 6)
    out = method.attend(Run(method, GRID).site(qkv))
    seen = torch.zeros(96, 96, dtype=torch.bool)
    seen[90:] = seen[:, 90:] = True
    torch.testing.assert_close(out.double(), attention(*qkv, seen, 0.25)[0], atol=1e-5, rtol=1e-5)


def test_a_choice_serves_later_steps_and_is_renewed_when_sizes_change():
    class Every(Best):
        def renew(self, site):
            return site.step % 3 == 0

    method = Every(backend="sdpa")
    run, first = Run(method, GRID), tensors(GRID)
    later = tensors(GRID, seed=5)
    run(first, 0)
    mask = run.notes["mask"]
    run(later, 1)
    assert run.notes["mask"] is mask
    run(later, 3)
    renewed = run.notes["mask"]
    assert renewed is not mask
    run([t[:1] for t in later], 4)  # guidance was switched off
    assert run.notes["mask"].pattern.shape[0] == 1


def test_an_author_who_forgets_a_part_is_told():
    from vtr.core.site import ModelInfo

    class Half(DynamicAttention):
        def scores(self, view):
            return view.q_means

    looks = frozenset({"qkv", "denoising"})
    info = ModelInfo("Wan", {"attention": 2}, {"attention": looks})
    with pytest.raises(TypeError, match=r"Half must define scores\(view\).* and budget"):
        Half().check(info)
    with pytest.raises(NotImplementedError, match="budget"):
        Half().attend(Run(Half(), GRID).site(tensors(GRID)))
    with pytest.raises(NotImplementedError, match="scores"):
        DynamicAttention().scores(None)


# ---- the parts -----------------------------------------------------------------------------------


def test_budget_rules_differ_by_a_block_at_the_edge():
    mass = torch.tensor([0.15, 0.5, 0.05, 0.3])
    kept = [top_p(mass, 0.6, crossing=c).nonzero().flatten().tolist() for c in (False, True)]
    assert kept == [[1], [1, 3]]
    assert top_p(mass, 0.1, crossing=False).tolist() == [False, True, False, False]
    assert top_p(mass, 0.5, crossing=False).tolist() == [False, True, False, False]
    assert top_p(mass, 1.0).all()
    assert top_p(mass, 0.0, least=3).sum() == 3
    assert [number_of(0.1, 9), number_of(0.1, 9, rounding="ceil"), number_of(0.1, 19)] == [1, 1, 1]
    assert [number_of(0.1, 25, rounding=r) for r in ("floor", "ceil", "round")] == [2, 3, 2]
    assert [number_of(1.0, 7), number_of(0.3, 10), number_of(1 - 0.9, 10)] == [7, 3, 1]
    assert number_of(0.0, 7, least=0) == 0
    assert top_k(torch.tensor([1.0, 2.0, 2.0]), 1).tolist() == [False, True, False]


@pytest.mark.parametrize("make", MAKERS)
def test_layouts_name_every_token_once(make):
    layout = MAKERS[make](GRID, (16, 32))
    real = layout.order[layout.order >= 0]
    assert torch.equal(real.sort().values, torch.arange(90))
    for side in (0, 1):
        counts, of = layout.counts(side), layout.block_of(side)
        assert torch.equal(torch.bincount(of, minlength=layout.blocks[side]), counts)


def test_a_tile_has_to_fit():
    with pytest.raises(
        ValueError, match=r"a tile of \(4, 2, 2\) tokens .* is larger than the grid"
    ):
        layouts.tiled(GRID, (4, 2, 2), (16, 16), whole=True)


def test_the_example_of_the_docs_is_a_method(monkeypatch):
    registry.registry()  # which is put back behind the test
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    page = (Path(__file__).parents[2] / "docs" / "diffusion.md").read_text()
    code = re.search(r"```python\n(from dataclasses.*?)```", page, re.DOTALL)
    space = {"__name__": __name__}
    exec(compile(code[1], "docs/diffusion.md", "exec", dont_inherit=True), space)
    out = Run(space["Nearby"](0.3, block=16), GRID)(tensors(GRID, 4))
    assert out.isfinite().all()
    dense = Run(space["Nearby"](1.0, block=16), GRID)
    torch.testing.assert_close(dense(tensors(GRID)), dense.site(tensors(GRID)).dense())


def test_a_tile_begins_a_block():
    layout = tiles(GRID, (16, 16))
    point = torch.stack(torch.unravel_index(torch.arange(90), GRID), 1)
    tile = [tuple(p) for p in (point // 2).tolist()]
    of = layout.block_of(0).tolist()
    assert len(set(zip(tile, of, strict=True))) == len(set(tile)) == len(set(of)) == 2 * 3 * 3


def test_always_on_blocks():
    layout = Layout(torch.arange(90), (16, 32))
    rows, columns = torch.arange(90) // 16, torch.arange(90) // 32
    expected = torch.zeros(6, 3, dtype=torch.bool)
    expected[rows, columns] = True
    assert torch.equal(always.diagonal(layout), expected)
    point = torch.stack(torch.unravel_index(torch.arange(90), GRID), 1)
    i, j = ((point[:, None] - point).abs().amax(-1) <= 1).nonzero(as_tuple=True)
    expected[rows[i], columns[j]] = True
    assert torch.equal(always.neighbours(GRID, layout), expected)
    assert always.leading(layout, 1).tolist() == [[True, False, False]] * 6


def test_schedules():
    assert [s for s in range(10) if schedule.at_steps(s, 10, (1, 0.5))] == [1, 5]
    with pytest.raises(RuntimeError, match="their number is not known"):
        schedule.at_steps(0, None, (0.5,))


def test_the_mask_of_chosen_blocks_leaves_the_gap_before_the_text():
    live = torch.ones(1, 1, 3, 2, dtype=torch.bool)
    mask = chosen_blocks(live, (16, 32), 40, text=5).to_dense()
    assert mask.shape == (40, key_places(40, 5, 32)) == (40, 69)
    assert mask[:, :40].all() and not mask[:, 40:64].any() and mask[:, 64:].all()
