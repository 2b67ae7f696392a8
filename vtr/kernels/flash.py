"""Block-sparse attention by the kernels of flash-attn-4 (Hopper and Blackwell)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtr.compat.flash_attn import flash_backward, flash_forward, missing_flash
from vtr.kernels.epilogue import finish
from vtr.kernels.flash_lists import FlashLists, Heavy, lists_of, tiles

DTYPES = (torch.bfloat16, torch.float16)
# Head dims for each first number of a compute capability. The compiler aborts on the backward at 200.
DIMS = {9: (*range(8, 193, 8), *range(232, 257, 8)), 10: tuple(range(8, 129, 8))}


def unavailable(device: torch.device | str) -> str:
    """Return the reason why flash-attn-4 does not run on a device, or ""."""
    device = torch.device(device)
    if device.type != "cuda":
        return f"the flash backend needs a CUDA device, not {device.type}"
    if missing_flash():
        return missing_flash()
    if _capability(device) not in DIMS:
        return (
            "the flash backend needs compute capability 9.x or 10.x (Hopper, Blackwell), "
            f"{device} has {_capability(device)}.x"
        )
    return ""


def _capability(device: torch.device) -> int:
    """Return the first number of the compute capability; Hopper's if torch finds no device, as for
    tensors without data."""
    return torch.cuda.get_device_capability(device)[0] if torch.cuda.is_available() else 9


def refuses(q: Tensor) -> str:
    """Return the reason why flash-attn-4 does not support a call, "" if it does."""
    if why := unavailable(q.device):
        return why
    if q.dtype not in DTYPES:
        return f"the flash backend computes in bfloat16 and float16, not {q.dtype}"
    capability = _capability(q.device)
    if q.shape[-1] not in DIMS[capability]:
        return f"the flash backend has head dims {DIMS[capability]} here, not {q.shape[-1]}"
    return ""


def _lists(q: Tensor, mask: list[Tensor], dims: list[int]) -> FlashLists:
    sizes = tiles(q.shape[-1], _capability(q.device), (dims[2], dims[3]))
    return lists_of(mask, dims, *sizes)


def _positive(q: Tensor, scale: float) -> tuple[Tensor, float, int]:
    """Return q and a scale above 0, which the kernels want, and the factor of q."""
    if scale > 0.0:
        return q, scale, 1
    return (-q, -scale, -1) if scale < 0.0 else (torch.zeros_like(q), 1.0, 0)


def forward(
    q: Tensor, k: Tensor, v: Tensor, row_scale: Tensor | None, added: Tensor | None,
    mask: list[Tensor], dims: list[int], scale: float, need_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See :func:`vtr.kernels.attention.block_sparse_attention` for the contract.

    ``out`` is laid out as (B, Sq, H, D) in memory, without an LSE the second result is empty.
    """
    q, scale, _ = _positive(q, scale)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    with torch.cuda.device_of(q):
        lists = _lists(q, mask, dims)
        heavy = lists.heavy
        out, lse = flash_forward(
            q, k, v, lists.blocks, lists.forward, lists.keeps(), lists.tables, scale,
            need_lse or heavy is not None,
        )  # fmt: skip
        if heavy is not None:
            assert lse is not None
            _write_heavy(out, lse, heavy, lists, q, k, v, scale)
    if row_scale is not None or added is not None:
        out = finish(out.transpose(1, 2), row_scale, added, dims[2]).to(q.dtype)
        out = out.transpose(1, 2).contiguous()
    lse = lse if need_lse and lse is not None else q.new_empty(0, dtype=torch.float32)
    return out.transpose(1, 2), lse


def _write_heavy(
    out: Tensor, lse: Tensor, heavy: Heavy, lists: FlashLists, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> None:  # fmt: skip
    """Compute heavy rows in parts and write them: out (B, Sq, H, D), lse (B, H, Sq)."""
    (batch, _, heads, dim), count, pieces = q.shape, heavy.count, heavy.pieces
    tokens = heavy.tokens[lists.mask.pattern.long()].expand(batch, heads, -1, -1)
    each = tokens[:, :, :, None].expand(-1, -1, -1, pieces, -1).flatten(2)
    rows = q.gather(1, each.transpose(1, 2)[..., None].expand(-1, -1, -1, dim))
    tables = [*lists.tables, heavy.table]
    found, parts = flash_forward(
        rows, k, v, heavy.blocks, lists.forward, lists.keeps(by_part=True), tables, scale, True
    )
    assert parts is not None
    parts = parts.view(batch, heads, count, pieces, -1)
    total = parts.logsumexp(3)
    # Rows without keys: -inf - -inf would be NaN.
    weight = (parts - total.masked_fill(total == float("-inf"), 0.0).unsqueeze(3)).exp()
    found = found.view(batch, count, pieces, -1, heads, dim)
    joined = (
        (found * weight.permute(0, 2, 3, 4, 1).unsqueeze(-1)).sum(2).to(out.dtype).flatten(1, 2)
    )
    # Past the last token its row is computed and written again.
    at = tokens.flatten(2)
    out.scatter_(1, at.transpose(1, 2)[..., None].expand(-1, -1, -1, dim), joined)
    lse.scatter_(2, at, total.flatten(2))


def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    mask: list[Tensor], dims: list[int], scale: float,
) -> tuple[Any, Any, Any]:  # fmt: skip
    """Compute gradients of q, k and v. Rows need no parts: a kernel's programs have columns."""
    q, scale, sign = _positive(q, scale)
    if dlse is not None:
        # A row without keys has no weights; its gradient may be NaN.
        dlse = dlse.masked_fill(lse == float("-inf"), 0.0)
    q, k, v, out, dout = (t.transpose(1, 2) for t in (q, k, v, out, dout))
    with torch.cuda.device_of(q):
        lists = _lists(q, mask, dims)
        dq, dk, dv = flash_backward(
            q, k, v, out, dout, lse, dlse, lists.columns, lists.backward, lists.keeps(), lists.tables,
            scale,
        )  # fmt: skip
    dq, dk, dv = (t.transpose(1, 2) for t in (dq, dk, dv))
    return (dq if sign == 1 else dq * sign), dk, dv
