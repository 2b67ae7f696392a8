"""Attention under a mask that follows from the grid alone, and stays the same for a whole run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from vtr.kernels import BlockMask, block_sparse_attention, masks
from vtr.kernels.keys import without_keys
from vtr.methods.common.attention import AttentionMethod
from vtr.methods.common.order import Arranged, arrange, reorder

if TYPE_CHECKING:
    from vtr.core.site import ModelInfo
    from vtr.diffusion.site import DiffusionAttentionSite

Grid = tuple[int, int, int]


class GridMask(NamedTuple):
    """A mask of the grid with what else there is to say of it.

    Attributes:
        mask: of the grid's tokens, on the CPU; or a function that gets a number of text tokens and
            returns the mask of these, dense both ways, and the grid's behind them. The function is
            for masks whose blocks are cut over text and grid alike (the authors of Radial Attention
            do so); with a plain mask, text that is first is moved behind the grid.
        order: (M,) int64, the raster index of the token in each place of the mask, for masks of
            reordered tokens; -1 for a place that holds no token. None for raster order.
        whole_blocks: whether the mask knows whole blocks alone: a block that holds text is then
            whole as well, and stays cheap. Otherwise text is added token by token.
    """

    mask: BlockMask | Callable[[int], BlockMask]
    order: Tensor | None = None
    whole_blocks: bool = False


class SequenceMask(NamedTuple):
    """A mask of grid and text, the order of tokens that it is for (None: the model's), and the share
    of dense attention's work that it asks for."""

    mask: BlockMask
    arranged: Arranged | None = None
    density: float = 1.0


@dataclass(frozen=True, kw_only=True)
class MaskedAttention(AttentionMethod):
    """Base of methods with a static mask. The author writes :meth:`grid_mask`, and nothing else.

    The base adds text, first or last as the family has it, dense both ways; leaves out the padding
    of text; puts tokens in order and back; and builds each mask once per size.
    """

    def check(self, info: ModelInfo) -> None:
        cls, base = type(self), MaskedAttention
        if all(
            getattr(cls, n) is getattr(base, n) for n in ("grid_mask", "grid_mask_at", "attend")
        ):
            raise TypeError(
                f"{cls.__name__} must define grid_mask(grid): the mask over the tokens of the grid "
                "(frames, height, width) in raster order, as vtr.kernels.masks build them"
            )
        super().check(info)

    def grid_mask(self, grid: Grid) -> BlockMask | Tensor | GridMask:
        """Return which tokens of the grid each token of the grid sees, on the CPU.

        Args:
            grid: (frames, height, width) in tokens; frames is 1 for an image. Token
                ``(f * height + h) * width + w`` is at frame f, row h, column w (raster order).

        Returns:
            A :class:`~vtr.kernels.BlockMask` of N x N tokens, N = frames * height * width, as the
            functions of :mod:`vtr.kernels.masks` build them; a bool tensor (N, N), True if seen, for
            small grids; or a :class:`GridMask` for tokens in another order.

        Raises:
            ValueError: the options do not fit the grid.
        """
        raise NotImplementedError(f"{type(self).__name__} must define grid_mask(grid)")

    def grid_mask_at(self, site: DiffusionAttentionSite) -> BlockMask | Tensor | GridMask:
        """Return :meth:`grid_mask` for one layer. Override it, and :meth:`mask_key`, if the mask
        depends on more than the grid."""
        return self.grid_mask(site.grid)

    def mask_key(self, site: DiffusionAttentionSite) -> tuple[object, ...]:
        """Return what the mask depends on beside the grid."""
        return ()

    def stays(self) -> bool:
        """Tell whether the mask of a layer is the same in every step of a run."""
        return True

    def sequence_mask(self, site: DiffusionAttentionSite) -> SequenceMask:
        """Return the mask of grid and text on the device of ``site.q``, built at the first call."""

        def build() -> SequenceMask:
            found = checked(self.name, self.grid_mask_at(site), site, self.block)
            mask, arranged = around_text(found, site.grid, site.text, site.text_first)
            if mask.q_len != site.q.shape[2] and arranged is None:
                raise ValueError(
                    f"{self.name}: the function of a GridMask returned a mask for {mask.q_len} tokens "
                    f"of grid and text, and there are {site.q.shape[2]}. It gets a number of text "
                    "tokens and returns the mask of these with the grid's behind them"
                )
            # Of the model's pairs of tokens: places without a token are work, not gain.
            share = mask.density * mask.q_len * mask.k_len / (site.q.shape[2] * site.k.shape[2])
            device = site.q.device
            arranged = None if arranged is None else arranged.to(device)
            return SequenceMask(mask.to(device), arranged, share)

        found: SequenceMask = site.for_size(("mask", *self.mask_key(site)), build)
        return found

    def attend(self, site: DiffusionAttentionSite) -> Tensor:
        return masked_attention(site, self.sequence_mask(site))[0]


# ---- from the grid to the sequence ---------------------------------------------------------------


def checked(name: str, found: object, site: DiffusionAttentionSite, block: int) -> GridMask:
    """Return what an author gave for a grid as a :class:`GridMask`.

    Raises:
        TypeError: it is no mask.
        ValueError: it is not of the grid's tokens; the message says what to return.
    """
    grid, tokens = site.grid, site.tokens
    where = f"{grid[0]} x {grid[1]} x {grid[2]} = {tokens} tokens (frames, height, width)"
    given = found if isinstance(found, GridMask) else GridMask(found)  # type: ignore[arg-type]
    mask, places = given.mask, tokens
    if isinstance(mask, Tensor):
        if mask.dtype != torch.bool or mask.ndim != 2:
            raise ValueError(
                f"{name}: grid_mask returned a tensor {tuple(mask.shape)} of {mask.dtype}; return a "
                f"bool tensor ({tokens}, {tokens}), True if the token of a row sees that of a column"
            )
        _check_size(name, tuple(mask.shape), tokens, site.text, where)
        return given._replace(mask=BlockMask.from_dense(mask.cpu(), block=block))
    if given.order is not None:
        order = given.order
        real = order[order >= 0].sort().values if isinstance(order, Tensor) else None
        if real is None or not torch.equal(real, torch.arange(tokens, device=order.device)):
            raise ValueError(
                f"{name}: the order of a grid mask must be an int64 tensor that names each of "
                f"{where} once by its raster index, from 0 to {tokens - 1}, and has -1 in places "
                f"without a token; got {tuple(order.shape) if isinstance(order, Tensor) else order}"
            )
        places = order.numel()
    if callable(mask):
        if given.order is not None:
            raise ValueError(
                f"{name}: a grid mask with an order is a BlockMask, not a function of the text in "
                "front: the base puts text behind reordered tokens"
            )
        return given
    if not isinstance(mask, BlockMask):
        raise TypeError(
            f"{name}: grid_mask returned {type(mask).__name__}; return a BlockMask of {where}, as the "
            "functions of vtr.kernels.masks build them, or a bool tensor of that many rows and columns"
        )
    _check_size(name, (mask.q_len, mask.k_len), places, site.text, where)
    return given


def _check_size(name: str, size: tuple[int, ...], places: int, text: int, where: str) -> None:
    if size == (places, places):
        return
    problem = f"{name}: grid_mask returned a mask of {size[0]} x {size[1]} tokens, "
    if text and size == (places + text,) * 2:
        raise ValueError(
            problem
            + f"that is of the whole sequence with its {text} tokens of text. Return the mask of "
            f"the grid alone, {where}: the base adds text, which is first in some families and "
            "last in others"
        )
    raise ValueError(problem + f"and the grid has {where}: build it from the argument grid alone")


def around_text(
    given: GridMask, grid: Grid, text: int, text_first: bool
) -> tuple[BlockMask, Arranged | None]:
    """The mask of grid and text, and the order of tokens that it is for (None: the model's)."""
    if not isinstance(given.mask, BlockMask):
        first = text if text_first else 0
        mask = given.mask(first)
        return masks.with_text(mask, text - first, whole_blocks=given.whole_blocks), None
    mask = masks.with_text(given.mask, text, whole_blocks=given.whole_blocks)
    order, tokens = given.order, grid[0] * grid[1] * grid[2]
    if order is None:
        order = torch.arange(tokens, device="cpu")
    order = order.cpu()
    real = torch.cat([order >= 0, torch.ones(text, dtype=torch.bool, device="cpu")])
    if not bool(real.all()):
        mask = without_keys(mask, real[None])
    return mask, arrange(order, text, text_first)


# ---- attention -----------------------------------------------------------------------------------


def masked_attention(
    site: DiffusionAttentionSite,
    given: SequenceMask,
    *,
    row_scale: Tensor | None = None,
    return_lse: bool = False,
    heads: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Compute attention of a site over what a mask keeps; all tensors in the model's order.

    Args:
        row_scale: (B, H, S) float, multiplies each output row.
        heads: (n,) int64, compute these heads alone, which share the mask; H is then n.

    Returns:
        out (B, H, S, D), and lse (B, H, S) float32 if asked for.
    """
    mask, arranged, density = given
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
        mask = _without_padding(site, given)
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


def _without_padding(site: DiffusionAttentionSite, given: SequenceMask) -> BlockMask:
    """The mask without the padding of text, built once per padding."""

    def build() -> BlockMask:
        valid = site.valid_mask
        if given.arranged is not None:
            valid = valid[:, given.arranged.order]
        return without_keys(given.mask, valid)

    found: BlockMask = site.for_text(int(given.mask.ident), build)
    return found
