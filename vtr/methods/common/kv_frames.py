"""Saliency of the entries of the current picture, and redundancy of those of earlier pictures."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.core.kv_site import KVSite

BASES = ("first", "principal")
_LOST = 1e-5  # of the largest direction; what is smaller is rounding
_ALIKE = 1e-3  # of the mean norm; behind a norm without weights all norms are equal up to rounding


def current_frame(site: KVSite) -> tuple[Tensor, Tensor]:
    """Tell the entries of the last frame of each sample from those of earlier ones, (B, Hk, K) bool each.

    A still image is one frame. Separators belong to none.
    """
    frame = site.frame
    last = frame.amax((1, 2))[:, None, None]
    return (frame == last) & (frame >= 0), (frame < last) & (frame >= 0)


def hidden_norms(site: KVSite) -> Tensor:
    """(B, Hk, K) float32, the length of what enters the attention module for each entry of this call; 0 for
    those of earlier calls."""
    assert site.hidden is not None
    norm = torch.linalg.vector_norm(site.hidden.float(), dim=-1)
    return site.at_entries(F.pad(norm, (site.length - norm.shape[1], 0)))


def saliency(norm: Tensor, inside: Tensor, temperature: float) -> Tensor:
    """Compute the softmax of the standardised norms of a set of entries over that set.

    A standard deviation below a thousandth of the mean counts as that much.

    Args:
        norm: (B, Hk, K) float32.
        inside: (B, Hk, K) bool, the set of each head.
        temperature: divides the standardised norms.

    Returns:
        (B, Hk, K) float32 that sums to 1 in each head, 0 outside the set.
    """
    size = inside.sum(-1, keepdim=True).clamp(min=1)
    mean = norm.masked_fill(~inside, 0.0).sum(-1, keepdim=True) / size
    apart = (norm - mean).masked_fill(~inside, 0.0)
    deviation = (apart.square().sum(-1, keepdim=True) / size).sqrt()
    least = (_ALIKE * mean).clamp(min=torch.finfo(norm.dtype).tiny)
    score = apart / torch.maximum(deviation, least) / temperature
    return torch.softmax(score.masked_fill(~inside, -torch.inf), -1).masked_fill(~inside, 0.0)


def first_basis(keys: Tensor, inside: Tensor, rank: int) -> Tensor:
    """Find an orthonormal basis of the first ``rank`` keys of a set, by a QR decomposition.

    These are the first ``rank`` columns of Q for all keys of the set, because there is no pivoting.

    Args:
        keys: (B, Hk, K, D).
        inside: (B, Hk, K) bool, the set of each head.
        rank: less than D.

    Returns:
        (B, Hk, D, R) float32; columns of 0 if the set has fewer keys.
    """
    order = torch.sort((~inside).int(), dim=-1, stable=True).indices[..., :rank]
    there = inside.gather(-1, order)
    first = keys.gather(2, order[..., None].expand(-1, -1, -1, keys.shape[3])).float()
    return torch.linalg.qr((first * there[..., None]).mT).Q * there[..., None, :]


def principal_basis(keys: Tensor, inside: Tensor, rank: int) -> Tensor:
    """Find the ``rank`` directions that hold most of a set of keys: the left singular vectors of the keys.

    Args and result as for :func:`first_basis`; there are columns of 0, too, for keys that are linearly dependent.
    """
    x = keys.float() * inside[..., None]
    size, vectors = torch.linalg.eigh(x.mT @ x)  # ascending
    size, vectors = size[..., -rank:], vectors[..., -rank:]
    return vectors * (size > _LOST * size[..., -1:])[..., None, :]


def residual(keys: Tensor, basis: Tensor) -> Tensor:
    """Measure what a basis (B, Hk, D, R) leaves of keys (B, Hk, K, D): the length of the rest, (B, Hk, K)
    float32."""
    x = keys.float()
    return torch.linalg.vector_norm(x - (x @ basis) @ basis.mT, dim=-1)
