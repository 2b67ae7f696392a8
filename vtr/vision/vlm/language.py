"""Run methods at the entry of a language model and between its layers.

One pre-hook on the language model shortens everything that has the length of the prompt; one on every
layer does so from a layer on, with masks and rotary tables to fit. Decoding steps pass the same hooks:
each layer then gets a mask for what its own cache holds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vtr.compat.torch import in_backward
from vtr.compat.transformers import (
    CACHE,
    CHECKPOINTED,
    DEEPSTACK,
    KEPT_LOGITS,
    causal_mask,
    check_deepstack,
    counts_columns,
    given_cache,
)
from vtr.core.recompute import Inputs
from vtr.core.trace import Trace
from vtr.core.wrapping import Bound, Entry, PerThread, Threaded
from vtr.vision.vlm.cache import cuts_of, forget, length_of, lock, remember, unlock
from vtr.vision.vlm.call import LanguageCall, PrefillRecord
from vtr.vision.vlm.deepstack import deepstack, narrowed
from vtr.vision.vlm.head import Purpose
from vtr.vision.vlm.inputs import apart, at_entry, folded, in_layer, rescaled, unfolded
from vtr.vision.vlm.marks import MarkedCache, marked
from vtr.vision.vlm.masks import check_cache, sync, two_way
from vtr.vision.vlm.masks import entry as masks_at_entry
from vtr.vision.vlm.middle import MiddleCuts
from vtr.vision.vlm.outputs import Exit, align, columns, every_column
from vtr.vision.vlm.prompt import cut_by_tower, without_repetitions
from vtr.vision.vlm.recompute import Layers, outside
from vtr.vision.vlm.refusals import check_flash
from vtr.vision.vlm.rows import Seen
from vtr.vision.vlm.sequence import padding_mask
from vtr.vision.vlm.uncached import hold

if TYPE_CHECKING:
    from vtr.vision.vlm.wrapping import VLMWrapping


class BeforeLayer(Bound):
    """The hook in front of layer ``i``. A decoding step on a GPU takes as long as Python does, so that
    layers at which nothing changes are passed at once."""

    def __init__(self, session: LanguageSession, i: int) -> None:
        super().__init__(session, "before_layer", i)
        self.layer = i

    def __call__(self, module: Any, args: Any, kwargs: Any) -> Any:  # type: ignore[override]
        session = self.owner
        call = session.call
        if call is None or call.stops is None or self.layer in call.stops:
            return session.before_layer(self.layer, module, args, kwargs)
        if call.override is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        if hidden.device != call.valid.device:
            return session.before_layer(self.layer, module, args, kwargs)
        args, kwargs = apart(module, args, kwargs)
        return args, {**kwargs, **call.override}


class LanguageSession(Threaded):
    """Runs the stages of all active methods in one language model.

    Args:
        owner: the wrapping; its entries, info, captures and trace are used.
        module: the language model, with ``layers`` and ``rotary_emb``.

    Attributes:
        pending: (B, L) int8, the kinds of the visual tokens of this thread's coming call, or None.
        padding: (B, past + L) mask that the model was given for the coming call, or None.
        purpose: what the coming call of this thread is for.
        call: the running call of this thread.
        way: how the sequence of this thread's last call left the language model, None if nothing was cut.
        last: what the prefill did that began last, in any thread.
    """

    pending = PerThread[Tensor | None]()
    padding = PerThread[Tensor | None]()
    purpose = PerThread[Purpose](Purpose())
    call = PerThread[LanguageCall | None]()
    way = PerThread[Exit | None]()
    made = PerThread[Callable[[], Tensor] | None]()  # the columns of this thread's last call

    def __init__(self, owner: VLMWrapping, module: Any) -> None:
        super().__init__()
        self.owner = owner
        self.module = module
        self.layers = module.layers
        self.visits: dict[tuple[str, int, str], list[tuple[Entry, str]]] = {}
        self.last: PrefillRecord | None = None
        self.inputs = Inputs()  # of layers that are not what their modules are given
        self.checkpoints = Layers(self)
        self.middle = MiddleCuts(self)
        self._columns: Callable[[], Tensor] | None = None  # of the call that began or ended last

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "last": None, "_columns": None}

    def install(self) -> None:
        """Plan the visits and set the hooks."""
        owner = self.owner
        self.forget()
        self.visits = {}
        for entry, stage in owner.stages():
            if stage.site in ("image", "pixels", "encoder", "attention", "kv", "logits"):
                continue
            inside = stage.site == "decoder"
            key = ("decoder", stage.layer, stage.place) if inside else ("prompt", 0, "entry")
            self.visits.setdefault(key, []).append((entry, stage.site))
        module = self.module
        owner.hook(self.checkpoints)
        owner.hook(module.register_forward_pre_hook(Bound(self, "before"), with_kwargs=True))
        owner.hook(module.register_forward_hook(Bound(self, "after"), prepend=True))
        owner.hook(module.register_forward_hook(Bound(self, "end"), always_call=True))
        for i, layer in enumerate(self.layers):
            owner.hook(layer.register_forward_pre_hook(BeforeLayer(self, i), with_kwargs=True))
            if counts_columns(getattr(layer, "self_attn", None)):
                owner.hook(layer.self_attn.q_proj.register_forward_hook(Bound(self, "rescale", i)))
        self.middle.install()
        if check_deepstack(module):
            owner.patch(module, DEEPSTACK, Bound(self, "deepstack"))

    # ---- the entry --------------------------------------------------------------------------

    def before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.owner.contrast.inside:  # no method acts on the second run of a contrast
            return None
        self.call, kinds, self.pending = None, self.pending, None
        purpose, self.purpose, self.way = self.purpose, Purpose(), None
        embeds, cache = kwargs.get("inputs_embeds"), given_cache(kwargs)
        attention = self.owner.attention
        attention.check(kwargs)
        if embeds is None:
            return None
        past = length_of(cache)
        if past == 0:
            self.last = None
            if cache is not None:
                forget(cache)
        cuts = cuts_of(cache)
        batch, length = embeds.shape[:2]
        before = past if cuts is None else past + cuts.offset
        if not past or length > 1:  # decoding steps have one column
            shape = (before, batch, length, embeds.device)
            self.made = self._columns = partial(every_column, kwargs.get("attention_mask"), *shape)
        if kinds is None:
            if past == 0:
                self.owner.begin(Trace())
            if cuts is None and not attention.known(cache):
                return None
        for entry in self.owner.active:
            check_flash(self.owner, entry.options)  # it may have been chosen since
        if module.training and torch.is_grad_enabled() and self._runs_again(past):
            # Some models make one for every call: the layers would not fill it.
            cache, kwargs = None, {k: v for k, v in kwargs.items() if k not in CACHE}
        if kinds is not None:
            check_cache(self.owner, cache)
        if self.owner.shares and KEPT_LOGITS in kwargs:
            kwargs = {**kwargs, KEPT_LOGITS: 0}  # it would leave out columns between layers
        given = kwargs.get("attention_mask")
        if self.owner.family.two_way and self.padding is not None:
            given = self.padding  # the model has built masks of it
        mask = self._mask(given, cuts, batch, before, length, embeds.device)
        if mask is None:
            valid = torch.ones(batch, length, dtype=torch.bool, device=embeds.device)
            history = None
        else:
            valid, history = mask[:, before:], mask[:, :before] if before else None
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(before, before + length, device=embeds.device)[None]
        if kinds is not None:
            kinds = kinds.to(embeds.device)
        call = LanguageCall(self.owner, past, valid, history, cuts, kinds, positions, cache)
        reduced = self.owner.output == "reduced"
        call.purpose, call.aligned = purpose, not (reduced or purpose.generating)
        if attention.asked:
            call.marks = marked(cache) or MarkedCache()
        if purpose.last and not call.aligned:  # padding that a cut makes anew goes to the left
            call.layout.right = False
        call.masks = two_way(self.owner, call, kwargs.get("attention_mask"))
        self.call = call
        if cuts is not None:
            unlock(cache, cuts)
        self.owner.kv.open(cache, True)
        if kinds is not None:
            self._begin(call)
            hold(self.owner, call)
            embeds = self._prompt(call, embeds)
            call.entered = call.layout
        elif not torch.is_grad_enabled() and not embeds.requires_grad:
            call.stops = None if self.owner.mixed else {0, *call.boundaries()}
        if not call.changed and cuts is None:
            if embeds is kwargs["inputs_embeds"]:
                return None
            return args, {**kwargs, "inputs_embeds": embeds}  # new values, nothing moved
        new = {
            **kwargs,
            "inputs_embeds": embeds,
            # Never None: gaps in positions without a mask are read as several packed sequences.
            "attention_mask": call.mask(0),
            "position_ids": call.moved(0),
        }
        if call.changed:
            if call.masks is not None:
                new["attention_mask"] = masks_at_entry(call, kwargs["attention_mask"])
            new |= narrowed(kwargs, call.layout)
            new |= at_entry(kwargs, call.layout, length)
        return args, new

    def _runs_again(self, past: int) -> bool:
        """Tell whether layers will run again in the backward pass, which they do without a cache."""
        self.inputs.purge()
        self.checkpoints.adopt()
        if not any(getattr(layer, CHECKPOINTED, False) for layer in self.layers):
            return False
        if past:
            raise RuntimeError(
                "gradient checkpointing goes without a KV cache, and a wrapped model in training was given "
                "one that holds an earlier turn: give the whole conversation as one prompt, or call "
                "model.eval() or model.gradient_checkpointing_disable()"
            )
        return True

    def running(self) -> LanguageCall | None:
        """The running call, or that of the layer which this thread's backward pass runs again."""
        again = self.owner.again
        return self.call if again is None else again.call

    def _mask(
        self, mask: Any, cuts: Any, batch: int, before: int, length: int, device: torch.device
    ) -> Tensor | None:
        first = next(iter(mask.values())) if isinstance(mask, dict) else mask
        if cuts is not None and (
            isinstance(mask, dict) or (first is not None and first.dim() == 4)
        ):
            if length > 1 and batch > 1:
                raise RuntimeError(
                    "a second turn of several samples with a static cache hides its padding: use a "
                    "dynamic cache, or one sample at a time"
                )
            return None
        return padding_mask(mask, batch, before + length, device)

    def _begin(self, call: LanguageCall) -> None:
        """A new trace, with what the tower has done already."""
        self.owner.enter()
        self.owner.captures.by_runs(call)
        towers = self.owner.captures.trace
        stages, tokens = list(towers.stages), dict(towers.tokens)
        self.owner.begin(Trace(stages, tokens, call.valid.shape[0], towers.notes))
        self.last = call.last = PrefillRecord(call)

    def _prompt(self, call: LanguageCall, embeds: Tensor) -> Tensor:
        """The prompt after all cuts before its first layer."""
        self.owner.contrast.prompt(call, embeds)
        embeds = without_repetitions(self.owner, call, embeds)
        embeds = cut_by_tower(self.owner, call, embeds)
        for entry, name in self.visits.get(("prompt", 0, "entry"), ()):
            embeds = call.visit(entry, name, 0, "entry", embeds)
        return embeds

    def columns(self) -> Tensor:
        """See :attr:`vtr.api.Handle.columns`."""
        made = self.made or self._columns
        if made is None:
            raise RuntimeError("the model has not been called since the method was applied")
        return made()

    def after(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        call, self.call = self.call, None
        if call is None:
            return
        cuts = call.record()
        if cuts is not None and call.cache is not None:
            remember(call.cache, cuts)
        self.owner.attention.after(call)
        self.owner.kv.after(call)
        self.owner.kv.open(call.cache, False)
        if call.held is not None:
            call.held.done, call.held.notes = True, dict(self.owner.tracing.notes)
        if call.changed:
            self._leave(call, output)

    def _leave(self, call: LanguageCall, output: Any) -> None:
        """The sequence leaves with the columns of what is left, or with those that were given."""
        purpose, layout = call.purpose, call.layout
        if call.last is not None:
            call.last.layout = layout
        self.made = self._columns = partial(columns, layout)
        self.way = Exit(layout, call.valid.shape[1], call.aligned)
        if self.owner.output == "aligned":
            align(output, self.way, [*call.left, layout])
        elif not isinstance(purpose.keep, int):
            raise ValueError(
                "logits_to_keep as a tensor has columns that were given, which output='reduced' does not "
                "return: use output='aligned', or all logits and handle.columns"
            )

    def end(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        """Also after an exception: nothing of the call is left."""
        call, self.call = self.call, None
        if call is not None and call.cuts is not None:
            lock(call.given, call.cuts)
        if call is not None:
            self.owner.kv.open(call.cache, False)

    # ---- its layers -------------------------------------------------------------------------

    def before_layer(
        self, i: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        call, given = self.call, args[0] if args else kwargs["hidden_states"]
        if self.owner.again is not None:  # cuts before a layer are outside of what runs again
            return None
        if call is None:
            if in_backward() and self.inputs.find(given, i):
                raise outside(module)
            return None
        if call.outside == i:
            return None
        args, kwargs = apart(module, args, kwargs)
        streams = self.owner.streams
        hidden = entered = folded(given) if streams > 1 else given
        call.to(hidden.device)
        if i:
            call.left.append(call.layout)
        else:
            call.cache = given_cache(kwargs)
            call.rope, call.synced = kwargs.get("position_embeddings"), call.layout
            if call.changed and self.owner.flash:
                call.override = {"position_ids": None}
        if call.visual is not None:
            for entry, name in self.visits.get(("decoder", i - 1, "end"), ()):
                hidden = call.visit(entry, name, i - 1, "end", hidden)
            hidden = self._enter_device(call, i, module, hidden)
            self._sync(call, i, hidden, kwargs)
            for entry, name in self.visits.get(("decoder", i, "start"), ()):
                hidden = call.visit(entry, name, i, "start", hidden)
                self._sync(call, i, hidden, kwargs)
            n = call.layout.slots.shape[1]
            self.owner.tracing.count("decoder", i, n, n)
            if i == 0:
                call.left.append(call.layout)
            if call.last is not None:
                call.last.entered.append(call.layout.valid)
            if ("decoder", i, "end") in self.visits or ("decoder", i, "middle") in self.visits:
                assert call.rope is not None
                call.seen = Seen(i, hidden, call.rope, call.layout, True)
        else:
            self._sync(call, i, hidden, kwargs)
        same = call.override is None and hidden is entered
        cuts = not same or ("decoder", i, "middle") in self.visits
        if cuts and (torch.is_grad_enabled() or given.requires_grad):
            self.inputs.note(given, i, True)
        if same:
            return None
        kwargs = {**kwargs, **(call.override or {}), **in_layer(call, kwargs)}
        hidden = unfolded(hidden, streams) if streams > 1 else hidden
        return (
            ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})
        )

    def rescale(self, i: int, module: Any, args: Any, output: Tensor) -> Tensor | None:
        """The queries of layer ``i`` are projected, whose attention scales them by their columns."""
        call = self.running()
        if call is None or (not call.changed and call.cuts is None):
            return None
        return rescaled(call, i, self.layers[i].self_attn, output)

    def _enter_device(self, call: LanguageCall, i: int, module: Any, hidden: Tensor) -> Tensor:
        """Hidden states go to the layer's device before its methods see them, not only inside of it."""
        if all(("decoder", i, place) not in self.visits for place in ("start", "middle", "end")):
            return hidden
        weight = next(module.parameters(), hidden)
        if weight.device.type != "meta":  # those of offloaded layers come when they run
            hidden = hidden.to(weight.device)
            call.to(weight.device)
        return hidden

    def _sync(self, call: LanguageCall, i: int, hidden: Tensor, given: dict[str, Any]) -> None:
        """Mask and rotary tables for the tokens that enter layer ``i``."""
        if self.owner.mixed:
            sync(self, call, i, given.get("position_embeddings"), hidden)
            return
        cut = call.synced is not call.layout
        if not cut and (i == 0 or i not in call.boundaries()):
            return
        if cut:
            call.segments.append((i, call.layout))
        if call.moves(i) or call.moves(i - 1):
            positions = call.moved(i)
            if self.owner.mrope:
                positions = positions[-3:] if positions.dim() == 3 else positions.expand(3, -1, -1)
            cos, sin = self.module.rotary_emb(hidden, positions)
            call.rope = (cos.to(hidden.device), sin.to(hidden.device))
        call.synced = call.layout
        call.override = {
            "attention_mask": causal_mask(self.module.config, hidden, call.mask(i), call.cache, i),
            "position_embeddings": call.rope,
            "position_ids": None,
        }

    def deepstack(self, *args: Any) -> Tensor:
        return deepstack(self, *args)
