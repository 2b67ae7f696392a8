"""Crops of a picture at the entry of a language model: tables of their tokens, and budgets over them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vtr.core.budget import Keep
from vtr.core.language_site import LanguageSite
from vtr.methods.common.temporal import best, shares

SEPARATORS = -1


class Crops(NamedTuple):
    """The crops of all pictures, and the frames of all videos, of a prompt.

    Attributes:
        sample: the sample of each group of tokens.
        picture: its index in ``site.videos[sample]``.
        row: its row in the vision tower's batch; ``SEPARATORS`` for the separators of a picture.
        size: its tokens.
        tokens: (groups, K) int64, their indices at the site, ascending, -1 behind the last. Groups are in the
            order of the prompt, separators of a picture before its crops.
    """

    sample: list[int]
    picture: list[int]
    row: list[int]
    size: list[int]
    tokens: Tensor

    def of(self, x: Tensor) -> Tensor:
        """x (B, N, ...) of the site -> (groups, K, ...)."""
        sample = torch.tensor(self.sample, device=x.device)
        return x[sample[:, None], self.tokens.clamp(min=0)]

    def pictures(self) -> dict[tuple[int, int], list[int]]:
        """(sample, picture) -> its groups: the separators last, the crops in the tower's order."""
        found: dict[tuple[int, int], list[int]] = {}
        for group, key in enumerate(zip(self.sample, self.picture, strict=True)):
            found.setdefault(key, []).append(group)
        return {k: sorted(g, key=lambda i: self.row[i] == SEPARATORS) for k, g in found.items()}

    def mark(self, site: LanguageSite, chosen: Tensor) -> Tensor:
        """Put (groups, K) bool back to the tokens of the site: (B, N) bool."""
        out = torch.zeros(site.batch, site.n + 1, dtype=torch.bool, device=site.device)
        sample = torch.tensor(self.sample, device=site.device)[:, None].expand_as(self.tokens)
        where = torch.where(chosen, self.tokens, site.n)
        return out.index_put((sample, where), chosen)[:, : site.n]

    def best(self, score: Tensor, number: Sequence[int]) -> Tensor:
        """Choose the ``number`` tokens of highest score (B, N) in each group: (groups, K) bool."""
        wanted = torch.tensor(list(number), device=score.device)
        return best(self.of(score), wanted, self.tokens >= 0)


def crops_of(site: LanguageSite, patches: Tensor) -> Crops:
    """Find the crop of every visual token.

    A token that the model blends from several crops (at borders, where a resized picture is put together) belongs to the
    mean of their numbers.

    Args:
        patches: (rows, patches), anything that the method stored in the tower; only its shape is read.
    """
    rows = torch.arange(len(patches), device=site.device, dtype=torch.float32)
    row = site.spread(rows[:, None].expand(patches.shape), newline=float(SEPARATORS))
    valid = site.valid_mask
    row = torch.where(valid, row, 0.0).round().long()
    width = len(patches) + 1
    most = max((len(spans) for spans in site.videos), default=1)
    sample = torch.arange(site.batch, device=site.device)[:, None]
    key = (sample * max(most, 1) + site.video.clamp(min=0)) * width + row + 1
    key, index = key[valid], valid.nonzero()[:, 1]
    order = torch.sort(key, stable=True).indices
    names, group, size = torch.unique_consecutive(
        key[order], return_inverse=True, return_counts=True
    )
    facts = torch.stack([names, size]).tolist()  # one look at the device
    first = size.cumsum(0) - size
    place = torch.arange(len(order), device=site.device) - first[group]
    tokens = index.new_full((len(names), max(facts[1], default=0)), -1)
    tokens[group, place] = index[order]
    picture = [name // width for name in facts[0]]
    return Crops(
        [p // max(most, 1) for p in picture],
        [p % max(most, 1) for p in picture],
        [name % width - 1 for name in facts[0]],
        facts[1],
        tokens,
    )


def picture_budgets(
    site: LanguageSite, keep: Keep, crops: Crops
) -> dict[tuple[int, int], tuple[int, list[int]]]:
    """(sample, picture) -> the tokens that it keeps, and its groups (see :meth:`Crops.pictures`)."""
    pictures = crops.pictures()
    sizes = {key: sum(crops.size[g] for g in groups) for key, groups in pictures.items()}
    numbers = {key: min(keep, size) for key, size in sizes.items()} if isinstance(keep, int) else {}
    if not numbers:
        for sample, total in enumerate(site.budget(keep).tolist()):
            mine = [key for key in sizes if key[0] == sample]
            parts = shares(min(total, sum(sizes[k] for k in mine)), [sizes[k] for k in mine])
            numbers.update(zip(mine, parts, strict=True))
    return {key: (numbers[key], groups) for key, groups in pictures.items()}


def even_budgets(site: LanguageSite, keep: Keep, crops: Crops) -> list[int]:
    """Spread each picture's budget over its crops in proportion to their tokens; separators get what is left."""
    out = [0] * len(crops.size)
    for number, groups in picture_budgets(site, keep, crops).values():
        content = [g for g in groups if crops.row[g] != SEPARATORS]
        sizes = [crops.size[g] for g in content]
        inside = min(number, sum(sizes))
        for g, share in zip(content, shares(inside, sizes), strict=True):
            out[g] = share
        for g in groups[len(content) :]:
            out[g] = number - inside
    return out


def proportional(total: int, weights: Sequence[int], rooms: Sequence[int]) -> list[int]:
    """Spread ``total`` in proportion to whole weights, no part above its room, as many as fit.

    Remainders go to the largest fractions, of equals to the first; parts of weight 0 get something only when
    all others are full, in order.
    """
    out, open_ = [0] * len(rooms), [i for i, w in enumerate(weights) if w > 0 and rooms[i] > 0]
    total = min(total, sum(rooms))
    while total and open_:
        whole = sum(weights[i] for i in open_)
        full = [i for i in open_ if total * weights[i] >= rooms[i] * whole]
        if full:
            for i in full:
                out[i] = rooms[i]
                total -= rooms[i]
            open_ = [i for i in open_ if i not in full]
            continue
        parts = {i: divmod(total * weights[i], whole) for i in open_}
        rest = total - sum(part for part, _ in parts.values())
        more = sorted(open_, key=lambda i: -parts[i][1])[:rest]
        for i in open_:
            out[i] = parts[i][0] + (i in more)
        total = 0
    for i, room in enumerate(rooms):
        take = min(total, room - out[i])
        out[i] += take
        total -= take
    return out
