"""The base of methods that read a part of the visual keys in decoding steps, over a full cache."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.core.budget import Keep, check_count, check_keep, check_layers, counts, fit_layers
from vtr.core.language_attention import take_rows
from vtr.core.site import ModelInfo
from vtr.methods.common.language_attention import LanguageAttentionMethod

if TYPE_CHECKING:
    from vtr.core.language_attention import LanguageAttentionSite


class Sides(NamedTuple):
    """The columns that a decoding step sees.

    Attributes:
        always: (B, A) int64, those that are always read, ascending, then -1.
        visual: (B, N) int64, the other ones, all of them visual, ascending, then -1.
        number: (B,) int64, how many of them each sample reads.
        most: the largest ``number``.
        all: whether every sample reads all of them.
    """

    always: Tensor
    visual: Tensor
    number: Tensor
    most: int
    all: bool


@dataclass(frozen=True, kw_only=True)
class DecodeMethod(LanguageAttentionMethod):
    """Base of decode-time sparse attention. The author writes :meth:`select`, and nothing else.

    The cache keeps everything; a decoding step reads a part of it. Only visual keys are left out: text, generated
    tokens, the first token and the most recent columns are always read. Calls of several rows (prompts, later
    turns, drafts of assisted decoding) are dense, so that a drafted token is judged by all keys.

    Attributes (beside those of :class:`Layered`):
        keys: visual keys that each key head reads in a step beside those that are always read: an int is a number
            per sample, a float in (0, 1] a share of the sample's.
        recent: newest columns that are always read, the row's own among them.
    """

    keys: Keep = field(default=256, kw_only=False)
    recent: int = 1

    def validate(self) -> None:
        super().validate()
        self._set("keys", check_keep(self.keys, "keys"))
        check_count(self.recent, "recent")

    def check(self, info: ModelInfo) -> None:
        cls = type(self)
        if cls.select is DecodeMethod.select and cls.attend is DecodeMethod.attend:
            raise TypeError(
                f"{cls.__name__} must define select(site): the columns that each key head reads, int64 "
                "(B, Hk, n), or None for all of them"
            )
        super().check(info)

    def select(self, site: LanguageAttentionSite) -> Tensor | None:
        """Choose the columns that each key head reads.

        Args:
            site: a decoding step, the whole batch with its padding.

        Returns:
            (B, Hk, n) int64, none of them twice, -1 for none; None for all. :meth:`read` adds those that are
            always read to chosen visual ones.
        """
        raise NotImplementedError(f"{type(self).__name__} must define select(site)")

    def seen(self, site: LanguageAttentionSite) -> None:
        """Do what a call of several rows, which is dense, asks for; nothing by default."""

    def attend(self, site: LanguageAttentionSite) -> Tensor:
        if self.keys == 1.0 and isinstance(self.keys, float):
            return site.dense()
        if site.phase != "decode":
            self.seen(site)
            return site.dense()
        columns = self.select(site)
        return site.dense_step() if columns is None else site.select(columns)

    def sides(self, site: LanguageAttentionSite) -> Sides:
        """Divide the columns that the last row sees into those that are always read and the others.

        Computed once for all layers of a call that hold the same columns; the device is asked once.
        """
        key = f"sides {site.sequence}"
        if key not in site.memory:
            site.memory[key] = self._sides(site)
        found: Sides = site.memory[key]
        return found

    def _sides(self, site: LanguageAttentionSite) -> Sides:
        sees, token = site.sees(site.last_row)[:, 0], site.valid.cumsum(1)
        newest = token > token.gather(1, site.last_row + site.offset) - self.recent
        # A window that is full of tokens may have let go of the first one.
        first = (token == 1) & (token[:, -1:] < (site.window or torch.inf))
        always = ~site.visual | newest | first
        always, visual = sees & always, sees & ~always
        total = torch.stack([always.sum(1), visual.sum(1)])
        number = counts(self.keys, total[1])
        facts = torch.cat([total.amax(1), number.amax()[None], (total[1] - number).amax()[None]])
        width, others, most, left = facts.tolist()
        return Sides(listed(always, width), listed(visual, others), number, most, left == 0)

    def read(self, site: LanguageAttentionSite, chosen: Tensor) -> Tensor:
        """Add the columns that are always read to chosen visual ones (B, Hk or 1, n), -1 for none."""
        always = self.sides(site).always[:, None].expand(-1, site.k.shape[1], -1)
        return torch.cat([always, chosen.expand(-1, site.k.shape[1], -1)], 2)


@dataclass(frozen=True, kw_only=True)
class ReusingMethod(DecodeMethod):
    """Base of methods in which few layers attend to everything and choose, and the layers behind reuse their choice.

    The author writes :meth:`choose`. Choices are computed anew in every step, so that nothing is kept between steps.
    A layer that holds other columns than the one that chose (behind a cut, or with another sliding window) attends
    to everything, and chooses for the layers behind that are like it.

    Attributes (beside those of :class:`DecodeMethod`):
        layers: layers that choose; the first one that is not dense always does. None is the published ones, at the
            same share of the depth.
    """

    SHARES: ClassVar[tuple[float, ...]] = ()

    layers: tuple[int, ...] | None = None
    dense_layers: int | tuple[int, ...] = 2

    def validate(self) -> None:
        super().validate()
        if self.layers is not None:
            self._set("layers", check_layers(self.layers))

    def check(self, info: ModelInfo) -> None:
        super().check(info)
        dense = sorted(set(self.choosing(info)) - set(self.working_layers(info, "attention")))
        if dense:
            raise ValueError(f"layers {dense} cannot choose: they are in dense_layers")

    def choosing(self, info: ModelInfo) -> tuple[int, ...]:
        """Return the layers that choose, ascending."""
        depth, working = info.depth["attention"], self.working_layers(info, "attention")
        if self.layers is None:
            scaled = {round(share * depth) for share in self.SHARES} & set(working)
        else:
            scaled = set(fit_layers(self.layers, depth))
        return tuple(sorted({working[0], *scaled}))

    def choose(self, site: LanguageAttentionSite) -> Tensor:
        """Choose visual columns by ``site.last_attention()``: (B, Hk or 1, n) int64, -1 for none.

        Choose from ``self.sides(site)``.
        """
        raise NotImplementedError(f"{type(self).__name__} must define choose(site)")

    def select(self, site: LanguageAttentionSite) -> Tensor | None:
        chosen: dict[object, Tensor | None] = site.memory.setdefault("chosen", {})
        if site.layer in self.choosing(site.info):
            chosen.clear()
        if site.sequence in chosen:
            return chosen[site.sequence]
        everything = self.sides(site).all
        chosen[site.sequence] = None if everything else self.read(site, self.choose(site))
        return None


def listed(mask: Tensor, width: int) -> Tensor:
    """List the True places of each row of a mask (B, N), ascending, then -1: (B, width) int64."""
    place = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
    slot = torch.where(mask, mask.cumsum(1) - 1, width)
    out = place.new_full((mask.shape[0], width + 1), -1)
    return out.scatter(1, slot, torch.where(mask, place, -1))[:, :width]


def best_columns(scores: Tensor, columns: Tensor, number: Tensor, most: int) -> Tensor:
    """Choose the columns of highest score for each key head.

    Args:
        scores: (B, Hk, S) float32, none below 0; NaN counts as 0.
        columns: (B, N) int64, the columns to choose from, -1 for none.
        number: (B,) int64, how many are chosen, at most the sample's columns.
        most: the largest number.

    Returns:
        (B, Hk, most) int64, -1 first, then ascending. Ties go to the lower column on every device.
    """
    place = columns.clamp(min=0)[:, None].expand(-1, scores.shape[1], -1)
    # The bits of floats from 0 on are ordered as ints are. With the column in the lower half no two are equal.
    bits = scores.nan_to_num(0.0).contiguous().view(torch.int32).long().gather(2, place)
    low = torch.iinfo(torch.int32).max
    ranks = torch.where(columns[:, None] < 0, -1, bits << 32 | (low - place))
    best = ranks.topk(most, -1).values
    kept = (torch.arange(most, device=scores.device) < number[:, None])[:, None]
    return torch.where(kept, low - (best & low), -1).sort(-1).values


def last_query(site: LanguageAttentionSite) -> Tensor:
    """Return the query of each sample's last row, (B, H, D) float32."""
    return take_rows(site.q, site.last_row)[:, :, 0].float()


