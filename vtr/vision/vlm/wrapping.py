"""The wrapping of a vision-language model: its hooks, its options and its costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vtr.compat.tested import explain
from vtr.compat.transformers import (
    CHUNKED,
    COMPILES,
    DRAFTS,
    ENCODED,
    ENCODER_OUTPUTS,
    FORWARDED,
    FULL,
    PIXELS,
    RECURRENT,
    SLIDING,
    attention_implementation,
    check_generate,
    has_axes,
    keys_from,
    kinds_of,
    language_module,
    streams_of,
)
from vtr.core.method import Method
from vtr.core.trace import Trace
from vtr.core.wrapping import Bound, Entry, PerThread, Wrapping
from vtr.errors import UnsupportedMethodError
from vtr.vision.vlm.arguments import has_any, has_features, named
from vtr.vision.vlm.attending import LanguageAttention
from vtr.vision.vlm.attention import has_halves, opens, rotate, shows, turn, watch
from vtr.vision.vlm.contrast import ContrastSession
from vtr.vision.vlm.costs import language_costs, tower_costs
from vtr.vision.vlm.drafts import DraftsAfterPrompt
from vtr.vision.vlm.facts import vlm_info
from vtr.vision.vlm.family import VLMFamily
from vtr.vision.vlm.features import Captures
from vtr.vision.vlm.generic import Generic
from vtr.vision.vlm.head import Head, Purpose
from vtr.vision.vlm.kv import KVSession
from vtr.vision.vlm.language import LanguageSession
from vtr.vision.vlm.masks import recurrent_layers
from vtr.vision.vlm.nesting import INNER, LANGUAGE, ROOT, Nesting, forget_compiled
from vtr.vision.vlm.outputs import MODES
from vtr.vision.vlm.packed import PackedSession
from vtr.vision.vlm.placeholders import find
from vtr.vision.vlm.recompute import LayerPass
from vtr.vision.vlm.refusals import check_flash, check_method, check_options, note_on_videos
from vtr.vision.vlm.stored import report as stored_report
from vtr.vision.vlm.tower import TowerSession
from vtr.vision.vlm.tower_calls import TowerCalls
from vtr.vision.vlm.uncached import Held

Turn = Callable[[Tensor, Tensor, Tensor], Tensor]
#: Why the attention of a language model is not read or computed by methods.
SHARES = "its last layers attend to the keys of earlier ones"


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

    # Record of the towers for the coming call of the language model: generate lets a thread's towers run
    # before the model, and other threads may come in between.
    captures = PerThread(make=Captures)
    # Choices of methods for a generate without a cache.
    held = PerThread[Held | None]()
    # A layer that the backward pass runs again, on a GPU in another thread.
    again = PerThread[LayerPass | None]()
    # The trace that this thread's call writes to; ``trace`` is that of the call that began last, in any thread.
    tracing = PerThread[Trace](make=Trace)
    # Arguments of the model's call for the entry of the language model.
    forwarded = PerThread[dict[str, Any]](make=dict)

    def __init__(self, root: Any, inner: Any, family: VLMFamily) -> None:
        self.root = root
        self.inner = inner
        self.family = family
        self.lm: Any = language_of(inner)
        layers: Any = self.lm.layers
        self.layers = layers
        self.kinds = kinds_of(self.lm)
        self.sources, self.streams = keys_from(self.lm), streams_of(self.lm)
        # True if layers get different masks, or more than a causal one.
        self.mixed = family.two_way or self.shares or any(kind not in FULL for kind in self.kinds)
        self.nesting = Nesting()
        self.towers: dict[str, TowerSession | PackedSession] = {}
        self.closed = family.blind or recurrent_layers(self.kinds)
        # True if q, k and v are seen by running the attention: of classes that are proven, and not read here.
        self.watches = False
        if self.shares and not self.closed:
            self.closed = SHARES
        if not self.closed:
            self.closed = next(filter(None, map(opens, layers)), "")
            if self.closed and isinstance(family, Generic):
                self.watches = not any(shows(self.lm, layer) for layer in layers)
                self.closed = "" if self.watches else self.closed
        self._turning: dict[int, Turn] = {}
        super().__init__(root, vlm_info(self))
        self.tower_calls = TowerCalls(self)
        self.language = LanguageSession(self, self.lm)
        self.attention = LanguageAttention(self)
        self.kv = KVSession(self)
        self.head = Head(self)
        self.contrast = ContrastSession(self)

    def begin(self, trace: Trace) -> None:
        """A call begins in this thread, and writes to this trace."""
        self.tracing = self.trace = trace

    # ---- what the model is ------------------------------------------------------------------

    @property
    def mrope(self) -> bool:
        return has_axes(self.inner, self.lm)

    @property
    def shares(self) -> bool:
        """Tell whether layers attend to the keys of earlier ones."""
        return any(source != i for i, source in enumerate(self.sources))

    @property
    def sliding(self) -> bool:
        """Tell whether layers of the language model attend within a window or a chunk, which their caches hold alone."""
        return any(kind in (*SLIDING, *CHUNKED) for kind in self.kinds)

    @property
    def counted(self) -> int:
        """The first layer of the language model that holds keys in a cache."""
        return next((i for i, kind in enumerate(self.kinds) if kind not in RECURRENT), 0)

    @property
    def flash(self) -> bool:
        return "flash" in attention_implementation(self.lm)

    @property
    def identified(self) -> nn.Module:
        """The last layer of the language model: fine-tuning changes it, and towers are shared by many models."""
        return self.layers[-1]  # type: ignore[no-any-return]

    def why(self, problem: str) -> str:
        """A problem of the layers; of a known class, the version of transformers may be to blame."""
        return explain("transformers", problem) if has_halves(self.layers[0]) else problem

    def scale(self, layer: int) -> float | None:
        """The factor of a layer's attention logits, None if its attention is not opened."""
        return None if self.closed else float(self.layers[layer].self_attn.scaling)

    def turning(self, layer: int) -> Turn:
        """The rotary embedding of a layer: a function of x (B, H, R, D), cos and sin."""
        if not self.watches:
            return rotate
        if layer not in self._turning:
            self._turning[layer] = self._found_turn(self.layers[layer])
        return self._turning[layer]

    def _found_turn(self, layer: Any) -> Turn:
        weight = next(layer.parameters())
        hidden = torch.linspace(-1, 1, 2 * self.lm.config.hidden_size)
        hidden = hidden.reshape(1, 2, -1).to(weight)
        size = layer.self_attn.head_dim
        ones, zeros = (make(1, 2, size).to(weight) for make in (torch.ones, torch.zeros))
        still, turned = (
            watch(self.lm, layer, hidden, x)[0] for x in ((ones, zeros), (zeros, ones))
        )
        if torch.equal(still, turned):  # no rotary embedding in this layer
            return lambda x, cos, sin: x
        return partial(turn, layer.self_attn)

    def compact(self, entry: Entry, site: str) -> bool:
        """Tell whether a method's cut at a site numbers positions anew."""
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
        self.contrast.check_together(entries)
        smaller = [e for e, found in sites if "image" in found]
        fewer = [e for e, found in sites if "pixels" in found]
        looks = [e for e, found in sites if "encoder" in found]
        if (smaller or fewer) and looks:
            what = "smaller pictures" if smaller else "parts of the pictures"
            raise ValueError(
                f"{(smaller or fewer)[0].method.name} gives the tower {what}, so that what "
                f"{looks[0].method.name} finds in it does not fit the prompt: apply one of them, or "
                "one that looks at the prompt or in the decoder"
            )
        if len(smaller + fewer) > 1 and fewer:
            names = " and ".join(e.method.name for e in smaller + fewer)
            raise ValueError(f"{names} both change what the tower is given: apply one of them")

        kv = [e for e, found in sites if "kv" in found]
        rows = [e for e, found in sites if "attention" in found and e.method.reads_cache]
        if kv and rows:
            raise ValueError(
                f"{rows[0].method.name} reads the whole KV cache while an answer is written, and "
                f"{kv[0].method.name} drops or packs entries of it: apply one of them"
            )

    def columns(self) -> Tensor:
        return self.language.columns()

    def check(self, method: Method, options: dict[str, Any]) -> None:
        check_options(self, options)
        try:
            super().check(method, options)
        except UnsupportedMethodError as error:
            if self.closed and "'decoder'" in str(error):
                raise UnsupportedMethodError(f"{error} ({self.why(self.closed)})") from None
            raise
        check_flash(self, options)
        check_method(self, method)

    def note(self, method: Method) -> str:
        return note_on_videos(self, method)

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
        self.tower_calls.install()
        self.contrast.install()  # before what shortens a call: it reads what the model was given
        self.language.install()
        self.kv.install()
        self.attention.install()
        if self.root is not inner or hasattr(self.root, "generate"):
            self.head.install()
        self.hook(inner.register_forward_pre_hook(Bound(self, "before_inner"), with_kwargs=True))
        check_generate(self.root)
        if hasattr(self.root, "generate"):
            self.patch(self.root, COMPILES, Bound(self, "never"))
            self.patch(self.root, DRAFTS, Bound(self, "drafts"))
        for module, level in levels:
            leave = Bound(self.nesting, "leave", level)
            self.hook(module.register_forward_hook(leave, always_call=True))

    def drafts(self, *args: Any, **kwargs: Any) -> DraftsAfterPrompt:
        """generate asks for its candidate generator: assisted decoding begins."""
        self.kv.check_drafts()
        self.contrast.refuse_drafts()
        root: Any = self.root
        return DraftsAfterPrompt(getattr(type(root), DRAFTS)(root, *args, **kwargs))

    def never(self, *args: Any, **kwargs: Any) -> bool:
        """generate compiles decoding with static caches by itself; lengths here change from call to call."""
        return False

    def enter(self) -> None:
        """The language model is entered with visual tokens."""
        for capture in self.captures.of.values():
            self.family.enter(capture, self.forwarded)
        self.forwarded = {}

    # ---- the model --------------------------------------------------------------------------

    def before_inner(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.language.pending = self.language.padding = None
        self.language.purpose = self.head.purpose or Purpose()
        given = named(module, args, kwargs)
        mask = given.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            self.language.padding = mask
        self.attention.check(given)
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
        cache = stored_report(last.cache)
        if cache is not None:
            costs["cache"] = cache
        return costs | language_costs(self, last)


def language_of(inner: Any) -> nn.Module:
    """The language model of an inner model."""
    module = language_module(inner)
    assert isinstance(module, nn.Module)
    return module
