"""Watch the attention of image or video tokens to the text, while a pipeline runs unchanged."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtr.compat.diffusers import CONTEXT, DISPATCHED, ENDED, parallel_of
from vtr.core.wrapping import Bound, wrapping_of
from vtr.diffusion.adapter import DiffusionWrapping
from vtr.diffusion.families import blocks_of, layers_of
from vtr.diffusion.processor import SiteProcessor, site_processor
from vtr.diffusion.views import Grid
from vtr.errors import UnsupportedModelError

# Families with text in cross attention: the module of a block that computes it.
CROSS = {
    **dict.fromkeys(("Wan", "Wan-VACE", "Wan-Animate", "SkyReels-V2"), "attn2"),
    **dict.fromkeys(("LTX-Video", "LTX-2", "PixArt", "HunyuanDiT"), "attn2"),
    "Kandinsky-5": "cross_attention",
}
# Families whose joint text has other tokens before those of the prompt, or that reorder them.
MIXED = frozenset({"Z-Image", "HunyuanVideo-1.5", "HunyuanImage", "FramePack", "AuraFlow"})
# The arguments of a transformer whose tokens are the keys of cross attention, one after another.
TEXTS = ("encoder_hidden_states", "encoder_hidden_states_t5")
# The call of a step that has the prompt: alone, or behind the negative prompt in one batch. Pipelines
# that give their calls no name have it in the first ("0").
CONDITIONAL = frozenset({"cond", "cond_uncond", "pred_cond", "0"})


class TextCall(NamedTuple):
    """The queries of one sample, and the keys that they see, in one attention layer.

    Attributes:
        layer: 0-based number among the layers that see text.
        step, steps: 0-based denoising step, and how many the run has (None if that is not known).
        grid: (frames, height, width) of the queries; an image has one frame, references of an edit left out.
        q: (1, H, N, D), N = frames * height * width in raster order, after norms and rotary embedding.
        k: (1, Hk, S, D), all keys of the call.
        text: the place of the text among the keys.
        mask: what the attention adds to its scores, broadcast to (1, H, N, S); in a bool one, True is seen.
        scale: factor of the scores.
    """

    layer: int
    step: int
    steps: int | None
    grid: Grid
    q: Tensor
    k: Tensor
    text: slice
    mask: Tensor | None
    scale: float


class TextWatch(DiffusionWrapping):
    """Shows each attention call that sees text, in the part of a run that has the prompt.

    The attention function runs as it is, on the same arguments: results are bit-identical to those of a
    pipeline that is not watched.

    Args:
        root: from :func:`vtr.diffusion.targets.locate`.
        samples: images or videos of a run.
        sample: 0-based number of the one to watch.
        seen: called with each :class:`TextCall`.

    Raises:
        UnsupportedModelError: the transformer has no text, or has a method of :func:`vtr.apply`.
    """

    def __init__(
        self, root: nn.Module, samples: int, sample: int, seen: Callable[[TextCall], None]
    ) -> None:
        super().__init__(root)
        self.samples, self.sample, self.seen = samples, sample, seen
        self.text_length = 0
        self.cross = CROSS.get(self.family.name)
        if self.family.name in MIXED:
            raise UnsupportedModelError(
                f"{self.family.name} has padding, registers or image features among the tokens of its text: "
                "the places of words are not known"
            )
        if not self.family.joint and self.cross is None:
            raise UnsupportedModelError(
                f"{self.family.name} has no attention to words that can be watched: its condition is a "
                "class, is added to the tokens, or comes in several parts"
            )
        if wrapping_of(root) is not None:
            raise UnsupportedModelError(
                "this pipeline has a method of vtr.apply: remove its handle, watch the dense run"
            )
        self.layers = len(self._watched(self.members[0]))

    def _watched(self, member: Any) -> list[Any]:
        if self.cross is None:
            return [attention for _, attention in layers_of(self.family, member)]
        blocks = blocks_of(self.family, member)
        return [getattr(block, self.cross) for block in blocks if hasattr(block, self.cross)]

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Watch what runs inside; everything is as before at the end."""
        try:
            self.install()
            yield
        finally:
            self.uninstall()

    def install(self) -> None:
        for index, member in enumerate(self.members):
            for layer, attention in enumerate(self._watched(member)):
                current = attention.processor
                if isinstance(current, SiteProcessor):
                    current = current.vtr_original
                watching = site_processor(current, Bound(self, "attention", layer))
                self.patch(attention, "processor", watching)
            if self.family.loops:
                part = getattr(member, self.family.loops)
                self.hook(part.register_forward_pre_hook(Bound(self, "count_rows")))
            if hasattr(member, CONTEXT):
                self.patch(member, CONTEXT, Bound(self, "context", index))
                self.patch(member, ENDED, Bound(self, "ended", index))
            self.hook(
                member.register_forward_pre_hook(Bound(self, "enter", index), with_kwargs=True)
            )
            self.hook(member.register_forward_hook(Bound(self, "leave")))

    def _adopt(self, model: nn.Module) -> None:
        """Nothing: processors that are set during a run are not watched."""

    @torch.compiler.disable
    def enter(
        self, index: int, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        super().enter(index, model, args, kwargs)
        given = inspect.signature(type(model).forward).bind(model, *args, **kwargs).arguments
        texts = [given[name] for name in TEXTS if given.get(name) is not None]
        self.text_length = sum(text.shape[1] for text in texts)

    @torch.compiler.disable
    def attention(
        self, layer: int, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        out: Tensor = function(*args, **kwargs)
        if self.inside:
            with torch.no_grad():
                self._show(
                    layer, function is F.scaled_dot_product_attention,
                    {**dict(zip(DISPATCHED, args, strict=False)), **kwargs},
                )  # fmt: skip
        return out

    def _show(self, layer: int, heads_first: bool, given: dict[str, Any]) -> None:
        assert self.call is not None
        facts = self.call.facts
        q, k = (given[name] for name in DISPATCHED[:2])
        if not heads_first:
            q, k = q.transpose(1, 2), k.transpose(1, 2)
        if self.family.loops and q.shape[2] == k.shape[2]:
            row, rows = self.call.next_sample(layer), self.call.batch
        else:
            row, rows = -1, q.shape[0]
        text = self._text(q, k)
        if text is None or facts.branch not in CONDITIONAL:
            return
        if parallel_of(given.get("parallel_config")) is not None:
            raise UnsupportedModelError(
                "each process has a part of the sequence under context parallelism: look at words in one "
                "process"
            )
        if rows < self.samples:
            raise RuntimeError(
                f"attention layer {layer} has {rows} samples, and the run makes {self.samples}: "
                "prompts and images per prompt do not say how many there are"
            )
        # The negative prompt is in front if both are in one batch.
        wanted = rows - self.samples + self.sample
        if row >= 0 and row != wanted:
            return
        pick = 0 if row >= 0 else wanted
        mask = given.get("attn_mask")
        if mask is not None and mask.ndim == 2:  # a bit for each key
            mask = mask[:, None, None]
        if mask is not None and mask.shape[0] > 1:
            mask = mask[pick : pick + 1]
        # An image has one frame; the frames behind it are references.
        grid = facts.grid if self.family.video else (1, *facts.grid[1:])
        tokens = math.prod(grid)
        first = text.stop if self.cross is None and facts.text_first else 0
        if mask is not None and mask.shape[-2] > 1:
            mask = mask[..., first : first + tokens, :]
        scale = given.get("scale")
        self.seen(
            TextCall(
                layer, facts.step, facts.steps, grid, q[pick : pick + 1, :, first : first + tokens],
                k[pick : pick + 1], text, mask,
                1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale),
            )
        )  # fmt: skip

    def _text(self, q: Tensor, k: Tensor) -> slice | None:
        """The place of the text among the keys; None for attention to something else."""
        assert self.call is not None
        tokens, keys = math.prod(self.call.facts.grid), k.shape[2]
        if self.cross is not None:  # image prompts and the like have another number of keys
            return slice(0, keys) if keys == self.text_length and q.shape[2] == tokens else None
        if q.shape[2] != keys or keys <= tokens:
            return None
        keys -= self.call.facts.extra  # references, behind the grid if the text is first
        if self.call.facts.text_first:
            return slice(0, keys - tokens) if keys > tokens else None
        return slice(tokens, keys)
