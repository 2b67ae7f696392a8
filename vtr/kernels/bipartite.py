"""Best match of every A token among the B tokens, without holding the Na x Nb matrix.

The matching step of ToMe (Bolya et al., "Token Merging", ICLR 2023, section 3): for each token of
set A the most similar token of set B. Scores are computed tile by tile. On the CPU they are reduced while
they are in cache, so that the extra memory is O(Na + Nb) and the reduction costs a fraction of the
product; on a GPU tiles have a fixed number of scores.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from vtr.compat.torch import constant_in_graphs, graph_maker
from vtr.kernels.precision import full_precision, lowers

# Score elements per tile and thread: 1 MiB of float32, which stays in a core's second-level cache.
_TILE = 1 << 18
# Fewer rows than this make a matrix product slow; above it the tile grows with Nb alone, so the
# own memory stays linear in the number of tokens.
_MIN_ROWS = 64
# Shorter rows, or fewer scores than this, are searched by torch's own maximum: its scalar search
# for the index costs less there than three more passes.
_SHORT_ROW = 64
_FEW = 1 << 14
# Reductions are vectorised in steps of this many elements; more than a few over are slow.
_VECTOR = 32
_OVER = 4
# Scores per tile on a GPU: 64 MiB of float32, enough to keep it busy.
_GPU_TILE = 1 << 24

Search = Callable[[Tensor, Tensor, "Tensor | None"], tuple[Tensor, Tensor]]


def bipartite_match(
    metric_a: Tensor,
    metric_b: Tensor,
    *,
    a_bias: Tensor | None = None,
    b_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Find for every A row the best score ``a . b`` over all B rows, and the index of that B row.

    Products and comparison are in float32, under ``torch.autocast`` too; among equal scores the
    lowest index wins. No gradient flows (a choice of partners is not differentiable).

    Args:
        metric_a: (B, Na, D) float32, bfloat16 or float16. For cosine similarity pass
            L2-normalised rows.
        metric_b: (B, Nb, D), Nb >= 1, same dtype and device.
        a_bias: (Na,) or (B, Na) float, added to the best score of a row; ``-inf`` protects the
            row: its score is -inf, its index still that of its best partner.
        b_mask: (Nb,) or (B, Nb) bool, False where a B row must never be chosen. A row whose
            partners are all masked has score -inf and index 0.

    Returns:
        ``(score, index)``: (B, Na) float32 and (B, Na) int64.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or Nb is 0.
    """
    _validate(metric_a, metric_b, a_bias, b_mask)
    if metric_a.requires_grad or metric_b.requires_grad:
        metric_a, metric_b = metric_a.detach(), metric_b.detach()
    if a_bias is not None and a_bias.requires_grad:
        a_bias = a_bias.detach()
    match = _match_on_gpu if metric_a.is_cuda else _match_tiles
    # Autocast would round the products, and with them the ranks that say which index is first.
    with full_precision(metric_a.device) if lowers(metric_a.device) else nullcontext():
        score, index = match(metric_a, metric_b, b_mask)
    if a_bias is not None:
        score.add_(a_bias)
    return score, index


