"""Best match of every A token among the B tokens, without holding the Na x Nb matrix.

The matching step of ToMe (Bolya et al., "Token Merging", ICLR 2023, section 3): for each token of
set A the most similar token of set B. Scores are made tile by tile and reduced while they are in
cache, so the memory of its own is O(Na + Nb) and the reduction costs a fraction of the product.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

# Score elements per tile: 1 MiB of float32, which stays in a core's second-level cache.
_TILE = 1 << 18
# Fewer rows than this make a matrix product slow; above it the tile grows with Nb alone, so the
# own memory stays linear in the number of tokens.
_MIN_ROWS = 64
# Below this many columns or elements the two-level reduction costs more calls than it saves.
_TWO_LEVEL_COLUMNS = 120
_TWO_LEVEL_ELEMENTS = 1 << 15
# Short rows are compared whole, this many elements at a time.
_DIRECT = 1 << 20


def bipartite_match(
    metric_a: Tensor,
    metric_b: Tensor,
    *,
    a_bias: Tensor | None = None,
    b_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """For every A row the best score ``a . b`` over all B rows, and which row that is.

    Products and comparison are in float32; among equal scores the lowest index wins. No gradient
    flows (a choice of partners is not differentiable).

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
    if metric_a.is_cuda:
        from vtr.kernels.triton_bipartite import match

        score, index = match(metric_a, metric_b, b_mask)
    else:
        score, index = _match_tiles(metric_a, metric_b, b_mask)
    if a_bias is not None:
        score = score.add_(a_bias)
    return score, index


def _match_tiles(a: Tensor, b: Tensor, b_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, rows, _ = a.shape
    columns = b.shape[1]
    if a.dtype != torch.float32:
        a, b = a.float(), b.float()
    if batch * rows * columns < _TWO_LEVEL_ELEMENTS:
        return _max_direct(a, b, b_mask)
    if columns < _TWO_LEVEL_COLUMNS and rows * columns <= _DIRECT:
        samples = max(1, _DIRECT // (rows * columns))
        own = b_mask is not None and b_mask.ndim == 2 and b_mask.shape[0] == batch
        parts = [
            _max_direct(a[these], b[these], b_mask[these] if own and b_mask is not None else b_mask)
            for these in (slice(i, i + samples) for i in range(0, batch, samples))
        ]
        if len(parts) == 1:
            return parts[0]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
    if columns < _TWO_LEVEL_COLUMNS:
        width = columns
    else:
        width = _group_width(columns)
        pad = -columns % width
        if pad:
            # Copies of the last row: their scores never beat an equal score of a lower index, so
            # they cannot change a result, and every group has the same width.
            b = torch.cat([b, b[:, -1:].expand(batch, pad, b.shape[2])], dim=1)
            if b_mask is not None:
                b_mask = torch.cat([b_mask, b_mask[..., -1:].expand(*b_mask.shape[:-1], pad)], -1)
    if b_mask is not None and b_mask.ndim == 1:
        b_mask = b_mask.expand(batch, -1)

    # Tiles of equal height: a last tile of a row or two would run at a vector product's speed,
    # and with its order of summation.
    samples = min(batch, max(1, _TILE // (rows * columns)))
    tiles = 1 if samples > 1 else max(1, rows // max(_MIN_ROWS, _TILE // columns))
    height = -(-rows // tiles)
    if samples == batch and tiles == 1:
        return _max_two_level(a, b, b_mask, columns, width)
    score = a.new_empty(batch, rows)
    index = torch.empty(batch, rows, dtype=torch.int64, device=a.device)
    for i in range(0, batch, samples):
        these = slice(i, i + samples)
        mask = None if b_mask is None else b_mask[these]
        for start in range(0, rows, height):
            part = slice(start, start + height)
            score[these, part], index[these, part] = _max_two_level(
                a[these, part], b[these], mask, columns, width
            )
    return score, index


def _scores(a: Tensor, b: Tensor, b_mask: Tensor | None) -> Tensor:
    scores = torch.bmm(a, b.mT)
    if b_mask is not None:
        scores.masked_fill_(~(b_mask.unsqueeze(1) if b_mask.ndim == 2 else b_mask), float("-inf"))
    return scores


def _max_direct(a: Tensor, b: Tensor, b_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    score, index = _scores(a, b, b_mask).max(2)
    return score, index


@functools.lru_cache(maxsize=1024)
def _group_width(columns: int) -> int:
    """Columns per group. The maximum is vectorised in steps of 32 (columns over are slow, so two at
    most); of these widths the one that pads least, and the wider where the rows are long."""
    widths = (64, 65, 66, 32, 33, 34) if columns >= 1024 else (32, 33, 34, 64, 65, 66)
    return min(widths, key=lambda width: -columns % width)


def _max_two_level(
    a: Tensor, b: Tensor, b_mask: Tensor | None, columns: int, width: int
) -> tuple[Tensor, Tensor]:
    """Row maximum and its first index: a vectorised maximum finds the group of columns, the slow
    search for the index then looks at that one group."""
    batch, rows, padded = a.shape[0], a.shape[1], b.shape[1]
    groups = padded // width
    scores = _scores(a, b, b_mask).view(batch * rows * groups, width)
    best, group = scores.amax(1).view(batch * rows, groups).max(1)
    first = torch.arange(0, batch * rows * groups, groups, device=a.device)
    index = scores.index_select(0, first.add_(group)).argmax(1).add_(group, alpha=width)
    if padded > columns:
        # A copy of the last row may round up where its original did not.
        index.clamp_(max=columns - 1)
    return best.view(batch, rows), index.view(batch, rows)


def _validate(a: Tensor, b: Tensor, a_bias: Tensor | None, b_mask: Tensor | None) -> None:
    shape_a, shape_b = a.shape, b.shape
    if len(shape_a) != 3 or len(shape_b) != 3 or shape_a[::2] != shape_b[::2]:
        raise ValueError(
            "bipartite_match needs metric_a (B, Na, D) and metric_b (B, Nb, D); got "
            f"{tuple(shape_a)} and {tuple(shape_b)}"
        )
    if shape_b[1] == 0:
        raise ValueError("metric_b has no rows: there is nothing to match with")
    if a.dtype != b.dtype or a.device != b.device:
        raise ValueError(
            f"metric_a is {a.dtype} on {a.device}, metric_b is {b.dtype} on {b.device}; "
            "convert one of them"
        )
    if not a.is_floating_point():
        raise ValueError(f"bipartite_match needs floating-point metrics, got {a.dtype}")
    for name, extra, count in (("a_bias", a_bias, shape_a[1]), ("b_mask", b_mask, shape_b[1])):
        if extra is None:
            continue
        if extra.shape not in ((count,), (shape_a[0], count)):
            raise ValueError(
                f"{name} must be ({count},) or ({shape_a[0]}, {count}), got {tuple(extra.shape)}"
            )
        if extra.device != a.device:
            raise ValueError(f"{name} is on {extra.device}, the metrics on {a.device}; move it")
    if b_mask is not None and b_mask.dtype != torch.bool:
        raise ValueError(f"b_mask must be bool (True: may be chosen), got {b_mask.dtype}")
    if a_bias is not None and not a_bias.is_floating_point():
        raise ValueError(f"a_bias must be floating point (-inf protects a row), got {a_bias.dtype}")
