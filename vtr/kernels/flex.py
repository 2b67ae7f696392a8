"""Block-sparse attention through compiled FlexAttention, and masks in its format."""

from __future__ import annotations

import functools
import importlib.util
import shutil
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vtr.compat.torch import flex_lse, strict_recompiling
from vtr.kernels import csr as _csr
from vtr.kernels.blockmask import BlockMask
from vtr.kernels.epilogue import finish

# Asked once, here: a compiled function may not search for packages.
HAS_TRITON = importlib.util.find_spec("triton") is not None
# Signatures whose compilation failed here: tried once, reported, not tried again.
_failed: dict[tuple[Any, ...], str] = {}
_masks: dict[int, Any] = {}


def to_flex(mask: BlockMask, *, lookup: bool = True, columns: bool = True) -> Any:
    """The mask as FlexAttention's BlockMask, on the same device (see ``BlockMask.to_flex``).

    ``lookup=False`` leaves the ``mask_mod`` out where no block is partial: compiled kernels never
    ask it then, while eager FlexAttention knows the mask by its ``mask_mod`` alone.
    ``columns=False`` leaves out what only FlexAttention's own backward reads; torch makes it under
    vmap, which does not run where FLOPs are counted.
    """
    from torch.nn.attention.flex_attention import BlockMask as FlexMask

    (nq, nk), (bm, bn) = mask.grid, mask.block
    row = _csr.row_of(mask.csr)
    slot = torch.arange(row.numel(), device=mask.device)
    which = mask.pattern.long()
    lists: list[Any] = []
    for full in (False, True):
        here = (mask.tile < 0) == full
        start = (mask.row_ptr[:-1] if full else mask.split).long()
        stop = (mask.split if full else mask.row_ptr[1:]).long()
        index = torch.zeros(mask.patterns * nq, nk, dtype=torch.int32, device=mask.device)
        index[row[here], slot[here] - start[row[here]]] = mask.col[here]
        lists.append((stop - start).int().view(-1, nq)[which])
        lists.append(index.view(-1, nq, nk)[which])
    sizes: dict[str, Any] = {
        "BLOCK_SIZE": mask.block,
        "seq_lengths": (mask.q_len, mask.k_len),
    }
    if not columns:
        sizes["compute_q_blocks"] = False
    if not lookup and not mask.tiles.shape[0]:
        return FlexMask.from_kv_blocks(*lists[:4], **sizes)
    tile_of = torch.full((mask.patterns * nq, nk), -2, dtype=torch.int32, device=mask.device)
    tile_of[row, mask.col.long()] = mask.tile
    tile_of = tile_of.view(-1, nq, nk)
    tiles, pattern = mask.tiles, mask.pattern
    samples, heads = (n > 1 for n in pattern.shape)

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        one = pattern[b if samples else b * 0, h if heads else h * 0]
        tile = tile_of[one, i // bm, j // bn]
        if not tiles.shape[0]:
            return tile == -1
        return (tile == -1) | (
            (tile >= 0) & tiles[tile.clamp(min=0).long(), (i % bm).long(), (j % bn).long()]
        )

    sizes["mask_mod"] = mask_mod
    return FlexMask.from_kv_blocks(*lists[:4], **sizes)


@functools.lru_cache(maxsize=1)
def _compiler() -> str:
    """Why nothing can be compiled for the CPU here, "" if it can."""
    import os

    name = os.environ.get("CXX") or "g++"
    if not any(shutil.which(c) for c in (name, "g++", "clang++")):
        return f"compiling FlexAttention for the CPU needs a C++ compiler ({name} was not found)"
    return ""


def unavailable(kind: str) -> str:
    """Why compiled FlexAttention does not run on this kind of device, "" if it does."""
    if kind == "cpu":
        return _compiler()
    if kind != "cuda":
        return f"FlexAttention is compiled here for CUDA and the CPU, not for {kind}"
    if not HAS_TRITON:
        return "compiling FlexAttention for CUDA needs the triton package, which is not installed"
    return ""


def refuses(q: Tensor, mask: BlockMask, need_lse: bool) -> str:
    """Why compiled FlexAttention cannot do this call, "" if it can."""
    if q.dtype == torch.float64:
        return "compiled FlexAttention does not compute in float64"
    if not q.is_cuda and need_lse:
        return "compiled FlexAttention returns no LSE and has no gradient on the CPU"
    why = unavailable(q.device.type)
    return why or _failed.get(_signature(q, mask.tensors(), mask.block), "")


def _signature(q: Tensor, mask: list[Tensor], block: Any) -> tuple[Any, ...]:
    return (str(q.device), q.dtype, tuple(q.shape), tuple(block), mask[5].shape[0] > 0)


@functools.lru_cache(maxsize=1)
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def _mask_of(mask: list[Tensor], dims: list[int]) -> Any:
    key = int(mask[6])
    if key not in _masks:
        made = BlockMask(dims[0], dims[1], (dims[2], dims[3]), *mask[:6])
        _masks[key] = to_flex(made, lookup=False, columns=False)
        weakref.finalize(mask[6], _masks.pop, key, None)
    return _masks[key]


def forward(
    q: Tensor, k: Tensor, v: Tensor, row_scale: Tensor | None, added: Tensor | None,
    mask: list[Tensor], dims: list[int], scale: float, need_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See :func:`vtr.kernels.attention.block_sparse_attention` for the contract."""
    block_mask = _mask_of(mask, dims)
    # Every shape is its own kernel. Past its limit of recompilations Dynamo would run the eager
    # function, which holds the whole map: an error instead.
    kwargs: dict[str, Any] = {"scale": scale, "enable_gqa": q.shape[1] != k.shape[1]}
    with strict_recompiling(256), torch.no_grad():
        try:
            made = _compiled()(q, k, v, block_mask=block_mask, **flex_lse(need_lse), **kwargs)
        except torch.OutOfMemoryError:
            raise  # of this call alone: the next one may have room
        except Exception as error:
            why = f"compiling FlexAttention failed here ({type(error).__name__}: {error})"
            _failed[_signature(q, mask, (dims[2], dims[3]))] = why[:2000]
            raise RuntimeError(f'{why[:2000]}; use backend="sdpa"') from error
    out, lse = made if need_lse else (made, q.new_empty(0, dtype=torch.float32))
    lse = getattr(lse, "lse", lse)
    return finish(out, row_scale, added, dims[2]).to(q.dtype).contiguous(), lse
