"""DivPrune: the most diverse subset of the visual tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.methods.base import Keep, LanguageSite, Presets, ScoredMethod, register


@register
@dataclass(frozen=True)
class DivPrune(Presets, ScoredMethod):
    r"""DivPrune (CVPR 2025): max-min diversity of the visual tokens at the entry of the language model.

    With the distance d_ij = 1 - cos(x_i, x_j) of the projected tokens: the first token is the one
    farthest from its nearest neighbour, each next one the token farthest from all that are chosen.
    No attention, no text, no training; works for every encoder. Positions are renumbered (the
    authors' choice).

    .. math::

        d_{ij} = 1 - \cos(x_i, x_j), \qquad
        S \leftarrow S \cup \Big\{\arg\max_{i \notin S} \min_{j \in S} d_{ij}\Big\}

    Differences from the authors' code: batches and any place of the image in the prompt (theirs is
    batch 1 with a system prompt of 35 tokens), and a fraction is rounded up as everywhere here
    (theirs to the nearest number).

    Args:
        keep: budget per image.
    """

    name: ClassVar[str] = "divprune"
    paper: ClassVar[str] = (
        "DivPrune: Diversity-based Visual Token Pruning, CVPR 2025, arXiv 2503.02175"
    )
    sites: ClassVar[tuple[str, ...]] = ("prompt",)
    needs: ClassVar = {"prompt": frozenset({"hidden"})}
    positions: ClassVar[str] = "compact"

    PRESETS: ClassVar = {
        "llava-1.5-7b/9.8%": {"keep": 56},
        **{f"llava-1.5-7b/{n}": {"keep": n} for n in (192, 128, 64)},
    }
    """The authors' setting (0.098 of 576 tokens, rounded to the nearest), and the rows of tables that
    compare it with other methods."""

    keep: Keep = 64

    def score(self, site: LanguageSite) -> Tensor:
        return farthest_points(site.hidden, site.budget(self.keep), site.valid_mask).float()


@torch.no_grad()
def farthest_points(x: Tensor, number: Tensor, valid: Tensor, chunk: int = 512) -> Tensor:
    """Greedy max-min subset by cosine distance: (B, N) bool, ``number[b]`` True in row b.

    Args:
        x: (B, N, C).
        number: (B,) int64, at most the number of valid tokens of the row.
        valid: (B, N) bool, tokens that may be chosen.
        chunk: rows of the distance matrix made at a time for the first token; the rest of the greedy
            needs one row per chosen token, so that the N x N matrix is never in memory.
    """
    batch, n, _ = x.shape
    x = F.normalize(x.float(), dim=-1)
    far = float("inf")
    nearest = x.new_full((batch, n), far)
    index = torch.arange(n, device=x.device)
    for start in range(0, n, chunk):
        rows = index[start : start + chunk]
        distance = 1.0 - x[:, rows] @ x.transpose(1, 2)
        blocked = ~valid[:, None, :] | (rows[:, None] == index)[None]
        nearest[:, rows] = distance.masked_fill(blocked, far).amin(-1)
    steps = int(number.max())
    chosen = torch.zeros(batch, n, dtype=torch.bool, device=x.device)
    score = nearest.masked_fill(~valid, -far)
    closest = torch.full_like(score, far)
    for step in range(steps):
        pick = score.argmax(1, keepdim=True)
        more = (number > step)[:, None]
        chosen = chosen.scatter(1, pick, chosen.gather(1, pick) | more)
        row = x.gather(1, pick[..., None].expand(-1, -1, x.shape[2]))
        closest = torch.minimum(closest, 1.0 - (x @ row.transpose(1, 2))[..., 0])
        score = closest.masked_fill(~valid | chosen, -far)
    return chosen
