"""Methods inside the attention of a language model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vtr.compat.transformers import (
    ATTEND,
    ATTENTION_EXTRAS,
    DROPOUT,
    SCALING,
    WINDOW,
    ask,
    ask_no_more,
)
from vtr.core.language_attention import LanguageAttentionSite, Marks, PaddingGroup, groups_of
from vtr.core.wrapping import Bound, Entry
from vtr.vision.vlm.marks import Columns, joined, mark, marked, marks_here
from vtr.vision.vlm.store import store_of

if TYPE_CHECKING:
    from vtr.vision.vlm.call import LanguageCall
    from vtr.vision.vlm.wrapping import VLMWrapping


class LanguageAttention:
    """Computes the attention of layers by their methods.

    One attention function and one mask function are registered with transformers, and named on the language
    model's configuration alone; the tower keeps its own. A module without a method is computed as ever.

    Attributes:
        by_layer: the method of each layer that has one.
        asked: layers whose attention is asked for, by these or by methods at the KV cache.
    """

    def __init__(self, owner: VLMWrapping) -> None:
        self.owner = owner
        self.by_layer: dict[int, Entry] = {}
        self.asked: list[int] = []

    def install(self) -> None:
        owner = self.owner
        self.by_layer = {s.layer: e for e, s in owner.stages() if s.site == "attention"}
        self.asked = sorted({*self.by_layer, *owner.kv.by_layer})
        if not self.asked:
            return
        ask(owner.lm)
        owner.hook(self)
        for i in self.asked:
            owner.patch(owner.layers[i].self_attn, ATTEND, Bound(self, "attend", i))
        for i, entry in self.by_layer.items():
            layer = owner.layers[i]
            if "hidden" in entry.method.requirements(owner.info)["attention"]:
                see = Bound(self, "before_layer")
                owner.hook(layer.register_forward_pre_hook(see, with_kwargs=True))

    def remove(self) -> None:
        """Called when hooks come off."""
        ask_no_more(self.owner.lm)

    # ---- calls of the language model --------------------------------------------------------

    def check(self, kwargs: dict[str, Any]) -> None:
        """A call of the language model begins.

        Raises:
            ValueError: attention maps are asked for, which a method does not compute.
        """
        if not self.asked:
            return
        # Another model with this configuration may have ended it, or the caller has chosen anew.
        ask(self.owner.lm)
        wanted = kwargs.get("output_attentions")
        if wanted is None:
            wanted = getattr(self.owner.lm.config, "output_attentions", False)
        if wanted:
            asked = (*self.by_layer.values(), *self.owner.kv.by_layer.values())
            names = ", ".join(dict.fromkeys(e.method.name for e in asked))
            raise ValueError(
                f"{names} computes no whole attention map, which output_attentions=True asks for. "
                'handle.trace.notes["attention"] has the density and the mask of each layer, vtr.draw shows '
                "the mask, and vtr.sinks the attention of a dense run; or remove the method for this call"
            )

    def known(self, cache: Any) -> bool:
        """Tell whether a call without new images is one that methods must see."""
        return bool(self.asked) and marked(cache) is not None

    def after(self, call: LanguageCall) -> None:
        """A call ends: its cache carries what is visual."""
        record, cache = call.marks, call.cache
        if not self.asked or record is None:
            return
        if call.visual is not None:
            made, shown = [], []
            cuts = {layer for layer, _ in call.segments}
            for first in sorted({0, *(c.first for c in record.columns), *cuts}):
                layout = [call.entered, *(lay for at, lay in call.segments if at <= first)][-1]
                made.append(Columns(first, self._marks_for_pictures(call, layout, first)))
                valid = torch.cat([call.columns_before(first), layout.valid], 1)
                shown.append((first, valid, made[-1].marks))
            record.columns = made
            self.owner.tracing.notes["columns"] = shown
        if cache is not None:
            mark(cache, record)

    def _marks_for_pictures(self, call: LanguageCall, layout: Any, layer: int) -> Marks:
        """The marks with frames, which :func:`vtr.draw` shows, if they are known."""
        entry = self._entry(layer)
        try:
            return self.marks(call, layout, layer, True, entry)
        except RuntimeError:  # the call has a part of an image, whose frames nobody knows
            call.placed = False
            return self.marks(call, layout, layer, False, entry)

    def _entry(self, layer: int) -> Entry:
        """The method that a layer's marks are for, or one of the others."""
        by_layer = {**self.owner.kv.by_layer, **self.by_layer}
        return by_layer.get(layer) or next(iter(by_layer.values()))

    def marks(
        self, call: LanguageCall, layout: Any, layer: int, places: bool, entry: Entry
    ) -> Marks:
        """The marks of the columns of a layer."""
        past = call.columns_before(layer).shape[1]
        assert call.marks is not None
        device = layout.valid.device
        before = call.marks.before(layer, past, layout.valid.shape[0], device)
        call.placed = call.placed or places
        video = bool(entry.options.get("video")) if places else None
        return joined(before, marks_here(call, layout, video), call.marks.counted)

    # ---- its layers -------------------------------------------------------------------------

    def before_layer(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = self.owner.language.running()
        if call is not None:
            call.hidden = args[0] if args else kwargs["hidden_states"]

    @torch.compiler.disable
    def attend(
        self, i: int, function: Any, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """Compute the attention of layer ``i``, (B, L, H, D); ``function`` is what transformers would call."""
        call = self.owner.language.running()
        if call is None or call.marks is None:
            out: Tensor = function(module, q, k, v, mask, **kwargs)[0]
            return out, None
        call.to(q.device)
        self._check(i, module, q, v, kwargs)
        store = store_of(call.cache, i)
        if store is not None:
            store.prefetch()
        if store is not None and self.owner.kv.rescores(call, i, q.shape[2]):
            result = self.owner.kv.attend_rescored(store, call, i, q, k, v, kwargs)
        elif store is not None and not store.whole:
            result = self.owner.kv.attend(store, call, i, q, k, v, mask, kwargs)
        elif i in self.by_layer:
            result = self._by_method(call, i, function, module, q, k, v, mask, kwargs)
        else:
            if store is not None and mask is not None and mask.shape[-1] > k.shape[2]:
                mask = mask[..., : k.shape[2]]  # that of a static cache, which has room for more
            result = function(module, q, k, v, mask, **kwargs)[0]
        self.owner.kv.after_attention(call, i, q, k, v, mask, kwargs)
        self.owner.kv.put_away(call.cache, i)
        return result.contiguous(), None

    def _by_method(
        self, call: LanguageCall, i: int, function: Any, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any,
        kwargs: dict[str, Any],
    ) -> Tensor:  # fmt: skip
        given = (q, k, v, mask)

        def dense() -> Tensor:
            found: Tensor = function(module, *given, **kwargs)[0]
            return found.transpose(1, 2)

        entry = self.by_layer[i]
        method: Any = entry.method
        valid = torch.cat([call.columns_before(i), call.layout.valid], 1)
        # A cache with a window has let go of the oldest columns, and a static one has room for more.
        valid = valid[:, -k.shape[2] :]
        k, v = (x[:, :, : valid.shape[1]] for x in (k, v))
        site = self._site(call, i, entry, q, k, v, valid, dense, kwargs)
        with call.casting(False):
            result: Tensor = method.attend(site)
        if result.shape != (*q.shape[:3], v.shape[3]) or result.dtype != q.dtype:
            raise RuntimeError(
                f"{method.name}: attend() returned {result.dtype} {tuple(result.shape)}, and the attention of "
                f"this call is {q.dtype} {(*q.shape[:3], v.shape[3])} (batch, heads, rows, head dim)"
            )
        self._note(call, site)
        return result.transpose(1, 2)

    def _site(
        self, call: LanguageCall, i: int, entry: Entry, q: Tensor, k: Tensor, v: Tensor, valid: Tensor,
        dense: Any, kwargs: dict[str, Any],
    ) -> LanguageAttentionSite:  # fmt: skip
        owner = self.owner
        which = owner.entries.index(entry)
        assert call.marks is not None
        layout, rows = call.layout, q.shape[2]
        phase = (
            "decode" if rows == 1 and call.visual is None else "turn" if call.past else "prefill"
        )
        # Of calls without visual tokens only sums are noted: the trace is that of the last prompt.
        apart = call.visual is None or call.again
        every = {} if apart else owner.tracing.notes.setdefault("attention", {})
        notes = every.setdefault(i, {})

        def marks(places: bool) -> Marks:
            found = self.marks(call, layout, i, places, entry)
            return Marks(*(x[:, -valid.shape[1] :] for x in found))

        def groups() -> list[PaddingGroup]:
            held = call.memory.setdefault("vtr.groups", {})
            key = (id(layout), valid.shape, q.device)
            if key not in held:
                held[key] = layout, groups_of(valid, rows)
            found: list[PaddingGroup] = held[key][1]
            return found

        return LanguageAttentionSite(
            info=owner.info, phase=phase, training=owner.root.training, valid=valid, marks=marks,
            window=kwargs.get(WINDOW), hidden=call.hidden, groups=groups, held=call.held_as(i), layer=i,
            layers=len(owner.layers),
            q=q, k=k, v=v, scale=kwargs[SCALING], dense=dense,
            state=call.marks.state.setdefault((which, entry.method.name, i), {}),
            memory=call.memory.setdefault(("attention", which), {}), notes=notes, table=entry.table_like(q),
            modules=entry.modules_like(q), backend=getattr(entry.method, "backend", "auto"),
        )  # fmt: skip

    def _note(self, call: LanguageCall, site: LanguageAttentionSite) -> None:
        if call.again:
            return
        if site.phase == "decode":
            layers = self.owner.tracing.notes.setdefault("decoding", {})
            total = layers.setdefault(
                site.layer, {"steps": 0, "work": 0.0, "pairs": 0.0, "spent": 0.0}
            )
            total["steps"] += 1
            total["work"] = total["work"] + site.notes.get("work", 0.0)
            total["pairs"] = total["pairs"] + site.pairs
            total["spent"] += site.notes.get("spent", 0.0)
        if call.visual is None:
            return
        site.notes["density"] = site.notes.pop("work", 0.0) / site.pairs
        columns = site.k.shape[2]
        self.owner.tracing.count("attention", site.layer, columns, columns)

    def _check(self, i: int, module: Any, q: Tensor, v: Tensor, kwargs: dict[str, Any]) -> None:
        """Raise ``RuntimeError`` if the attention is asked for more than a softmax over keys."""
        name = self._entry(i).method.name
        extra = [n for n in ATTENTION_EXTRAS if kwargs.get(n) is not None]
        if extra or q.shape[3] != v.shape[3]:
            what = f"has {', '.join(extra)}" if extra else "has values of another width than keys"
            raise RuntimeError(
                f"{name}: the attention of layer {i} ({type(module).__name__}) {what}, which no kernel of vtr "
                f"computes: name the layer in dense_layers, or use a method that acts between layers"
            )
        if kwargs.get(DROPOUT):
            raise RuntimeError(
                f"{name}: the attention of layer {i} has dropout: set attention_dropout to 0 in the "
                "language model's configuration"
            )
