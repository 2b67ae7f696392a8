"""Expectations of flash-attn-4."""

from __future__ import annotations

from vtr.compat.contract import Expectation

_USED = "vtr/compat/flash_attn.py"

CONTRACT = (
    Expectation(
        "flash_attn.cute.interface:flash_attn_func",
        _USED,
        starts=("q", "k", "v"),
        takes=(
            *("softmax_scale", "pack_gqa", "mask_mod", "aux_tensors", "block_sparse_tensors"),
            "return_lse",
        ),
    ),
    Expectation(
        "flash_attn.cute.interface:_flash_attn_bwd",
        _USED,
        starts=("q", "k", "v", "out", "dout", "lse"),
        takes=(
            *("softmax_scale", "mask_mod", "aux_tensors", "block_sparse_tensors", "dlse"),
            *("dq", "dk", "dv"),
        ),
    ),
    Expectation(
        "flash_attn.cute.block_sparsity:BlockSparseTensorsTorch",
        _USED,
        has=("mask_block_cnt", "mask_block_idx", "full_block_cnt", "full_block_idx", "block_size"),
    ),
    Expectation("flash_attn.cute.utils:scalar_to_ssa", _USED, takes=("dtype",)),
)
