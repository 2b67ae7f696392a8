"""flash-attn-4: its block-sparse attention, and how a mask function hands it a bit.

Importing its compiler takes seconds, so that everything here does so on first use.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vtr.compat.contract import contract, moved
from vtr.compat.tested import TESTED, installed
from vtr.compat.torch import constant_in_graphs

#: The numbers and the indices of a row's partial blocks, then those of its full blocks.
Blocks = tuple[Tensor, Tensor, Tensor, Tensor]


@constant_in_graphs
def missing_flash() -> str:
    """Return the reason why there is no block-sparse flash attention here, "" if there is."""
    return _missing()


@functools.cache
def _missing() -> str:
    if installed("flash_attn") is None:
        return (
            "the flash backend needs the flash-attn-4 package, which is not installed "
            f"(pip install 'vtr[flash]', or {TESTED['flash_attn'].requirement})"
        )
    lines = moved(contract("flash_attn"))
    if not lines:
        return ""
    return f"{'; '.join(lines)}: install {TESTED['flash_attn'].requirement}"


def _sparse(blocks: Blocks, size: tuple[int, int]) -> Any:
    made = importlib.import_module("flash_attn.cute.block_sparsity").BlockSparseTensorsTorch
    names = ("mask_block_cnt", "mask_block_idx", "full_block_cnt", "full_block_idx")
    return made(**dict(zip(names, blocks, strict=True)), block_size=size)


def mask_value(bit: Any) -> Any:
    """Convert the number that a mask function has computed inside a kernel to what it must return."""
    return importlib.import_module("flash_attn.cute.utils").scalar_to_ssa(bit, type(bit))


def flash_forward(
    q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, size: tuple[int, int],
    keeps: Callable[..., Any], aux: list[Tensor], scale: float, need_lse: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Compute attention of q (B, Sq, H, D) and k, v (B, Sk, Hk, D): out like q, LSE (B, H, Sq) float32.

    Args:
        blocks: lists of the key blocks of each query block.
        size: (queries, keys) of a block.
        keeps: called as ``(sample, head, query, key, lengths, aux)`` for pairs in partial blocks.
        need_lse: else the LSE may be None.
    """
    out, lse = importlib.import_module("flash_attn.cute.interface").flash_attn_func(
        q, k, v, softmax_scale=scale, pack_gqa=False, mask_mod=keeps, aux_tensors=aux,
        block_sparse_tensors=_sparse(blocks, size), return_lse=need_lse,
    )  # fmt: skip
    return out, lse


def flash_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, lse: Tensor, dlse: Tensor | None,
    blocks: Blocks, size: tuple[int, int], keeps: Callable[..., Any], aux: list[Tensor], scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute the gradients of q, k and v, contiguous in the layout of :func:`flash_forward`.

    Its public function has a backward only as part of its own autograd graph, which an operator
    cannot keep: it would compute the forward once more. torch's FlexAttention calls this one too.

    Args:
        blocks: lists of the query blocks of each key block.
    """
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    importlib.import_module("flash_attn.cute.interface")._flash_attn_bwd(
        q, k, v, out, dout, lse, softmax_scale=scale, mask_mod=keeps, aux_tensors=aux,
        block_sparse_tensors=_sparse(blocks, size), dlse=dlse, dq=dq, dk=dk, dv=dv,
    )  # fmt: skip
    return dq, dk, dv
