"""One call of a language model with visual tokens: what methods see, and how cuts are carried out."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vtr.core.language_site import Frames, VisualSpan
from vtr.core.method import Reduction
from vtr.core.site import QKV
from vtr.core.tokens import TokenMap
from vtr.core.trace import StageRecord
from vtr.core.wrapping import Entry
from vtr.kernels.precision import lowers
from vtr.vision.vlm.attention import project, watch
from vtr.vision.vlm.cache import Cuts, Group, cached, length_of
from vtr.vision.vlm.features import Grid
from vtr.vision.vlm.frames import KINDS
from vtr.vision.vlm.head import Purpose
from vtr.vision.vlm.marks import MarkedCache
from vtr.vision.vlm.recompute import chosen
from vtr.vision.vlm.rows import Seen
from vtr.vision.vlm.sequence import SequenceLayout, follow, positions_along, put, rows_of
from vtr.vision.vlm.visit import language_site

if TYPE_CHECKING:
    from vtr.core.kv_site import KVSite
    from vtr.vision.vlm.store import EntryStore
    from vtr.vision.vlm.stored import Stored
    from vtr.vision.vlm.uncached import Held
    from vtr.vision.vlm.wrapping import VLMWrapping


class PrefillRecord:
    """Record of the last prefill, for the loss and the report.

    Attributes:
        valid: (B, L) bool, the sequence as it came in.
        past: (B,) columns that the cache held before.
        entered: per layer, (B, L') bool of the tokens that entered it.
        halved: the same for the second half (MLP) of layers that were cut in the middle.
        held: per layer whose cache was freed of tokens, (B,) tokens of this call that it holds.
        stored: per layer in which a method chose the entries of the cache, the bytes that it held at the end.
        cache: what the layers of the cache held after the last call, if methods choose its entries.
        layout: the sequence at the end, None if nothing was cut.
        captures: what the towers did for it.
    """

    def __init__(self, call: LanguageCall) -> None:
        self.valid = call.valid
        self.captures = call.owner.captures
        self.past = call.columns_before(0).sum(1)
        self.entered: list[Tensor] = []
        self.halved: dict[int, Tensor] = {}
        self.held: dict[int, Tensor] = {}
        self.stored: dict[int, int] = {}
        self.cache: list[Stored] = []
        self.layout: SequenceLayout | None = None


class LanguageCall:
    """The state of one call of the language model: a prefill, a later turn, or a decoding step.

    Args:
        owner: the wrapping.
        past: columns in the first layer's cache.
        valid: (B, L) bool, False for padding.
        history: (B, given - L) bool or None: padding mask of the earlier columns as they were given.
        cuts: what the cache carries from earlier calls.
        kinds: (B, L) int8, 1 for tokens of images, 2 for those of videos, else 0; None if nothing can
            be cut.
        positions: (B, L), (3, B, L) or (4, B, L) int64 position ids as they were given.
    """

    def __init__(
        self,
        owner: VLMWrapping,
        past: int,
        valid: Tensor,
        history: Tensor | None,
        cuts: Cuts | None,
        kinds: Tensor | None,
        positions: Tensor,
        cache: Any,
    ) -> None:
        self.owner = owner
        self.past = past
        self.valid = valid
        self.history = history
        self.cuts = cuts
        self.positions = positions
        self.cache = self.given = cache
        self.visual = visual = None if kinds is None else kinds > 0
        self.layout = self.entered = SequenceLayout(valid, visual)
        self.segments: list[tuple[int, SequenceLayout]] = []
        # Of what entered layer 0, then of what left each layer.
        self.left: list[SequenceLayout] = []
        self.purpose, self.aligned = Purpose(), True
        self.held: Held | None = None
        # Of the visits so far, and those of an earlier run that are to be repeated.
        self.choices: dict[Any, Reduction | None] = {}
        self.repeats: dict[Any, Reduction | None] | None = None
        self.again = False  # a layer of the call runs again, in the backward pass
        self.inside = False  # a layer runs that will run again
        self.outside: int | None = None  # the layer before which cuts are done
        self.rope: tuple[Tensor, Tensor] | None = None
        # Of layers of several kinds: the masks that a prompt was given, and what layers of a kind are given now.
        self.masks: dict[str, Tensor | None] | None = None
        self.by_kind: dict[str, dict[str, Any]] = {}
        # The columns that layers of a kind attend to, for later layers that attend to their keys.
        self.shown: dict[str, tuple[Tensor, Tensor]] = {}
        self.synced: SequenceLayout | None = None
        self.override: dict[str, Any] | None = None
        self.seen: Seen | None = None
        self.last: PrefillRecord | None = None  # what a prefill did
        # For methods inside the attention: what is known of the columns, whether their images and frames are
        # asked for, and what enters the layer that runs.
        self.marks: MarkedCache | None = None
        self.placed = False
        self.hidden: Tensor | None = None
        self.normed: Tensor | None = None  # what enters its attention
        # Layers whose entries of the KV cache are chosen when the call ends.
        self.choosing: list[tuple[Entry, KVSite, EntryStore]] = []
        # Layers before which something changes in a decoding step; None in other calls: it may before any.
        self.stops: set[int] | None = None
        self.half: Tensor | None = None  # the residual of a layer that was cut in the middle
        self.full = valid.shape
        if kinds is not None and visual is not None:
            self.kinds = kinds.masked_fill(~valid, 0)
            slots = self.arrived = self.layout.slots
            self.rank = (valid.long().cumsum(1) - 1).clamp(min=0)
            self.entry = self.layout.valid_slots.sum(1)
            place = torch.arange(slots.shape[1], device=valid.device).expand_as(slots)
            kept = torch.where(self.layout.valid_slots, place, -1)
            self.map = TokenMap.keep(kept, slots.shape[1], self.layout.has_padding)
        self.memory: dict[Any, dict[Any, Any]] = {}
        self.casts = casts_of(valid.device)
        self.changed = False
        self._frames: dict[bool, Frames] = {}
        self._counts: list[list[int]] | None = None

    def counts(self, kind: str) -> list[int]:
        """Count the visual tokens of a modality in each sample; the device is asked once."""
        if self._counts is None:
            found = torch.stack([(self.kinds == number).sum(1) for number in KINDS.values()])
            self._counts = found.tolist()
        return self._counts[list(KINDS).index(kind)]

    # Facts of a call that are all on one device.
    _PLACED = (
        *("valid", "history", "positions", "visual", "kinds", "arrived", "rank", "entry", "map"),
        *(
            "layout",
            "entered",
            "synced",
            "segments",
            "left",
            "rope",
            "override",
            "masks",
            "by_kind",
            "shown",
            "memory",
            "_frames",
        ),
    )

    def to(self, device: torch.device) -> None:
        """Follow the hidden states: the layers of a model may be spread over several devices."""
        if device == self.valid.device:
            return
        # Layouts are compared with ``is``: one stays one.
        layouts: dict[int, tuple[SequenceLayout, SequenceLayout]] = {}

        def there(x: Any) -> Any:
            if isinstance(x, SequenceLayout):
                return layouts.setdefault(id(x), (x, x.to(device)))[1]
            if isinstance(x, (Tensor, TokenMap)):
                return x.to(device)
            if isinstance(x, Frames):
                frame, place, video = (t.to(device) for t in (x.frame, x.place, x.video))
                return Frames(frame, place, video, x.videos)
            if isinstance(x, dict):
                return {key: there(value) for key, value in x.items()}
            if type(x) in (tuple, list):
                return type(x)(map(there, x))
            if isinstance(x, tuple) and not isinstance(x, torch.Size):  # with names
                return type(x)(*map(there, x))
            return x

        for name in self._PLACED:
            if name in self.__dict__:
                setattr(self, name, there(getattr(self, name)))

    # ---- what earlier calls left ------------------------------------------------------------

    def shift(self, layer: int) -> Tensor | None:
        """(B,) by how much positions of this call move down in this layer because of earlier calls."""
        found = None if self.cuts is None else self.cuts.group(layer).shift
        return None if found is None else found.to(self.valid.device)

    def columns_before(self, layer: int) -> Tensor:
        """(B, past of this layer) bool: the cached columns that are tokens."""
        batch = self.valid.shape[0]
        if self.cuts is None:
            if self.history is not None:
                return self.history
            return torch.ones(batch, self.past, dtype=torch.bool, device=self.valid.device)
        group = self.cuts.group(layer)
        tail = self.cuts.after(self.past)
        if self.history is None:
            later = torch.ones(batch, tail, dtype=torch.bool, device=self.valid.device)
        else:
            later = self.history[:, self.cuts.length :]
        return torch.cat([group.mask.to(later.device), later], 1)

    @property
    def offset(self) -> int:
        """The columns before this call, as they were given."""
        return self.past + (0 if self.cuts is None else self.cuts.offset)

    def columns(self, layer: int, layout: SequenceLayout | None = None) -> Tensor:
        """(B, past of this layer + L) int64: where its columns were in the sequence as it was given."""
        now = (self.layout if layout is None else layout).index + self.offset
        if self.cuts is None:
            before = torch.arange(self.past, device=now.device).expand(now.shape[0], -1)
            return torch.cat([before, now], 1)
        tail = torch.arange(self.cuts.length, self.offset, device=now.device)
        group = self.cuts.group(layer).columns.to(now.device)
        return torch.cat([group, tail.expand(now.shape[0], -1), now], 1)

    def held_as(self, layer: int) -> tuple[int, int]:
        """Tell layers whose columns are other tokens apart: by the cuts of earlier calls and of this one."""
        return 0 if self.cuts is None else self.cuts.group(layer).first, len(self.segments)

    def boundaries(self) -> set[int]:
        """Layers >= 1 before which masks change because of earlier calls."""
        return set() if self.cuts is None else {g.first for g in self.cuts.groups[1:]}

    def moved(self, layer: int) -> Tensor:
        """Position ids of the tokens in this layer."""
        layout, out = self.layout, self.positions
        if self.changed:
            out = positions_along(out, layout.index, layout.valid)
        shift = self.shift(layer)
        if layout.adjust is not None:
            out = out - layout.adjust
        if shift is not None:
            out = out - shift[:, None]
        return out.clamp(min=0)

    def moves(self, layer: int) -> bool:
        """Tell whether positions in this layer differ from those that were given."""
        return self.layout.adjust is not None or self.shift(layer) is not None

    def mask(self, layer: int) -> Tensor:
        """(B, past of this layer + L) int64 padding mask."""
        return torch.cat([self.columns_before(layer), self.layout.valid], 1).long()

    def record(self) -> Cuts | None:
        """The record that the cache must carry from now on; None if no call has cut anything."""
        if not self.changed:
            return self.cuts
        length = self.valid.shape[1] + self.offset
        groups = []
        for first in sorted({0, *self.boundaries(), *(layer for layer, _ in self.segments)}):
            now = [self.entered, *(lay for layer, lay in self.segments if layer <= first)][-1]
            shift = self.shift(first)
            groups.append(
                Group(
                    first,
                    torch.cat([self.columns_before(first), now.valid], 1),
                    self.columns(first, now),
                    now.tail if shift is None else shift if now.tail is None else now.tail + shift,
                )
            )
        return Cuts(groups, length, self.owner.counted)

    def frames(self, joined: bool = False) -> Frames:
        """Frames and places of the visual tokens of the prompt."""
        if joined not in self._frames:
            self._frames[joined] = self.owner.captures.frames(self, joined)
        return self._frames[joined]

    def images(self) -> list[list[tuple[int, int, Grid]]]:
        """Per sample its images: start and length among the visual tokens of the prompt, and grid."""
        return [[(s.start, s.length, grid_of(s)) for s in spans] for spans in self.frames().videos]

    def grid(self) -> Grid:
        """The one grid of prompts that have one image each, all of a size."""
        grids = {tuple(grid for _, _, grid in images) for images in self.images()}
        only = next(iter(grids))
        return only[0] if len(grids) == 1 and len(only) == 1 else None

    # ---- methods ----------------------------------------------------------------------------

    def visit(self, entry: Entry, name: str, layer: int, place: str, hidden: Tensor) -> Tensor:
        """Call a method; returns the hidden states, shortened if it cuts."""
        key = (self.owner.entries.index(entry), name, layer, place)
        if self.repeats is not None:
            reduction = self.repeats[key]
        else:

            def choose(hidden: Tensor) -> Reduction | None:
                site = language_site(self, entry, name, layer, place, hidden)
                with self.casting(False):  # scores are float32: autocast would round their products
                    return entry.token_method.reduce(site)

            inside = self.inside
            reduction = chosen(choose, hidden, entry.method.name) if inside else choose(hidden)
            self.choices[key] = reduction
        return hidden if reduction is None else self.commit(entry, name, layer, hidden, reduction)

    def casting(self, on: bool) -> AbstractContextManager[Any]:
        """``torch.autocast`` as the model runs under it, or without it; nothing if it does not."""
        if self.casts is None:
            return nullcontext()
        return torch.autocast(self.valid.device.type, self.casts, enabled=on)

    def project(
        self, where: Seen, tokens: Tensor, rope: tuple[Tensor, Tensor], which: Sequence[str]
    ) -> QKV:
        """q, k, v of tokens (B, R, C) that enter a layer, under the model's autocast."""
        owner, layer = self.owner, self.owner.layers[where.layer]
        with self.casting(True):
            if owner.watches:
                return watch(owner.lm, layer, tokens, rope)
            return project(layer, tokens, rope, which)

    def commit(
        self, entry: Entry, name: str, layer: int, hidden: Tensor, reduction: Reduction
    ) -> Tensor:
        """Carry out a cut: new layout, new hidden states (B, L', C)."""
        step = reduction.map
        layout = self.layout
        if step is None:
            if reduction.tokens is None:
                return hidden
            return put(hidden, layout.slots, reduction.tokens)
        if reduction.absolute:
            raise ValueError(
                f"{entry.method.name} returns maps from the input, which only encoders take"
            )
        if step.n_in != layout.slots.shape[1] or step.batch != layout.slots.shape[0]:
            raise RuntimeError(
                f"{entry.method.name} returned {step!r} for {layout.slots.shape[1]} tokens"
            )
        if reduction.tokens is not None or reduction.weights is not None:
            values = reduction.tokens
            if values is None:
                values = step.merge(
                    rows_of(hidden, layout.slots), reduction.weights, reduction.normalize,
                    reduction.keep_norm,
                )  # fmt: skip
            taken = step.kept.clamp(min=0)
            slots = layout.slots.gather(1, taken).masked_fill(~step.valid, -1)
            hidden = put(hidden, slots, values)
        compact = self.owner.compact(entry, name)
        self.layout, index, valid = layout.cut(step.kept, self.rank, compact)
        before = self.map
        self.map = before.then(step)
        self.changed = True
        if not self.again:
            self._record(entry, name, layer, step, before)
        if isinstance(self.rope, Tensor):
            self.rope = follow(self.rope, index, valid, 1)
        elif self.rope is not None:
            cos, sin = self.rope
            self.rope = (follow(cos, index, valid, 1), follow(sin, index, valid))
        return follow(hidden, index, valid)

    def _record(
        self, entry: Entry, name: str, layer: int, step: TokenMap, before: TokenMap
    ) -> None:
        self.owner.tracing.stages.append(
            StageRecord(
                name,
                layer,
                entry.method.name,
                before.n_out,
                step.n_out,
                step,
                self.map,
                self.grid(),
                tuple(i[0][2] if len(i) == 1 else None for i in self.images()),
                self.frames(bool(entry.options.get("video"))),
            )
        )

    def repeat(self) -> LanguageCall:
        """The call as it is now, for a layer that runs again: methods that cut are not asked anew."""
        twin = copy.copy(self)
        twin.again, twin.inside = True, False
        twin.repeats = self.choices if self.repeats is None else self.repeats
        twin.memory, twin._frames, twin.seen, twin.cache = {}, {}, None, None
        twin.hidden = None
        # A method is asked again inside of attention: it must not find what it kept in the first run.
        twin.marks = None if self.marks is None else MarkedCache()
        twin.segments, twin.left = list(self.segments), list(self.left)
        return twin

    def keys(self, where: Seen) -> Tensor:
        """(B, Hk, past + L, D): all keys that a layer sees, from the cache if it has them."""
        layer = where.layer
        past = length_of(self.cache, layer)
        if where.done:
            found = cached(self.cache, layer, past)
            if found is not None and past >= where.hidden.shape[1]:
                return found[0]
        _, k, _ = self.project(where, where.hidden, where.rope, ("k",))
        earlier = 0 if self.cache is None else past - (where.hidden.shape[1] if where.done else 0)
        if earlier > 0:
            found = cached(self.cache, layer, earlier)
            if found is None:
                raise RuntimeError(
                    f"{type(self.cache).__name__} does not show its keys: text attention over an "
                    "earlier turn needs a dynamic or static cache"
                )
            k = torch.cat([found[0].to(k), k], 2)
        return k


def casts_of(device: torch.device) -> torch.dtype | None:
    """The dtype that ``torch.autocast`` computes in on a device; None if it is off."""
    return torch.get_autocast_dtype(device.type) if lowers(device) else None


def grid_of(span: VisualSpan) -> Grid:
    """(rows, columns), (frames, rows, columns), or None with separators between or after the frames."""
    if span.grid is None or span.frames * span.grid[0] * span.grid[1] != span.length:
        return None
    return span.grid if span.frames == 1 else (span.frames, *span.grid)
