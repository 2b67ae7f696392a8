"""Block-sparse attention: the public function, its checks, the dispatch and the custom operator."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vtr.compat.torch import below_autograd, is_fake, is_plain, transformed
from vtr.kernels import int8
from vtr.kernels.blockmask import BlockMask
from vtr.kernels.epilogue import finish
from vtr.kernels.kept import Kind, keep, kind_of_call
from vtr.kernels.precision import full_precision, lowers
from vtr.kernels.product import gains, stacks
from vtr.kernels.standard_blocks import SIZES, in_standard_blocks, standard_block

BACKENDS = ("triton", "flex", "flash", "sdpa", "reference")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Head dims of the Triton kernels; flex and sdpa take any.
TRITON_DIMS = tuple(sorted({72, 88, *range(32, 257, 16)}))
# Compiling FlexAttention takes half a minute, so on the CPU it must have much to gain: live
# query-key pairs over all heads. On 2 cores this is about a second of work.
_FLEX_PAIRS = 1 << 23
# Query-key pairs of a query block and thread from which on oneDNN's products, which threads share,
# beat compiled FlexAttention, in which each thread has separate query blocks.
_ONEDNN_PAIRS = 1 << 15


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    *,
    scale: float | None = None,
    row_scale: Tensor | None = None,
    added: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    quantize: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over the keys that a block mask keeps; exact, any length, trainable.

    ``out_i = row_scale_i * softmax_j(scale q_i . k_j) v_j + added_I`` over the keys j that
    ``mask`` keeps for query i of query block I (the specification is
    :mod:`vtr.kernels.reference`). Differentiable in q, k, v, row_scale, added and through the
    returned LSE.

    Args:
        q: (B, H, Sq, D) float32, bfloat16 or float16. On the CPU float64 as well.
        k, v: (B, Hk, Sk, D), same dtype and device; H is a multiple of Hk (query head h reads
            key head ``h // (H // Hk)``).
        mask: :class:`BlockMask` of Sq x Sk tokens on the device of q, one pattern for all or one
            per sample and head.
        scale: factor of the scores, 1 / sqrt(D) when None.
        row_scale: (B, H, Sq) float, multiplies each output row (Re-ttention's rho). Not the LSE.
        added: (B, H, NQ, D) float with NQ = ceil(Sq / bm), one row per query block of the mask,
            added after ``row_scale`` to each output row of that block before it is rounded
            (Rectified SpaAttn's pooled values). Not the LSE.
        return_lse: also return the natural log-sum-exp of each row's scaled scores.
        backend: ``"triton"`` (GPU; head dims 32 to 256 in steps of 16, 72 and 88), ``"flex"``
            (compiled FlexAttention), ``"flash"`` (flash-attn-4 on Hopper and Blackwell; never chosen by
            ``"auto"``), ``"sdpa"`` (gathers key blocks, needs no compiler), ``"reference"`` (eager, the
            whole map in memory), or ``"auto"``: the fastest that supports the call. Backends differ by
            rounding only. On a GPU, the first two have blocks of 16, 32, 64 or 128 tokens: at the first
            call with another mask, its blocks are cut anew (:meth:`BlockMask.with_block`), and ``added``
            is then added after rounding.
        quantize: ``"int8"`` rounds each block of queries, and of keys less their mean, to 8 bits
            (SageAttention, arXiv 2410.02367; the specification is :mod:`vtr.kernels.int8_reference`): not
            exact, and without gradients. The Triton kernel multiplies the integers; other backends
            multiply float32 numbers of the same values, to study the error without a GPU.

    Returns:
        ``out`` (B, H, Sq, D) in the dtype of q, or ``(out, lse)`` with lse (B, H, Sq) float32
        (float64 for float64). A query that sees no key has zeros and -inf.

    Raises:
        ValueError: shapes, dtypes, devices or the mask's size do not fit together.
        RuntimeError: the given backend does not support the call here (the message says which one
            does), ``quantize`` is given and gradients are needed, or the call is inside ``torch.func`` or
            forward-mode AD, or is differentiated twice, which only ``"reference"`` supports.
    """
    scale = None if scale is None else float(scale)
    kind = kind_of_call(q, k, v, row_scale, added, (scale, return_lse, backend, quantize))
    if kind is not None and type(mask) is BlockMask:
        known = mask.kept.get(kind)
        if known is not None:
            out, lse = known(q, k, v, row_scale, added)
            return (out, lse) if return_lse else out
    validate(q, k, v, mask, row_scale, added)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    given = [t for t in (q, k, v, row_scale, added) if t is not None]
    if backend != "reference":
        _refuse_transforms(given)
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in given)
    name = _choose(q, mask, return_lse or grad, grad, backend)
    if quantize is not None:
        if quantize != "int8":
            raise ValueError(f'quantize must be "int8" or None, got "{quantize}"')
        if grad:
            raise RuntimeError(
                'quantize="int8" has no gradients: call it under torch.no_grad(), or leave it out'
            )
        if name == "flash":
            raise RuntimeError('backend="flash" has no quantize="int8"; use backend="auto"')
        out, lse = _int8(q, k, v, mask, row_scale, added, scale, return_lse, name)
        return (out, lse) if return_lse else out
    if name == "reference":
        from vtr.kernels.reference import block_sparse_attention_reference

        out, lse = block_sparse_attention_reference(
            q, k, v, mask, scale=scale, row_scale=row_scale, added=added
        )
        return (out, lse) if return_lse else out
    if kind is not None and name in ("triton", "sdpa") and all(map(is_plain, given)):
        out, lse = _keeping(kind, q, k, v, row_scale, added, mask, scale, return_lse, name)
        return (out, lse) if return_lse else out
    # A row scale that learns, and what is added where anything learns, are applied outside, where
    # autograd sees them (the backward needs the output without what is added); else in the kernel.
    # flash-attn-4 itself reads the output in its backward, so that the output may not be scaled.
    learns = row_scale is not None and (row_scale.requires_grad or name == "flash")
    outside = grad and (added is not None or learns)
    out, lse = torch.ops.vtr.block_sparse_attention(
        q, k, v, None if outside else row_scale, None if outside else added, mask.tensors(),
        [mask.q_len, mask.k_len, *mask.block], scale, return_lse or grad, name,
    )  # fmt: skip
    if outside:
        out = finish(out, row_scale, added, mask.block[0]).to(q.dtype)
    return (out, lse) if return_lse else out


