"""FrameFusion: merge alike neighbours in time layer by layer, then prune once by attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.core.budget import Keep, check_count, check_keep, check_number
from vtr.core.language_site import LanguageSite
from vtr.core.method import Examples, Reduction, Stage, TokenMethod
from vtr.core.presets import Presets
from vtr.core.registry import register
from vtr.core.site import ModelInfo
from vtr.methods.common.merge import by_representative
from vtr.methods.common.temporal import best, has_video, in_videos
from vtr.methods.common.text import need_text_after


@register
@dataclass(frozen=True)
class FrameFusion(Presets, TokenMethod):
    r"""FrameFusion (ICCV 2025, arXiv 2501.01986): similarity first, importance once.

    At the entry of layer 0 and then between attention and MLP of every layer, a token of a video is
    compared by its hidden state with the token of its place that is left in an earlier frame (cosine).
    If it is at least ``similarity``, the token is merged; chains become the plain mean of their tokens, in the
    place of the earliest. When fewer than ``least`` of the tokens merge at a layer, merging ends, and at
    the next visit one cut by attention follows: by the mean attention that a token receives, over heads and
    over queries: all tokens of the prompt, or its last ``rows`` tokens of text.

    .. math::

        \text{merge } x_j^t \text{ into } x_j^{t'} \text{ if } \cos(x_j^t, x_j^{t'}) \ge \tau, \qquad
        \text{then } s_j = \frac{1}{H |R|} \sum_{h} \sum_{q \in R} A_h[q, j], \qquad
        \frac{1}{L} \sum_l \frac{n_l}{n_0} \le \mathrm{keep}

    The budget is a cost, the mean over layers of the share of tokens that go through them. Each visit
    knows the share s that would spend what is left of it evenly: merging stops there, and the cut by
    attention goes there.

    Differences from the authors' code: the default ``rows=None`` follows the paper, which speaks of
    cumulative attention; in their code the mean over queries is given one row, that of the last token
    (LLaVA-Video, MiniCPM-V, NVILA, InternVL: ``rows=1``), or the last four (Qwen2-VL: ``rows=4``). The
    number of layers is the model's (theirs is always 28); numbers of tokens are rounded down, so that
    the cost is never more than the budget (theirs: to the nearest at the cut by attention); several
    samples and videos work, each with its own budget; if the tokens left by merging would spend more than
    the budget, the cut follows at once (theirs raises an error later); layers that cannot be opened
    between attention and MLP are cut at their end, which costs the MLP of one layer more than
    counted. Positions of kept tokens do not change. Still images and separators stay whole. The content
    decides which tokens are merged, not the cost.

    Args:
        keep: budget per video: mean over layers of the share of its tokens, the paper's cost. An int is
            a mean number of tokens per video.
        similarity: least cosine at which tokens are merged.
        least: share of merged tokens below which merging ends.
        rows: number of text tokens at the end of the prompt whose attention ranks; None is every token of
            the prompt, of the video too.
    """

    name: ClassVar[str] = "framefusion"
    paper: ClassVar[str] = (
        "FrameFusion: Combining Similarity and Importance for Video Token Reduction, ICCV 2025, "
        "arXiv 2501.01986"
    )
    sites: ClassVar[tuple[str, ...]] = ("decoder",)
    needs: ClassVar = {"decoder": frozenset({"hidden", "attention_received"})}
    positions: ClassVar[str] = "original"

    PRESETS: ClassVar = {
        "llava-video-7b/30%": {"rows": 1},
        "qwen2-vl-7b/30%": {"similarity": 0.5, "rows": 4},
        "internvl2.5-8b/30%": {"similarity": 0.5, "rows": 1},
    }
    """The authors' example scripts. They count 28 layers for InternVL2.5's 32 too."""

    keep: Keep = 0.3
    similarity: float = 0.6
    least: float = 0.1
    rows: int | None = None

    @classmethod
    def examples(cls) -> Examples:
        return {"counted": ()}

    def validate(self) -> None:
        self._set("keep", check_keep(self.keep))
        check_number(self.similarity, "similarity", -1, 1)
        check_number(self.least, "least", 0, 1)
        check_count(self.rows, "rows", none=True)

    def requirements(self, info: ModelInfo) -> dict[str, frozenset[str]]:
        attention = "attention_received" if self.rows is None else "text_attention"
        return {"decoder": frozenset({"hidden", attention})}

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        place = "middle" if info.decoder_middle else "end"
        inner = range(info.depth["decoder"] - 1)
        return Stage("decoder", 0, "start"), *(Stage("decoder", i, place) for i in inner)

    def reduce(self, site: LanguageSite) -> Reduction | None:
        states: dict[tuple[int, int], _State] | None = site.memory.get("states")
        if states is None:
            states = site.memory["states"] = self._begin(site)
        moving = in_videos(site)
        video = site.video
        n = torch.arange(site.n, device=site.device).expand(site.batch, -1)
        stands = torch.where(site.valid_mask, n, -1)
        start, received = stands, None
        for (b, v), state in states.items():
            if state.done:
                continue
            index = (moving[b] & (video[b] == v)).nonzero()[:, 0]
            left = state.left(site.info.depth["decoder"])
            if not state.merging:
                if received is None:
                    received = self._received(site)
                stands = self._prune(stands, received[b], b, index, left)
                state.done = True
                continue
            similar = chain_cosine(site.hidden[b, index], site.place[b, index])
            joins = similar >= self.similarity
            over = len(index) - left  # tokens that must go
            found = int(joins.sum())
            if over <= 0:
                joins, found, state.done = torch.zeros_like(joins), 0, True
            elif found >= over:
                number = torch.full((1,), over, device=joins.device)
                joins, found = best(similar[None], number, similar[None].isfinite())[0], over
                state.done = True
            elif found < self.least * len(index):
                state.merging = False
            after = len(index) - found
            if not state.done and not state.affords(after, site.info.depth["decoder"]):
                # What merging leaves would spend more than there is: the cut cannot wait.
                if received is None:
                    received = self._received(site)
                stands = self._prune(stands, received[b], b, index, left)
                state.done, after = True, left
            else:
                stands = stands.clone()
                stands[b, index] = index[chains(joins, site.place[b, index])]
            state.spent.append(after)
        if torch.equal(stands, start):
            return None
        return Reduction(by_representative(stands), torch.ones_like(stands, dtype=torch.float32))

    def _begin(self, site: LanguageSite) -> dict[tuple[int, int], _State]:
        found: dict[tuple[int, int], _State] = {}
        if not has_video(site, self.name):
            return found
        moving = in_videos(site)
        for b, spans in enumerate(site.videos):
            for v, span in enumerate(spans):
                number = int((moving[b] & (site.video[b] == v)).sum())
                if span.kind == "video" and number:
                    share = self.keep * number if isinstance(self.keep, float) else self.keep
                    found[b, v] = _State(min(float(share), float(number)))
        return found

    def _received(self, site: LanguageSite) -> Tensor:
        """(B, N) attention that each token receives."""
        if self.rows is None:
            return site.attention_received()
        need_text_after(site)
        back = torch.arange(self.rows, device=site.device)
        last = (site.last_text - back).clamp(
            min=-1
        )  # -1 is no row; rows before the video give zeros
        return site.attention_rows_from_text(last).mean((1, 2))

    def _prune(
        self, stands: Tensor, received: Tensor, sample: int, index: Tensor, left: int
    ) -> Tensor:
        number = torch.full((1,), min(left, len(index)), device=index.device)
        every = torch.ones(1, len(index), dtype=torch.bool, device=index.device)
        stays = best(received[None, index], number, every)[0]
        out = stands.clone()
        out[sample, index[~stays]] = -1
        return out


class _State:
    """One video during one prefill.

    Attributes:
        budget: mean tokens per layer.
        spent: tokens of each layer decided so far.
        merging, done: merging continues; all is decided.
    """

    def __init__(self, budget: float) -> None:
        self.budget = budget
        self.spent: list[int] = []
        self.merging, self.done = True, False

    def left(self, depth: int) -> int:
        """Tokens per layer that spend what is left of the budget evenly; one at least."""
        rest = self.budget * depth - sum(self.spent)
        return max(1, int(rest / (depth - len(self.spent)) + 1e-9))

    def affords(self, tokens: int, depth: int) -> bool:
        """Tell whether this many tokens in the next layer leave one for each layer after it."""
        later = depth - len(self.spent) - 1
        return sum(self.spent) + tokens + later <= max(self.budget, 1.0) * depth + 1e-9


def chain_cosine(x: Tensor, place: Tensor) -> Tensor:
    """Cosine of each token with the one before it at its place; -inf without one.

    Args:
        x: (N, C), in the order of the prompt.
        place: (N,) int64.
    """
    order = torch.sort(place, stable=True).indices
    unit = F.normalize(x[order].float(), dim=-1)
    cosine = torch.full_like(unit[:, 0], -float("inf"))
    same = place[order][1:] == place[order][:-1]
    cosine[1:] = torch.where(same, (unit[1:] * unit[:-1]).sum(-1), cosine[1:])
    return torch.empty_like(cosine).index_put((order,), cosine)


def chains(joins: Tensor, place: Tensor) -> Tensor:
    """(N,) the token that each one is merged into: the first of its chain.

    Args:
        joins: (N,) bool, whether a token is merged with the one before it at its place.
    """
    order = torch.sort(place, stable=True).indices
    at = torch.arange(len(order), device=order.device)
    head = torch.where(joins[order], -1, at).cummax(0).values
    return torch.empty_like(order).index_put((order,), order[head])
