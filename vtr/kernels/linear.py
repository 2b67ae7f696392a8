"""Sparse softmax attention beside linear attention (SLA): the function, its checks, the operator."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vtr.compat.torch import is_fake
from vtr.kernels import linear_chunks
from vtr.kernels.attention import block_sparse_attention, triton_refuses, validate
from vtr.kernels.blockmask import BlockMask
from vtr.kernels.keys import without_keys
from vtr.kernels.linear_reference import (
    FEATURES,
    KEYS,
    feature_map,
    marginal_blocks,
    sparse_linear_attention_reference,
)
from vtr.kernels.precision import full_precision, lowers


def sparse_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    *,
    scale: float | None = None,
    feature: str = "softmax",
    keys: str = "marginal",
    negligible: Tensor | None = None,
    keys_valid: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the blocks of a mask, and linear attention over the other keys (SLA).

    SLA (arXiv 2509.24006) sorts blocks into critical ones (those of ``mask``), negligible ones,
    and marginal ones (the rest). The critical ones get softmax attention, the marginal ones linear attention
    ``phi(q_i) . sum_j phi(k_j) v_j / (phi(q_i) . sum_j phi(k_j))``. The method then adds the two, the second after
    a learned D x D layer: ``out = sparse + projection(linear)``. The specification is
    :mod:`vtr.kernels.linear_reference`. Differentiable in q, k and v through both results.

    Args:
        q: (B, H, Sq, D). k, v: (B, Hk, Sk, D), as for :func:`vtr.kernels.block_sparse_attention`.
        mask: :class:`BlockMask` of the critical blocks. A block that it holds in part (a partial tile) is
            critical as a whole: neither branch reads the pairs that the tile leaves out.
        scale: factor of the scores of the softmax, 1 / sqrt(D) when None. phi gets q and k unscaled.
        feature: phi: ``"softmax"`` over the head dim (the paper's best), ``"elu"`` (elu + 1), or ``"relu"``.
        keys: the keys of the linear attention. ``"marginal"``: those of marginal blocks (the paper).
            ``"all"``: every key, with 1e-5 added to the denominator (the released code, TurboDiffusion).
        negligible: bool (B or 1, H or 1, NQ, NK), blocks that the linear attention leaves out; for
            ``keys="marginal"``. A block that is in ``mask`` too is critical.
        keys_valid: bool (B, Sk), False for keys that neither branch reads, such as padding. Without it every
            key counts.
        backend: as for :func:`vtr.kernels.block_sparse_attention`.

    Returns:
        ``(sparse, linear)``, two tensors (B, H, Sq, D) in the dtype of q. ``linear`` is 0 for a query without
        marginal keys, or whose phi has no product above 0 with theirs (``"relu"``).

    Raises:
        ValueError: shapes, dtypes, devices or the mask's size do not fit together, or an option is unknown.
        RuntimeError: the given backend does not support the call here, or the call is inside
            ``torch.func`` or forward-mode AD, or is differentiated twice, which only ``"reference"`` supports.
    """
    validate(q, k, v, mask, None, None)
    _check(q, mask, feature, keys, negligible, keys_valid)
    if backend == "reference":
        return sparse_linear_attention_reference(
            q, k, v, mask, scale=scale, feature=feature, keys=keys, negligible=negligible,
            keys_valid=keys_valid,
        )  # fmt: skip
    seen = mask if keys_valid is None else without_keys(mask, keys_valid)
    sparse = block_sparse_attention(q, k, v, seen, scale=scale, backend=backend)
    assert isinstance(sparse, Tensor)
    name = _choose(q, mask, backend)
    work = torch.promote_types(q.dtype, torch.float32)
    if name == "triton" and q.dtype in (torch.float16, torch.bfloat16):
        # Sums over all keys leave the range of float16.
        work, v = torch.bfloat16, v.to(torch.bfloat16)
    rows, columns = feature_map(q, feature).to(work), feature_map(k, feature).to(work)
    if keys_valid is not None:
        columns = columns.masked_fill(~keys_valid[:, None, :, None], 0.0)
    linear, _ = torch.ops.vtr.linear_branch(
        rows, columns, v, negligible, mask.tensors(), [mask.q_len, mask.k_len, *mask.block],
        keys == "all", name,
    )  # fmt: skip
    return sparse, linear.to(q.dtype)


