"""The site ``kv`` of a language model: the entries of one layer's KV cache, for methods."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vtr.core.budget import Keep, counts
from vtr.core.language_attention import Marks, take_rows
from vtr.core.site import ModelInfo
from vtr.kernels import attention_rows

_BYTES = 1 << 28  # of attention rows in float32 that are computed at a time


class Change(NamedTuple):
    """The decision of a method about the entries of one layer.

    Attributes:
        kept: (B, Hk, K) bool, the entries that stay.
        k, v: (B, Hk, K, D) what the entries that stay hold from now on (merging); None for what they hold.
        bits: (B, Hk, K) int64, the bits with which an entry that stays is stored: 2, 4, 8, or 16 and more for
            the model's dtype. None leaves each as it is stored.
        aside: (B, Hk, K) bool, entries that are copied to CPU memory, from where :meth:`KVMethod.recall` takes
            them instead of others of them. None for none.
    """

    kept: Tensor
    k: Tensor | None = None
    v: Tensor | None = None
    bits: Tensor | None = None
    aside: Tensor | None = None


class Here(NamedTuple):
    """The visual tokens of a call among the columns of a layer.

    Attributes:
        token: (B, S) int64, the index of each among the visual tokens of the prompt as it came in, -1 for
            others.
        left: (B, N) bool, which of the N tokens are left, in the layer that runs or at the end of the call.
    """

    token: Tensor
    left: Tensor


class KVSite:
    """The entries of one layer's KV cache in one call: those that were held, and those of the call.

    An entry is a key and a value of one KV head. KV heads may hold entries of different tokens, and different
    numbers of them: K is the largest number, and other heads have empty places. Query head ``h`` reads KV
    head ``h // (H // Hk)``.

    Attributes:
        site: ``"kv"``.
        info: the model.
        layer, layers: 0-based number of the layer, and how many there are.
        phase: ``"prefill"`` (nothing was held), ``"turn"`` (a later call with several rows), or ``"decode"``
            (one row).
        training: whether the model is in training mode.
        q: (B, H, L, D) rotated queries of this call; None at the end of the call.
        scale: factor of the scores.
        hidden: (B, L, C) what enters the attention module, behind the layer's norm, for methods that need the
            signal ``hidden``; else None.
        fresh: columns that came since entries were last chosen.
        visited: whether this call brought visual tokens.
        entries: name to (B, Hk, K, ...), what a method notes of each entry: it is kept with the cache, and
            follows evictions, beams and crops. Entries of this call have zeros.
        state: dict that is kept with the cache; tensors in it have the batch first, and follow its rows.
        memory: dict of this method for this call, shared by its layers.
        notes: dict that ends in ``trace.notes["kv"][layer]``.
        aside: what is noted of the entries in CPU memory, as in ``entries``; None without such.
    """

    site = "kv"

    def __init__(
        self,
        *,
        info: ModelInfo,
        layer: int,
        layers: int,
        phase: str,
        training: bool,
        q: Tensor | None,
        k: Tensor | None = None,
        v: Tensor | None = None,
        read: Callable[[], tuple[Tensor, Tensor]] | None = None,
        scale: float,
        columns: Callable[[], Tensor],
        tokens: Tensor,
        rows: int,
        prompt: int,
        marks: Callable[[bool], Marks],
        bits: Callable[[], Tensor],
        fresh: int,
        visited: bool,
        entries: dict[str, Tensor],
        state: dict[str, Any],
        memory: dict[str, Any],
        notes: dict[str, Any],
        hidden: Tensor | None = None,
        visuals: Callable[[], Here] | None = None,
        aside: dict[str, Tensor] | None = None,
        known: Marks | None = None,
        sees_all: bool = False,
    ) -> None:
        self.info, self.layer, self.layers, self.phase = info, layer, layers, phase
        self.training, self.q, self.scale = training, q, scale
        self._given, self._read = (k, v), read
        self.fresh, self.visited = fresh, visited
        self._columns, self._bits = columns, bits
        self.entries, self.state, self.memory, self.notes = entries, state, memory, notes
        self.hidden, self.aside = hidden, aside
        self._visuals = visuals if visuals is not None else self._nothing_came
        self._known, self._sees_all = known, sees_all
        self._tokens, self._rows, self._prompt = tokens, rows, prompt
        self._marks = marks
        self._found: dict[bool, Marks] = {}

    def _nothing_came(self) -> Here:
        """The visual tokens of a call that brought none."""
        none = torch.full_like(self._tokens, -1, dtype=torch.int64)
        return Here(none, torch.zeros_like(self._tokens[:, :1]))

    # ---- entries ----------------------------------------------------------------------------

    @functools.cached_property
    def _entries(self) -> tuple[Tensor, Tensor]:
        k, v = self._given
        if k is not None and v is not None:
            return k, v
        assert self._read is not None, "give k and v, or read"
        return self._read()

    @property
    def k(self) -> Tensor:
        """(B, Hk, K, D) keys, rotated, in the model's dtype; packed ones are unpacked when they are asked for."""
        return self._entries[0]

    @property
    def v(self) -> Tensor:
        """(B, Hk, K, D) values, as :attr:`k`."""
        return self._entries[1]

    @functools.cached_property
    def columns(self) -> Tensor:
        """(B, Hk, K) int64, the place of each entry in the sequence, padding counted; -1 for an empty place."""
        return self._columns()

    @functools.cached_property
    def bits(self) -> Tensor:
        """(B, Hk, K) int64, the bits with which each entry is stored."""
        return self._bits()

    @property
    def length(self) -> int:
        """The number of columns of the sequence."""
        return self._tokens.shape[1]

    def marks(self, places: bool = False) -> Marks:
        """Return what is known of each column of the sequence; without ``places`` image and frame need not be."""
        if places not in self._found:
            self._found[places] = self._marks(places)
        return self._found[places]

    def at_entries(self, of_columns: Tensor, nothing: Any = 0) -> Tensor:
        """Look values of columns (B, S) up for the entries, (B, Hk, K); ``nothing`` for empty places."""
        index, empty = self._places
        found = of_columns.gather(1, index).view(self.columns.shape)
        return found.masked_fill(empty, nothing)

    @functools.cached_property
    def _places(self) -> tuple[Tensor, Tensor]:
        """(B, Hk * K) columns with 0 for empty places, and (B, Hk, K) bool, True for these."""
        return self.columns.clamp(min=0).flatten(1), self.columns < 0

    @functools.cached_property
    def valid(self) -> Tensor:
        """(B, Hk, K) bool, True for entries of tokens, False for padding and empty places."""
        return self.at_entries(self._tokens)

    @property
    def visual(self) -> Tensor:
        """(B, Hk, K) bool, True for visual tokens."""
        return self._marked("kind", False, 0) > 0

    @property
    def text(self) -> Tensor:
        """(B, Hk, K) bool, True for text, generated tokens among it."""
        return self.valid & ~self.visual

    @property
    def image(self) -> Tensor:
        """(B, Hk, K) int64: the image or video of each visual entry, counted through the conversation, -1 for
        others."""
        return self._marked("image", True, -1)

    @property
    def frame(self) -> Tensor:
        """(B, Hk, K) int64: the frame of each visual entry, counted through the conversation, -1 for others
        and for separators. A still image is one frame."""
        return self._marked("frame", True, -1)

    def _marked(self, name: str, places: bool, nothing: int) -> Tensor:
        """Look a mark up for the entries. Of columns that were numbered anew, each entry has its own."""
        found = self.at_entries(getattr(self.marks(places), name), nothing)
        if self._known is None:
            return found
        own: Tensor = getattr(self._known, name)
        index = self.columns.clamp(0, own.shape[2] - 1)
        old = (self.columns >= 0) & (self.columns < own.shape[2])
        return torch.where(old, own.gather(2, index), found)

    @property
    def token(self) -> Tensor:
        """(B, Hk, K) int64: the index of each visual entry of this call among the visual tokens of the prompt as
        it came in; -1 for others."""
        return self.at_entries(self._visuals().token, -1)

    @property
    def left(self) -> Tensor:
        """(B, Hk, K) bool, True for visual entries of this call whose tokens are left: in this layer, or at the
        end of the call in the last one."""
        token, left = self.token, self._visuals().left
        found = left.gather(1, token.clamp(min=0).flatten(1)).view_as(token)
        return found & (token >= 0)

    @property
    def here(self) -> Tensor:
        """(B, Hk, K) bool, True for entries of this call."""
        return self.columns >= self.length - self._rows

    @property
    def generated(self) -> Tensor:
        """(B, Hk, K) bool, True for tokens that came after the last prompt with images or videos."""
        return self.valid & (self.columns >= self._prompt)

    @property
    def order(self) -> Tensor:
        """(B, Hk, K) int64: how many tokens of the sample come before each entry, dropped ones counted."""
        return self.at_entries(self._tokens.cumsum(1) - self._tokens.long())

    @property
    def age(self) -> Tensor:
        """(B, Hk, K) int64: how many tokens of the sample came after each entry, dropped ones counted."""
        tokens = self._tokens.long()
        return self.at_entries(tokens.sum(1, keepdim=True) - tokens.cumsum(1))

    @property
    def prompt_tokens(self) -> Tensor:
        """(B,) int64: tokens up to the end of the last prompt with images or videos."""
        return self._tokens[:, : self._prompt].sum(1)

    def count(self, keep: Keep) -> Tensor:
        """Count the visual tokens that a budget allows each sample, (B,) int64.

        A float is a share of all visual tokens of the conversation; an int a number per image or video.
        """
        if isinstance(keep, float):
            return counts(keep, (self.marks().kind > 0).sum(1))
        image = self.marks(True).image
        most = int(image.max()) + 1 if image.numel() else 0
        every = image[..., None] == torch.arange(most, device=image.device)
        return every.sum(1).clamp(max=keep).sum(1)

    # ---- rows -------------------------------------------------------------------------------

    @property
    def row_valid(self) -> Tensor:
        """(B, L) bool, True for rows of this call that are tokens."""
        return self._tokens[:, self.length - self._rows :]

    def last_rows(self, number: int) -> Tensor:
        """Find the last ``number`` tokens of each sample among the rows of this call, (B, R) int64 ascending
        with R the smaller of ``number`` and L; -1 for none."""
        valid, rows = self.row_valid, self._rows
        behind = valid.int().flip(1).cumsum(1).flip(1)  # tokens from a row on
        index = torch.arange(rows, device=valid.device)
        chosen = torch.where(valid & (behind <= number), index, -1)
        return chosen.sort(1).values[:, rows - min(number, rows) :]

    def sees(self, rows: Tensor) -> Tensor:
        """Tell which entries rows may see: (B, R) int64 to (B, Hk, R, K) bool. Row -1 sees none."""
        at = torch.where(rows < 0, -1, rows + self.length - self._rows)
        return (self.columns[:, :, None] <= at[:, None, :, None]) & self.valid[:, :, None]

    def attention_rows(self, rows: Tensor) -> Tensor:
        """Compute attention of rows (B, R) int64 over the entries, (B, H, R, K) float32; zeros for row -1."""
        assert self.q is not None, "queries are gone at the end of a call: use watch(site)"
        if self._sees_all:  # the one row of the call, and no mask to build
            return attention_rows(self.q, self.k.to(self.q.dtype), scale=self.scale)
        q = take_rows(self.q, rows)
        sees = self.sees(rows).repeat_interleave(q.shape[1] // self.k.shape[1], 1)
        return attention_rows(q, self.k.to(q.dtype), bias=sees, scale=self.scale)

    def column_sums(
        self, rows: Tensor | None = None, *, decay: float | None = None, normalised: bool = False
    ) -> Tensor:
        """Sum attention over rows, and over the query heads of each KV head, (B, Hk, K) float32.

        Rows are computed a part at a time: no map is held.

        Args:
            rows: (B, R) int64 rows of this call, ascending, -1 for none; None for all.
            decay: a row counts ``decay ** n`` if n of the rows come after it; None for 1.
            normalised: divide by the number of these rows that see the entry, with ``decay`` by the sum of
                what they count.
        """
        if rows is None:
            index = torch.arange(self._rows, device=self.columns.device)
            rows = torch.where(self.row_valid, index, -1)
        weight = (rows >= 0).float()
        if decay is not None:
            after = (rows >= 0).flip(1).cumsum(1).flip(1) - 1
            weight = weight * torch.as_tensor(decay, device=rows.device) ** after.clamp(min=0)
        batch, heads, number = self.columns.shape
        assert self.q is not None, "queries are gone at the end of a call: use watch(site)"
        step = max(1, _BYTES // (4 * batch * self.q.shape[1] * number))
        total = torch.zeros(batch, heads, number, device=self.columns.device)
        seen = torch.zeros_like(total)
        for part, share in zip(rows.split(step, 1), weight.split(step, 1), strict=True):
            grouped = self.attention_rows(part).unflatten(1, (heads, -1))
            total += (grouped * share[:, None, None, :, None]).sum((2, 3))
            if normalised:
                seen += (self.sees(part) * share[:, None, :, None]).sum(2)
        return total / seen.clamp(min=torch.finfo(seen.dtype).tiny) if normalised else total
