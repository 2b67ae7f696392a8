"""Linear attention over the marginal blocks of a mask on any device, without an N x N map.

With x = phi(q), y = phi(k), and u = (v, 1), so that the last column carries the denominators:

    S_J = y_J^T u_J  (D x (D + 1));  H_I = sum_{J in M_I} S_J;  (n_i, z_i) = x_i H_I;  l_i = n_i / z_i

The sums over M_I are one product of the block map with all S_J. Nothing is subtracted from a total: a
row whose marginal keys weigh little loses no digits, and one without any gets an exact 0.

Backward, with g the gradient of l and a_i = (g_i, -g_i . l_i) / z_i:

    dx_i = a_i H_I^T;  dH_I = x_I^T a_I;  dS_J = sum_{I: J in M_I} dH_I;  dy_j = dS_J u_j;  dv_j = y_j dS_J
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.kernels.linear_reference import EPSILON

# Values of H that are held at a time (16 MiB in float32).
_CHUNK = 1 << 22


def _cut(x: Tensor, block: int) -> Tensor:
    """Cut (S, D) into (blocks, block, D), with zeros after the last token."""
    return F.pad(x, (0, 0, 0, -x.shape[0] % block)).unflatten(0, (-1, block))


def _sums(y: Tensor, v: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compute y and u in blocks, and S (NK, D (D + 1))."""
    u = _cut(F.pad(v.to(y.dtype), (0, 1), value=1.0), block)
    y = _cut(y, block)
    return y, u, (y.transpose(1, 2) @ u).flatten(1)


def _parts(
    sums: Tensor, blocks: Tensor | None, rows: int, dim: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield query blocks, the map (query blocks, NK) of their marginal blocks, and their H."""
    if blocks is None:
        every = sums.new_ones(1, sums.shape[0])
        yield slice(0, rows), every, (every @ sums).view(1, dim, dim + 1)
        return
    step = max(1, _CHUNK // sums.shape[1])
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        chosen = blocks[part].to(sums.dtype)
        yield part, chosen, (chosen @ sums).view(-1, dim, dim + 1)


def _map_of(blocks: Tensor | None, b: int, h: int) -> Tensor | None:
    return None if blocks is None else blocks[b % blocks.shape[0], h % blocks.shape[1]]


def forward(
    x: Tensor, y: Tensor, v: Tensor, blocks: Tensor | None, block: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Compute l (B, H, Sq, D) and 1 / z (B, H, Sq), both 0 if z is 0, in the dtype of x.

    Args:
        x: (B, H, Sq, D), y: (B, Hk, Sk, D), features in float32 or float64. v: (B, Hk, Sk, D), any dtype.
        blocks: (B or 1, H or 1, NQ, NK) bool, the marginal blocks; None for all keys.
    """
    batch, heads, length, dim = x.shape
    group = heads // y.shape[1]
    out, factor = torch.empty_like(x), torch.empty_like(x[..., 0])
    for b in range(batch):
        for h in range(heads):
            if h % group == 0:
                _, _, sums = _sums(y[b, h // group], v[b, h // group], block[1])
            query = _cut(x[b, h], block[0])
            for part, _, held in _parts(sums, _map_of(blocks, b, h), len(query), dim):
                found = (query[part] @ held).flatten(0, 1)
                z = found[:, dim] + (EPSILON if blocks is None else 0.0)
                inverse = torch.where(z > 0, 1 / z, 0.0)
                here = slice(part.start * block[0], min(part.stop * block[0], length))
                count = here.stop - here.start
                factor[b, h, here] = inverse[:count]
                out[b, h, here] = (found[:, :dim] * inverse[:, None])[:count]
    return out, factor


def backward(
    dout: Tensor, x: Tensor, y: Tensor, v: Tensor, out: Tensor, factor: Tensor,
    blocks: Tensor | None, block: tuple[int, int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute the gradients of x, y and v."""
    batch, heads, length, dim = x.shape
    group = heads // y.shape[1]
    dx, dy, dv = torch.empty_like(x), torch.empty_like(y), torch.empty_like(v)
    slope = torch.cat([dout, -(dout * out).sum(-1, keepdim=True)], -1) * factor[..., None]
    for b in range(batch):
        for kh in range(y.shape[1]):
            keys, values, sums = _sums(y[b, kh], v[b, kh], block[1])
            dsums = torch.zeros_like(sums)
            for h in range(kh * group, (kh + 1) * group):
                query, a = _cut(x[b, h], block[0]), _cut(slope[b, h], block[0])
                for part, chosen, held in _parts(sums, _map_of(blocks, b, h), len(query), dim):
                    here = slice(part.start * block[0], min(part.stop * block[0], length))
                    found = (a[part] @ held.transpose(1, 2)).flatten(0, 1)
                    dx[b, h, here] = found[: here.stop - here.start]
                    dheld = query[part].transpose(1, 2) @ a[part]
                    if blocks is None:
                        dheld = dheld.sum(0, keepdim=True)
                    dsums += chosen.t() @ dheld.flatten(1)
            change = dsums.view(-1, dim, dim + 1)
            dy[b, kh] = (values @ change.transpose(1, 2)).flatten(0, 1)[: y.shape[2]]
            dv[b, kh] = (keys @ change[..., :dim]).flatten(0, 1)[: y.shape[2]].to(v.dtype)
    return dx, dy, dv


def flops(
    queries: int, keys: int, dim: int, block: tuple[int, int], every: bool, backward: bool
) -> tuple[int, int]:
    """Count the FLOPs of one query head and of one key head."""
    size = 2 * dim * (dim + 1)
    rows = 1 if every else -(-queries // block[0])
    maps = rows * -(-keys // block[1]) * size
    if backward:  # H again; dx and dH; dS. S again; dy and dv (which has a column less)
        return 2 * (maps + queries * size), 2 * keys * size + keys * 2 * dim * dim
    return maps + queries * size, keys * size
