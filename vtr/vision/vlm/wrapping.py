"""The wrapping of a vision-language model: hooks on the model, its language model and its layers."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from vtr.errors import UnsupportedMethodError, UnsupportedModelError
from vtr.method import Method, Reduction
from vtr.signals import ModelInfo
from vtr.tokens import TokenMap, top_indices
from vtr.trace import Trace
from vtr.vision.vlm.attention import opens
from vtr.vision.vlm.cache import cuts_of, forget, length_of, remember
from vtr.vision.vlm.call import Call, Seen
from vtr.vision.vlm.families import Family, find
from vtr.vision.vlm.features import Capture, Captures
from vtr.vision.vlm.sequence import Layout, follow, two_dimensional
from vtr.wrapping import Bound, Entry, Wrapping

FEATURES = ("pixel_values", "pixel_values_videos", "mm_encoder_outputs", "image_features")
MODALITIES = {"get_image_features": "image", "get_video_features": "video"}


class VLMWrapping(Wrapping):
    """A wrapped vision-language model.

    Options:
        positions: ``"original"`` (tokens after a cut keep their positions), ``"compact"`` (they are
            numbered anew), or None, the method's own choice.
    """

    options = {"positions": None}

    def __init__(self, root: Any, inner: Any, family: Family) -> None:
        self.inner = inner
        self.family = family
        self.lm = inner._modules.get("language_model", inner._modules.get("text_model"))
        self.layers = self.lm.layers
        self.captures = Captures()
        self.pending: Tensor | None = None
        self.running: dict[str, Any] | None = None
        self.call: Call | None = None
        self.labels: Tensor | None = None
        self.last: Last | None = None
        super().__init__(root, self._info())

    def __getstate__(self) -> dict[str, Any]:
        # What belongs to a running call is not copied: its tensors may be part of an autograd graph.
        state = {**super().__getstate__(), "captures": Captures(), "last": None}
        return {**state, "pending": None, "running": None, "call": None, "labels": None}

    # ---- what the model is ------------------------------------------------------------------

    @property
    def mrope(self) -> bool:
        parameters = getattr(self.lm.config, "rope_parameters", None) or {}
        return "mrope_section" in parameters

    def _info(self) -> ModelInfo:
        config = self.lm.config
        depth = {"prompt": 1, "projector": 1, "decoder": len(self.layers)}
        look = frozenset({"hidden", "text"})
        signals = {"prompt": look, "projector": look, "decoder": look}
        if not opens(self.layers[0]):
            signals["decoder"] = look | {"queries", "keys", "values", "text_attention"}
        return ModelInfo(
            family=f"transformers {self.family.title}",
            depth=depth,
            signals=signals,
            extra={
                "mrope": self.mrope,
                "lm_dim": config.hidden_size,
                "lm_heads": config.num_attention_heads,
                "lm_kv_heads": getattr(config, "num_key_value_heads", config.num_attention_heads),
            },
        )

    @property
    def flash(self) -> bool:
        return "flash" in str(getattr(self.lm.config, "_attn_implementation", ""))

    def scale(self, layer: int) -> float:
        return float(self.layers[layer].self_attn.scaling)

    def compact(self, entry: Entry) -> bool:
        if self.mrope:
            return False
        chosen = entry.options.get("positions")
        return (entry.method.positions if chosen is None else chosen) == "compact"

    def check(self, method: Method, options: dict[str, Any]) -> None:
        positions = options.get("positions")
        if positions not in (None, "original", "compact"):
            raise ValueError(f"positions must be 'original', 'compact' or None, got {positions!r}")
        if positions == "compact" and self.mrope:
            raise ValueError(
                f"positions='compact' is not defined for {self.info.family}: its positions are "
                "two-dimensional (m-RoPE); use positions='original'"
            )
        super().check(method, options)
        for stage in method.stages(self.info):
            if stage.site == "decoder":
                if stage.place not in ("start", "end"):
                    raise ValueError(f"a decoder stage is at the 'start' or 'end', got {stage!r}")
                if stage.place == "end" and stage.layer == len(self.layers) - 1:
                    raise ValueError(
                        f"{method.name}: nothing comes after layer {stage.layer}, the last of "
                        f"{len(self.layers)}"
                    )

    # ---- hooks ------------------------------------------------------------------------------

    def install(self) -> None:
        self.visits: dict[tuple[str, int, str], list[Entry]] = {}
        for entry, stage in self.stages():
            if stage.site == "encoder":
                continue
            key = (stage.site, stage.layer, stage.place)
            if stage.site in ("prompt", "projector"):
                key = ("prompt", 0, "")
            self.visits.setdefault(key, []).append(entry)
        inner: Any = self.inner
        if self.root is not inner:
            self.hook(
                self.root.register_forward_pre_hook(Bound(self, "before_root"), with_kwargs=True)
            )
            self.hook(self.root.register_forward_hook(Bound(self, "after_root"), with_kwargs=True))
        self.hook(inner.register_forward_pre_hook(Bound(self, "before_inner"), with_kwargs=True))
        self.hook(self.lm.register_forward_pre_hook(Bound(self, "before_lm"), with_kwargs=True))
        self.hook(self.lm.register_forward_hook(Bound(self, "after_lm"), with_kwargs=True))
        for i, layer in enumerate(self.layers):
            self.hook(layer.register_forward_pre_hook(Bound(self, "before_layer", i), with_kwargs=True))
        for name, modality in MODALITIES.items():
            if hasattr(inner, name):
                bound = Bound(self, "features", name, modality)
                # generate reads the signature to know which inputs to pass.
                bound.__dict__["__signature__"] = inspect.signature(getattr(inner, name))
                self.patch(inner, name, bound)
        watched = self.family.watch(inner)
        if watched is not None:
            self.patch(inner, watched, Bound(self, "watched", watched))
        if hasattr(self.lm, "_deepstack_process"):
            self.patch(self.lm, "_deepstack_process", Bound(self, "deepstack"))
        if hasattr(type(self.root), "_valid_auto_compile_criteria"):
            self.patch(self.root, "_valid_auto_compile_criteria", Bound(self, "never"))

    def never(self, *args: Any, **kwargs: Any) -> bool:
        """generate compiles decoding with static caches by itself; lengths here change from call to call."""
        return False

    # ---- the towers -------------------------------------------------------------------------

    def features(self, name: str, modality: str, *args: Any, **kwargs: Any) -> Any:
        """``get_image_features``: remember what becomes of the tower's tokens."""
        method = getattr(type(self.inner), name)
        if self.running is not None:  # one modality made from the other
            return method(self.inner, *args, **kwargs)
        if modality in self.captures.of:
            self.captures = Captures()
        if not self.captures.of:
            self.trace = Trace()
        capture = Capture()
        self.running = {"capture": capture}
        try:
            out = method(self.inner, *args, **kwargs)
            found = getattr(out, "pooler_output", None)
            if found is not None:
                bound = inspect.signature(method).bind(self.inner, *args, **kwargs)
                given = {**bound.arguments, **bound.arguments.get("kwargs", {}), **self.running}
                capture.lengths = [x.shape[0] for x in found]
                self.family.describe(self.inner, capture, given)
                self.captures.of[modality] = capture
        finally:
            self.running = None
        return out

    def watched(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Remember the arguments of a step between tower and language model."""
        if self.running is not None:
            self.running[name] = (args, kwargs)
        return getattr(type(self.inner), name)(self.inner, *args, **kwargs)

    # ---- the model --------------------------------------------------------------------------

    def before_root(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.labels = None
        if kwargs.get("labels") is None or not _has_features(kwargs):
            return None
        self.labels = kwargs["labels"]
        return args, {**kwargs, "labels": None}

    def after_root(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """The loss of the tokens that were left."""
        labels, self.labels = self.labels, None
        if labels is None:
            return None
        logits = output[0] if isinstance(output, tuple) else output.logits
        layout = None if self.last is None else self.last.layout
        if layout is not None and layout.index.shape[1] != labels.shape[1]:
            labels = follow(labels, layout.index, ~layout.live, -100)
        elif layout is not None:
            labels = labels.masked_fill(~layout.live.to(labels.device), -100)
        if logits.shape[1] != labels.shape[1]:
            raise ValueError(
                f"labels cannot be combined with logits_to_keep: {logits.shape[1]} logits for "
                f"{labels.shape[1]} tokens"
            )
        extra = {k: v for k, v in kwargs.items() if k == "num_items_in_batch"}
        vocab = module.config.get_text_config().vocab_size
        loss = module.loss_function(logits=logits, labels=labels, vocab_size=vocab, **extra)
        if isinstance(output, tuple):
            return (loss, *output)
        output["loss"] = loss
        return output

    def before_inner(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.pending = None
        if kwargs.get("pixel_values") is not None or kwargs.get("pixel_values_videos") is not None:
            self.captures = Captures()  # the towers run inside this call
        if _has_features(kwargs):
            ids = kwargs.get("input_ids", args[0] if args else None)
            found = find(module, ids, kwargs.get("inputs_embeds"))
            self.pending = found if found is not None and bool(found.any()) else None

    # ---- the language model -----------------------------------------------------------------

    def before_lm(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.call, visual, self.pending = None, self.pending, None
        embeds, cache = kwargs.get("inputs_embeds"), kwargs.get("past_key_values")
        if embeds is None:
            return None
        past = length_of(cache)
        if past == 0:
            self.last = None
            if cache is not None:
                forget(cache)
        cuts = cuts_of(cache)
        if visual is None:
            if past == 0:
                self.trace = Trace()
            if cuts is None:
                return None
        elif module.training and torch.is_grad_enabled() and getattr(module, "gradient_checkpointing", False):
            raise RuntimeError(
                "gradient checkpointing cannot be used on a wrapped language model (the second pass "
                "through a layer would cut again): call model.gradient_checkpointing_disable()"
            )
        batch, length = embeds.shape[:2]
        before = past + (0 if cuts is None else cuts.offset)
        mask = self._mask(kwargs.get("attention_mask"), cuts, batch, before, length, embeds.device)
        if mask is None:
            live = torch.ones(batch, length, dtype=torch.bool, device=embeds.device)
            history = None
        else:
            live, history = mask[:, before:], mask[:, :before] if before else None
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(before, before + length, device=embeds.device)[None]
        if visual is not None:
            visual = visual.to(embeds.device)
        call = Call(self, past, live, history, cuts, visual, positions, cache)
        self.call = call
        if visual is not None:
            self._begin(call)
            embeds = self._prompt(call, embeds)
            call.entered = call.layout
        if not call.changed and cuts is None:
            return None
        new = {
            **kwargs,
            "inputs_embeds": embeds,
            # Never None: gaps in positions without a mask are read as several packed sequences.
            "attention_mask": call.mask(0),
            "position_ids": call.moved(0),
        }
        if call.changed:
            index, pad = call.layout.index, ~call.layout.live
            stack = kwargs.get("visual_pos_masks")
            if stack is not None:
                new["visual_pos_masks"] = follow(stack, index, pad, False)
                features = kwargs.get("deepstack_visual_embeds")
                if features is not None:
                    stays = _kept(call.layout, stack)
                    new["deepstack_visual_embeds"] = [f[stays.to(f.device)] for f in features]
            for name in ("token_type_ids", "mm_token_type_ids"):
                value = kwargs.get(name)
                if isinstance(value, Tensor) and value.shape[-1] == length:
                    new[name] = follow(value, index, pad)
        return args, new

    def _mask(
        self, mask: Any, cuts: Any, batch: int, before: int, length: int, device: torch.device
    ) -> Tensor | None:
        first = next(iter(mask.values())) if isinstance(mask, dict) else mask
        if cuts is not None and (isinstance(mask, dict) or (first is not None and first.dim() == 4)):
            if length > 1 and batch > 1:
                raise RuntimeError(
                    "a second turn of several samples with a static cache hides its padding: use a "
                    "dynamic cache, or one sample at a time"
                )
            return None
        return two_dimensional(mask, batch, before + length, device)

    def _begin(self, call: Call) -> None:
        """A new trace, with what the tower has done already."""
        stages = [s for s in self.trace.stages if s.site == "encoder"]
        tokens = {k: v for k, v in self.trace.tokens.items() if k == "encoder"}
        self.trace = Trace(stages, tokens, call.live.shape[0], self.trace.notes)
        self.last = Last(call)

    def _prompt(self, call: Call, embeds: Tensor) -> Tensor:
        for capture in self.captures.of.values():
            if capture.alive is not None:
                alive = self.captures.spreader(call)(capture.alive.float(), 0.0)
                keep = (alive > 0.5) & call.layout.valid
                kept, padded = top_indices(keep.float(), keep.sum(1), keep)
                entry = next(e for e in self.active if e.method.name in capture.cutters)
                step = TokenMap.keep(kept, call.map.n_out, padded)
                embeds = call.commit(entry, "prompt", 0, embeds, Reduction(step))
        for entry in self.visits.get(("prompt", 0, ""), ()):
            embeds = call.visit(entry, "prompt", 0, "", embeds)
        return embeds

    def after_lm(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        call, self.call = self.call, None
        if call is None:
            return
        cuts = call.record()
        if cuts is not None and call.cache is not None:
            remember(call.cache, cuts)
        if call.visual is not None and self.last is not None:
            self.last.layout = call.layout

    # ---- its layers -------------------------------------------------------------------------

    def before_layer(self, i: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = self.call
        if call is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        if i == 0:
            call.cache = kwargs.get("past_key_values")
            call.rope, call.synced = kwargs["position_embeddings"], call.layout
            if call.changed and self.flash:
                call.override = {"position_ids": None}
        if call.visual is not None:
            for entry in self.visits.get(("decoder", i - 1, "end"), ()):
                hidden = call.visit(entry, "decoder", i - 1, "end", hidden)
            self._sync(call, i, hidden)
            for entry in self.visits.get(("decoder", i, "start"), ()):
                hidden = call.visit(entry, "decoder", i, "start", hidden)
                self._sync(call, i, hidden)
            n = call.layout.slots.shape[1]
            self.trace.count("decoder", i, n, n)
            if self.last is not None:
                self.last.lengths.append(call.layout.live)
            if ("decoder", i, "end") in self.visits:
                assert call.rope is not None
                call.seen = Seen(i, hidden, call.rope, call.layout, True)
        else:
            self._sync(call, i, hidden)
        if call.override is None:
            return None
        if args:
            return (hidden, *args[1:]), {**kwargs, **call.override}
        return args, {**kwargs, **call.override, "hidden_states": hidden}

    def _sync(self, call: Call, i: int, hidden: Tensor) -> None:
        """Mask and rotary tables for the tokens that enter layer ``i``."""
        cut = call.synced is not call.layout
        if not cut and (i == 0 or i not in call.boundaries()):
            return
        from transformers.masking_utils import create_causal_mask

        if cut:
            call.segments.append((i, call.layout))
        elif i in call.boundaries():
            call.rope = None
        if call.rope is None or bool(call.layout.adjust.any()):
            positions = call.moved(i)
            if self.mrope:
                positions = positions[-3:] if positions.dim() == 3 else positions.expand(3, -1, -1)
            call.rope = self.lm.rotary_emb(hidden, positions)
        call.synced = call.layout
        call.override = {
            "attention_mask": create_causal_mask(
                self.lm.config, hidden, call.mask(i), call.cache, None, layer_idx=i
            ),
            "position_embeddings": call.rope,
            "position_ids": None,
        }

    def deepstack(self, hidden: Tensor, masks: Tensor, features: Tensor) -> Tensor:
        """Qwen3-VL adds features of the tower after its first layers, for tokens that are left."""
        call = self.call
        if call is not None and hidden.shape[1] != masks.shape[1]:
            layout, entered = call.layout, call.entered
            index, pad = _between(entered, layout)
            stays = torch.zeros_like(masks)
            b, s = (~pad).nonzero(as_tuple=True)
            stays[b.to(masks.device), index[b, s].to(masks.device)] = True
            features = features[stays[masks].to(features.device)]
            masks = follow(masks, index, pad, False)
        return type(self.lm)._deepstack_process(self.lm, hidden, masks, features)

    # ---- costs ------------------------------------------------------------------------------

    def costs(self) -> dict[str, Any] | None:
        return None


class Last:
    """What the last prefill did, for the loss and the report."""

    def __init__(self, call: Call) -> None:
        self.length = call.live
        self.past = call.past
        self.lengths: list[Tensor] = []
        self.layout: Layout | None = None


def _has_features(kwargs: dict[str, Any]) -> bool:
    return any(kwargs.get(name) for name in FEATURES if not isinstance(kwargs.get(name), Tensor)) or any(
        isinstance(kwargs.get(name), Tensor) for name in FEATURES
    )


def _kept(layout: Layout, visual: Tensor) -> Tensor:
    """(number of visual tokens,) bool: which of the entries of a (B, L) mask are left."""
    stays = torch.zeros_like(visual)
    b, s = layout.live.nonzero(as_tuple=True)
    stays[b, layout.index[b, s]] = True
    return stays[visual]


def _between(old: Layout, new: Layout) -> tuple[Tensor, Tensor]:
    """Index and padding that take the sequence of ``old`` to that of ``new``."""
    batch, length = old.index.shape
    width = int(max(old.index.max(), new.index.max())) + 1
    place = torch.zeros(batch, width, dtype=torch.long, device=old.index.device)
    slot = torch.arange(length, device=old.index.device).expand(batch, length)
    b, s = old.live.nonzero(as_tuple=True)
    place[b, old.index[b, s]] = slot[b, s]
    return place.gather(1, new.index), ~new.live
