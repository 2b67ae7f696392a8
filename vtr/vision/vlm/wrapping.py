"""The wrapping of a vision-language model: its facts, its towers and its costs."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vtr.compat.tested import explain
from vtr.compat.transformers import (
    COMPILES,
    DRAFTS,
    ENCODED,
    ENCODER_OUTPUTS,
    FORWARDED,
    GIVEN_PIXELS,
    MODALITIES,
    PIXELS,
    attention_implementation,
    check_generate,
    language_module,
    masks_otherwise,
)
from vtr.core.method import Method, TokenMethod
from vtr.core.registry import registry
from vtr.core.site import LanguageSizes, ModelInfo
from vtr.core.trace import Trace
from vtr.core.wrapping import Bound, Entry, PerThread, Wrapping
from vtr.errors import UnsupportedMethodError, UnsupportedModelError
from vtr.vision.encoders.image import ask, at_any_size, entry_of, open_image
from vtr.vision.encoders.pooling import has_pooling
from vtr.vision.encoders.session import encoder_info, square_grid
from vtr.vision.vlm.arguments import has_any, has_features, named
from vtr.vision.vlm.attention import has_halves, opens, runs_otherwise
from vtr.vision.vlm.cache_site import CacheSession
from vtr.vision.vlm.costs import language_costs, tower_costs
from vtr.vision.vlm.drafts import DraftsAfterPrompt
from vtr.vision.vlm.family import VLMFamily
from vtr.vision.vlm.features import Capture, Captures, first_token
from vtr.vision.vlm.head import Head, Purpose
from vtr.vision.vlm.language import LanguageSession
from vtr.vision.vlm.nesting import INNER, LANGUAGE, ROOT, Nesting, forget_compiled
from vtr.vision.vlm.outputs import MODES
from vtr.vision.vlm.packed import PackedSession, form_of, packed_info
from vtr.vision.vlm.pictures import Shrunk
from vtr.vision.vlm.placeholders import find
from vtr.vision.vlm.recompute import LayerPass
from vtr.vision.vlm.tower import TowerSession
from vtr.vision.vlm.uncached import Held

TOWER_FACTS = ("prefix", "has_cls", "dim", "heads", "tokens")


class VLMWrapping(Wrapping):
    """A wrapped vision-language model.

    Options:
        positions: ``"original"`` (tokens after a cut keep their positions), ``"compact"`` (they are
            numbered anew), or None, the method's own choice.
        video: whether still images of the same grid that follow one another in a prompt are the frames
            of one video (InternVL's processor makes videos so, as may any prompt of many images).
        flash_attention: whether the language model may run FlashAttention 2 or 3.
        output: ``"aligned"`` or ``"reduced"``, see :mod:`vtr.vision.vlm`; the same for all methods.
    """

    options = {"positions": None, "video": False, "flash_attention": False, "output": "aligned"}

    # What the towers did for the coming call of the language model: generate lets a thread's towers run
    # before the model, and other threads may come in between.
    captures = PerThread(make=Captures)
    # What methods chose for a generate without a cache.
    held = PerThread[Held | None]()
    # A layer that the backward pass runs again: in a thread of its own on a GPU.
    again = PerThread[LayerPass | None]()
    # What this thread's call writes to; ``trace`` is that of the call that began last, in any thread.
    tracing = PerThread[Trace](make=Trace)
    # Arguments of steps between tower and language model, while a ``get_..._features`` runs.
    running = PerThread[dict[str, Any] | None]()
    # Whether the tower is given pictures of another size.
    resizing = PerThread[bool](False)
    # Arguments of the model's call for the entry of the language model.
    forwarded = PerThread[dict[str, Any]](make=dict)

    def __init__(self, root: Any, inner: Any, family: VLMFamily) -> None:
        self.inner = inner
        self.family = family
        self.lm: Any = language_of(inner)
        self.layers: Any = self.lm.layers
        self.nesting = Nesting()
        self.towers: dict[str, TowerSession | PackedSession] = {}
        super().__init__(root, self._info())
        self.language = LanguageSession(self, self.lm)
        self.cache = CacheSession(self)
        self.head = Head(self)

    def begin(self, trace: Trace) -> None:
        """A call begins in this thread, and writes to this trace."""
        self.tracing = self.trace = trace

    # ---- what the model is ------------------------------------------------------------------

    def _info(self) -> ModelInfo:
        config = self.lm.config
        layers = len(self.layers)
        depth = {"prompt": 1, "decoder": layers, "cache": layers}
        look = frozenset({"hidden", "text"})
        decoder = look
        self.closed = next(filter(None, map(opens, self.layers)), "")
        if not self.closed:
            decoder = look | {"queries", "keys", "values", "text_attention", "attention_received"}
        heads = config.num_attention_heads
        language = LanguageSizes(
            config.hidden_size,
            heads,
            getattr(config, "num_key_value_heads", heads),
            getattr(config, "head_dim", None) or config.hidden_size // heads,
        )
        facts = self._tower()
        if facts is not None:
            depth |= facts.depth
            look |= {"encoder_scores"}
            decoder |= {"encoder_scores"}
        common: dict[str, Any] = {n: getattr(facts, n) for n in TOWER_FACTS if facts is not None}
        if facts is not None:
            common["last_layer"] = self.family.last_layer(self.inner, facts.depth["encoder"])
        if not self.family.fixed:
            common["tokens"] = None
        signals = {} if facts is None else dict(facts.signals)
        if facts is not None and all(map(has_pooling, (s.tower for s in self.towers.values()))):
            signals["encoder"] |= {"pooling"}
        cache = frozenset() if self.closed else frozenset({"newest_attention"})
        signals |= {"prompt": look, "decoder": decoder, "cache": cache}
        info = ModelInfo(
            f"transformers {self.family.title}",
            depth,
            signals,
            tower_cuts=not self.family.cuts,
            decoder_middle=has_halves(self.layers[0]),
            mrope=self.mrope,
            language=language,
            **common,
        )
        open_image(info, self.family.fixed_size(self.inner))
        return info

    def _tower(self) -> ModelInfo | None:
        """Open the vision towers; None where methods can only look from the prompt on."""
        facts: ModelInfo | None = None
        opened: dict[Any, TowerSession | PackedSession] = {}
        for kind in MODALITIES.values():
            tower: Any = self.family.tower(self.inner, kind)
            if tower not in opened:
                session, facts = self._open(tower)
                if session is None:
                    return None
                opened[tower] = session
            self.towers[kind] = opened[tower]
        return facts

    def _open(self, tower: Any) -> tuple[TowerSession | PackedSession | None, ModelInfo | None]:
        from vtr.vision.encoders.transformers import tower_parts

        if form_of(tower) is not None:
            packed = PackedSession(self, tower)
            return packed, packed_info(packed)
        try:
            parts = tower_parts(tower)
        except UnsupportedModelError:
            return None, None
        session = TowerSession(self, parts.runners, parts.prefix, square_grid, tower)
        return session, encoder_info("", **parts._asdict(), pixels=True)

    @property
    def mrope(self) -> bool:
        parameters = getattr(self.lm.config, "rope_parameters", None) or {}
        return "mrope_section" in parameters

    @property
    def sliding(self) -> bool:
        """Whether layers of the language model attend within a window."""
        config = self.lm.config
        types = getattr(config, "layer_types", None)
        if types is not None:
            return any(t != "full_attention" for t in types)
        return getattr(config, "sliding_window", None) is not None

    @property
    def flash(self) -> bool:
        return "flash" in attention_implementation(self.lm)

    def check_flash(self, options: dict[str, Any]) -> None:
        """Refuse FlashAttention in the language model unless the caller asked for it.

        What is given to it is right (no positions with gaps, which it reads as packed sequences), but
        its results after a cut have never been compared on a GPU.
        """
        if self.flash and not options.get("flash_attention"):
            name = attention_implementation(self.lm)
            raise UnsupportedMethodError(
                f"the language model runs {name!r}, whose results after a cut have not been proven on "
                "a GPU: call model.set_attn_implementation('sdpa') (it has flash kernels of its own), "
                "or pass flash_attention=True to use it all the same"
            )

    def why(self, problem: str) -> str:
        """A problem of the layers; of a known class, the version of transformers may be to blame."""
        return explain("transformers", problem) if has_halves(self.layers[0]) else problem

    def scale(self, layer: int) -> float | None:
        """The factor of a layer's attention logits, None where its attention is not opened."""
        return None if self.closed else float(self.layers[layer].self_attn.scaling)

    def compact(self, entry: Entry, site: str) -> bool:
        """Whether a method's cut at a site numbers positions anew."""
        if self.mrope:
            return False
        chosen = entry.options.get("positions")
        return (entry.token_method.positions_at(site) if chosen is None else chosen) == "compact"

    @property
    def output(self) -> str:
        """The option ``output`` of the active methods."""
        return next((str(e.options["output"]) for e in self.active), MODES[0])

    def check_together(self, entries: Sequence[Entry]) -> None:
        super().check_together(entries)
        if len({entry.options["output"] for entry in entries}) > 1:
            raise ValueError(
                "methods applied to one model return their outputs in one way: give all of them "
                "output='aligned' or all output='reduced'"
            )
        sites = [(e, {s.site for s in e.method.stages(self.info)}) for e in entries]
        smaller = [e for e, found in sites if "image" in found]
        looks = [e for e, found in sites if "encoder" in found]
        if smaller and looks:
            raise ValueError(
                f"{smaller[0].method.name} gives the tower smaller pictures, so that what "
                f"{looks[0].method.name} finds in it does not fit the prompt: apply one of them, or "
                "one that looks at the prompt or in the decoder"
            )

    def columns(self) -> Tensor:
        return self.language.columns()

    def check(self, method: Method, options: dict[str, Any]) -> None:
        output = options.get("output", MODES[0])
        if output not in MODES:
            raise ValueError(f"output must be one of {MODES}, got {output!r}")
        positions = options.get("positions")
        if positions not in (None, "original", "compact"):
            raise ValueError(f"positions must be 'original', 'compact' or None, got {positions!r}")
        if positions == "compact" and self.mrope:
            raise ValueError(
                f"positions='compact' is not defined for {self.info.family}: its positions are "
                "two-dimensional (m-RoPE); use positions='original'"
            )
        try:
            super().check(method, options)
        except UnsupportedMethodError as error:
            if self.closed and "'decoder'" in str(error):
                raise UnsupportedMethodError(f"{error} ({self.why(self.closed)})") from None
            raise
        self.check_flash(options)
        # What a tower cuts is taken out of the prompt as well.
        stages = method.stages(self.info)
        shortens = any(stage.site != "encoder" or stage.cuts for stage in stages)
        odd = runs_otherwise(self.layers[0]) or masks_otherwise()
        if odd and shortens:
            odd = self.why(f"{odd}, by which a cut is carried out")
            raise UnsupportedMethodError(f"{method.name} cannot cut for this language model: {odd}")
        if self.sliding and shortens:
            raise UnsupportedMethodError(
                f"{method.name} cannot cut for a language model with sliding-window layers: their "
                "windows count tokens, and would reach further back after a cut"
            )
        for stage in stages:
            if stage.site == "encoder" and self.family.cuts and stage.cuts:
                raise UnsupportedMethodError(
                    f"{method.name} cuts inside the vision tower, which {self.info.family} does not "
                    f"allow: {self.family.cuts}"
                )
            if stage.site == "cache" and stage.layer < 1:
                raise ValueError(
                    f"{method.name}: layer 0 holds the whole cache, so that a visit of the cache is at a "
                    f"layer in 1..{len(self.layers) - 1}, got {stage!r}"
                )
            if stage[::2] == ("decoder", "middle") and not self.info.decoder_middle:
                raise UnsupportedMethodError(
                    f"{method.name} acts between attention and MLP of layer {stage.layer}, where "
                    f"{type(self.layers[0]).__name__} cannot be opened: use the layer's end"
                )
            if stage[:2] == ("decoder", len(self.layers) - 1) and stage.place != "start":
                raise ValueError(
                    f"{method.name}: nothing comes after layer {stage.layer}, the last of "
                    f"{len(self.layers)}"
                )

    def takes_videos(self, method: Method) -> bool:
        """Whether a method that works on this model works for its videos, too."""
        if not self.family.pooled or (isinstance(method, TokenMethod) and method.rejoins):
            return True
        return not any(s.site == "encoder" and s.cuts for s in method.stages(self.info))

    def for_videos(self, without: Collection[str]) -> str:
        """Names of the methods that work for videos, without some of them."""
        names = []
        for name, cls in registry().items():
            try:
                self.check(cls(), dict(self.options))
            except (UnsupportedMethodError, ValueError):
                continue
            if name not in without and self.takes_videos(cls()):
                names.append(name)
        return ", ".join(names)

    def note(self, method: Method) -> str:
        if self.takes_videos(method):
            return ""
        return (
            "it cuts inside the vision tower, which works for images and not for videos "
            f"({self.family.pooled}). For videos use one of {self.for_videos([method.name])}"
        )

    # ---- hooks ------------------------------------------------------------------------------

    def install(self) -> None:
        inner: Any = self.inner
        forget_compiled()
        levels = [(self.root, ROOT), (inner, INNER), (self.lm, LANGUAGE)]
        levels = levels[self.root is inner :]
        for module, level in levels:
            enter = Bound(self.nesting, "enter", level)
            self.hook(module.register_forward_pre_hook(enter))
        if any(stage.site == "encoder" for _, stage in self.stages()):
            for session in dict.fromkeys(self.towers.values()):
                session.install()
        if entry_of(self) is not None:
            towers = {self.family.tower(inner, kind) for kind in MODALITIES.values()}
            for tower in towers:
                embeddings = getattr(tower, GIVEN_PIXELS[0], None)
                if isinstance(embeddings, nn.Module):
                    hook = Bound(self, "at_any_size")
                    self.hook(embeddings.register_forward_pre_hook(hook, with_kwargs=True))
        self.language.install()
        self.cache.install()
        if self.root is not inner:
            self.head.install()
        self.hook(inner.register_forward_pre_hook(Bound(self, "before_inner"), with_kwargs=True))
        for name, modality in MODALITIES.items():
            if hasattr(inner, name):
                bound = Bound(self, "features", name, modality)
                # generate reads the signature to know which inputs to pass.
                bound.__dict__["__signature__"] = inspect.signature(getattr(inner, name))
                self.patch(inner, name, bound)
        watched = self.family.watch(inner)
        if watched is not None:
            self.patch(inner, watched, Bound(self, "watched", watched))
        check_generate(self.root)
        if hasattr(self.root, "generate"):
            self.patch(self.root, COMPILES, Bound(self, "never"))
            self.patch(self.root, DRAFTS, Bound(self, "drafts"))
        for module, level in levels:
            leave = Bound(self.nesting, "leave", level)
            self.hook(module.register_forward_hook(leave, always_call=True))

    def drafts(self, *args: Any, **kwargs: Any) -> DraftsAfterPrompt:
        """generate asks for its candidate generator: assisted decoding begins."""
        root: Any = self.root
        return DraftsAfterPrompt(getattr(type(root), DRAFTS)(root, *args, **kwargs))

    def never(self, *args: Any, **kwargs: Any) -> bool:
        """generate compiles decoding with static caches by itself; lengths here change from call to call."""
        return False

    # ---- the towers -------------------------------------------------------------------------

    def features(self, name: str, modality: str, *args: Any, **kwargs: Any) -> Any:
        """``get_image_features``: remember what becomes of the tower's tokens."""
        method = getattr(type(self.inner), name)
        if self.running is not None:  # one modality made by way of the other
            return method(self.inner, *args, **kwargs)
        return self._capture(method, modality, args, kwargs)

    def _capture(
        self, method: Any, modality: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if modality in self.captures.of:
            self.captures = Captures()
        if not self.captures.of:
            self.captures.trace = Trace()
        self.begin(self.captures.trace)
        capture = Capture(modality)
        running = self.running = {}
        bound = inspect.signature(method).bind(self.inner, *args, **kwargs)
        given = {**bound.arguments, **bound.arguments.get("kwargs", {})}
        capture.numbers = partial(self.family.crops, self.inner, capture, given)
        tower = self.towers.get(modality)
        if tower is not None:
            tower.capture = capture
        try:
            shrunk = self._shrunk(modality, given)
            if shrunk is None:
                out = method(self.inner, *args, **kwargs)
            else:
                out = self._smaller(method, shrunk, args, kwargs)
            found = getattr(out, "pooler_output", None)
            if found is not None:
                if shrunk is not None:
                    capture.coarse = shrunk.widen(out)
                    found = out.pooler_output
                given |= running
                capture.lengths = [x.shape[:-1].numel() for x in found]
                first = first_token(out)
                capture.first = None if first is None else first.clone()
                self.family.describe(self.inner, capture, given)
                self.captures.of[modality] = capture
        finally:
            self.running = None
            if tower is not None:
                tower.capture = None
        return out

    def _shrunk(self, modality: str, given: dict[str, Any]) -> Shrunk | None:
        """What a method makes of the pictures of a call, None where it leaves all of them."""
        entry = entry_of(self)
        pictures = None if entry is None else self.family.pictures(self.inner, modality, given)
        if entry is None or pictures is None:
            return None
        blank, memory = torch.empty(0, device="cpu"), dict[str, Any]()
        notes = self.tracing.notes
        shrunk = Shrunk(pictures, lambda grid: ask(self, entry, 1, grid, blank, memory, notes))
        return None if shrunk.entry is None else shrunk

    def _smaller(
        self, method: Any, shrunk: Shrunk, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Make the features of smaller pictures."""
        new = shrunk.arguments()
        names = [n for n in inspect.signature(method).parameters if n != "self"]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        for name in given.keys() - set(names) - new.keys():
            if name.startswith(("image_", "video_")) and isinstance(given[name], Tensor):
                raise UnsupportedMethodError(
                    f"a method makes the pictures smaller, and {name} was computed for the larger "
                    "ones: leave it out"
                )
        self.resizing = True
        try:
            return method(self.inner, **{**given, **new})
        finally:
            self.resizing = False

    def at_any_size(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A tower's embedding is given pictures of another size."""
        return at_any_size(module, args, kwargs) if self.resizing else None

    def enter(self) -> None:
        """The language model is entered with visual tokens."""
        for capture in self.captures.of.values():
            self.family.enter(capture, self.forwarded)
        self.forwarded = {}

    def watched(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Remember the arguments of a step between tower and language model."""
        if self.running is not None:
            self.running[name] = (args, kwargs)
        return getattr(type(self.inner), name)(self.inner, *args, **kwargs)

    # ---- the model --------------------------------------------------------------------------

    def before_inner(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.language.pending = None
        self.language.purpose = self.head.purpose or Purpose()
        given = named(module, args, kwargs)
        made = given.get(ENCODER_OUTPUTS)
        elsewhere = made is not None and not (isinstance(made, dict) and self.captures.made(made))
        if elsewhere or has_any(given, (*PIXELS, *ENCODED)):
            self.captures = Captures()  # the towers run inside this call, or the caller ran them
        if has_features(given):
            found = find(module, given.get("input_ids"), given.get("inputs_embeds"))
            self.forwarded = {name: given[name] for name in FORWARDED if name in given}
            self.language.pending = found if found is not None and bool(found.any()) else None

    # ---- costs ------------------------------------------------------------------------------

    def costs(self) -> dict[str, Any] | None:
        last = self.language.last
        if last is None:
            return None
        costs: dict[str, Any] = {}
        batch = last.valid.shape[0]
        made = last.captures.of
        if "encoder" in self.trace.tokens and made:
            tower = self.towers[next(iter(made))]
            if isinstance(tower, TowerSession):
                crops = sum(c.crops for c in made.values())
                costs["encoder"] = tuple(round(f * crops / batch) for f in tower.flops())
        towers = tower_costs(self, last)
        if towers is not None:
            costs["encoder"] = towers
        return costs | language_costs(self, last)


def language_of(inner: Any) -> nn.Module:
    """The language model of an inner model."""
    module = language_module(inner)
    assert isinstance(module, nn.Module)
    return module
