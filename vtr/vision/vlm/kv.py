"""Methods that decide what the KV cache of a language model holds (the site ``kv``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.compat.transformers import SCALING, WINDOW
from vtr.core.kv_site import Here, KVSite
from vtr.core.packed_attention import PlainEntries, attend_parts
from vtr.core.packed_entries import PackedEntries
from vtr.core.wrapping import Bound, Entry
from vtr.errors import UnsupportedMethodError
from vtr.vision.vlm.sequence import mark
from vtr.vision.vlm.store import EntryStore, make_store, store_of
from vtr.vision.vlm.stored import stored

if TYPE_CHECKING:
    from vtr.core.language_attention import Marks
    from vtr.vision.vlm.call import LanguageCall
    from vtr.vision.vlm.wrapping import VLMWrapping

FEW = 8  # rows up to which packed entries are read as they are: for more, unpacking them is faster


class KVSession:
    """Lets methods choose the entries of caches, and attends to what is held.

    Attributes:
        by_layer: the method of each layer that has one.
    """

    def __init__(self, owner: VLMWrapping) -> None:
        self.owner = owner
        self.by_layer: dict[int, Entry] = {}

    def install(self) -> None:
        owner = self.owner
        self.by_layer = {s.layer: e for e, s in owner.stages() if s.site == "kv"}
        for i, entry in self.by_layer.items():
            if "hidden" in entry.method.requirements(owner.info)["kv"]:
                see = Bound(self, "before_attention")
                attention = owner.layers[i].self_attn
                owner.hook(attention.register_forward_pre_hook(see, with_kwargs=True))

    # ---- calls of the language model --------------------------------------------------------

    def open(self, cache: Any, is_open: bool) -> None:
        """A call begins or ends: stores may be added to in between."""
        for i in self.by_layer:
            store = store_of(cache, i)
            if store is not None:
                store.open = is_open

    def check(self, cache: Any) -> None:
        """generate begins.

        Raises:
            UnsupportedMethodError: it has no cache.
        """
        if self.by_layer and cache is None:
            raise UnsupportedMethodError(
                f"{self._names()} acts on the KV cache, and generate runs without one: use use_cache=True"
            )

    def check_drafts(self) -> None:
        """Assisted decoding begins.

        Raises:
            UnsupportedMethodError: entries are chosen while an answer is written, by tokens that may be
                rejected.
        """
        if any(e.method.while_decoding for e in self.by_layer.values()):  # type: ignore[attr-defined]
            raise UnsupportedMethodError(
                f"{self._names()} chooses entries of the KV cache while the answer is written, and assisted "
                "decoding (a draft model, prompt lookup) takes tokens back: use every=0 and keep instead of "
                "bytes, or generate without assistance"
            )

    def _names(self) -> str:
        return ", ".join(dict.fromkeys(e.method.name for e in self.by_layer.values()))

    def after(self, call: LanguageCall) -> None:
        """A call ends: methods that see all layers first choose now."""
        waiting, call.choosing = call.choosing, []
        for entry, site, store in waiting:
            site.q = None
            store.prefetch()
            self._choose(call, entry, site, store)
            self.put_away(call.cache, site.layer)
        last = call.last or self.owner.language.last
        if not self.by_layer or call.cache is None or call.again or last is None:
            return
        last.cache = stored(call.cache, last.cache)
        if call.last is not None:
            last.stored = {i: s.bytes for i, s in enumerate(last.cache) if s.held is not None}

    # ---- its layers -------------------------------------------------------------------------

    def put_away(self, cache: Any, i: int) -> None:
        """Offload layer ``i`` again, if its cache does so: transformers does it before the attention."""
        store = store_of(cache, i)
        if store is not None and getattr(cache, "offloading", False):
            store.offload()

    def before_attention(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = self.owner.language.running()
        if call is not None:
            call.normed = args[0] if args else kwargs["hidden_states"]

    def attend(
        self, store: EntryStore, call: LanguageCall, i: int, q: Tensor, k: Tensor, v: Tensor, mask: Any,
        kwargs: dict[str, Any],
    ) -> Tensor:  # fmt: skip
        """Compute the attention of layer ``i`` over the entries that are held, (B, L, H, D). Before that, the
        method may exchange them for others in CPU memory.

        ``k`` and ``v`` are the entries in the model's dtype. ``mask`` is that of a cache which holds everything;
        None if the model found no padding.
        """
        if self._recall(call, i, q, k, v, kwargs, store):
            k, v = store.keys, store.values
        scale, rows = kwargs[SCALING], q.shape[2]
        sees = None
        if mask is not None or rows > 1 or store.ragged:
            valid = torch.cat([call.columns_before(i), call.layout.valid], 1)
            if rows == 1 and kwargs.get(WINDOW) is None:
                sees = store.live(valid)[:, :, None] & call.layout.valid[:, None, None]
            else:
                sees = seen(store.columns(), valid, rows, kwargs.get(WINDOW))
        if store.packed and rows <= FEW:
            parts: list[PackedEntries | PlainEntries] = [*store.packed, PlainEntries(k, v)]
            return attend_parts(q, parts, sees, scale).transpose(1, 2)
        if store.packed:
            k, v = store.read()
        if sees is None:
            return attend_all(q, k, v, scale).transpose(1, 2)
        return attend(q, k, v, sees, scale).transpose(1, 2)

    def rescores(self, call: LanguageCall, i: int, rows: int) -> bool:
        """Tell whether layer ``i`` attends by scores that its method changes."""
        entry = self.by_layer.get(i)
        decoding = rows == 1 and call.visual is None
        return decoding and entry is not None and entry.method.rescores  # type: ignore[attr-defined]

    def attend_rescored(
        self, store: EntryStore, call: LanguageCall, i: int, q: Tensor, k: Tensor, v: Tensor,
        kwargs: dict[str, Any],
    ) -> Tensor:  # fmt: skip
        """Compute the attention of a decoding step by changed scores, (B, 1, H, D)."""
        entry = self.by_layer[i]
        valid = torch.cat([call.columns_before(i), call.layout.valid], 1)
        site = self._site(call, i, entry, store, q, k, v, valid, kwargs)
        method: Any = entry.method
        heads, groups = q.shape[1], site.k.shape[1]
        grouped = q.unflatten(1, (groups, -1))[:, :, :, 0].float()
        with call.casting(False):
            scores = (grouped @ site.k.float().mT * site.scale).flatten(1, 2)[:, :, None]
            sees = site.sees(torch.zeros_like(valid[:, :1], dtype=torch.int64))
            changed = method.rescore(site, scores)
            hidden = ~sees.repeat_interleave(heads // groups, 1)
            weights = changed.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num(0.0)
            out = weights.unflatten(1, (groups, -1))[:, :, :, 0] @ site.v.float()
        return out.flatten(1, 2)[:, None].to(q.dtype)

    def _recall(
        self, call: LanguageCall, i: int, q: Tensor, k: Tensor, v: Tensor, kwargs: dict[str, Any], store: EntryStore
    ) -> bool:  # fmt: skip
        """Tell whether other entries are held from now on."""
        entry = self.by_layer.get(i)
        if entry is None or store.aside is None or call.visual is not None:
            return False
        valid = torch.cat([call.columns_before(i), call.layout.valid], 1)
        site = self._site(call, i, entry, store, q, k, v, valid, kwargs)
        method: Any = entry.method
        wanted = method.recall(site)
        if wanted is None:
            return False
        store.recall(wanted)
        return True

    def after_attention(
        self, call: LanguageCall, i: int, q: Tensor, k: Tensor, v: Tensor, mask: Any, kwargs: dict[str, Any]
    ) -> None:  # fmt: skip
        """The attention of layer ``i`` is done; ``mask`` is None if the model found no padding."""
        entry = self.by_layer.get(i)
        if entry is None or call.cache is None or call.again:
            return
        if call.visual is None and not entry.method.acts_while_decoding:  # type: ignore[attr-defined]
            return
        valid = torch.cat([call.columns_before(i), call.layout.valid], 1)
        store = store_of(call.cache, i) or make_store(call.cache, i, valid.shape[1])
        if store is None:
            held = type(call.cache.layers[i]).__name__
            raise UnsupportedMethodError(
                f"{entry.method.name} chooses entries of a KV cache, and layer {i} holds them in a {held}: use "
                "a dynamic or static cache of transformers (cache_implementation='dynamic'), whose entries are "
                "neither quantised nor limited to a window"
            )
        method: Any = entry.method
        store.open, store.exact = True, method.in_bytes
        sees_all = mask is None and q.shape[2] == 1 and not store.ragged
        site = self._site(call, i, entry, store, q, k, v, valid, kwargs, sees_all)
        with call.casting(False):
            method.watch(site)
        store.entries, store.state = site.entries, site.state
        if not method.due(site):
            return
        if method.whole:
            call.choosing.append((entry, site, store))
        else:
            self._choose(call, entry, site, store)

    def _choose(self, call: LanguageCall, entry: Entry, site: KVSite, store: EntryStore) -> None:
        method: Any = entry.method
        with call.casting(False):
            change = method.compress(site)
        store.entries, store.state = site.entries, site.state
        store.chosen = store.length
        if change is None:
            return
        shape = site.columns.shape
        for name, x in (("kept", change.kept), ("bits", change.bits)):
            if x is not None and x.shape != shape:
                raise RuntimeError(
                    f"{method.name}: {name} of a Change must be {tuple(shape)} (batch, KV heads, entries), got "
                    f"{tuple(x.shape)}"
                )
        nothing = change.k is None and (change.bits is None or torch.equal(change.bits, site.bits))
        if nothing and torch.equal(change.kept & site.valid, site.valid):
            return
        store.choose(change._replace(kept=change.kept & site.valid))
        if call.visual is not None:
            site.notes["columns"] = store.columns()
            self.owner.tracing.count("kv", site.layer, shape[2], store.number)

    def _site(
        self, call: LanguageCall, i: int, entry: Entry, store: EntryStore, q: Tensor, k: Tensor, v: Tensor,
        valid: Tensor, kwargs: dict[str, Any], sees_all: bool = False,
    ) -> KVSite:  # fmt: skip
        owner, attention = self.owner, self.owner.attention
        assert call.marks is not None
        rows, layout = q.shape[2], call.layout
        which = owner.entries.index(entry)
        every = {} if call.visual is None else owner.tracing.notes.setdefault("kv", {})
        prompt = valid.shape[1] if call.visual is not None else call.marks.length(i)

        def marks(places: bool) -> Marks:
            return attention.marks(call, layout, i, places, entry)

        def visuals() -> Here:
            return here(call, i, valid.shape[1])

        def read() -> tuple[Tensor, Tensor]:
            return store.read() if store.packed else (k[:, :, :number], v[:, :, :number])

        number = store.number  # a static cache has room for more
        return KVSite(
            info=owner.info, layer=i, layers=len(owner.layers), training=owner.root.training,
            phase="decode" if rows == 1 and call.visual is None else "turn" if call.past else "prefill",
            q=q, read=read, scale=kwargs[SCALING], columns=store.columns, tokens=valid, rows=rows,
            prompt=prompt, marks=marks, bits=store.bits, fresh=store.length - store.chosen,
            visited=call.visual is not None, entries=store.noted(), state=store.state,
            memory=call.memory.setdefault(("kv", which), {}), notes=every.setdefault(i, {}),
            hidden=call.normed, visuals=visuals, known=store.known, sees_all=sees_all,
            aside=None if store.aside is None else store.aside.entries,
        )  # fmt: skip


def here(call: LanguageCall, layer: int, columns: int) -> Here:
    """The visual tokens of a call among the columns of a layer, and which of them are left now."""
    batch, length = call.valid.shape
    if call.visual is None:
        none = torch.full((batch, columns), -1, device=call.valid.device)
        return Here(none, torch.zeros(batch, 1, dtype=torch.bool, device=none.device))
    layout = [call.entered, *(lay for at, lay in call.segments if at <= layer)][-1]
    number = call.arrived.shape[1]
    index = torch.arange(number, device=call.valid.device).expand_as(call.arrived)
    of_column = torch.full((batch, length + 1), -1, device=index.device)
    of_column = of_column.scatter(1, torch.where(call.arrived < 0, length, call.arrived), index)
    of_column[:, length] = -1
    token = of_column.gather(1, layout.index).masked_fill(~layout.visual, -1)
    left = mark(call.map.kept, number)
    return Here(F.pad(token, (columns - token.shape[1], 0), value=-1), left)


def attend_all(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Compute attention of one row over all entries, (B, H, 1, D)."""
    batch, heads, _, width = q.shape
    grouped = q.view(batch, k.shape[1], -1, width)
    out = F.scaled_dot_product_attention(grouped, k, v, scale=scale)
    return out.view(batch, heads, 1, v.shape[3])


