"""DyCoke: thin frames that repeat the one before; then a KV cache that follows the newest token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.core.budget import Keep, check_count, check_keep, check_number, count, counts
from vtr.core.language_site import CacheSite, LanguageSite
from vtr.core.method import Examples, Reduction, Stage, TokenMethod
from vtr.core.presets import Presets
from vtr.core.registry import register
from vtr.core.site import ModelInfo
from vtr.core.tokens import TokenMap, top_indices
from vtr.methods.common.temporal import Cutting, best, clips, in_videos, neighbour_similarity

WINDOW = 4


@register
@dataclass(frozen=True)
class DyCoke(Presets, TokenMethod):
    """DyCoke (CVPR 2025, arXiv 2411.15024): temporal merging, then a dynamic KV cache.

    Before the language model, in windows of four frames, the first stays whole. Frames 1 and 3 are
    compared with the frame before them, frame 2 with frame 0, place by place (cosine of the embeddings,
    before any thinning); of each of the three the ``keep`` least similar tokens stay, the others are
    dropped. The number of tokens left does not depend on the content: of every four frames of P tokens
    P + 3 ``count(keep, P)``, 47.5 % at the published K = 0.7. Still images and separators stay whole.

    While the answer is written, layers after ``layer`` hold the keys and values of only the ``kv`` share of
    the video's tokens: those that the newest token attends to most in ``layer`` (mean over heads). The
    method chooses again when that attention's cosine to the step before falls below ``similarity``. Layers
    up to ``layer`` hold all. The last token of the prompt makes the first choice.

    Unlike the authors' code, this frees memory (their cache keeps everything, and the
    chosen entries are copied out of it in every step). Other entries are moved to CPU memory
    (``evicted="cpu"``), from which a new choice takes them, or are dropped (``evicted="drop"``): then the
    first choice is kept. This part acts in ``generate``; a forward without a cache has nothing to choose
    from. If one call brings several tokens (a later turn, assisted decoding), the last of them chooses
    for all: with ``evicted="cpu"`` assisted decoding may give another answer than unassisted decoding.

    Other differences from the authors' code: it leaves frame 2 of the last window whole, and a frame
    after the last pair out; they choose first in the first decoding step, and go back to the whole cache
    in steps whose attention is as before (here the choice stays); tokens stay in raster order (theirs are
    ordered by dissimilarity inside a frame, which gives them other positions than their places have); a
    fraction is rounded up as everywhere here (at K = 0.7 and 196 tokens 59 instead of 58).

    Args:
        keep: budget per thinned frame, three of every four: 1 - K of the paper. An int is a number of
            tokens per thinned frame.
        kv: budget of the video's tokens in the later layers' cache, 1 - P of the paper; an int is a number
            per sample. None leaves the cache whole.
        layer: 0-based, the layer whose attention chooses; None is the third of 28 (the published L = 3:
            fewer from the fourth on), scaled.
        similarity: cosine of the attention below which the method chooses again.
        evicted: ``"cpu"`` or ``"drop"``.
    """

    name: ClassVar[str] = "dycoke"
    paper: ClassVar[str] = (
        "DyCoke: Dynamic Compression of Tokens for Fast Video LLMs, CVPR 2025, arXiv 2411.15024"
    )
    sites: ClassVar[tuple[str, ...]] = ("prompt", "cache")
    needs: ClassVar = {
        "prompt": frozenset({"hidden"}),
        "cache": frozenset({"newest_attention"}),
    }
    positions: ClassVar[str] = "compact"

    PRESETS: ClassVar = {
        "llava-onevision-7b/47.5%": {"keep": 58},
        "llava-onevision-7b/62.5%": {"keep": 98},
        "llava-onevision-7b/77.5%": {"keep": 137},
    }
    """K = 0.7, 0.5 and 0.3, by the share that enters the language model: tokens of a thinned frame of 196,
    rounded down as the authors do, and P = 0.7 of their script."""

    keep: Keep = 0.3
    kv: Keep | None = 0.3
    layer: int | None = None
    similarity: float = 0.9
    evicted: str = "cpu"

    @classmethod
    def examples(cls) -> Examples:
        return {"everything": (cls(keep=1.0, kv=None),), "counted": ()}

    def validate(self) -> None:
        self._set("keep", check_keep(self.keep))
        if self.kv is not None:
            self._set("kv", check_keep(self.kv, "kv"))
        check_count(self.layer, "layer", low=0, none=True)
        check_number(self.similarity, "similarity", -1, 1)
        if self.evicted not in ("cpu", "drop"):
            raise ValueError(f"evicted must be 'cpu' or 'drop', got {self.evicted!r}")

    def requirements(self, info: ModelInfo) -> dict[str, frozenset[str]]:
        if self.kv is None:
            return {"prompt": self.needs["prompt"]}
        return dict(self.needs)

    def retained(self, frames: int, tokens: int) -> int:
        """Tokens left of a video of ``frames`` frames of ``tokens`` tokens each."""
        whole = -(-frames // WINDOW)
        return whole * tokens + (frames - whole) * count(self.keep, tokens)

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        if self.kv is None:
            return (Stage("prompt", 0),)
        depth = info.depth["decoder"]
        layer = max(0, 3 * depth // 28 - 1) if self.layer is None else self.layer
        if layer > depth - 2:
            raise ValueError(f"layer must be in 0..{depth - 2} for {depth} layers, got {layer}")
        place = "follow" if self.evicted == "cpu" else "from"
        return Stage("prompt", 0), Stage("cache", layer + 1, place)

    def reduce(self, site: Any) -> Reduction | None:
        if site.site == "cache":
            return self._choose(site)
        return self._thin(site)

    def _thin(self, site: LanguageSite) -> Reduction | None:
        cutting = Cutting(site)
        for clip in clips(site, self.name):
            stays = thin(clip.of(site.hidden), count(self.keep, clip.tokens.shape[1]))
            index = torch.arange(stays.numel(), device=site.device)
            cutting.put(clip, torch.where(stays.flatten(), index, -1))
        return cutting.reduction()

    def _choose(self, site: CacheSite) -> Reduction | None:
        """At the cache after the prompt, or in a decoding step."""
        assert self.kv is not None
        if site.kept is None:
            site.state["video"] = in_videos(site)
        moving: Tensor = site.state["video"]
        row = site.newest_attention().masked_fill(~moving, 0)
        before: Tensor | None = site.state.get("row")
        site.state["row"] = row
        number = counts(self.kv, moving.sum(1))
        alike = torch.zeros(site.batch, dtype=torch.bool, device=row.device)
        if before is not None:
            alike = F.cosine_similarity(row, before, dim=1) >= self.similarity
        if bool((number == moving.sum(1)).all() | alike.all()):  # one look at the device per step
            return None
        stays = best(row, number, moving) | (site.valid_mask & ~moving)
        kept, has_padding = top_indices(stays.float(), stays.sum(1), stays)
        if site.kept is not None:
            kept = torch.where(alike[:, None], site.kept, kept)
        return Reduction(TokenMap.keep(kept, site.n, has_padding), absolute=site.kept is not None)


def thin(x: Tensor, number: int) -> Tensor:
    """Choose the tokens of (T, P, C) features that stay, (T, P) bool: ``number`` of each thinned frame."""
    t, p, _ = x.shape
    likeness = torch.zeros(t, p, device=x.device)
    if t > 1:
        likeness[1::2] = neighbour_similarity(x)[::2]
    if t > 2:
        likeness[2::WINDOW] = neighbour_similarity(x, 2)[::WINDOW]
    numbers = torch.full((t,), number, device=x.device)
    numbers[::WINDOW] = p
    return best(-likeness, numbers, torch.ones_like(likeness, dtype=torch.bool))
