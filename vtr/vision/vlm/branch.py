"""The second run of a conversation, which decoding by contrast compares the model's own with."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vtr.compat.transformers import cache_layer, with_cache
from vtr.vision.vlm.cache import BRANCH


class NewColumns(NamedTuple):
    """Columns that the second run is given next.

    Attributes:
        embeds: (B, L, C) embeddings.
        valid: (B, L) bool, False for padding.
        positions: (B, L), (3, B, L) or (4, B, L) int64.
        more: further arguments of the language model.
    """

    embeds: Tensor
    valid: Tensor
    positions: Tensor
    more: dict[str, Any]


class Branch:
    """A second run, as it is after a step. A copy of the model's KV cache has a copy of it.

    Attributes:
        cache: its own KV cache.
        mask: (B, n) bool, the columns of that cache that are tokens.
        shift: (B,) int64, by how much lower the positions of coming tokens are than in the model's own run; None
            for not at all.
        seen: columns of the model's own run that it has followed.
        prompt: those of them up to the end of the last prompt with pictures.
        ids: (B, n) token ids of the step before, by which rows are found again.
        live: (B,) bool, samples that have pictures; None before any has.
        logits: (B, V) float32, of the last step.
    """

    def __init__(self, cache: Any) -> None:
        self.cache = cache
        self.mask: Tensor | None = None
        self.shift: Tensor | None = None
        self.seen = self.prompt = 0
        self.ids: Tensor | None = None
        self.live: Tensor | None = None
        self.logits: Tensor | None = None

    def run(self, language: Any, columns: NewColumns) -> Tensor:
        """Let the language model run on, and return the hidden states (B, L, C)."""
        mask = columns.valid if self.mask is None else torch.cat([self.mask, columns.valid], 1)
        out = language(
            inputs_embeds=columns.embeds,
            attention_mask=mask.long(),
            position_ids=columns.positions,
            use_cache=True,
            **with_cache(type(language).forward, self.cache),
            **columns.more,
        )
        self.mask = mask
        return out.last_hidden_state  # type: ignore[no-any-return]

    def follow(self, ids: Tensor, beams: int) -> None:
        """Let rows follow the beams, which are rows of a sample that lie next to one another.

        Args:
            ids: (B, n + 1) ids of this step. A row continues any row of its sample whose ids are its first n: equal
                texts of one sample have equal caches. (Those of two samples may not: their pictures differ.)

        Raises:
            RuntimeError: there is no such row.
        """
        assert self.ids is not None
        old = self.ids.unflatten(0, (-1, beams))
        new = ids[:, : old.shape[2]].unflatten(0, (-1, beams))
        match = (new[:, :, None] == old[:, None]).all(-1)
        found = torch.cat([match.any(-1).flatten(), (match.int().argmax(-1)).flatten()]).tolist()
        if not all(found[: len(ids)]):
            raise RuntimeError(
                "a row of generate continues none of the rows of the step before, so that the second run of a "
                "contrast cannot follow it: use greedy decoding, sampling or beam search of transformers"
            )
        parents = [row // beams * beams + p for row, p in enumerate(found[len(ids) :])]
        if parents != list(range(len(ids))):
            self._take(torch.tensor(parents, device=ids.device))

    def _take(self, rows: Tensor) -> None:
        if self.mask is None:  # no second run: rows of a sample are alike
            return
        self.cache.reorder_cache(rows)
        self.mask = self.mask[rows.to(self.mask.device)]

    def crop(self, seen: int) -> bool:
        """Forget the last columns of a text, up to ``seen`` of the model's own run; False if pictures are among
        them."""
        more = self.seen - seen
        if seen < self.prompt:
            return False
        self.seen = seen
        if more and self.mask is not None:
            left = self.mask.shape[1] - more
            for i in range(len(self.cache.layers)):
                layer = cache_layer(self.cache, i, growing=True)
                if layer is None:
                    return False
                layer.keys, layer.values = layer.keys[:, :, :left], layer.values[:, :, :left]
            self.mask = self.mask[:, :left]
        return True


def branch_of(cache: Any) -> Branch | None:
    """The second run that belongs to a KV cache."""
    found = None if cache is None else cache.__dict__.get(BRANCH)
    return found if isinstance(found, Branch) else None


def keep_branch(cache: Any, branch: Branch) -> None:
    """Keep a second run with the KV cache of the model's own, for later turns."""
    if cache is not None:
        cache.__dict__[BRANCH] = branch