def recalled(site: LanguageAttentionSite) -> Tensor | None:
    """Return the columns that an earlier call has kept in ``site.state``, numbered as they are now.

    The state has ``columns`` (B, Hk, n) int64; ``since``, the length of the cache when they were chosen or last
    confirmed; and ``length``, that of the last call, which is set here. A full sliding window has let go of its oldest
    columns since.

    Returns:
        (B, Hk, n) int64, -1 for columns that are gone; None if nothing was kept, or if the cache was cropped to
        before the row that has chosen.
    """
    state, length = site.state, site.k.shape[2]
    if "columns" not in state:
        return None
    if site.window is not None and length >= site.window:
        gone = max(0, state["length"] - site.offset)
        state["columns"] = torch.where(state["columns"] < gone, -1, state["columns"] - gone)
        state["since"] -= gone
    state["length"] = length
    columns: Tensor = state["columns"]
    return None if state["since"] > site.offset else columns


def either(first: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Take columns (B, Hk, n) from ``a`` for the samples ``first`` (B,), else from ``b``; -1 fills the shorter."""
    width = max(a.shape[2], b.shape[2])
    a, b = (F.pad(x, (0, width - x.shape[2]), value=-1) for x in (a, b))
    return torch.where(first[:, None, None], a, b)


def paged(x: Tensor, page: int) -> Tensor:
    """Cut rows (B, N) into pages (B, ceil(N / page), page); the last one is filled with -1."""
    return F.pad(x, (0, -x.shape[1] % page), value=-1).unflatten(1, (-1, page))
