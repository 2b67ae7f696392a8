"""SpAtten: tokens and heads that little attention reaches are pruned, and stay out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtr.core.tokens import take
from vtr.errors import UnsupportedMethodError
from vtr.kernels import attention_rows
from vtr.kernels.masks.budgets import top_k
from vtr.methods.base import (
    EncoderAttentionSite,
    Examples,
    Keep,
    ModelInfo,
    Reduction,
    Site,
    Stage,
    TokenMethod,
    check_number,
    check_schedule,
    check_share,
    count,
    register,
)
from vtr.methods.common.cascade import (
    HeadImportance,
    first_pruned,
    heads_left,
    linear_counts,
    output_size,
)
from vtr.methods.common.encoder_attention import NEEDS
from vtr.methods.common.lowbit import check_bit_split, split_bits
from vtr.methods.common.scored import keep_best, to_keep


@register
@dataclass(frozen=True)
class SpAtten(TokenMethod):
    r"""SpAtten (HPCA 2021, arXiv 2012.09852): cascade pruning of tokens and heads, local pruning of values, and
    progressive bits. Training-free, and without a class token.

    - Tokens: the importance of a token is the attention that it has received so far, summed over layers, heads
      and all queries. In each block, between attention and MLP, the least important go, and stay out.
    - Heads: the importance of a head is the sum of the absolute values that it has returned so far, over
      layers, tokens and channels; head h of one layer is taken for head h of the next, as in the paper. The least
      important are left out of all later layers: their outputs are zero, and their attention counts for no token.
    - Values: each row of each head multiplies only the ``values`` largest of its probabilities, which are not
      normalised again.
    - Bits: attention is computed from the higher bits of queries and keys; rows whose largest probability is
      below ``flat`` are computed again with all bits.

    .. math::

        s_j = \sum_{l} \sum_h \sum_q A^l_h[q, j], \qquad
        S_h = \sum_l \sum_q \sum_c |o^l_h[q, c]|

    **Real on today's hardware is the pruning of tokens**, which needs the attention of all rows beside the model's
    own. The rest is what the paper's chip does. Heads that are chosen per image are computed and then zeroed, and
    the report counts them. ``vtr.calibrate`` chooses heads once, on dense runs (ours): their attention is not
    computed and not counted, while their share of the projections still is. Values and bits change the numbers as
    the chip would, and cost time here.

    The paper prunes nothing in the first layers and from there on at a ratio that changes linearly with the layer; the
    numbers ``start`` and ``head_start`` are our reading of it, and so is that the numbers of tokens and heads fall in
    equal steps. The paper's class token can be pruned; here protected tokens stay. The step of the bits is one per
    image and head. The authors' public Python code is another algorithm, for the KV cache of a language model.

    Args:
        keep: tokens left in the end, or a budget for each block that prunes.
        heads: share of the heads left in the end.
        start, head_start: share of the layers in front that prune no tokens, and no heads.
        values: share of the probabilities of a row that values are multiplied by.
        bits: numbers of higher bits (with the sign) and lower bits of queries and keys; None is no rounding. The
            paper has 4 to 12 higher and 4 lower ones.
        flat: largest probability below which a row is computed with all bits; ours.
    """

    name: ClassVar[str] = "spatten"
    paper: ClassVar[str] = "SpAtten, HPCA 2021, arXiv 2012.09852"
    sites: ClassVar[tuple[str, ...]] = ("encoder", "attention")
    needs: ClassVar = {"attention": NEEDS, "encoder": frozenset({"hidden"})}
    calibrated: ClassVar[bool] = True

    keep: Keep | tuple[Keep, ...] = 0.5
    heads: float = 1.0
    start: float = 0.15
    head_start: float = 0.3
    values: float = 1.0
    bits: tuple[int, int] | None = None
    flat: float = 0.1

    @classmethod
    def examples(cls) -> Examples:
        some = (cls(0.4), cls(0.4, heads=0.5, values=0.5, bits=(6, 4), head_start=0.0))
        return {"some": some, "everything": (cls(1.0),)}

    def validate(self) -> None:
        self._set("keep", check_schedule(self.keep, falling=True))
        check_share(self.heads, "heads")
        check_share(self.values, "values")
        for option in ("start", "head_start"):
            check_number(getattr(self, option), option, 0.0, 1.0)
        check_number(self.flat, "flat", 0.0, 1.0)
        if self.bits is not None:
            self._set("bits", check_bit_split(self.bits))

    def cuts(self, info: ModelInfo) -> range:
        """List the blocks that prune tokens. Raises ``ValueError`` if ``keep`` has another number of entries."""
        depth = info.depth["encoder"]
        cuts = range(first_pruned(self.start, depth), depth)
        if isinstance(self.keep, tuple) and len(self.keep) != len(cuts):
            raise ValueError(
                f"keep has {len(self.keep)} entries for the {len(cuts)} blocks {cuts[0]} to {cuts[-1]}"
            )
        return cuts

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        attention = (Stage("attention", n) for n in range(info.depth["attention"]))
        return (*attention, *(Stage("encoder", n) for n in self.cuts(info)))

    def tokens_left(self, info: ModelInfo, tokens: int) -> tuple[int, ...]:
        """Count the tokens left of ``tokens`` behind each of :meth:`cuts`."""
        cuts = self.cuts(info)
        if isinstance(self.keep, tuple):
            return tuple(count(k, tokens) for k in self.keep)
        return linear_counts(tokens, count(self.keep, tokens), len(cuts))

    def head_counts(self, depth: int, heads: int) -> dict[int, int]:
        """Count the heads that layers compute, of those that leave some out."""
        layers = range(max(1, first_pruned(self.head_start, depth)), depth)
        left = linear_counts(heads, count(float(self.heads), heads), max(1, len(layers)))
        return {n: k for n, k in zip(layers, left, strict=False) if k < heads}

    # ---- attention ----------------------------------------------------------------------------

    def attend(self, site: EncoderAttentionSite) -> Tensor:
        seen = site.memory
        tokens = any(k < site.map.n_in for k in self.tokens_left(site.info, site.map.n_in))
        fixed = site.table.get("heads")
        counts = self.head_counts(site.layers, site.q.shape[1]) if fixed is None else {}
        if site.layer in counts:
            alive = seen.setdefault("alive", torch.ones_like(seen["heads"], dtype=torch.bool))
            seen["alive"] = heads_left(alive, seen["heads"], counts[site.layer])
        alive = seen.get("alive") if fixed is None else fixed[site.layer].expand(len(site.q), -1)
        received, out = None, None
        if tokens or self.values < 1 or self.bits is not None:
            received, out = self.look(site, alive)
        if out is None:
            out = self.compute(site, None if fixed is None else fixed[site.layer])
        if alive is not None:
            out = out * alive[:, :, None, None]
        if counts:
            size = output_size(site, out)
            seen["heads"] = seen["heads"] + size if "heads" in seen else size
        if tokens and received is not None:
            old = seen.get("tokens", received.new_zeros(len(received), site.map.n_in))
            place = site.map.kept.clamp(min=0)
            seen["tokens"] = old.scatter_add(
                1, place, received[:, site.prefix :] * (site.map.kept >= 0)
            )
        return out

    def compute(self, site: EncoderAttentionSite, fixed: Tensor | None) -> Tensor:
        """Compute attention as the model does, of the heads (H,) bool alone if they are fixed."""
        if fixed is None or bool(fixed.all()):
            return site.dense()
        chosen = fixed.nonzero()[:, 0]
        found = site.heads(chosen)
        return found.new_zeros(site.q.shape).index_copy(1, chosen, found)

    def look(
        self, site: EncoderAttentionSite, alive: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Sum the attention that each token receives, (B, T) float32; and compute the output if it is not that of
        plain attention, else None."""
        plain = self.values == 1.0 and self.bits is None
        number = math.ceil(self.values * site.tokens - 1e-9)
        rounded = None
        if plain or self.bits is not None:
            site.spend(2.0 * site.q.shape[1] * site.tokens**2 * site.q.shape[3])
        if self.bits is not None:
            rounded = [split_bits(x, *self.bits, site.valid) for x in (site.q, site.k)]
        total, parts = torch.zeros_like(site.q[:, 0, :, 0], dtype=torch.float32), []
        for start, stop in site.each_rows():
            rows = (
                site.rows(start, stop)
                if rounded is None
                else self.rounded(site, rounded, start, stop)
            )
            if not plain:
                kept = rows * top_k(rows, number) if number < site.tokens else rows
                parts.append((kept @ site.v.float()).to(site.v.dtype))
            weight = torch.ones_like(rows[:, :, :, :1])
            if alive is not None:
                weight = weight * alive[:, :, None, None]
            if site.valid is not None:
                weight = weight * site.valid[:, None, start:stop, None]
            total = total + (rows * weight).sum((1, 2))
        return total, None if plain else torch.cat(parts, 2)

    def rounded(
        self, site: EncoderAttentionSite, both: list[tuple[Tensor, Tensor]], start: int, stop: int
    ) -> Tensor:
        """Compute rows of attention from the higher bits, and flat ones from all bits."""
        bias = site.bias
        if bias is not None and bias.shape[2] > 1:
            bias = bias[:, :, start:stop]
        high, full = (
            attention_rows(q[:, :, start:stop], k, bias=bias, scale=site.scale)
            for q, k in zip(*both, strict=True)
        )
        again = high.amax(3, keepdim=True) < self.flat
        site.notes.setdefault("all_bits", []).append(again.float().mean())
        return torch.where(again, full, high)

    # ---- tokens and heads ---------------------------------------------------------------------

    def reduce(self, site: Site) -> Reduction | None:
        stage = self.cuts(site.info).index(site.layer)
        number = to_keep(site, self.tokens_left(site.info, site.map.n_in)[stage])
        if number is None:
            return None
        return keep_best(site, take(site.memory["tokens"], site.index.clamp(min=0)), number)

    def needs_table(self, info: ModelInfo) -> bool:
        """Return False: without a table heads are chosen per image."""
        return False

    def calibrator(self, info: ModelInfo) -> HeadImportance:
        """Return what chooses heads once for all images; raises ``UnsupportedMethodError`` if none is to go."""
        counts = self.head_counts(info.depth["attention"], info.heads or 0)
        if not counts:
            raise UnsupportedMethodError(
                f"{self} leaves out no head of {info.family}, so that there is nothing to calibrate: give heads= a "
                "smaller share"
            )
        return HeadImportance(info.depth["attention"], info.heads or 0, counts)
