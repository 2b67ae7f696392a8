"""A stand-in for flash-attn-4 on any device: its functions computed in float64 from the same arguments.

It reads nothing but what the kernels read (lists of tiles, the mask function and its tables), refuses what
they refuse, and knows nothing of :class:`vtr.kernels.BlockMask`.
"""

from __future__ import annotations

import sys
from collections import namedtuple
from types import ModuleType

import torch

from vtr.compat import flash_attn as compat
from vtr.kernels import flash

#: What the functions were called with since :func:`install`.
calls: list[dict[str, object]] = []

BlockSparseTensorsTorch = namedtuple(
    "BlockSparseTensorsTorch",
    "mask_block_cnt mask_block_idx full_block_cnt full_block_idx block_size",
)


def scalar_to_ssa(a, dtype):
    assert dtype is type(a)
    return a.unsqueeze(0)  # kernels read element 0


def install(monkeypatch, capability=9):
    """Put the stand-in where flash-attn-4 is imported from, and let its backend run on the CPU."""
    calls.clear()
    interface = {"flash_attn_func": flash_attn_func, "_flash_attn_bwd": _flash_attn_bwd}
    for name, has in (
        ("interface", interface),
        ("block_sparsity", {"BlockSparseTensorsTorch": BlockSparseTensorsTorch}),
        ("utils", {"scalar_to_ssa": scalar_to_ssa}),
    ):
        module = ModuleType(f"flash_attn.cute.{name}")
        vars(module).update(has)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(compat, "installed", lambda package: "4.0.0b36")
    monkeypatch.setattr(compat, "_missing", compat._missing.__wrapped__)
    monkeypatch.setattr(flash, "unavailable", lambda device: flash.missing_flash())
    monkeypatch.setattr(flash, "_capability", lambda device: capability)


def _tiles(length, size):
    return -(-length // size)


def _check(cnt, idx, batch, heads, rows, columns):
    """The shapes that ``normalize_block_sparse_tensors`` allows."""
    assert cnt.dtype == idx.dtype == torch.int32
    assert cnt.shape[0] in (1, batch) and cnt.shape[1] in (1, heads) and cnt.shape[2] == rows
    assert idx.shape[:3] == cnt.shape and idx.shape[3] <= columns
    assert int(cnt.max()) <= idx.shape[3]


def dense_of(blocks, size, keeps, aux, batch, heads, q_len, k_len, by_columns=False):
    """(B, H, Sq, Sk) bool: the pairs that the kernels would visit and keep."""
    rows, columns = _tiles(q_len, size[0]), _tiles(k_len, size[1])
    seen = torch.zeros(batch, heads, rows * size[0], columns * size[1], dtype=torch.int32)
    for partial, (cnt, idx) in ((True, blocks[:2]), (False, blocks[2:])):
        _check(cnt, idx, batch, heads, *((columns, rows) if by_columns else (rows, columns)))
        cnt, idx = cnt.expand(batch, heads, -1), idx.expand(batch, heads, -1, -1)
        for b, h, n in torch.cartesian_prod(*map(torch.arange, cnt.shape)).tolist():
            listed = idx[b, h, n, : cnt[b, h, n]].tolist()
            assert listed == sorted(set(listed))  # the last is the one with a bounds check
            for other in listed:
                r, c = (other, n) if by_columns else (n, other)
                i = torch.arange(r * size[0], (r + 1) * size[0], dtype=torch.int32)
                j = torch.arange(c * size[1], (c + 1) * size[1], dtype=torch.int32)
                # Only the first tile of a list is checked against the last key.
                assert partial or (c + 1) * size[1] <= k_len
                kept = torch.ones(len(i), len(j), dtype=torch.int32)
                if partial:
                    # As where bounds are checked; elsewhere tokens beyond the ends come as they are.
                    at = torch.meshgrid(i % q_len if by_columns else i, j, indexing="ij")
                    at = [x.reshape(1, -1) for x in at]
                    lead = [torch.full_like(at[0], x) for x in (b, h)]
                    kept = keeps(*lead, *at, None, aux)[0].view(len(i), len(j))
                seen[b, h, i[0] : i[-1] + 1, j[0] : j[-1] + 1] += kept
    assert int(seen.max()) <= 1  # nothing twice
    seen = seen.bool()
    assert not seen[:, :, :, k_len:].any()
    return seen[:, :, :q_len, :k_len]


def _scores(q, k, dense, scale):
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    scores = torch.einsum("bihd,bjhd->bhij", q.double(), k.double()) * scale
    return scores.masked_fill(~dense, float("-inf"))


def flash_attn_func(
    q, k, v, softmax_scale=None, pack_gqa=None, mask_mod=None, aux_tensors=None,
    block_sparse_tensors=None, return_lse=False,
):  # fmt: skip
    *blocks, size = block_sparse_tensors
    batch, q_len, heads, _ = q.shape
    assert pack_gqa is False and softmax_scale > 0
    assert q.dtype == k.dtype == v.dtype and q.dtype in (torch.bfloat16, torch.float16)
    calls.append({"size": size, "q_len": q_len, "blocks": blocks})
    dense = dense_of(blocks, size, mask_mod, aux_tensors, batch, heads, q_len, k.shape[1])
    scores = _scores(q, k, dense, softmax_scale)
    lse = scores.logsumexp(3)
    weights = (scores - lse.masked_fill(lse.isinf(), 0.0).unsqueeze(3)).exp()
    v = v.repeat_interleave(heads // v.shape[2], 2).double()
    out = torch.einsum("bhij,bjhd->bihd", weights, v).to(q.dtype).contiguous()
    return out, lse.float() if return_lse else None


def _flash_attn_bwd(
    q, k, v, out, dout, lse, softmax_scale=None, mask_mod=None, aux_tensors=None,
    block_sparse_tensors=None, dlse=None, dq=None, dk=None, dv=None,
):  # fmt: skip
    *blocks, size = block_sparse_tensors
    (batch, q_len, heads, _), group, k_len = q.shape, q.shape[2] // k.shape[2], k.shape[1]
    assert out.shape == dout.shape == q.shape and lse.shape == (batch, heads, q_len)
    assert dout.dtype == out.dtype == q.dtype and lse.dtype == torch.float32 and softmax_scale > 0
    calls.append({"size": size, "backward": True})
    dense = dense_of(
        blocks, size, mask_mod, aux_tensors, batch, heads, q_len, k_len, by_columns=True
    )
    lse, dout = lse.double(), dout.double()
    weights = _scores(q, k, dense, softmax_scale) - lse.masked_fill(lse.isinf(), 0.0).unsqueeze(3)
    weights = weights.exp()
    delta = (dout * out.double()).sum(3).transpose(1, 2)
    if dlse is not None:
        delta = delta - dlse
    d_weights = torch.einsum("bihd,bjhd->bhij", dout, v.double().repeat_interleave(group, 2))
    d_scores = weights * (d_weights - delta.unsqueeze(3)) * softmax_scale
    dq.copy_(torch.einsum("bhij,bjhd->bihd", d_scores, k.double().repeat_interleave(group, 2)))
    both = (
        torch.einsum("bhij,bihd->bjhd", d_scores, q.double()),
        torch.einsum("bhij,bihd->bjhd", weights, dout),
    )
    for given, found in zip((dk, dv), both, strict=True):
        given.copy_(found.unflatten(2, (-1, group)).sum(3))
    return dq, dk, dv
