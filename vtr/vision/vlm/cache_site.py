"""The site ``cache``: keys and values of visual tokens, freed after the prompt, or followed by the newest
token while the answer is written.

``Stage("cache", k, place)``, visited when the prompt is done:

- ``"from"``: layers k and later lose what the returned map drops.
- ``"before"``: layers before k lose it, and what was cut in later layers already (an identity map frees
  just that).
- ``"follow"``: as ``"from"``, but what goes is kept in CPU memory, and the method is visited again before
  layer k in every decoding step. There it may choose other tokens, as many as before: a map from all tokens
  of the first visit (``Reduction(..., absolute=True)``), or None.

The site is a :class:`vtr.core.language_site.CacheSite`. Layers then hold caches of different lengths, which
:mod:`vtr.vision.vlm.cache` keeps account of. A second prompt on the same cache (a later turn) may free its
own tokens; those of the first stay as they were last.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vtr.compat.transformers import cache_layer
from vtr.core.language_site import CacheSite
from vtr.core.tokens import TokenMap, take
from vtr.core.trace import StageRecord
from vtr.core.wrapping import Bound, Entry
from vtr.errors import UnsupportedMethodError
from vtr.kernels import attention_rows
from vtr.vision.vlm.attention import project
from vtr.vision.vlm.cache import FOLLOW, Cuts, Follow, Group, cached, remember
from vtr.vision.vlm.sequence import SequenceLayout, mark, members

if TYPE_CHECKING:
    from vtr.vision.vlm.call import LanguageCall
    from vtr.vision.vlm.wrapping import VLMWrapping

ATTRIBUTE = FOLLOW
STATE = -1  # of a call's memories, the one that stays with the cache


class CacheSession:
    """Visits methods at caches, and frees what they drop."""

    def __init__(self, owner: VLMWrapping) -> None:
        self.owner = owner
        self.visits: list[tuple[Entry, int, str]] = []

    def install(self) -> None:
        owner = self.owner
        self.visits = [(e, s.layer, s.place) for e, s in owner.stages() if s.site == "cache"]
        if len(self.visits) > 1:
            names = ", ".join(entry.method.name for entry, _, _ in self.visits)
            raise ValueError(f"a KV cache can be visited once per prompt, got visits of {names}")
        for entry, layer, place in self.visits:
            if "newest_attention" in entry.method.requirements(owner.info).get("cache", ()):
                look = Bound(self, "see", layer - 1)
                owner.hook(
                    owner.layers[layer - 1].register_forward_pre_hook(look, with_kwargs=True)
                )
            if place == "follow":
                again = Bound(self, "again", entry)
                owner.hook(owner.layers[layer].register_forward_pre_hook(again, with_kwargs=True))

    def see(self, i: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Make the newest token's query in layer ``i``."""
        call = self.owner.language.running()
        if call is None or call.cache is None:
            return
        if call.visual is None and _follow_of(call.cache) is None:
            return
        hidden = args[0] if args else kwargs["hidden_states"]
        # The layers of a model may be spread over several devices.
        device = next(module.parameters(), hidden).device
        hidden = hidden if device.type == "meta" else hidden.to(device)
        valid = call.layout.valid.to(hidden.device)
        index = torch.arange(valid.shape[1], device=valid.device)
        last = torch.where(valid, index, 0).amax(1, keepdim=True)
        cos, sin = (
            take(x.to(hidden.device).expand(hidden.shape[0], -1, -1), last)
            for x in kwargs["position_embeddings"]
        )
        q, _, _ = project(self.owner.layers[i], take(hidden, last), (cos, sin), ("q",))
        call.newest = q, call.layout

    def newest(self, call: LanguageCall, layer: int, columns: Tensor) -> Tensor:
        """(B, N) attention of the newest token to cached ``columns`` (B, N) of a layer; -1 gives 0."""
        assert call.newest is not None
        query, layout = call.newest
        device = query.device
        mask = torch.cat([call.columns_before(layer).to(device), layout.valid.to(device)], 1)
        found = cached(call.cache, layer, mask.shape[1])
        if found is None:
            raise _refused(call.cache)
        keys = found[0].to(query)
        scale = self.owner.scale(layer)
        weights = attention_rows(query, keys, scale=scale, bias=mask[:, None, None])
        row = weights[:, :, 0].mean(1).to(columns.device).gather(1, columns.clamp(min=0))
        return row.masked_fill(columns < 0, 0)

    # ---- after the prompt -------------------------------------------------------------------

    def after(self, call: LanguageCall) -> None:
        """The prompt is done, and the cache carries the record of its cuts."""
        if call.visual is None or call.cache is None or not self.visits:
            return
        for entry, layer, place in self.visits:
            reduction = entry.token_method.reduce(self._site(call, entry, layer))
            if reduction is not None and reduction.map is not None:
                self._free(call, entry, layer, place, reduction.map)

    def _site(self, call: LanguageCall, entry: Entry, layer: int) -> CacheSite:
        look = self._columns(call, layer - 1)
        return self._make(
            call, entry, layer, call.map, look, 0, None, call.memory.setdefault(STATE, {})
        )

    def _make(
        self,
        call: LanguageCall,
        entry: Entry,
        layer: int,
        now: TokenMap,
        look: Tensor,
        step: int,
        kept: Tensor | None,
        state: dict[str, Any],
    ) -> CacheSite:
        owner = self.owner
        batch, device = look.shape[0], look.device
        nothing = torch.zeros(batch, 0, dtype=torch.bool, device=device)
        key = owner.entries.index(entry)
        return CacheSite(
            step=step,
            kept=kept,
            state=state,
            newest=lambda: self.newest(call, layer - 1, look),
            site="cache",
            layer=layer,
            info=owner.info,
            hidden=torch.zeros(*look.shape, 0, device=device),
            map=now,
            valid=look >= 0 if now.has_padding else None,
            memory=call.memory.setdefault(key, {}),
            training=owner.root.training,
            modules=None,
            notes=owner.tracing.notes,
            entry=None if step else call.entry,
            text=torch.zeros(batch, 0, 0, device=device),
            text_valid=nothing,
            text_after=nothing,
            images=[] if step else call.images(),
            frames=Known(call, bool(entry.options.get("video")), step),
            spread=_nothing_to_spread,
            rows=None,
        )

    def _layout(self, call: LanguageCall, layer: int) -> SequenceLayout:
        """The sequence of this call as the layer had it."""
        return [call.entered, *(lay for first, lay in call.segments if first <= layer)][-1]

    def _columns(self, call: LanguageCall, layer: int) -> Tensor:
        """(B, N) where the tokens that are left at the end are in a layer's cache."""
        layout = self._layout(call, layer)
        where = layout.places(call.valid.shape[1])
        kept = call.map.kept
        position = call.arrived.gather(1, kept.clamp(min=0))
        columns = where.gather(1, position).masked_fill(kept < 0, -1)
        return torch.where(columns < 0, -1, columns + call.columns_before(layer).shape[1])

    def _free(
        self, call: LanguageCall, entry: Entry, layer: int, place: str, step: TokenMap
    ) -> None:
        cache, depth = call.cache, len(self.owner.layers)
        first, stop = (0, layer) if place == "before" else (layer, depth)
        for i in range(first, stop):
            if cache_layer(cache, i, growing=True) is None:
                raise _refused(cache)
        total = call.map.then(step)
        length = call.valid.shape[1]
        follow = None
        if place == "follow":
            look = self._columns(call, layer - 1)
            follow = Follow(entry.method, layer, call.map, look, step.kept)
            follow.state = call.memory.pop(STATE, {})
        kept = total.kept
        position = call.arrived.gather(1, kept.clamp(min=0)).masked_fill(kept < 0, -1)
        stays = mark(position, length) | ~mark(call.arrived, length)
        old = call.record(True)
        assert old is not None
        bounds = {first, *(g.first for g in old.groups)} | ({stop} if stop < depth else set())
        groups, ends = [], [*sorted(bounds)[1:], depth]
        for begin, end in zip(sorted(bounds), ends, strict=True):
            group = old.group(begin)
            if not first <= begin < stop:
                groups.append(Group(begin, group.mask, group.shift))
                continue
            layout = self._layout(call, begin)
            before = call.columns_before(begin)
            here = stays.gather(1, layout.index)
            columns = members(group.mask & torch.cat([torch.ones_like(before), here], 1))
            groups.append(Group(begin, columns >= 0, group.shift))
            candidates = self._columns(call, begin)
            if follow is not None:
                chosen = candidates.gather(1, step.kept.clamp(min=0))
                place_of = torch.searchsorted(_ascending(columns), chosen.contiguous())
                follow.held[begin] = place_of.masked_fill(step.kept < 0, -1)
            for i in range(begin, end):
                _shorten(
                    cache.layers[i], columns, candidates if follow is not None else None, follow
                )
            if call.last is not None:
                number = (columns >= 0).sum(1) - before.sum(1)
                for i in range(begin, end):
                    call.last.held[i] = number
        remember(cache, Cuts(groups, old.length))
        if follow is not None:
            cache.__dict__[ATTRIBUTE] = follow
        if place != "before":
            self._record(call, entry, layer, step, total)

    def _record(
        self, call: LanguageCall, entry: Entry, layer: int, step: TokenMap, total: TokenMap
    ) -> None:
        self.owner.tracing.stages.append(
            StageRecord(
                "cache",
                layer,
                entry.method.name,
                step.n_in,
                step.n_out,
                step,
                total,
                call.grid(),
                tuple(i[0][2] if len(i) == 1 else None for i in call.images()),
                call.frames(bool(entry.options.get("video"))),
            )
        )

    # ---- in a decoding step -----------------------------------------------------------------

    def again(
        self, entry: Entry, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Before the layer from which tokens are chosen."""
        call = self.owner.language.running()
        if call is None or call.visual is not None:
            return
        follow = _follow_of(call.cache)
        if follow is None or follow.method != entry.method:
            return
        if follow.look.shape[0] != call.valid.shape[0]:
            raise RuntimeError(
                f"the KV cache was filled for {follow.look.shape[0]} sequences and is used for "
                f"{call.valid.shape[0]}: {entry.method.name} cannot choose again for repeated samples; "
                "repeat them before the prompt, or let it choose once"
            )
        follow.step += 1
        site = self._make(
            call,
            entry,
            follow.first,
            follow.map,
            follow.look,
            follow.step,
            follow.kept,
            follow.state,
        )
        reduction = entry.token_method.reduce(site)
        if reduction is not None and reduction.map is not None:
            exchange(call.cache, follow, reduction.map.kept)


class Known:
    """Frames after the prompt; a decoding step has none."""

    def __init__(self, call: LanguageCall, joined: bool, step: int) -> None:
        self.call, self.joined, self.step = call, joined, step

    def __call__(self) -> Any:
        if self.step:
            raise RuntimeError("frames are known at step 0 only: remember them in site.state")
        return self.call.frames(self.joined)


def exchange(cache: Any, follow: Follow, kept: Tensor) -> None:
    """Put other tokens in the columns of the chosen ones: ``kept`` (B, K), as many per row as before."""
    if not torch.equal(kept >= 0, follow.kept >= 0):
        raise RuntimeError(
            f"{follow.method.name} chose another number of tokens in a decoding step"
        )
    changed = (kept != follow.kept).any(1)
    if not bool(changed.any()):
        return
    row, slot = ((kept >= 0) & changed[:, None]).nonzero(as_tuple=True)
    source, origin = kept[row, slot].cpu(), follow.rows[row.cpu()]
    firsts = sorted(follow.held)
    for i, (keys, values) in enumerate(zip(follow.keys, follow.values, strict=True), follow.first):
        layer = cache.layers[i]
        column = follow.held[[f for f in firsts if f <= i][-1]][row, slot]
        for name, stored in (("keys", keys), ("values", values)):
            held = getattr(layer, name)
            if held.is_inference() and not torch.is_inference_mode_enabled():
                held = held.clone()  # made in inference mode: it can only be written to there
                setattr(layer, name, held)
            chosen = stored[origin, :, source].to(held.device, non_blocking=True)
            held[row.to(held.device), :, column.to(held.device)] = chosen
    follow.kept = kept


def _shorten(layer: Any, columns: Tensor, candidates: Tensor | None, follow: Follow | None) -> None:
    """Leave the ``columns`` (B, n) of a layer's cache; -1 (padding) leaves any."""
    for name in ("keys", "values"):
        held = getattr(layer, name)
        if follow is not None and candidates is not None:
            stored = _gather(held, candidates)
            target = torch.empty(
                stored.shape, dtype=stored.dtype, pin_memory=stored.is_cuda, device="cpu"
            )
            getattr(follow, name).append(target.copy_(stored))
        setattr(layer, name, _gather(held, columns))


def _gather(x: Tensor, columns: Tensor) -> Tensor:
    """Columns (B, n) of x (B, Hk, S, D) -> (B, Hk, n, D), a new tensor."""
    index = columns.clamp(min=0).to(x.device)[:, None, :, None]
    return x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3]))


def _ascending(columns: Tensor) -> Tensor:
    """Columns with their padding at the end made larger than all others."""
    return torch.where(columns < 0, torch.iinfo(torch.long).max, columns).contiguous()


def _refused(cache: Any) -> UnsupportedMethodError:
    return UnsupportedMethodError(
        f"keys and values of a {type(cache).__name__} cannot be freed or chosen: its layers have a fixed "
        "size or another form. Use a dynamic cache (generate's default), or a method without a cache site"
    )


def _follow_of(cache: Any) -> Follow | None:
    found = None if cache is None else cache.__dict__.get(ATTRIBUTE)
    return found if isinstance(found, Follow) else None


def _nothing_to_spread(scores: Tensor, newline: float | None) -> Tensor:
    raise RuntimeError(
        "scores of the encoder can be spread before the prompt is done, not at a cache"
    )
