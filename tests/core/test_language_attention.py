"""The attention site of language models, against loops over rows and columns in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vtr.core.language_attention import (
    LanguageAttentionSite,
    Marks,
    groups_of,
    share_of,
)
from vtr.core.site import ModelInfo
from vtr.kernels import BlockMask
from vtr.kernels.masks import causal_blocks

INFO = ModelInfo("test", {"attention": 2}, {"attention": frozenset({"qkv", "prompt"})})


def make(
    rows: int = 21,
    earlier: int = 0,
    valid: Tensor | None = None,
    window: int | None = None,
    batch: int = 2,
    dtype: torch.dtype = torch.float32,
    **more: Any,
) -> LanguageAttentionSite:
    torch.manual_seed(rows + earlier)
    columns = rows + earlier
    q = torch.randn(batch, 4, rows, 8, dtype=dtype)
    k, v = (torch.randn(batch, 2, columns, 8, dtype=dtype) for _ in range(2))
    valid = torch.ones(batch, columns, dtype=torch.bool) if valid is None else valid
    kind = (torch.arange(columns) % 3 > 0).long().expand(batch, -1) * valid
    given = {
        "info": INFO, "phase": "prefill", "training": False, "layer": 1, "layers": 2, "scale": 0.3,
        "dense": lambda: by_hand(site).to(dtype), "state": {}, "memory": {}, "notes": {},
        "marks": lambda places: Marks(kind, kind - 1, kind - 1), "q": q, "k": k, "v": v,
        "valid": valid, "window": window, "groups": lambda: groups_of(valid, rows),
    }  # fmt: skip
    site = LanguageAttentionSite(**{**given, **more})
    return site


def allowed(site: LanguageAttentionSite, b: int, i: int, j: int) -> bool:
    p = i + site.offset
    near = site.window is None or p - j < site.window
    return bool(j <= p and site.valid[b, j] and site.valid[b, p] and near)


def by_hand(site: LanguageAttentionSite, keep: Tensor | None = None) -> Tensor:
    """Attention over allowed pairs, and those of ``keep`` (B, H, L, S) alone, float64; zeros without any."""
    q, k, v = (x.double() for x in (site.q, site.k, site.v))
    out = torch.zeros(*q.shape, dtype=torch.float64)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            g = h // (q.shape[1] // k.shape[1])
            for i in range(q.shape[2]):
                js = [j for j in range(k.shape[2]) if allowed(site, b, i, j)]
                js = [j for j in js if keep is None or keep[b, h, i, j]]
                if js:
                    weight = torch.softmax(q[b, h, i] @ k[b, g, js].T * site.scale, 0)
                    out[b, h, i] = weight @ v[b, g, js]
    return out


def holes() -> Tensor:
    """Padding on the left, in the middle and on the right of 26 columns."""
    valid = torch.ones(3, 26, dtype=torch.bool)
    valid[0, :4] = False
    valid[1, :2], valid[1, 5:9] = False, False
    valid[2, 22:] = False
    return valid


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("earlier", [0, 13])
def test_sparse(earlier: int, window: int | None) -> None:
    site = make(earlier=earlier, window=window)
    nk = -(-(21 + earlier) // 16)
    blocks = torch.rand(2, 2, 2, nk) < 0.5
    keep = blocks.repeat_interleave(2, 1).repeat_interleave(16, 2).repeat_interleave(16, 3)
    want = by_hand(site, keep[:, :, :21, : 21 + earlier])
    torch.testing.assert_close(site.sparse(blocks, 16).double(), want, atol=1e-5, rtol=0)
    mask = BlockMask.from_dense(keep[:, :, :21, : 21 + earlier].contiguous(), block=16)
    torch.testing.assert_close(site.sparse(mask).double(), want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("window", [None, 5])
def test_parts_have_no_padding(window: int | None) -> None:
    valid = holes()
    if window is not None:
        valid[1, 5:9] = True  # a window counts tokens: padding inside of it takes no place
    site = make(20, 6, valid, window, batch=3)
    outputs = []
    for group, part in site.parts():
        assert part.valid.all()
        assert torch.equal(part.visual, site.visual[group.samples][:, group.columns])
        outputs.append((group, part.dense()))
    out = site.join(outputs)
    torch.testing.assert_close(out.double(), by_hand(site), atol=1e-5, rtol=0)
    assert not out[2, :, -4:].any()


def test_the_whole_batch_is_one_part_without_copies() -> None:
    site = make()
    ((group, part),) = site.parts()
    assert group.samples is None
    assert part.q.data_ptr() == site.q.data_ptr()
    assert part.k.data_ptr() == site.k.data_ptr()
    shifted = torch.ones(2, 21, dtype=torch.bool)
    shifted[:, :3] = False
    ((_, part),) = make(valid=shifted).parts()
    assert (part.q.shape[2], part.bos.tolist()) == (18, [0, 0])


@pytest.mark.parametrize("rows", [[[0, 5, 20]], [[3, -1, 20]], [[-1, -1, -1]]])
def test_rows(rows: list[list[int]]) -> None:
    site = make(valid=holes()[:2, :21])
    index = torch.tensor(rows * 2)
    dense = by_hand(site)
    found = site.dense_rows(index)
    attention = site.attention_rows(index)
    for b in range(2):
        for n, i in enumerate(rows[0]):
            seen = i >= 0 and bool(site.valid[b, i])
            want = dense[b, :, i] if seen else torch.zeros(4, 8, dtype=torch.float64)
            if seen or i < 0:
                torch.testing.assert_close(found[b, :, n].double(), want, atol=1e-5, rtol=0)
                weighed = site.weigh(attention)[b, :, n].double()
                torch.testing.assert_close(weighed, want, atol=1e-5, rtol=0)


def test_edit_changes_its_rows_alone() -> None:
    site = make(earlier=5)
    rows = torch.tensor([[2, 9], [4, -1]])

    def last_column_only(attention: Tensor, part: Tensor) -> Tensor:
        torch.testing.assert_close(attention.sum(-1)[0], torch.ones(4, 2), atol=1e-6, rtol=0)
        out = torch.zeros_like(attention)
        out[..., 3] = 1.0
        return out

    out = site.edit(last_column_only, rows)
    want = by_hand(site)
    for b, i in ((0, 2), (0, 9), (1, 4)):
        want[b, :, i] = site.v[b, :, 3].double().repeat_interleave(2, 0)
    torch.testing.assert_close(out.double(), want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("earlier", [0, 6])
def test_pairs_and_shares(earlier: int, window: int | None) -> None:
    valid = holes()[:, : 20 + earlier]
    site = make(20, earlier, valid, window, batch=3)
    places = [(b, i, j) for b in range(3) for i in range(20) for j in range(20 + earlier)]
    if window is None:
        assert float(site.pairs) == sum(allowed(site, *place) for place in places)
    blocks = torch.rand(1, 1, 2, 2) < 0.7
    blocks[..., 0] = True
    mask = causal_blocks(blocks, q_len=20, k_len=20 + earlier, block=16, window=window)
    area = whole = 0
    for i, rows in ((0, 16), (1, 4)):
        for j, columns in ((0, 16), (1, 4 + earlier)):
            pairs = [
                (a + earlier - b)
                for a in range(16 * i, 16 * i + rows)
                for b in range(16 * j, 16 * j + columns)
            ]
            if any(0 <= p < (window or 99) for p in pairs):
                whole += rows * columns
                area += rows * columns * int(blocks[0, 0, i, j])
    assert float(share_of(mask, window)) == pytest.approx(area / whole)


def test_density_of_dense_is_one() -> None:
    site = make()
    site.dense()
    assert float(site.notes["work"] / site.pairs) == 1.0
    site.spend(3.0)
    site.spend(2.0)
    assert site.notes["spent"] == 10.0  # two samples


def test_wrong_masks() -> None:
    site = make()
    with pytest.raises(TypeError, match="bool tensor of blocks or a BlockMask, got list"):
        site.sparse([[True]])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"the mask is for 16 x 16 tokens.*21 rows and 21 columns"):
        site.sparse(BlockMask.from_dense(torch.ones(16, 16, dtype=torch.bool), block=16))
    with pytest.raises(ValueError, match="the block map has 3 samples, and there are 2 here"):
        site.sparse(torch.ones(3, 1, 2, 2, dtype=torch.bool), 16)


def test_parts_keep_their_memory_until_a_cut() -> None:
    """Cuts between layers may change the order of the samples' lengths: no sample sees another's memory."""
    memory: dict[str, Any] = {}
    fresh = []
    for lengths in (
        (20, 12),
        (20, 12),
        (12, 12),
        (9, 12),
        (9, 10),
    ):  # of two samples, layer by layer
        valid = torch.arange(20)[None] < torch.tensor(lengths)[:, None]
        for group, part in make(20, valid=valid, memory=memory).parts():
            mine = (None if group.samples is None else group.samples.tolist(), part.q.shape[2])
            fresh.append("mine" not in part.memory)
            assert part.memory.setdefault("mine", mine) == mine
    assert sum(fresh) == 5 and len(fresh) == 9  # each sample at each length once, and once both