def seen(columns: Tensor, valid: Tensor, rows: int, window: int | None = None) -> Tensor:
    """Tell which entries rows see, (B, Hk, L, K) bool.

    Args:
        columns: (B, Hk, K) int64, the column of each entry, -1 for an empty place.
        valid: (B, S) bool, the columns that are tokens.
        rows: L, the number of last columns that are rows.
        window: columns that a row sees, itself the last of them; None for all.
    """
    batch, length = valid.shape
    at = torch.arange(length - rows, length, device=columns.device)
    live = valid.gather(1, columns.clamp(min=0).view(batch, -1)).view_as(columns) & (columns >= 0)
    sees = live[:, :, None] & (columns[:, :, None] <= at[:, None])
    if window is not None:
        sees &= at[:, None] - columns[:, :, None] < window
    return sees & valid[:, None, length - rows :, None]


def attend(q: Tensor, k: Tensor, v: Tensor, sees: Tensor, scale: float) -> Tensor:
    """Compute attention over entries of each KV head, (B, H, L, D).

    Keys and values are read once for all query heads of a KV head. Rows that see no entry, as those of padding,
    are zero.

    Args:
        q: (B, H, L, D).
        k, v: (B, Hk, K, D).
        sees: (B, Hk, L, K) bool.
    """
    batch, heads, rows, width = q.shape
    groups = k.shape[1]
    none = ~sees.any(3, keepdim=True)
    sees = (sees | none).repeat(1, 1, 1 if rows == 1 else heads // groups, 1)
    out = F.scaled_dot_product_attention(
        q.reshape(batch, groups, -1, width), k, v, sees, scale=scale
    )
    out = out.view(batch, groups, -1, rows, v.shape[3]).masked_fill(none[:, :, None], 0)
    return out.view(batch, heads, rows, v.shape[3])
