"""Sparse softmax attention beside linear attention (SLA): the public function and its checks."""

from __future__ import annotations

import torch
from torch import Tensor

from vtr.kernels.attention import validate
from vtr.kernels.blockmask import BlockMask
from vtr.kernels.linear_reference import FEATURES, KEYS, sparse_linear_attention_reference


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
    return sparse_linear_attention_reference(
        q, k, v, mask, scale=scale, feature=feature, keys=keys, negligible=negligible,
        keys_valid=keys_valid,
    )  # fmt: skip


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
