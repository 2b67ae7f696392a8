"""Block-sparse attention whose blocks are chosen at run time, as a choice of six parts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.kernels import BlockMask, block_sparse_attention
from vtr.kernels.masks import layouts
from vtr.kernels.masks.chosen import chosen_blocks, computed_share, key_places
from vtr.kernels.masks.layouts import Layout
from vtr.kernels.masks.rest import Rest
from vtr.kernels.precision import full_precision
from vtr.methods.common.attention import AttentionMethod
from vtr.methods.common.order import reorder

if TYPE_CHECKING:
    from vtr.core.site import ModelInfo
    from vtr.diffusion.site import DiffusionAttentionSite

Grid = tuple[int, int, int]


class BlockChoice(NamedTuple):
    """A choice of blocks, which may serve several steps.

    Attributes:
        live: (B, H, NQ, NK) bool, the blocks of grid tokens that are kept.
        mask: of the queries of the grid and all keys.
        density: share of the pairs of all tokens that is computed, a tensor ().
        rest: what takes the place of the others.
        text_valid: the padding of text that ``mask`` is for.
    """

    live: Tensor
    mask: BlockMask
    density: Tensor
    rest: Rest
    text_valid: Tensor | None

    def serves(self, view: GridView) -> bool:
        """Tell whether it is for a call of the same samples, heads, tokens and text."""
        sizes = (view.q.shape[0], view.q.shape[1], view.q.shape[2], view.keys.shape[2])
        mine = (*self.live.shape[:2], self.mask.q_len, self.mask.k_len)
        return sizes == mine and self.text_valid is view.text_valid


class _Places(NamedTuple):
    """A layout with the indices that follow from it and from the text, on the device of q.

    ``queries`` (M,) and ``keys`` (K,) are the model's index of each place, None for those that are
    there already; ``back`` (N,) the place of each grid token; ``filled`` (M,) False for places without
    a token, None if all have one; ``counts`` the tokens of each query block and of each key block.
    """

    layout: Layout
    queries: Tensor | None
    keys: Tensor | None
    back: Tensor | None
    filled: Tensor | None
    counts: tuple[Tensor, Tensor]
    always: Tensor | None


class GridView:
    """The tokens of one attention call in the order of a layout, for the choice of blocks.

    Attributes:
        site: the attention call.
        layout: of the grid tokens, M places in NQ query blocks and NK key blocks.
        sides: tokens of a query block and of a key block.
        counts_q, counts_k: (NQ,), (NK,) int64, tokens of each block.
        filled: (M,) bool, False for places without a token (there q, k and v are 0); None if all have
            one.
        scale: factor of the scores.
        q: (B, H, M, D). k, v: (B, Hk, M, D).
        keys, values: (B, Hk, K, D): the places of the grid, what fills their last block up, the text.
        text: number of text tokens T, text_valid: (B, T) bool, False for padding, or None.
        text_k, text_v: (B, Hk, T, D).
    """

    def __init__(self, site: DiffusionAttentionSite, places: _Places) -> None:
        self.site, self._places = site, places
        self.layout, self.sides, self.scale = places.layout, places.layout.sides, site.scale
        self.counts_q, self.counts_k = places.counts
        self.filled = places.filled
        self.text, self.text_valid = site.text, site.text_valid
        end = site.first + site.tokens
        if places.queries is None:
            self.q = site.q[:, :, site.first : end]
        else:
            self.q = reorder(site.q, places.queries)
        self.keys, self.values = (
            t if places.keys is None else reorder(t, places.keys) for t in (site.k, site.v)
        )
        if self.filled is not None:
            rest = self.keys.shape[2] - places.layout.places
            self.q = self.q * self.filled[:, None]
            wide = F.pad(self.filled, (0, rest), value=True)[:, None]
            self.keys, self.values = self.keys * wide, self.values * wide

    @property
    def k(self) -> Tensor:
        return self.keys[:, :, : self.layout.places]

    @property
    def v(self) -> Tensor:
        return self.values[:, :, : self.layout.places]

    @property
    def text_k(self) -> Tensor:
        return self.keys[:, :, self.keys.shape[2] - self.text :]

    @property
    def text_v(self) -> Tensor:
        return self.values[:, :, self.values.shape[2] - self.text :]

    @cached_property
    def keys_valid(self) -> Tensor | None:
        """(B, K) bool, False for places of ``keys`` that hold no token or padding of text; None if all
        are seen."""
        places, padding = self.layout.places, self.keys.shape[2] - self.layout.places - self.text
        if self.filled is None and self.text_valid is None and padding == 0:
            return None
        grid = self.q.new_ones(places, dtype=torch.bool) if self.filled is None else self.filled
        seen = F.pad(grid, (0, padding), value=False).expand(self.q.shape[0], -1)
        if self.text_valid is None:
            return F.pad(seen, (0, self.text), value=True)
        return torch.cat([seen, self.text_valid], 1)

    @cached_property
    def q_means(self) -> Tensor:
        """(B, H, NQ, D) float32, the mean of the tokens of each query block."""
        return self.means(self.q, 0)

    @cached_property
    def k_means(self) -> Tensor:
        """(B, Hk, NK, D) float32, the mean of the tokens of each key block."""
        return self.means(self.k, 1)

    def means(self, x: Tensor, side: int) -> Tensor:
        """Compute the mean of each block's tokens along a side, 0 for queries and 1 for keys.

        Args:
            x: (..., M, D), 0 in places without a token.

        Returns:
            (..., number of blocks, D) float32 (float64 for float64); 0 for a block without tokens.
        """
        block, work = self.sides[side], torch.promote_types(x.dtype, torch.float32)
        whole = x.shape[-2] // block * block
        parts = []
        if whole:
            parts.append(x[..., :whole, :].unflatten(-2, (-1, block)).sum(-2, dtype=work))
        if whole < x.shape[-2]:
            parts.append(x[..., whole:, :].sum(-2, keepdim=True, dtype=work))
        counts = (self.counts_q, self.counts_k)[side]
        return torch.cat(parts, -2) / counts.clamp(min=1)[:, None]

    def restore(self, out: Tensor) -> Tensor:
        """Put the output of the grid's places (B, H, M, D) into the model's order, with that of the text,
        which sees everything but padding: (B, H, S, D)."""
        if self._places.back is not None:
            out = reorder(out, self._places.back)
        if self.text == 0:
            return out
        site = self.site
        words = site.q[:, :, : self.text] if site.text_first else site.q[:, :, site.tokens :]
        seen = None if self.text_valid is None else site.valid_mask[:, None, None]
        found = F.scaled_dot_product_attention(
            words, site.k, site.v, attn_mask=seen, scale=self.scale,
            enable_gqa=site.k.shape[1] != site.q.shape[1],
        )  # fmt: skip
        return torch.cat([found, out] if site.text_first else [out, found], 2)


TABLE = "density"
"""Name of the table with densities by group of steps, layer and head."""


def density_at(site: DiffusionAttentionSite, table: Tensor) -> Tensor:
    """Read the densities of a call's heads, (H, 1), in a table (G, layers, heads); the steps of a run are divided
    evenly among the G groups.

    Raises:
        RuntimeError: the table is for another model, the number of steps is not known, or the model trains.
    """
    groups, layers, heads = table.shape
    if site.training:
        raise RuntimeError(
            "a plan has densities for the steps of a generation, and training has no such steps: "
            "apply the method without the plan"
        )
    if (layers, heads) != (site.layers, site.all_heads):
        raise RuntimeError(
            f"the plan has densities for {layers} layers of {heads} heads; here are {site.layers} of "
            f"{site.all_heads}"
        )
    group, steps = 0, site.steps
    if groups > 1 and steps is None:
        raise RuntimeError(
            f"the plan has densities for {groups} groups of steps, and the number of steps is not known: apply it "
            "to the pipeline, or with vtr.apply(..., steps=50)"
        )
    if steps is not None:
        group = min(groups - 1, site.step * groups // steps)
    own = slice(site.first_head, site.first_head + site.q.shape[1])
    return table[group, site.layer, own, None].to(site.q.device)


@dataclass(frozen=True, kw_only=True)
class DynamicAttention(AttentionMethod):
    """Base of methods that choose the key blocks of every query block and head at run time.

    All published ones are a choice of six parts, for which :mod:`vtr.kernels.masks` has functions:

    ========  =================================================  =====================
    part      question                                           method of this class
    ========  =================================================  =====================
    layout    which tokens are in a block                        :meth:`layout`
    score     how much is a block expected to get                :meth:`scores`
    budget    which blocks of a row are kept                     :meth:`budget`
    always    which are kept whatever their score                :meth:`always`
    rest      what takes the place of the others                 :meth:`rest`
    schedule  when is the choice made anew                       :meth:`renew`
    ========  =================================================  =====================

    The author writes ``scores`` and ``budget``, and those of the others that differ from their
    defaults. The base puts tokens in order and back; lets every query see the text, and the text
    everything; leaves out the padding of text; keeps the best block of a row that would see nothing at all;
    and chooses in full precision. Gradients flow through the attention itself and through ``rest``, not
    through the choice.

    A plan can give such a method a density for each group of steps, each layer and each head: its table ``density``,
    which :func:`vtr.search` finds. :meth:`share` reads it; an author who calls it says so, ``tabled = True``.
    """

    def share(self, view: GridView, own: float) -> float | Tensor:
        """Return the share of blocks that is kept: ``own``, the option, or (H, 1) float32 for the heads here from the
        plan's table, on the device of q.

        Raises:
            RuntimeError: the table is for other steps, layers or heads, or the model trains.
        """
        site = view.site
        return own if TABLE not in site.table else density_at(site, site.table[TABLE])

    @property
    def sides(self) -> tuple[int, int]:
        """Tokens of a query block and of a key block."""
        return self.block, self.block

    def check(self, info: ModelInfo) -> None:
        cls, base = type(self), DynamicAttention
        own = cls.attend is not base.attend or cls.choose is not base.choose
        if not own and (cls.scores is base.scores or cls.budget is base.budget):
            raise TypeError(
                f"{cls.__name__} must define scores(view), (B, H, NQ, NK), and budget(scores, view), "
                "which of these blocks are kept"
            )
        super().check(info)

    def layout(self, grid: Grid) -> Layout:
        """Return the order of the grid's tokens and their blocks, on the CPU; asked once per size."""
        return layouts.raster(grid, self.sides)

    def scores(self, view: GridView) -> Tensor:
        """Return the score of each pair of blocks, (B, H, NQ, NK); larger is kept rather."""
        raise NotImplementedError(f"{type(self).__name__} must define scores(view)")

    def budget(self, scores: Tensor, view: GridView) -> Tensor:
        """Return which blocks are kept by their scores, (B, H, NQ, NK) bool."""
        raise NotImplementedError(f"{type(self).__name__} must define budget(scores, view)")

    def always(self, grid: Grid, layout: Layout) -> Tensor | None:
        """Return the blocks that are kept whatever their score, (NQ, NK) bool on the CPU; asked once
        per size."""
        return None

    def rest(self, view: GridView, scores: Tensor, live: Tensor) -> Rest:
        """Return what takes the place of the blocks that are not in ``live`` (B, H, NQ, NK)."""
        return Rest()

    def renew(self, site: DiffusionAttentionSite) -> bool:
        """Tell whether to choose anew in this call. If not, that of the call before is used,
        unless its sizes are others (guidance was switched off, say)."""
        return True

    # ---- a call -----------------------------------------------------------------------------

    def attend(self, site: DiffusionAttentionSite) -> Tensor:
        view = self.view(site)
        chosen = self.chosen(view)
        site.count(chosen.density)
        site.notes["mask"] = chosen.mask  # for vtr.draw; in the order of the layout
        base = DynamicAttention
        added = any(part is not None for part in chosen.rest)
        site.notes["rest"] = added or type(self).compute is not base.compute
        return view.restore(self.compute(view, chosen))

    def view(self, site: DiffusionAttentionSite) -> GridView:
        """Return the tokens of the call in the order of the layout."""

        def build() -> _Places:
            layout = self.layout(site.grid)
            always = self.always(site.grid, layout)
            return _places(layout, always, site)

        return GridView(site, site.for_size("places", build))

    def chosen(self, view: GridView) -> BlockChoice:
        """Return the choice of blocks for a call: a new one, or that of an earlier call."""
        # Training has no order of steps, and checkpointing may not meet what a call has left.
        if type(self).renew is DynamicAttention.renew or view.site.training:
            return self.choose(view)
        known: BlockChoice | None = view.site.state.get("chosen")
        if known is None or not known.serves(view) or self.renew(view.site):
            known = view.site.state["chosen"] = self.choose(view)
        return known

    def choose(self, view: GridView) -> BlockChoice:
        """Choose blocks by their scores."""
        learns = torch.is_grad_enabled() and type(self).rest is not DynamicAttention.rest
        # The choice compares close numbers: autocast would round them.
        with full_precision(view.q.device):
            with torch.set_grad_enabled(learns):
                scores = self.scores(view)
            with torch.no_grad():
                live = self.budget(scores.detach(), view)
            return self.keep(view, live, scores)

    def keep(self, view: GridView, live: Tensor, scores: Tensor) -> BlockChoice:
        """Make a choice of ``live`` (B, H, NQ, NK) bool, united with those that are always kept.

        Args:
            scores: (B, H, NQ, NK or more): of a row that would see nothing, not even text, the best is
                kept.
        """
        always, layout = view._places.always, view.layout
        if always is not None:
            live = live | always
        if view.text == 0 or view.text_valid is not None:
            best = scores[..., : live.shape[-1]].detach().argmax(-1, keepdim=True)
            nothing = ~live.any(-1, keepdim=True)
            if view.text_valid is not None:
                nothing = nothing & ~view.text_valid.any(1)[:, None, None, None]
            live = live | torch.zeros_like(live).scatter_(-1, best, nothing)
        if layout.padded:
            live = live & (view.counts_k > 0)
        filled = view.filled
        if filled is not None and view.text_valid is None:
            filled = layout.order >= 0  # on the CPU, where the mask's columns are built then
        mask = chosen_blocks(
            live, view.sides, layout.places, filled=filled, text=view.text,
            text_valid=view.text_valid,
        )  # fmt: skip
        density = computed_share(live, view.sides, layout.places, view.site.tokens, view.text)
        return BlockChoice(live, mask, density, self.rest(view, scores, live), view.text_valid)

    def compute(self, view: GridView, chosen: BlockChoice) -> Tensor:
        """Compute the output of the grid's places, (B, H, M, D)."""
        out: Any = block_sparse_attention(
            view.q, view.keys, view.values, chosen.mask, scale=view.scale,
            row_scale=chosen.rest.row_scale, added=chosen.rest.added, backend=view.site.backend,
        )  # fmt: skip
        return out  # type: ignore[no-any-return]


def _places(layout: Layout, always: Tensor | None, site: DiffusionAttentionSite) -> _Places:
    places, text, device = layout.places, site.text, site.q.device
    start = site.text if site.text_first else 0
    queries = layout.order.clamp(min=0) + start
    gap = key_places(places, text, layout.sides[1]) - places - text
    words = torch.arange(text, device="cpu") + (0 if site.text_first else site.tokens)
    fill = torch.zeros(gap, dtype=torch.int64, device="cpu")
    keys = torch.cat([queries, fill, words])
    same = torch.equal(keys, torch.arange(site.q.shape[2], device="cpu"))
    real = layout.order >= 0
    back = torch.empty(site.tokens, dtype=torch.int64, device="cpu")
    back[layout.order[real]] = real.nonzero().flatten()
    return _Places(
        layout,
        None if layout.is_raster else queries.to(device),
        None if same else keys.to(device),
        None if layout.is_raster else back.to(device),
        real.to(device) if layout.padded else None,
        (layout.counts(0).to(device), layout.counts(1).to(device)),
        None if always is None else always.to(device),
    )
