"""VisionZip: the dominant tokens, and the rest merged into a few contextual ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.core.budget import Keep, check_keep, count
from vtr.core.language_site import LanguageSite
from vtr.core.method import Reduction, Stage, TokenMethod
from vtr.core.presets import Presets
from vtr.core.registry import register
from vtr.core.site import ModelInfo, Site
from vtr.core.tokens import TokenMap, take, top_indices
from vtr.kernels.precision import full_precision
from vtr.methods.common.merge import by_representative
from vtr.methods.common.scored import to_keep

DROPPED = -1e6


@register
@dataclass(frozen=True)
class VisionZip(Presets, TokenMethod):
    r"""VisionZip (CVPR 2025, arXiv 2412.04467): dominant tokens, and contextual ones from the rest.

    In the encoder layer whose output the projector reads: dominant are the tokens of highest class
    attention (mean over heads). Of the others, every n-th is a target, the rest are assigned to the
    target of most similar key (cosine, keys averaged over heads), and a contextual token is the
    target plus the mean of those assigned to it (a sum, as in the authors' code).

    .. math::

        D = \operatorname{top}_k\Big(\frac{1}{H} \sum_h A_h[\mathrm{cls}, j]\Big), \qquad
        c_t = x_t + \frac{1}{|C_t|} \sum_{i \in C_t} x_i, \quad C_t = \{i : \arg\max_{t'} \cos(\bar k_i,
        \bar k_{t'}) = t\}

    Without a class token (SigLIP, Qwen) the score is the mean attention that a token receives in that
    layer, the paper's rule for such towers, computed in chunks of rows so that the full map is never in
    memory. This was compared with the authors' code for LLaVA, which has a class token, not with their
    later code for Qwen2.5-VL, which computes the whole map of the last block.

    If an image is one crop whose patches are the visual tokens (LLaVA-1.5), all of this is done in
    the encoder, so that contextual tokens are computed before the projector, as by the authors. Otherwise
    (tiles, joined patches) an image's crops share its budget, and contextual tokens are built from
    projected ones, at the entry of the language model.

    Differences from the authors' code: the class token itself is not kept (it is one of their
    dominant tokens; language models here never see it); tokens stay in raster order (theirs:
    dominant, then contextual); with tiles they choose in every crop separately.

    Args:
        keep: budget per image, contextual tokens included.
        contextual: number of contextual tokens among them (int), or their share of ``keep`` (float);
            the default 5/32 gives the released splits 54 + 10, 108 + 20 and 162 + 30. 0 merges nothing.
    """

    name: ClassVar[str] = "visionzip"
    paper: ClassVar[str] = (
        "VisionZip: Longer is Better but Not Necessary, CVPR 2025, arXiv 2412.04467"
    )
    sites: ClassVar[tuple[str, ...]] = ("encoder", "prompt")
    needs: ClassVar = {
        "encoder": frozenset({"keys", "attention_received"}),
        "prompt": frozenset({"hidden", "encoder_scores"}),
    }
    positions: ClassVar[str] = "compact"

    PRESETS: ClassVar = {
        **{f"llava-1.5-7b/{n}": {"keep": n} for n in (192, 128, 64)},
        **{f"llava-next-7b/{n}": {"keep": n} for n in (640, 320, 160)},
    }
    """The rows of the paper's tables: tokens of 576, and of up to 2880. The default ``contextual`` gives
    162 + 30, 108 + 20 and 54 + 10, and five times that for five crops."""

    keep: Keep = 64
    contextual: int | float = 5 / 32

    def validate(self) -> None:
        self._set("keep", check_keep(self.keep))
        c = self.contextual
        number = isinstance(c, (int, float)) and not isinstance(c, bool)
        if not number or c < 0 or (isinstance(c, float) and not c < 1.0):
            raise ValueError(
                "contextual must be an int >= 0 (tokens) or a float in [0, 1) (share of keep), "
                f"got {c!r}"
            )
        if isinstance(c, int) and isinstance(self.keep, int) and c >= self.keep:
            raise ValueError(f"contextual must be less than keep={self.keep}, got {c}")

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        return Stage("encoder", info.last_layer, "end", cuts=False), Stage("prompt", 0)

    def reduce(self, site: Any) -> Reduction | None:
        if site.site == "encoder":
            score = site.cls_attention() if site.info.has_cls else site.attention_received()
            if site.info.tokens is None:
                site.memory["score"], site.memory["keys"] = score, site.key_mean()
                return None
            return self._merge_crops(site, score)
        here: LanguageSite = site
        if site.info.tokens is not None:
            return self._take_merged(here)
        number = here.budget(self.keep)
        if to_keep(here, number) is None:
            return None
        valid = here.valid_mask
        keys = here.spread(here.stored("keys"), 0.0).masked_fill(~valid[..., None], 0.0)
        return Reduction(
            *self._split(here.spread(here.stored("score")), keys, number, valid), normalize=False
        )

    def _split(
        self, score: Tensor, keys: Tensor, number: Tensor, valid: Tensor
    ) -> tuple[TokenMap, Tensor]:
        """The map that leaves ``number`` (B,) tokens, and the weights (B, N) of the merged sums."""
        merged = self._contextual(number)
        merged = torch.where(number >= valid.sum(1), torch.zeros_like(merged), merged)
        main = dominant(score, number - merged, valid)
        stands, targets = contextual_groups(keys, valid & ~main, merged)
        index = torch.arange(score.shape[1], device=score.device)
        step = by_representative(torch.where(main, index, stands))
        assigned = (step.size - 1).gather(1, step.source.clamp(min=0)).clamp(min=1)
        return step, torch.where(main | targets, torch.ones_like(assigned), 1.0 / assigned)

    def _merge_crops(self, site: Site, score: Tensor) -> Reduction | None:
        """Put the contextual tokens in the place of their targets; the cut follows at the prompt."""
        n = site.n
        if count(self.keep, n) >= n:
            return None
        number = torch.full((site.batch,), count(self.keep, n), device=site.device)
        step, weights = self._split(score, site.key_mean(), number, site.valid_mask)
        index = torch.arange(n, device=site.device)
        stands = step.kept.gather(1, step.source.clamp(min=0))
        # How far each token's representative is: the same number in the crop and in the prompt.
        site.memory["way"] = (stands - index).float().masked_fill(step.source < 0, DROPPED)
        sums = step.merge(site.hidden, weights, normalize=False)
        return Reduction(None, tokens=step.restore(sums, site.hidden))

    def _take_merged(self, site: LanguageSite) -> Reduction | None:
        whole = site.info.tokens
        assert whole is not None
        if count(self.keep, whole) >= whole:
            return None
        way = site.spread(site.stored("way"), 0.0)
        gone = ~site.valid_mask | (way <= DROPPED)
        index = torch.arange(site.n, device=site.device)
        stands = index + way.masked_fill(gone, 0.0).round().long()
        step = by_representative(stands.masked_fill(gone, -1))
        return Reduction(step, tokens=step.gather(site.hidden))

    def _contextual(self, number: Tensor) -> Tensor:
        """Count the contextual ones of ``number`` (B,) tokens; at least one is dominant."""
        if isinstance(self.contextual, int):
            wanted = torch.full_like(number, self.contextual)
        else:
            wanted = torch.round(number.double() * self.contextual).long()
        return torch.minimum(wanted, (number - 1).clamp(min=0))


def dominant(score: Tensor, number: Tensor, valid: Tensor) -> Tensor:
    """(B, N) bool: the ``number[b]`` best tokens of each row by ``score`` (B, N)."""
    kept, has_padding = top_indices(score, number, valid)
    return TokenMap.keep(kept, score.shape[1], has_padding).source >= 0


def contextual_groups(keys: Tensor, rest: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
    """Targets and assignment of the tokens that are not dominant.

    With n of them in raster order, the targets are the first, the (1 + step)-th and so on, ``number``
    in all, with step = max(1, n // number); every other one goes to the target whose key is most
    similar (cosine).

    Args:
        keys: (B, N, D), averaged over heads.
        rest: (B, N) bool, the tokens in question.
        number: (B,) int64 targets per row, at most the number of ``rest``.

    Returns:
        representative (B, N) int64 (a target's own index, the target's index of an assigned token,
        -1 elsewhere), and is_target (B, N) bool.
    """
    n = rest.sum(1)
    step = torch.div(n, number.clamp(min=1), rounding_mode="floor").clamp(min=1)[:, None]
    rank = rest.long().cumsum(1) - 1
    is_target = (
        rest & (rank % step == 0) & (torch.div(rank, step, rounding_mode="floor") < number[:, None])
    )
    unit = F.normalize(keys.float(), dim=-1)
    targets, _ = top_indices(is_target.float(), is_target.sum(1), is_target)
    with full_precision(keys.device):
        likeness = unit @ take(unit, targets.clamp(min=0)).transpose(1, 2)
    nearest = likeness.masked_fill((targets < 0)[:, None], -float("inf"))
    if targets.shape[1] == 0:
        return torch.full_like(rank, -1), is_target
    best = targets.gather(1, nearest.argmax(2))
    index = torch.arange(rest.shape[1], device=rest.device)
    representative = torch.where(is_target, index, best)
    return representative.masked_fill(~rest | (number == 0)[:, None], -1), is_target
