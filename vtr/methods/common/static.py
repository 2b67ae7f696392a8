"""Attention methods whose mask follows from the sizes alone, and stays the same for a whole run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from vtr.kernels import BlockMask, block_sparse_attention
from vtr.kernels.keys import without_keys
from vtr.methods.common.attention import AttentionMethod
from vtr.methods.common.order import Arranged, reorder

if TYPE_CHECKING:
    from vtr.diffusion.site import AttentionSite

Window = int | float | tuple[int, ...]


class Layout(NamedTuple):
    """A mask, the order of tokens that it is for (None: the model's), and the share of dense
    attention's work that it asks for."""

    mask: BlockMask
    arranged: Arranged | None = None
    density: float = 1.0


@dataclass(frozen=True, kw_only=True)
class StaticSparse(AttentionMethod):
    """Base of methods with a static mask: a subclass says what it is (:meth:`make_layout`)."""

    def make_layout(self, site: AttentionSite) -> Layout:
        """The mask for ``site.grid`` and ``site.text``, on the CPU. Called once for these sizes.

        Raises ``ValueError`` where the options do not fit the grid.
        """
        raise NotImplementedError

    def stays(self) -> bool:
        """Whether the mask of a layer is the same in every step of a run."""
        return True

    def layout_key(self, site: AttentionSite) -> tuple[object, ...]:
        """What the mask depends on beside the sizes."""
        return ()

    def layout(self, site: AttentionSite) -> Layout:
        """The mask on the device of ``site.q``, made at the first call."""

        def make() -> Layout:
            mask, arranged, _ = self.make_layout(site)
            device = site.q.device
            if arranged is not None:
                arranged = Arranged(*(t.to(device) for t in arranged))
            # Of the model's pairs of tokens: places that are filled up are work, not gain.
            share = mask.density * mask.q_len * mask.k_len / (site.q.shape[2] * site.k.shape[2])
            return Layout(mask.to(device), arranged, share)

        found: Layout = site.for_size(("layout", *self.layout_key(site)), make)
        return found

    def attend(self, site: AttentionSite) -> Tensor:
        return sparse(site, self.layout(site))[0]


def sparse(
    site: AttentionSite,
    layout: Layout,
    *,
    row_scale: Tensor | None = None,
    return_lse: bool = False,
    heads: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention of a site over what a layout keeps; all tensors in the model's order.

    Args:
        row_scale: (B, H, S) float, multiplies each output row.
        heads: (n,) int64, compute these heads alone, which share the mask; H is then n.

    Returns:
        out (B, H, S, D), and lse (B, H, S) float32 if asked for.
    """
    mask, arranged, density = layout
    q, k, v = site.q, site.k, site.v
    if heads is not None:
        density *= heads.numel() / q.shape[1]
        shared = q.shape[1] // k.shape[1]
        q, k, v = (
            q.index_select(1, heads), *(t.index_select(1, heads // shared) for t in (k, v))
        )  # fmt: skip
    site.count(density)
    site.notes["mask"] = mask  # for vtr.draw; in the method's order of tokens
    if site.text_valid is not None:
        mask = _for_valid_text(site, layout)
    if arranged is not None:
        q, k, v = (reorder(t, arranged.order) for t in (q, k, v))
        if row_scale is not None:
            row_scale = row_scale.index_select(2, arranged.order)
    found = block_sparse_attention(
        q, k, v, mask, scale=site.scale, row_scale=row_scale, return_lse=return_lse,
        backend=site.backend,
    )  # fmt: skip
    out, lse = found if isinstance(found, tuple) else (found, None)
    if arranged is not None:
        out = reorder(out, arranged.back)
        lse = None if lse is None else lse.index_select(2, arranged.back)
    return out, lse


def _for_valid_text(site: AttentionSite, layout: Layout) -> BlockMask:
    """The mask without padded text, made once per padding."""
    assert site.text_valid is not None
    text_valid = site.text_valid

    def make() -> BlockMask:
        grid = text_valid.new_ones(site.q.shape[0], site.q.shape[2] - site.text)
        parts = (text_valid, grid) if site.text_first else (grid, text_valid)
        valid = torch.cat(parts, 1)
        if layout.arranged is not None:
            valid = valid[:, layout.arranged.order]
        return without_keys(layout.mask, valid)

    found: BlockMask = site.for_text(int(layout.mask.ident), make)
    return found


def check_window(window: object, name: str = "window") -> Window:
    """A share of the grid (a float in (0, 1]), one positive int, or two or three of them."""
    if isinstance(window, (tuple, list)):
        if len(window) in (2, 3) and all(type(n) is int and n > 0 for n in window):
            return tuple(window)
    elif (type(window) is int and window > 0) or (isinstance(window, float) and 0 < window <= 1):
        return window
    raise ValueError(
        f"{name} must be a float in (0, 1] (a share of the grid), a positive int, or ints for "
        f"(frames, height, width), got {window!r}"
    )


def fit_window(window: Window, counts: Sequence[int]) -> tuple[int, ...]:
    """A window per axis for a grid of ``counts`` tokens (or tiles) per axis.

    An int holds for every axis as far as the axis goes; two ints are height and width; a float is
    the share of the grid, for which the window with the nearest share is taken, with nearly equal
    shares of the axes.
    """
    if isinstance(window, float):
        return _window_of_share(tuple(counts), window)
    if isinstance(window, int):
        return tuple(min(window, n) for n in counts)
    return (1,) * (len(counts) - len(window)) + window


def _window_of_share(counts: tuple[int, ...], share: float) -> tuple[int, ...]:
    total = math.prod(counts)
    even = share ** (1 / max(1, sum(n > 1 for n in counts)))

    def cost(window: tuple[int, ...]) -> float:
        skew = sum(
            abs(math.log(w / (n * even))) for w, n in zip(window, counts, strict=True) if n > 1
        )
        return abs(math.log(math.prod(window) / total / share)) + 0.1 * skew

    # Only sizes about the even one are worth trying: a window far from it is never the best.
    tries = []
    for n in counts:
        near = round(n * even)
        low, high = max(1, min(near // 2, n - 1)), min(n, 2 * near + 1)
        tries.append(range(low if n > 1 else 1, high + 1))
    return min(product(*tries), key=cost)


def compact_tile(shape: Sequence[int], tokens: int) -> tuple[int, ...]:
    """A tile of at least ``tokens`` tokens (or the whole grid) with sides as equal as powers of two
    can be: doubles the shortest side that its axis still holds, the last axis first."""
    tile = [1] * len(shape)
    while math.prod(tile) < tokens:
        room = [i for i, n in enumerate(shape) if tile[i] < n]
        if not room:
            break
        axis = min(room, key=lambda i: (tile[i], -i))
        tile[axis] *= 2
    return tuple(tile)