def _choose(q: Tensor, mask: BlockMask, backend: str) -> str:
    """Choose how the linear attention is computed: ``"triton"`` or ``"chunks"``."""
    if backend == "sdpa" or (backend != "triton" and not q.is_cuda):
        return "chunks"
    why = triton_refuses(q, mask.block)
    half = not why and q.is_cuda and q.dtype == torch.float16
    if half and torch.cuda.get_device_capability(q.device)[0] < 8:
        why = (
            "linear attention in Triton computes float16 as bfloat16, which this GPU does not have"
        )
    if why and backend == "triton":
        raise RuntimeError(f'{why}; use backend="auto" or "sdpa"')
    return "chunks" if why else "triton"


def _check(
    q: Tensor, mask: BlockMask, feature: str, keys: str, negligible: Tensor | None,
    keys_valid: Tensor | None,
) -> None:  # fmt: skip
    if feature not in FEATURES:
        raise ValueError(f"feature {feature!r} is none of {', '.join(FEATURES)}")
    if keys not in KEYS:
        raise ValueError(f"keys {keys!r} is none of {', '.join(KEYS)}")
    batch, heads = q.shape[:2]
    if negligible is not None:
        if keys == "all":
            raise ValueError(
                'negligible blocks are left out of keys="marginal" alone; leave out negligible, or '
                'pass keys="marginal"'
            )
        lead, grid = tuple(negligible.shape[:2]), tuple(negligible.shape[2:])
        fits = negligible.ndim == 4 and lead[0] in (1, batch) and lead[1] in (1, heads)
        if negligible.dtype != torch.bool or not fits or grid != mask.grid:
            raise ValueError(
                f"negligible must be bool (B or 1, H or 1, NQ, NK) with B = {batch}, H = {heads} and "
                f"(NQ, NK) = {mask.grid}, got {negligible.dtype} {tuple(negligible.shape)}"
            )
    if keys_valid is not None and (
        keys_valid.dtype != torch.bool or keys_valid.shape != (batch, mask.k_len)
    ):
        raise ValueError(
            f"keys_valid must be bool (B, Sk) = {(batch, mask.k_len)}, got {keys_valid.dtype} "
            f"{tuple(keys_valid.shape)}"
        )
    for name, given in (("negligible", negligible), ("keys_valid", keys_valid)):
        if given is not None and given.device != q.device:
            raise ValueError(f"{name} is on {given.device}, q on {q.device}; move it there")


# ---- the operator -----------------------------------------------------------------------------


def _blocks(
    negligible: Tensor | None, mask: list[Tensor], dims: list[int], every: bool
) -> Tensor | None:
    if every:
        return None
    return marginal_blocks(BlockMask(dims[0], dims[1], (dims[2], dims[3]), *mask[:6]), negligible)


