"""Attention sinks: how they are found, and how attention is moved away from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from vtr.core.language_attention import LanguageAttentionSite
    from vtr.core.site import ModelInfo

EPS = 1e-6
ROWS = 256  # query rows at a time

DIMS = {(4096, 32, 32, 32): (1415, 2533), (5120, 40, 40, 40): (2100, 4743)}
"""Channels, query heads, key heads and layers of Llama-2 (and Vicuna 1.5) 7B and 13B: the channels in which their
sinks are massive (the authors' constants.py)."""


def normalised(hidden: Tensor) -> Tensor:
    """|x| / sqrt(mean x^2 + 1e-6) over the last axis, float32: an RMS norm without weights, and the sign."""
    x = hidden.float()
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)).abs()


def massive(hidden: Tensor, dims: Sequence[int], tau: float) -> Tensor:
    """Find the tokens with a massive activation (arXiv 2503.03321, section 3.2).

    Args:
        hidden: (B, L, C), what enters a layer, before its norm.
        dims: channels in which sinks are massive.
        tau: least magnitude, exclusive, after an RMS norm over all channels.

    Returns:
        (B, L) bool.
    """
    size = normalised(hidden)
    return (torch.stack([size[..., d] for d in dims]) > tau).any(0)


def published(info: ModelInfo) -> tuple[int, ...]:
    """Return the published channels of a model, by its sizes; empty if it has others."""
    sizes = info.language
    if sizes is None:
        return ()
    return DIMS.get((sizes.dim, sizes.heads, sizes.kv_heads, info.depth["attention"]), ())


def move_mass(
    attention: Tensor, source: Tensor, target: Tensor, keep: float, rows: Tensor | None = None
) -> Tensor:
    """Leave ``keep`` of their attention to the source columns, and give the rest to the target columns.

    The targets share it in proportion to what they have, so that the sum of a row stays as it is. A row
    whose targets have no attention is not changed.

    Args:
        attention: (B, H, R, S) float32.
        source, target: bool, broadcast to that shape; no column is both.
        keep: share that stays, in [0, 1]; 1 returns the same numbers.
        rows: (B, H, R) bool, the rows to change; None is all.
    """
    budget = (1.0 - keep) * (attention * source).sum(-1, keepdim=True)
    there = (attention * target).sum(-1, keepdim=True)
    moves = there > 0
    if rows is not None:
        moves = moves & rows[..., None]
    factor = 1.0 + budget / there.clamp_min(torch.finfo(there.dtype).tiny)
    moved = torch.where(
        source, attention * keep, torch.where(target, attention * factor, attention)
    )
    return torch.where(moves, moved, attention)


def received(site: LanguageAttentionSite) -> tuple[Tensor, Tensor]:
    """Mean attention that each key receives in a call, over the query rows that see it.

    Exact; computed for some rows of every sample at a time, never as a whole map.

    Returns:
        (B, H, S) float32, 0 for keys that no row sees; and (B, S) int64, the rows that see each key.
    """
    (batch, heads, length, dim), columns = site.q.shape, site.k.shape[2]
    total = torch.zeros(batch, heads, columns, device=site.q.device)
    number = torch.zeros(batch, columns, dtype=torch.int64, device=site.q.device)
    for rows in all_rows(site).split(ROWS, 1):
        total += site.attention_rows(rows).sum(2)
        number += site.sees(rows).sum(1)
    site.spend(2.0 * heads * length * columns * dim)
    return total / number[:, None].clamp(min=1), number


def hidden_sinks(site: LanguageAttentionSite, threshold: float) -> Tensor:
    """Find the tokens behind the first that receive more than ``threshold`` on average (arXiv 2406.15765).

    Returns:
        (B, H, S) bool.
    """
    column = torch.arange(site.k.shape[2], device=site.q.device)
    return (received(site)[0] > threshold) & (column != site.bos[:, None])[:, None]


def all_rows(site: LanguageAttentionSite) -> Tensor:
    """(B, L) int64: the query rows of a call, -1 for rows of padding."""
    index = torch.arange(site.q.shape[2], device=site.q.device)
    valid = site.valid[:, site.offset : site.offset + len(index)]
    return torch.where(valid, index, -1)


def aligned(known: Tensor, site: LanguageAttentionSite) -> tuple[Tensor, int]:
    """Fit what a call remembered of its columns to the earlier columns of this one, (B, ..., offset).

    A cache with a window has let go of its oldest columns; a cropped one, of its newest. Columns that no call has
    seen get zeros.

    Returns:
        the tensor, and how many columns were let go of at the front.
    """
    more = site.offset - known.shape[-1]
    gone = max(0, -more) if site.window is not None else 0
    return F.pad(known[..., gone:], (0, more + gone)), gone


class FirstToken:
    """Finds the channels in which a prompt's first token is massive, in the middle half of the layers.

    Mean of the normalised magnitude over prompts and layers, above ``tau``. The paper finds that visual sinks
    are massive in the channels of the first token (section 3.2).
    """

    def __init__(self, tau: float) -> None:
        self.tau, self.number = tau, 0
        self.total: Tensor | None = None

    def see(self, site: LanguageAttentionSite) -> None:
        """Add one attention call; only prompts in middle layers count."""
        edge = site.layers // 4
        if site.phase != "prefill" or not edge <= site.layer < site.layers - edge:
            return
        assert site.hidden is not None
        first = site.hidden[torch.arange(len(site.bos), device=site.bos.device), site.bos]
        found = normalised(first).sum(0).double().cpu()
        self.total = found if self.total is None else self.total + found
        self.number += len(first)

    def finish(self) -> dict[str, Tensor]:
        """Return ``dims``, int64.

        Raises:
            ValueError: no channel is massive.
        """
        mean = torch.zeros(1) if self.total is None else self.total / self.number
        dims = (mean > self.tau).nonzero().flatten()
        if not len(dims):
            raise ValueError(
                f"no channel of the first token is above tau={self.tau:g} on average in the middle layers (the "
                f"largest is {float(mean.max()):.1f}): this model has no sinks that VAR can find by them; "
                "calibrate with a lower tau to look for weaker ones"
            )
        return {"dims": dims}


class SinkMass:
    """Measures the attention of each head on hidden sinks, as a mean over the rows of prompts."""

    def __init__(self, threshold: float, least: float) -> None:
        self.threshold, self.least = threshold, least
        self.mass: dict[int, list[Tensor]] = {}

    def see(self, site: LanguageAttentionSite) -> None:
        """Add one attention call; only prompts count."""
        if site.phase != "prefill":
            return
        rows, sinks = all_rows(site), hidden_sinks(site, self.threshold)
        total = torch.zeros(sinks.shape[:2], device=sinks.device)
        for part in rows.split(ROWS, 1):
            total += (site.attention_rows(part) * sinks[:, :, None]).sum((2, 3))
        mean = total / (rows >= 0).sum(1, keepdim=True)
        self.mass.setdefault(site.layer, []).extend(mean.cpu())

    def finish(self) -> dict[str, Tensor]:
        """Return ``heads`` (layers, H) bool and ``mass``, the means (layers, H) float32.

        Raises:
            ValueError: no head is chosen.
        """
        mass = torch.stack([torch.stack(m).mean(0) for _, m in sorted(self.mass.items())])
        heads = mass >= self.least
        heads[:2] = heads[-1:] = False
        if not heads.any():
            raise ValueError(
                f"no head between layers 2 and {len(mass) - 2} spends least={self.least:g} of its attention on "
                f"tokens above threshold={self.threshold:g} (the most is {float(mass.max()):.3f}): lower one of them"
            )
        return {"heads": heads, "mass": mass}