def _int8(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, row_scale: Tensor | None,
    added: Tensor | None, scale: float, return_lse: bool, name: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if name == "reference":
        from vtr.kernels.int8_reference import int8_attention_reference

        return int8_attention_reference(
            q, k, v, mask, scale=scale, row_scale=row_scale, added=added
        )
    found: tuple[Tensor, Tensor] = torch.ops.vtr.int8_attention(
        q, k, v, row_scale, added, mask.tensors(), [mask.q_len, mask.k_len, *mask.block], scale,
        return_lse, name,
    )  # fmt: skip
    return found


def _refuse_transforms(tensors: list[Tensor]) -> None:
    """Raise under torch.func and forward-mode AD, in which the operator would give no tangent."""
    if torch.compiler.is_compiling():
        return
    if transformed(tensors):
        raise RuntimeError(
            "block_sparse_attention has reverse-mode autograd (backward(), torch.autograd.grad) "
            'alone; for torch.func (grad, vmap, jvp) and forward-mode AD use backend="reference"'
        )


def available_backends(device: torch.device | str) -> dict[str, str]:
    """Map each backend to "" if it runs on this device, else to the reason why it does not."""
    from vtr.kernels import flash, flex

    kind = torch.device(device).type
    triton = "" if kind == "cuda" else f"Triton kernels need a CUDA device, not {kind}"
    if not flex.HAS_TRITON:
        triton = "the Triton kernels need the triton package, which is not installed"
    found = {"triton": triton, "flex": flex.unavailable(kind), "flash": flash.unavailable(device)}
    return {**found, "sdpa": "", "reference": ""}


def _choose(q: Tensor, mask: BlockMask, need_lse: bool, grad: bool, backend: str) -> str:
    from vtr.kernels import flex

    if backend == "auto":
        if q.is_cuda:
            if not triton_refuses(q):
                return "triton"
            return "sdpa" if flex.refuses(q, mask, need_lse) else "flex or sdpa"
        # The work is judged by what is stored, so that nothing is read from a device or traced.
        pairs = mask.col.numel() // mask.patterns * mask.block[0] * mask.block[1]
        large = pairs * q.shape[0] * q.shape[1] >= _FLEX_PAIRS
        return "flex or sdpa" if large and not flex.refuses(q, mask, need_lse) else "sdpa"
    if backend not in BACKENDS:
        raise ValueError(f'backend {backend!r} is none of "auto", {", ".join(BACKENDS)}')
    why = ""
    if backend == "triton":
        why = triton_refuses(q)
    elif backend == "flex":
        why = flex.refuses(q, mask, need_lse)
    elif backend == "flash":
        from vtr.kernels import flash

        why = flash.refuses(q)
    if why:
        raise RuntimeError(f'{why}; use backend="auto" or "sdpa"')
    return backend


def triton_refuses(q: Tensor, block: Sequence[int] = ()) -> str:
    """Return the reason why the Triton kernels do not support a call, "" if they do. ``block``: for
    kernels whose result depends on the blocks, so that they cannot be cut anew."""
    from vtr.kernels import flex

    if q.shape[-1] not in TRITON_DIMS:
        return f"the Triton kernels have head dims {TRITON_DIMS}, not {q.shape[-1]}"
    if any(n not in SIZES for n in block):
        return f"the Triton kernels have blocks of 16, 32, 64 or 128 tokens, not {tuple(block)}"
    if q.dtype not in DTYPES:
        return f"the Triton kernels compute in float32, bfloat16 and float16, not {q.dtype}"
    if not flex.HAS_TRITON:
        return "the Triton kernels need the triton package, which is not installed"
    if not q.is_cuda:
        from vtr.kernels import triton_common

        if not triton_common.interpreting():
            return f"the Triton kernels need a CUDA device, q is on {q.device}"
    return ""


def _shapes(q: Tensor, k: Tensor, v: Tensor) -> str:
    return f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"


def validate(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, row_scale: Tensor | None,
    added: Tensor | None,
) -> None:  # fmt: skip
    if not isinstance(mask, BlockMask):
        raise ValueError(
            f"mask must be a vtr.kernels.BlockMask, got {type(mask).__module__}."
            f"{type(mask).__name__}; BlockMask.from_dense or BlockMask.from_flex makes one"
        )
    given = [t for t in (q, k, v, row_scale, added) if t is not None]
    if any(not isinstance(t, Tensor) or t.layout != torch.strided for t in given):
        kinds = ", ".join(str(getattr(t, "layout", type(t).__name__)) for t in given)
        raise ValueError(
            "q, k, v, row_scale and added must be dense tensors (torch.strided; to_dense() makes one), "
            f"got {kinds}"
        )
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        raise ValueError(
            f"need q (B, H, Sq, D) and equal k, v (B, Hk, Sk, D); got {_shapes(q, k, v)}"
        )
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(f"q and k differ in batch or head dim: {_shapes(q, k, v)}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"query heads must be a multiple of key heads: {_shapes(q, k, v)}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; convert them to one dtype")
    allowed = DTYPES if q.is_cuda else (*DTYPES, torch.float64)
    if q.dtype not in allowed:
        raise ValueError(f"dtype {q.dtype} is none of {', '.join(map(str, allowed))}")
    others = [*(t.device for t in given), mask.device]
    if any(device != q.device for device in others):
        devices = ", ".join(sorted(map(str, {q.device, *others})))
        raise ValueError(
            f"q, k, v, mask, row_scale and added are on different devices ({devices}); "
            "move them, the mask with mask.to(device)"
        )
    if (q.shape[2], k.shape[2]) != (mask.q_len, mask.k_len):
        raise ValueError(
            f"the mask is for {mask.q_len} queries and {mask.k_len} keys, q and k have "
            f"{q.shape[2]} and {k.shape[2]}; build it for these lengths"
        )
    heads = tuple(mask.pattern.shape)
    if heads[0] not in (1, q.shape[0]) or heads[1] not in (1, q.shape[1]):
        raise ValueError(
            f"the mask has patterns for (batch, heads) = {heads}, q has {tuple(q.shape[:2])}; each "
            "must match or be 1"
        )
    if row_scale is not None and (
        row_scale.shape != q.shape[:3] or not row_scale.is_floating_point()
    ):
        raise ValueError(
            f"row_scale must be float (B, H, Sq) = {tuple(q.shape[:3])}, got "
            f"{row_scale.dtype} {tuple(row_scale.shape)}"
        )
    rows = (*q.shape[:2], mask.grid[0], q.shape[3])
    if added is not None and (added.shape != rows or not added.is_floating_point()):
        raise ValueError(
            f"added must be float (B, H, query blocks, D) = {rows}, got {added.dtype} "
            f"{tuple(added.shape)}"
        )


# ---- the operator -----------------------------------------------------------------------------


def _run(
    q: Tensor, k: Tensor, v: Tensor, row_scale: Tensor | None, added: Tensor | None,
    mask: list[Tensor], dims: list[int], scale: float, need_lse: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    # Precision is that of q: autocast would round the products that float32 is summed from.
    with full_precision(q.device) if lowers(q.device) else nullcontext():
        return _forward(q, k, v, row_scale, added, mask, dims, scale, need_lse, backend)


_operator = torch.library.custom_op("vtr::block_sparse_attention", _run, mutates_args=())


def _keeping(
    kind: Kind, q: Tensor, k: Tensor, v: Tensor, row_scale: Tensor | None, added: Tensor | None,
    mask: BlockMask, scale: float, return_lse: bool, name: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run a call that nobody takes part in, and keep what it has worked out."""
    tensors, dims = mask.tensors(), [mask.q_len, mask.k_len, *mask.block]
    if name == "triton":
        from vtr.kernels import triton_attention

        tensors, cut = in_standard_blocks(tensors, dims)
        if cut is dims or added is None:
            out, lse, call = triton_attention.keeping(
                q, k, v, row_scale, added, tensors, cut, scale
            )
            if call is not None:
                keep(mask, kind, call)
            return out, lse
        tensors = mask.tensors()

    def run(
        q: Tensor, k: Tensor, v: Tensor, row_scale: Tensor | None, added: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        with below_autograd():  # where the body of an operator runs
            return _run(q, k, v, row_scale, added, tensors, dims, scale, return_lse, name)

    keep(mask, kind, run)
    return run(q, k, v, row_scale, added)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, row_scale: Tensor | None, added: Tensor | None,
    mask: list[Tensor], dims: list[int], scale: float, need_lse: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if backend == "triton":
        from vtr.kernels import triton_attention

        mask, cut = in_standard_blocks(mask, dims)
        inside = added if cut is dims else None
        out, lse = triton_attention.forward(q, k, v, row_scale, inside, mask, cut, scale)
        return out if inside is added else finish(out, None, added, dims[2]).to(q.dtype), lse
    if backend == "flash":
        from vtr.kernels import flash

        return flash.forward(q, k, v, row_scale, added, mask, dims, scale, need_lse)
    if backend == "flex" or (backend == "flex or sdpa" and not _sooner_by_sdpa(q, k, mask, dims)):
        from vtr.kernels import flex

        try:
            return flex.forward(q, k, v, row_scale, added, mask, dims, scale, need_lse)
        except RuntimeError as error:
            if backend == "flex":
                raise
            warnings.warn(f"{error}: this call and later ones like it use it", stacklevel=2)
    from vtr.kernels import sdpa

    # The CPU's flash attention of torch 2.11 misreads rows whose elements are apart.
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    return sdpa.forward(q, k, v, row_scale, added, mask, dims, scale, need_lse)


@torch.library.custom_op("vtr::int8_attention", mutates_args=())
def _int8_operator(
    q: Tensor, k: Tensor, v: Tensor, row_scale: Tensor | None, added: Tensor | None,
    mask: list[Tensor], dims: list[int], scale: float, need_lse: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if backend == "triton":
        from vtr.kernels import triton_int8

        mask, cut = in_standard_blocks(mask, dims)
        inside = added if cut is dims else None
        out, lse = triton_int8.forward(q, k, v, row_scale, inside, mask, cut, scale, need_lse)
        return out if inside is added else finish(out, None, added, dims[2]).to(q.dtype), lse
    with full_precision(q.device):
        (bm, bn), mean = standard_block(dims[2:]), int8.mean_key(k)
        rows = int8.restored(*int8.rounded(q, bm), bm)
        columns = int8.restored(*int8.rounded(k, bn, mean), bn)
        out, lse = _forward(
            rows, columns, v.to(mean.dtype), row_scale, added, mask, dims, scale, need_lse, backend
        )
        return out.to(q.dtype), lse + int8.shift(q, mean, scale) if need_lse else lse


def _sooner_by_sdpa(q: Tensor, k: Tensor, mask: list[Tensor], dims: list[int]) -> bool:
    """Tell whether ``sdpa`` beats compiled FlexAttention; at run time, as it depends on the threads."""
    rows, columns = mask[2].numel(), mask[3].numel()
    if stacks(q.dtype, q.device):  # query heads of a key head that share a pattern are one call
        patterns, groups = rows // -(-dims[0] // dims[2]), k.shape[0] * k.shape[1]
        return groups < q.shape[0] * q.shape[1] and patterns <= groups
    pairs = columns / max(1, rows) * dims[2] * dims[3]
    return pairs >= _ONEDNN_PAIRS * torch.get_num_threads() and gains(q.dtype, q.device)


@_int8_operator.register_fake
@_operator.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, row_scale: Tensor | None, added: Tensor | None,
    mask: list[Tensor], dims: list[int], scale: float, need_lse: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    lse = torch.promote_types(q.dtype, torch.float32)
    shape = q.shape[:3] if need_lse or backend == "triton" else (0,)
    out = _tokens_first(q) if backend == "flash" else q.new_empty(q.shape)
    return out, q.new_empty(shape, dtype=lse)


def _tokens_first(like: Tensor) -> Tensor:
    """Make an empty (B, H, S, D) that is (B, S, H, D) in memory, as flash-attn-4 has it."""
    batch, heads, tokens, dim = like.shape
    return like.new_empty(batch, tokens, heads, dim).transpose(1, 2)


@torch.library.custom_op("vtr::block_sparse_attention_backward", mutates_args=())
def _backward_operator(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    row_scale: Tensor | None, mask: list[Tensor], dims: list[int], scale: float, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if _backward_in_flash(backend):
        from vtr.kernels import flash

        return flash.backward(dout, dlse, q, k, v, out, lse, mask, dims, scale)
    delta = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    if dlse is not None:
        # The gradient of the LSE -inf of a row without keys may be NaN; the row has no weights.
        delta = (delta - dlse).masked_fill(lse == float("-inf"), 0.0)
    if row_scale is not None:
        dout = (dout * row_scale.unsqueeze(-1)).to(dout.dtype)
    if _backward_in_triton(q, dims, backend):
        from vtr.kernels import triton_attention

        mask, dims = in_standard_blocks(mask, dims)
        return triton_attention.backward(dout, delta, q, k, v, lse, mask, dims, scale)
    from vtr.kernels import sdpa

    with full_precision(q.device):
        return sdpa.backward(dout, delta, q, k, v, lse, mask, dims, scale)


def _backward_in_flash(backend: str) -> bool:
    """The backward of flash-attn-4 adds up the gradients of the queries in no fixed order."""
    return backend == "flash" and not torch.are_deterministic_algorithms_enabled()


def _backward_in_triton(q: Tensor, dims: list[int], backend: str) -> bool:
    """Compiled FlexAttention has no operator for its backward; the Triton one is used if it can be."""
    by_other = backend.startswith("flex") or (
        backend == "flash" and not _backward_in_flash(backend)
    )
    return backend == "triton" or (by_other and q.is_cuda and not triton_refuses(q))


@_backward_operator.register_fake
def _(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    row_scale: Tensor | None, mask: list[Tensor], dims: list[int], scale: float, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if _backward_in_flash(backend):
        return _tokens_first(q), _tokens_first(k), _tokens_first(v)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    # ``added`` is None here: a call that learns adds it outside.
    q, k, v, row_scale, _, mask, dims, scale, _, backend = inputs
    ctx.save_for_backward(q, k, v, row_scale, *output, *mask)
    ctx.rest = (dims, scale, backend)
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, row_scale, out, lse, *mask = ctx.saved_tensors
    dims, scale, backend = ctx.rest
    none = [None] * len(mask)
    if dout is None and dlse is None:
        return None, None, None, None, None, none, None, None, None, None
    dout = torch.zeros_like(out) if dout is None else dout
    grads = torch.ops.vtr.block_sparse_attention_backward(
        dout, dlse, q, k, v, out, lse, row_scale, mask, dims, scale, backend
    )
    return *grads, None, None, none, None, None, None, None


torch.library.register_autograd("vtr::block_sparse_attention", _gradient, setup_context=_setup)


def _no_second_order(*_: Any) -> Any:
    raise RuntimeError(
        "block_sparse_attention has no second derivative (create_graph=True was followed through "
        'its backward); backend="reference" is differentiable to any order'
    )


torch.library.register_autograd("vtr::block_sparse_attention_backward", _no_second_order)


def _flops(q: Tensor, mask: list[Tensor], dims: list[int], products: int) -> int:
    """Count ``products`` matrix products of 2 D FLOPs per live query-key pair."""
    pattern, row_ptr, split, col, tile, tiles = mask[:6]
    try:
        q_len, k_len, bm, bn = dims
        made = BlockMask(q_len, k_len, (bm, bn), pattern, row_ptr, split, col, tile, tiles)
        live = made.density * q_len * k_len
    except Exception as error:  # tensors without data (fake mode) cannot be counted exactly
        if not is_fake(row_ptr):
            raise error
        live = col.numel() * bm * bn / max(1, split.numel() // -(-q_len // bm))
    return round(products * 2 * q.shape[3] * live) * q.shape[0] * q.shape[1]


@register_flop_formula(
    [torch.ops.vtr.block_sparse_attention, torch.ops.vtr.int8_attention], get_raw=True
)
def _forward_flops(
    q: Tensor, k: Any, v: Any, row_scale: Any, added: Any, mask: Any, dims: Any, *_: Any, **__: Any
) -> int:
    return _flops(q, mask, dims, 2)


@register_flop_formula(torch.ops.vtr.block_sparse_attention_backward, get_raw=True)
def _backward_flops(
    dout: Any,
    dlse: Any,
    q: Tensor,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    row_scale: Any,
    mask: Any,
    dims: Any,
    scale: Any,
    backend: str,
    *_: Any,
    **__: Any,
) -> int:
    # Both Triton kernels, over rows and over columns, compute scores and dO V^T.
    return _flops(q, mask, dims, 7 if _backward_in_triton(q, dims, backend) else 5)
