"""DyCoke: thin frames that repeat the one before; then a KV cache that follows the newest token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.core.budget import Keep, check_count, check_keep, check_number, count, counts
from vtr.core.kv_site import Change, KVSite
from vtr.core.language_site import LanguageSite
from vtr.core.method import Examples, Reduction, Stage, TokenMethod
from vtr.core.presets import Presets
from vtr.core.registry import register
from vtr.core.site import ModelInfo
from vtr.methods.common.kv import KVChoices
from vtr.methods.common.temporal import Cutting, best, clips, neighbour_similarity

WINDOW = 4


@register
@dataclass(frozen=True)
class DyCoke(Presets, KVChoices, TokenMethod):
    r"""DyCoke (CVPR 2025, arXiv 2411.15024): temporal merging, then a dynamic KV cache.

    Before the language model, in windows of four frames, the first stays whole. Frames 1 and 3 are
    compared with the frame before them, frame 2 with frame 0, place by place (cosine of the embeddings,
    before any thinning); of each of the three the ``keep`` least similar tokens stay, the others are
    dropped. The number of tokens left does not depend on the content: of every four frames of P tokens
    P + 3 ``count(keep, P)``, 47.5 % at the published K = 0.7. Still images and separators stay whole.

    .. math::

        c_j^t = \cos(x_j^t, x_j^{t'}), \qquad \text{frame } t \text{ keeps its tokens of smallest } c_j^t,
        \qquad n = P + 3 \lceil \mathrm{keep} \cdot P \rceil \text{ of } 4P

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
    sites: ClassVar[tuple[str, ...]] = ("prompt", "kv")
    needs: ClassVar = {
        "prompt": frozenset({"hidden"}),
        "kv": frozenset({"entries"}),
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
        layer, depth = self.layer_in(info), info.depth["kv"]
        if layer > depth - 2:
            raise ValueError(f"layer must be in 0..{depth - 2} for {depth} layers, got {layer}")
        later = (Stage("kv", n) for n in range(layer + 1, depth))
        return Stage("prompt", 0), Stage("kv", layer, cuts=False), *later

    def layer_in(self, info: ModelInfo) -> int:
        """The layer whose attention chooses."""
        depth = info.depth["kv"]
        return max(0, 3 * depth // 28 - 1) if self.layer is None else self.layer

    def reduce(self, site: Any) -> Reduction | None:
        return self._thin(site)

    def _thin(self, site: LanguageSite) -> Reduction | None:
        cutting = Cutting(site)
        for clip in clips(site, self.name):
            stays = thin(clip.of(site.hidden), count(self.keep, clip.tokens.shape[1]))
            index = torch.arange(stays.numel(), device=site.device)
            cutting.put(clip, torch.where(stays.flatten(), index, -1))
        return cutting.reduction()

    def due(self, site: KVSite) -> bool:
        return site.visited and site.layer > self.layer_in(site.info)

    def watch(self, site: KVSite) -> None:
        """In the layer whose attention chooses."""
        if site.layer != self.layer_in(site.info):
            if site.visited:
                site.entries["token"] = site.token + 1
            return
        if site.visited:
            site.entries["token"] = site.token + 1
            site.state.clear()
            site.state["moving"] = in_videos(site)
        elif "moving" not in site.state or self.evicted == "drop":
            return
        assert self.kv is not None  # else no layer is visited
        moving: Tensor = site.state["moving"]
        row = newest_attention(site, moving.shape[1]).masked_fill(~moving, 0)
        before: Tensor | None = site.state.get("row")
        site.state["row"] = row
        chosen = best(row, counts(self.kv, moving.sum(1)), moving)
        if before is not None:
            alike = F.cosine_similarity(row, before, dim=1) >= self.similarity
            if bool(alike.all()):  # the one look at the device of a step
                return
            chosen = torch.where(alike[:, None], site.state["chosen"], chosen)
        site.state["chosen"] = site.memory["chosen"] = chosen
        site.memory["moving"] = moving

    def compress(self, site: KVSite) -> Change | None:
        moving = at_tokens(site.memory["moving"], site.entries["token"])
        kept = ~moving | at_tokens(site.memory["chosen"], site.entries["token"])
        return Change(kept, aside=moving if self.evicted == "cpu" else None)

    def recall(self, site: KVSite) -> Tensor | None:
        if site.aside is None or "chosen" not in site.memory:
            return None
        return at_tokens(site.memory["chosen"], site.aside["token"])


def newest_attention(site: KVSite, tokens: int) -> Tensor:
    """Compute the attention that the newest token pays to each of ``tokens`` visual tokens of the prompt, (B,
    tokens) float32: mean over heads, softmax over all that it sees."""
    row = site.attention_rows(site.last_rows(1))[:, :, 0].mean(1)
    token = site.entries["token"][:, 0]  # of a layer that holds all: the same in every head
    out = row.new_zeros(len(row), tokens + 1)
    return out.scatter(1, token, row)[:, 1:]


def at_tokens(values: Tensor, token: Tensor) -> Tensor:
    """Look values of tokens (B, N) bool up for entries of token + 1 (B, Hk, K); False for 0."""
    index = (token - 1).clamp(min=0)
    return values.gather(1, index.flatten(1)).view_as(token) & (token > 0)


def in_videos(site: KVSite) -> Tensor:
    """(B, N) bool: which of the visual tokens of a prompt are those of a frame of a video."""
    marks, token = site.marks(True), site.token[:, 0]
    video, frame = site.image[:, 0].clamp(min=0), site.frame[:, 0]
    here = (token >= 0) & (frame >= 0)
    number = int(marks.image.max()) + 1
    last = torch.full((len(token), number + 1), -1, device=token.device)
    where = torch.where(here, video, number)
    last = last.scatter_reduce(1, where, torch.where(here, frame, -1), "amax")
    first = torch.full_like(last, torch.iinfo(last.dtype).max)
    first = first.scatter_reduce(1, where, torch.where(here, frame, first[0, 0]), "amin")
    several = (last > first).gather(1, where) | (site.at_entries(marks.kind)[:, 0] == 2)
    size = int(token.max()) + 1
    out = torch.zeros(len(token), size + 1, dtype=torch.bool, device=token.device)
    return out.scatter(1, torch.where(here, token, size), several & here)[:, :size]


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