@torch.library.custom_op("vtr::linear_branch", mutates_args=())
def _operator(
    x: Tensor, y: Tensor, v: Tensor, negligible: Tensor | None, mask: list[Tensor], dims: list[int],
    every: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    with full_precision(x.device) if lowers(x.device) else nullcontext():
        if backend == "triton":
            from vtr.kernels import triton_linear

            return triton_linear.forward(x, y, v, negligible, mask, dims, every)
        blocks = _blocks(negligible, mask, dims, every)
        return linear_chunks.forward(x, y, v, blocks, (dims[2], dims[3]))


@_operator.register_fake
def _(
    x: Tensor, y: Tensor, v: Tensor, negligible: Tensor | None, mask: list[Tensor], dims: list[int],
    every: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape), x.new_empty(x.shape[:3], dtype=wide)


@torch.library.custom_op("vtr::linear_branch_backward", mutates_args=())
def _backward_operator(
    dout: Tensor, x: Tensor, y: Tensor, v: Tensor, out: Tensor, factor: Tensor,
    negligible: Tensor | None, mask: list[Tensor], dims: list[int], every: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    with full_precision(x.device) if lowers(x.device) else nullcontext():
        if backend == "triton":
            from vtr.kernels import triton_linear

            return triton_linear.backward(dout, x, y, v, out, factor, negligible, mask, dims, every)
        blocks = _blocks(negligible, mask, dims, every)
        return linear_chunks.backward(dout, x, y, v, out, factor, blocks, (dims[2], dims[3]))


@_backward_operator.register_fake
def _(
    dout: Tensor, x: Tensor, y: Tensor, v: Tensor, out: Tensor, factor: Tensor,
    negligible: Tensor | None, mask: list[Tensor], dims: list[int], every: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return x.new_empty(x.shape), y.new_empty(y.shape), v.new_empty(v.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, y, v, negligible, mask, dims, every, backend = inputs
    ctx.save_for_backward(x, y, v, *output, negligible, *mask)
    ctx.rest = (dims, every, backend)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, dout: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    x, y, v, out, factor, negligible, *mask = ctx.saved_tensors
    dims, every, backend = ctx.rest
    rest = (None, [None] * len(mask), None, None, None)
    if dout is None:
        return None, None, None, *rest
    grads = torch.ops.vtr.linear_branch_backward(
        dout, x, y, v, out, factor, negligible, mask, dims, every, backend
    )
    return *grads, *rest


torch.library.register_autograd("vtr::linear_branch", _gradient, setup_context=_setup)


def _no_second_order(*_: Any) -> Any:
    raise RuntimeError(
        "sparse_linear_attention has no second derivative (create_graph=True was followed through its "
        'backward); backend="reference" is differentiable to any order'
    )


torch.library.register_autograd("vtr::linear_branch_backward", _no_second_order)


# ---- FLOPs ------------------------------------------------------------------------------------


def _flops(
    x: Tensor, y: Tensor, negligible: Tensor | None, mask: list[Tensor], dims: list[int], every: bool,
    backend: str, backward: bool,
) -> int:  # fmt: skip
    batch, heads, q_len, dim = x.shape
    key_heads, k_len = y.shape[1], y.shape[2]
    if backend == "chunks":
        block = (dims[2], dims[3])
        by_head, by_key_head = linear_chunks.flops(q_len, k_len, dim, block, every, backward)
        return batch * (heads * by_head + key_heads * by_key_head)
    if is_fake(mask[3]):  # how much is listed cannot be counted without data
        pairs = 0.0 if every else mask[3].numel() / max(1, mask[2].numel()) * q_len * dims[3]
    else:
        from vtr.kernels.triton_linear_lists import listed_of

        pairs = listed_of(negligible, mask, dims, every).pairs(dims)
    # Totals of keys (again in the backward) and of queries; products of both with rows.
    by_key_head, by_head, products = (6, 4, 6) if backward else (2, 2, 2)
    return batch * (
        key_heads * by_key_head * k_len * dim * dim
        + heads * (by_head * q_len * dim * dim + round(2 * products * dim * pairs))
    )


@register_flop_formula(torch.ops.vtr.linear_branch, get_raw=True)
def _forward_flops(
    x: Tensor, y: Tensor, v: Any, negligible: Any, mask: Any, dims: Any, every: bool, backend: str,
    *_: Any, **__: Any,
) -> int:  # fmt: skip
    return _flops(x, y, negligible, mask, dims, every, backend, False)


@register_flop_formula(torch.ops.vtr.linear_branch_backward, get_raw=True)
def _backward_flops(
    dout: Any, x: Tensor, y: Tensor, v: Any, out: Any, factor: Any, negligible: Any, mask: Any,
    dims: Any, every: bool, backend: str, *_: Any, **__: Any,
) -> int:  # fmt: skip
    return _flops(x, y, negligible, mask, dims, every, backend, True)
