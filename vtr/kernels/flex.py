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
from vtr.kernels.blockmask import BlockMask
from vtr.kernels.epilogue import finish
from vtr.kernels.flex_mask import to_flex
from vtr.kernels.standard_blocks import in_standard_blocks

# Asked once, here: a compiled function may not search for packages.
HAS_TRITON = importlib.util.find_spec("triton") is not None
# Signatures whose compilation failed here: tried once, reported, not tried again.
_failed: dict[tuple[Any, ...], str] = {}
_masks: dict[int, Any] = {}


@functools.lru_cache(maxsize=1)
def _compiler() -> str:
    """Return the reason why nothing can be compiled for the CPU here, "" if it can."""
    import os

    name = os.environ.get("CXX") or "g++"
    if not any(shutil.which(c) for c in (name, "g++", "clang++")):
        return f"compiling FlexAttention for the CPU needs a C++ compiler ({name} was not found)"
    return ""


def unavailable(kind: str) -> str:
    """Return the reason why compiled FlexAttention does not run on this kind of device, or ""."""
    if kind == "cpu":
        return _compiler()
    if kind != "cuda":
        return f"FlexAttention is compiled here for CUDA and the CPU, not for {kind}"
    if not HAS_TRITON:
        return "compiling FlexAttention for CUDA needs the triton package, which is not installed"
    return ""


def refuses(q: Tensor, mask: BlockMask, need_lse: bool) -> str:
    """Return the reason why compiled FlexAttention does not support this call, "" if it does."""
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
    if mask[3].is_cuda:  # the CPU has no tiles that must divide a block
        mask, dims = in_standard_blocks(mask, dims)
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
            raise  # only for this call: the next one may have enough memory
        except Exception as error:
            why = f"compiling FlexAttention failed here ({type(error).__name__}: {error})"
            _failed[_signature(q, mask, (dims[2], dims[3]))] = why[:2000]
            raise RuntimeError(f'{why[:2000]}; use backend="sdpa"') from error
    out, lse = made if need_lse else (made, q.new_empty(0, dtype=torch.float32))
    lse = getattr(lse, "lse", lse)
    return finish(out, row_scale, added, dims[2]).to(q.dtype).contiguous(), lse
