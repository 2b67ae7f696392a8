"""MInference 1.0 (Jiang et al., NeurIPS 2024, arXiv 2407.02490): a fixed pattern for each head."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from vtr.methods.base import Examples, Keep, PrefillMethod, check_keep, count, register
from vtr.methods.common.lines import (
    last_lines,
    lines_flops,
    pooled_flops,
    pooled_scores,
    vertical_slash,
)
from vtr.methods.common.shares import largest

if TYPE_CHECKING:
    from vtr.core.language_attention import LanguageAttentionSite

PATTERNS = "vertical-slash", "a-shape", "block-sparse"
_AUTHORS = {"vertical_and_slash": "vertical-slash", "stream_llm": "a-shape", "block_sparse": "block-sparse"}  # fmt: skip

Head = tuple[str, Keep, Keep]


@register
@dataclass(frozen=True, kw_only=True)
class MInference(PrefillMethod):
    r"""Give each head a pattern of fixed size, and find its place in the prompt anew in each call.

    - ``"vertical-slash"``: the attention of the last 64 rows is summed over each key (vertical) and over each
      distance between row and key (slash). The keys and the distances of largest sums are
      computed in all rows; the first 30 keys and the distances below 100 come before all others.
    - ``"a-shape"``: the first ``vertical`` keys and the last ``slash`` keys of each row.
    - ``"block-sparse"``: per block of rows the key blocks of largest ``mean(q_I) . mean(k_J)``, of ``pooled``
      tokens together.

    .. math::

        v_j = \sum_{q \in \mathrm{last~64}} A[q, j], \qquad s_\delta = \sum_{q \in \mathrm{last~64}} A[q, q
        - \delta], \qquad
        M_{ij} = [\,j \in \operatorname{top}(v)\,] \lor [\,i - j \in \operatorname{top}(s)\,]

    The authors choose pattern and sizes of each head offline, on one text of 30k tokens, by the error of the
    attention output. ``patterns`` takes such a table.

    The authors' kernel gathers single keys and blocks of 64 along each slash, at any offset. Here
    lines are counted in tokens as well, but taken in whole blocks on a fixed grid: ``ceil(vertical / block)`` key
    blocks and ``ceil(slash / block)`` groups of neighbouring distances, those of largest sums, and every block
    that a distance of a group crosses. That is about the same work, for other keys if the hot ones are scattered.
    Their block-sparse pattern takes 100 blocks of 64 keys; a shorter last block has here the mean of its
    own keys, weighted by their number.

    Args:
        vertical: keys of the vertical part: an int is tokens, a float in (0, 1] a share of all keys.
        slash: distances of the slash part, likewise. The defaults of both are those of the authors' code for a
            head without an entry in its table, for prompts of 128k tokens: give shares for shorter ones.
        pooled: keys per block of rows of the block-sparse pattern, likewise.
        pattern: of all heads, if ``patterns`` is None.
        patterns: per layer and query head (pattern, vertical, slash); of a block-sparse head the
            second is not read, as in the authors' code. The authors' names of patterns are taken as well, so that
            ``[[h[str(i)][:3] for i in range(len(h))] for h in json.load(file)]`` reads one of their tables.
    """

    name: ClassVar[str] = "minference"
    paper: ClassVar[str] = "MInference 1.0, NeurIPS 2024, arXiv 2407.02490"

    PROBES: ClassVar[int] = 64
    FIRST: ClassVar[int] = 30
    NEAR: ClassVar[int] = 100

    vertical: Keep = field(default=1000, kw_only=False)
    slash: Keep = field(default=6096, kw_only=False)
    pooled: Keep = 6400
    pattern: str = "vertical-slash"
    patterns: tuple[tuple[Head, ...], ...] | None = None

    @classmethod
    def examples(cls) -> Examples:
        def with_share(share: float) -> tuple[MInference, ...]:
            return tuple(
                cls(share, share, pooled=share, pattern=p, block=16, last_rows=1) for p in PATTERNS
            )

        return {"some": with_share(0.1), "everything": with_share(1.0)}

    def validate(self) -> None:
        super().validate()
        for name in ("vertical", "slash", "pooled"):
            self._set(name, check_keep(getattr(self, name), name))
        self._set("pattern", _known(self.pattern))
        if self.patterns is not None:
            self._set("patterns", tuple(tuple(map(_head, layer)) for layer in self.patterns))

    @torch.no_grad()
    def blocks(self, site: LanguageAttentionSite) -> Tensor | None:
        heads = self._heads(site)
        found = site.q.new_zeros(1, 1, 1, 1, dtype=torch.bool)
        for pattern in sorted({head[0] for head in heads}):
            part = (
                self._block_sparse(site)
                if pattern == PATTERNS[2]
                else self._lines(site, heads, pattern)
            )
            mine = torch.tensor([head[0] == pattern for head in heads], device=part.device)
            found = found | (part & mine[:, None, None])
        return found

    def _heads(self, site: LanguageAttentionSite) -> tuple[Head, ...]:
        heads = site.q.shape[1]
        if self.patterns is None:
            return ((self.pattern, self.vertical, self.slash),) * heads
        given = {len(layer) for layer in self.patterns}
        if len(self.patterns) != site.layers or given != {heads}:
            raise ValueError(
                f"patterns must have an entry for each of {site.layers} layers and {heads} query "
                f"heads of this model; got {len(self.patterns)} layers of {sorted(given)} heads"
            )
        return self.patterns[site.layer]

    def _lines(self, site: LanguageAttentionSite, heads: tuple[Head, ...], pattern: str) -> Tensor:
        q, k, keys = site.q, site.k, site.k.shape[2]
        if pattern == PATTERNS[0]:
            last = q[:, :, -self.PROBES :]
            site.spend(lines_flops(last, k, last.shape[2]))
            vertical, slash = last_lines(last, k, scale=site.scale, window=site.window)
            vertical[..., : self.FIRST] = slash[..., : self.NEAR] = torch.inf
        else:  # the first keys, and the nearest
            falling = 1 / torch.arange(1.0, keys + 1, device=q.device)
            vertical = slash = falling.expand(1, q.shape[1], keys)
        sizes = [[-(-count(size, keys) // self.sides[1]) for size in head[1:]] for head in heads]
        wide, near = torch.tensor(sizes, device=q.device).T
        return vertical_slash(vertical, slash, (wide, near), q.shape[2], self.sides)

    def _block_sparse(self, site: LanguageAttentionSite) -> Tensor:
        q, k = site.q, site.k
        site.spend(pooled_flops(q, k, self.sides))
        logits = pooled_scores(q, k, self.sides, site.scale, site.window)
        best = -(-count(self.pooled, k.shape[2]) // self.sides[1])
        return largest(logits, torch.tensor(best, device=q.device))


def _known(pattern: object) -> str:
    found = _AUTHORS.get(str(pattern), str(pattern))
    if found not in PATTERNS:
        raise ValueError(f"pattern must be one of {', '.join(PATTERNS)}, got {pattern!r}")
    return found


def _head(entry: object) -> Head:
    if not isinstance(entry, (list, tuple)) or len(entry) != 3:
        raise ValueError(f"patterns: an entry must be (pattern, vertical, slash), got {entry!r}")
    first, second = (check_keep(size, "a size in patterns") for size in entry[1:])
    return _known(entry[0]), first, second
