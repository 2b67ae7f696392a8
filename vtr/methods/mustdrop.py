"""MustDrop: merge in the tower, drop what no text token looks at, and free it in earlier layers' caches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtr.core.kv_site import Change, KVSite
from vtr.errors import UnsupportedMethodError
from vtr.methods.base import (
    Examples,
    LanguageSite,
    ModelInfo,
    Presets,
    Reduction,
    Site,
    Stage,
    TokenMap,
    TokenMethod,
    check_count,
    check_flag,
    check_layers,
    check_number,
    check_share,
    count,
    fit_layers,
    register,
    top_indices,
)
from vtr.methods.common.alike import merge_windows
from vtr.methods.common.kv import KVChoices
from vtr.methods.common.text import need_text_after, scaled_layers

ROWS = 64
"""Text rows whose attention is computed at a time."""


@register
@dataclass(frozen=True)
class MustDrop(Presets, KVChoices, TokenMethod):
    r"""MustDrop (arXiv 2411.10803): tokens are dropped in the tower, in the prompt and in decoding.

    In the tower: behind its first layer the tokens of a window of ``window`` x ``window`` are averaged if the
    mean cosine of their pairs is at least ``alike``. The ``key`` share of a crop's tokens with the most class
    attention (mean over heads) are key tokens, which nothing drops later.

    .. math::

        s_j = \sum_{t \in \mathrm{text}} A_{tj}, \qquad
        \text{drop } j \text{ if } s_j < \mathrm{overall} \sum_i s_i \;\text{ and }\; \max_t A_{tj} <
        \mathrm{single}

    In the language model: behind each of ``layers``, with A_tj the attention of text token t after the image to visual
    token j (mean over heads, softmax over all keys) and s_j its sum over t, token j is dropped if s_j is below
    ``overall`` times the sum of all s, and every A_tj is below ``single``. How many are left depends on the
    content.

    In decoding: what was dropped in the end is also freed in the cache of the layers from the first of ``layers``
    on, which needed it for the prompt; the layers before hold all. Positions are numbered anew (the authors'
    choice).

    Without a class token the score is the mean attention that a token receives, as in ``VisionZip``. Towers
    that cannot be cut (LLaVA-NeXT, Qwen) need ``window=None``, which merges nothing.

    Differences from the authors' code: key tokens are those of the layer whose output the projector reads
    (theirs: of the last layer, which LLaVA does not use); merged windows stay in raster order, at their last
    token's place (theirs come first); each image merges what it asks for; batches, several images; rows of the
    text only, so that every attention backend works.

    Args:
        overall: share of all attention below which a token may be dropped; 0 drops nothing.
        single: attention of each text token below which it may be dropped.
        layers: 0-based, ascending, behind which tokens are dropped; None is the released 2, 6, 10, 14 of 32, scaled.
        key: share of a crop's tokens that are key tokens, rounded up.
        window: side of the windows in tokens, which must divide the grid's sides; None merges none.
        alike: least mean cosine in a window.
        trim: whether earlier layers free their keys and values of dropped tokens.
    """

    name: ClassVar[str] = "mustdrop"
    paper: ClassVar[str] = "MustDrop: Multi-Stage Vision Token Dropping, 2024, arXiv 2411.10803"
    sites: ClassVar[tuple[str, ...]] = ("encoder", "decoder", "kv")
    whole: ClassVar[bool] = True
    needs: ClassVar = {
        "encoder": frozenset({"hidden", "attention_received"}),
        "decoder": frozenset({"text_attention", "encoder_scores"}),
        "kv": frozenset({"entries"}),
    }
    positions: ClassVar[str] = "compact"
    data_dependent: ClassVar[bool] = True

    PRESETS: ClassVar = {
        "llava-1.5-7b/192": {"overall": 0.001, "single": 0.001},
        "llava-1.5-7b/128": {"overall": 0.0012, "single": 0.001},
        "llava-1.5-7b/64": {"overall": 0.011, "single": 0.01},
    }
    """The authors' settings for TextVQA, by the mean number of tokens over the layers that they left there."""

    overall: float = 0.001
    single: float = 0.001
    layers: tuple[int, ...] | None = None
    key: float = 0.08
    window: int | None = 3
    alike: float = 0.8
    trim: bool = True

    @classmethod
    def examples(cls) -> Examples:
        # Not every tower can be cut, which windows need.
        return {
            "some": (cls(overall=0.08, single=0.2, layers=(0, 2), window=None),),
            "everything": (cls(overall=0.0, layers=(0, 2), window=None),),
            "counted": (),
        }

    def validate(self) -> None:
        for name in ("overall", "single"):
            check_number(getattr(self, name), name, 0, 1)
        check_share(self.key, "key")
        check_count(self.window, "window", low=2, none=True)
        check_number(self.alike, "alike", -1, 1)
        check_flag(self.trim, "trim")
        if self.layers is not None:
            self._set("layers", check_layers(self.layers))

    def requirements(self, info: ModelInfo) -> dict[str, frozenset[str]]:
        return {site: self.needs[site] for site in self.sites if self.trim or site != "kv"}

    def _layers(self, info: ModelInfo) -> tuple[int, ...]:
        depth = info.depth["decoder"]
        if self.layers is None:
            return scaled_layers((2, 6, 10, 14), 32, depth)
        return fit_layers(self.layers, depth)

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        layers = self._layers(info)
        stages = [Stage("encoder", info.last_layer, "end", cuts=False)]
        if self.window is not None:
            if not info.tower_cuts or info.last_layer < 1:
                raise UnsupportedMethodError(
                    f"mustdrop merges windows behind the first layer of the tower, which {info.family} "
                    "does not allow: use window=None, which drops in the language model alone"
                )
            stages.insert(0, Stage("encoder", 0, "end"))
        stages += [Stage("decoder", layer, "end") for layer in layers]
        if self.trim:
            stages += [Stage("kv", layer) for layer in range(layers[0], layers[-1] + 1)]
        return tuple(stages)

    def reduce(self, site: Any) -> Reduction | None:
        if site.site == "decoder":
            return self._drop(site)
        here: Site = site
        if here.layer == here.info.last_layer:
            self._note(here)
            return None
        assert self.window is not None  # else nothing is visited before
        step, _ = merge_windows(here, self.window, self.alike, False, self.name)
        return None if step is None else Reduction(step, here.size)

    def compress(self, site: KVSite) -> Change | None:
        return Change((site.token < 0) | site.left)

    def _note(self, site: Site) -> None:
        """Store which tokens of the model's input are key tokens, or were merged into one."""
        score = site.cls_attention() if site.info.has_cls else site.attention_received()
        number = torch.tensor(
            [count(self.key, n) for n in site.counts.tolist()], device=site.device
        )
        kept, padding = top_indices(score, number, site.valid)
        chosen = (TokenMap.keep(kept, site.n, padding).source >= 0).float()
        site.memory["key"] = site.map.restore(chosen[..., None], "zero")[..., 0]

    def _drop(self, site: LanguageSite) -> Reduction | None:
        need_text_after(site)
        total, most = seen_by_text(site)
        valid = site.valid_mask
        unseen = (total < self.overall * total.sum(1, keepdim=True)) & (most < self.single)
        # A token that several patches become is a key token if one of them is; separators are none.
        key = site.spread(site.stored("key"), newline=0.0) > 0
        stays = valid & (~unseen | key)
        if torch.equal(stays, valid):
            return None
        kept, padding = top_indices(stays.float(), stays.sum(1), stays)
        return Reduction(TokenMap.keep(kept, site.n, padding))


def seen_by_text(site: LanguageSite) -> tuple[Tensor, Tensor]:
    """Compute the sum and the largest of the text's attention to each visual token, over the text after the
    first of them: (B, N) float32 each, mean over heads."""
    after = site.text_after
    rows, _ = top_indices(after.float(), after.sum(1), after)
    total = torch.zeros(site.batch, site.n, device=site.device)
    most = total.clone()
    for start in range(0, rows.shape[1], ROWS):
        part = site.attention_rows_from_text(rows[:, start : start + ROWS]).mean(1)
        total, most = total + part.sum(1), torch.maximum(most, part.amax(1))
    return total, most