def _match_tiles(a: Tensor, b: Tensor, b_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    if a.dtype != torch.float32:
        a, b = a.float(), b.float()
    batch, rows, _ = a.shape
    columns = b.shape[1]
    # A graph for batches of any size cannot have tiles chosen for one size.
    if graph_maker() or batch * rows * columns < _FEW:
        return _search(a, b, b_mask)
    # A compiled function cannot ask for the threads, and may run with others.
    tile = _TILE * (1 if torch.compiler.is_compiling() else torch.get_num_threads())
    search: Search = _search
    if columns >= _SHORT_ROW:
        search = functools.partial(_compare, columns=columns)
        pad = -columns % _VECTOR
        if 0 < pad < _VECTOR - _OVER:
            # Copies of the last row: their ranks are below its own.
            b = torch.cat([b, b[:, -1:].expand(batch, pad, b.shape[2])], dim=1)
            if b_mask is not None:
                b_mask = torch.cat([b_mask, b_mask[..., -1:].expand(*b_mask.shape[:-1], pad)], -1)
    return _in_tiles(a, b, b_mask, search, tile)


def _match_on_gpu(a: Tensor, b: Tensor, b_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Match by the vendor's products: a kernel that holds no scores at all was half as fast."""
    search: Search = _search
    half = a.dtype in (torch.bfloat16, torch.float16)
    if half and not torch.compiler.is_compiling() and _sums_in_float32(a.dtype):
        search = functools.partial(_search, product=_half_product)
    else:
        a, b = a.float(), b.float()
        if _lowers_float32():
            # One product of the parts: high high + high low + low high.
            (high, low), (b_high, b_low) = _parts(a), _parts(b)
            a, b = torch.cat([high, high, low], 2), torch.cat([b_high, b_low, b_high], 2)
    if graph_maker():
        return search(a, b, b_mask)
    return _in_tiles(a, b, b_mask, search, _GPU_TILE)


def _half_product(a: Tensor, b: Tensor) -> Tensor:
    """Exact products on tensor cores, summed and left in float32: ``bmm`` of halves alone would round
    the sums."""
    return torch.bmm(a, b, out_dtype=torch.float32)


@constant_in_graphs
def _sums_in_float32(dtype: torch.dtype) -> bool:
    """Tell whether cuBLAS sums halves in float32: ROCm does not, and users may allow float16 sums."""
    settings = torch.backends.cuda.matmul
    lowered = dtype == torch.float16 and getattr(settings, "allow_fp16_accumulation", False)
    return torch.version.hip is None and not lowered


@constant_in_graphs
def _lowers_float32() -> bool:
    """Tell whether the user allows TF32 in torch's products, which keeps 10 of the factors' 23 bits."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def _parts(x: Tensor) -> tuple[Tensor, Tensor]:
    """Split x into the part that TF32 keeps and a rest, which TF32 rounds by less than 2^-21 of x."""
    high = (x.view(torch.int32) + 0x1000 & ~0x1FFF).view(torch.float32)
    return high, x - high


def _in_tiles(
    a: Tensor, b: Tensor, b_mask: Tensor | None, search: Search, tile: int
) -> tuple[Tensor, Tensor]:
    """Search tiles of about ``tile`` scores: of several samples, or of some rows of one."""
    batch, rows, _ = a.shape
    columns = b.shape[1]
    # Tiles of equal height: a last tile of a row or two would run at a vector product's speed,
    # and with its order of summation.
    samples = -(-batch // -(-batch // max(1, tile // (rows * columns))))
    tiles = 1 if samples > 1 else max(1, rows // max(_MIN_ROWS, tile // columns))
    if samples == batch and tiles == 1:
        return search(a, b, b_mask)
    if b_mask is not None:
        b_mask = b_mask.expand(batch, -1)
    height = -(-rows // tiles)
    score = a.new_empty(batch, rows, dtype=torch.float32)
    index = torch.empty(batch, rows, dtype=torch.int64, device=a.device)
    for i in range(0, batch, samples):
        these = slice(i, i + samples)
        mask = None if b_mask is None else b_mask[these]
        for start in range(0, rows, height):
            part = slice(start, start + height)
            score[these, part], index[these, part] = search(a[these, part], b[these], mask)
    return score, index


def _scores(
    a: Tensor,
    b: Tensor,
    b_mask: Tensor | None,
    product: Callable[[Tensor, Tensor], Tensor] = torch.bmm,
) -> Tensor:
    scores = product(a, b.mT)
    if b_mask is not None:
        scores.masked_fill_(~(b_mask.unsqueeze(1) if b_mask.ndim == 2 else b_mask), float("-inf"))
    return scores


def _search(
    a: Tensor,
    b: Tensor,
    b_mask: Tensor | None,
    product: Callable[[Tensor, Tensor], Tensor] = torch.bmm,
) -> tuple[Tensor, Tensor]:
    # The index is that of the first maximum, as torch's documentation promises.
    found: tuple[Tensor, Tensor] = _scores(a, b, b_mask, product).max(2)
    return found


def _compare(a: Tensor, b: Tensor, b_mask: Tensor | None, columns: int) -> tuple[Tensor, Tensor]:
    """Find row maxima and their first index by vectorised passes alone: the scores that equal the
    maximum are marked with falling ranks, so that the maximal rank marks the first."""
    scores = _scores(a, b, b_mask)
    padded = scores.shape[2]
    best = scores.amax(2, keepdim=True)
    ranks = torch.arange(padded, 0, -1, dtype=torch.float32, device=scores.device)
    marks = torch.ge(scores, best, out=scores).mul_(ranks)
    # A copy of the last row may round up where its original did not, and a row with a NaN equals
    # nothing; the index must be one of a B row all the same.
    index = marks.amax(2).neg_().add_(padded).clamp_(max=columns - 1).long()
    return best.squeeze(2), index


def _validate(a: Tensor, b: Tensor, a_bias: Tensor | None, b_mask: Tensor | None) -> None:
    # At a hundred tokens the whole match takes 10 microseconds: every look at a tensor counts.
    shape_a, shape_b, dtype, device = a.shape, b.shape, a.dtype, a.device
    if (
        len(shape_a) != 3
        or len(shape_b) != 3
        or shape_a[0] != shape_b[0]
        or shape_a[2] != shape_b[2]
    ):
        raise ValueError(
            "bipartite_match needs metric_a (B, Na, D) and metric_b (B, Nb, D); got "
            f"{tuple(shape_a)} and {tuple(shape_b)}"
        )
    if not shape_b[1]:
        raise ValueError("metric_b has no rows: there is nothing to match with")
    if b.dtype != dtype or b.device != device:
        raise ValueError(
            f"metric_a is {dtype} on {device}, metric_b is {b.dtype} on {b.device}; "
            "convert one of them"
        )
    if not dtype.is_floating_point:
        raise ValueError(f"bipartite_match needs floating-point metrics, got {dtype}")
    if a_bias is not None:
        _validate_extra("a_bias", a_bias, shape_a[0], shape_a[1], device)
        if not a_bias.dtype.is_floating_point:
            raise ValueError(
                f"a_bias must be floating point (-inf protects a row), got {a_bias.dtype}"
            )
    if b_mask is not None:
        _validate_extra("b_mask", b_mask, shape_a[0], shape_b[1], device)
        if b_mask.dtype != torch.bool:
            raise ValueError(f"b_mask must be bool (True: may be chosen), got {b_mask.dtype}")


def _validate_extra(name: str, extra: Tensor, batch: int, count: int, device: torch.device) -> None:
    shape = extra.shape
    if shape != (count,) and shape != (batch, count):
        raise ValueError(f"{name} must be ({count},) or ({batch}, {count}), got {tuple(shape)}")
    if extra.device != device:
        raise ValueError(f"{name} is on {extra.device}, the metrics on {device}; move it")
