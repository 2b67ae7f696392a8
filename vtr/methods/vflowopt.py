"""VFlowOpt: one importance map from the encoder, pruned progressively, with recycling."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.core.budget import Keep, check_flag, check_keep, check_layers, check_number, fit_layers
from vtr.core.language_site import LanguageSite, VisualSpan
from vtr.core.method import Examples, Reduction, Stage, TokenMethod
from vtr.core.presets import Presets
from vtr.core.registry import register
from vtr.core.site import ModelInfo, Site, rows_at_once
from vtr.core.tokens import TokenMap
from vtr.methods.common.merge import by_representative
from vtr.methods.common.scored import prune, to_keep


class Tuned(NamedTuple):
    """Result of the authors' search for one budget."""

    rates: tuple[float, float, float]
    threshold: float
    cell: float


RELEASED: Mapping[float, Tuned] = {
    0.5: Tuned((0.723320, 0.748748, 0.487), 28.6830, 11.7568),
    0.25: Tuned((0.265103, 0.983343, 0.877326), 34.7596, 15.5808),
    0.1: Tuned((0.116615, 1.0, 0.6011), 39.2649, 17.3870),
}
"""The released settings, all for LLaVA-OneVision-7B, by the share of tokens left on average; alpha is 0."""


@register
@dataclass(frozen=True)
class VFlowOpt(Presets, TokenMethod):
    r"""VFlowOpt (ICCV 2025, arXiv 2508.05211): visual information flow, pruned in three stages.

    The importance of a token is calibrated context: with A the head-averaged attention map of the
    last encoder layer whose output the model uses, the tokens whose received attention exceeds
    ``threshold`` times the mean act as the queries, and a token's importance is the mean attention
    that they pay to it. This one map ranks the tokens at all stages: at the entry of the language
    model, after L/3 and after 2L/3 of its layers. The first cut comes before tokens have positions, so
    that they are numbered from 0 behind it; the later ones leave gaps (as in the authors' code).

    .. math::

        Q = \Big\{i : \bar a_i > t \cdot \operatorname{mean} \bar a\Big\}, \qquad
        s_j = \frac{1}{|Q|} \sum_{i \in Q} A[i, j], \qquad
        x_C = \frac{\sum_{j \in C} s_j x_j}{\sum_{j \in C} s_j}

    At the first stage the least important tokens are recycled: those of one cell of ``cell`` x
    ``cell`` tokens (of each image, or crop grid) are merged into their mean, weighted by importance,
    at the place of the most important of them. Newline tokens are always kept there. In prompts with a
    video the least important are dropped instead, as in the authors' code.

    The authors search rates and parameters for each model and budget, and have released those for
    LLaVA-OneVision-7B at 50, 25 and 10 % (:meth:`preset`). Options left at None take the released values
    at the budget ``keep``; between two budgets they are interpolated linearly, which is ours, and
    beyond the last they stay as they are.

    Differences from the authors' code: if no token passes the threshold, all count (theirs averages
    the empty set); the number left is exact (theirs depends on how many cells are occupied); cells of
    a tiled image stay within their tile (theirs lie on the composed grid); the entropy term, whose
    weight is 0 in all released settings, reads pixels in 0..255 (theirs are normalised ones that wrap
    around in uint8), which ``pixel_mean`` and ``pixel_std`` give back.

    Args:
        keep: visual tokens on average over the layers of the language model (R1 is solved for it), or
            the three rates (R1, R2, R3), each of what is left, as floats.
        later: R2 and R3 if ``keep`` is one budget.
        threshold: t, in units of the mean received attention. With a number of tokens as ``keep`` and
            None, the budget is taken as a share of the image's patches, as no tokens are there yet.
        cell: a, the side of a recycling cell in tokens (fractions are meant: 15.58).
        alpha: weight of the patches' entropy (softmax over the crop), in [-1, 1].
        pixel_mean, pixel_std: what the image processor subtracts and divides by (``image_mean``,
            ``image_std``; on pixels in 0..1); needed with ``alpha``.
        layers: the two 0-based layers before the later cuts; None is L/3 and 2L/3.
        merge: recycle (True) or drop (False); None recycles unless the prompt has a video.
    """

    name: ClassVar[str] = "vflowopt"
    paper: ClassVar[str] = (
        "VFlowOpt: Visual Information Flow-Guided Pruning, ICCV 2025, arXiv 2508.05211"
    )
    sites: ClassVar[tuple[str, ...]] = ("encoder", "prompt", "decoder")
    needs: ClassVar = {
        "encoder": frozenset({"queries", "keys", "attention_received"}),
        "prompt": frozenset({"hidden", "encoder_scores"}),
        "decoder": frozenset({"encoder_scores"}),
    }
    positions: ClassVar[str] = "original"

    PRESETS: ClassVar = {
        f"llava-onevision-7b/{share:.0%}": {
            "keep": tuned.rates, "threshold": tuned.threshold, "cell": tuned.cell,
        }
        for share, tuned in RELEASED.items()
    }  # fmt: skip
    """:data:`RELEASED`: the authors' rates, of which R1 leaves a little more or less than the budget."""

    keep: Keep | tuple[float, float, float] = 0.25
    later: tuple[float, float] | None = None
    threshold: float | None = None
    cell: float | None = None
    alpha: float = 0.0
    pixel_mean: tuple[float, ...] | None = None
    pixel_std: tuple[float, ...] | None = None
    layers: tuple[int, int] | None = None
    merge: bool | None = None

    @classmethod
    def examples(cls) -> Examples:
        return {"counted": ()}

    def validate(self) -> None:
        if isinstance(self.keep, Sequence) and not isinstance(self.keep, str):
            if len(self.keep) != 3:
                raise ValueError(f"keep must be one budget or the three rates, got {self.keep!r}")
            for i, rate in enumerate(self.keep):
                check_number(rate, f"keep[{i}]", 1e-6, 1.0)
            self._set("keep", tuple(float(rate) for rate in self.keep))
        else:
            self._set("keep", check_keep(self.keep))
        if self.later is not None:
            if not isinstance(self.later, Sequence) or len(self.later) != 2:
                raise ValueError(f"later must be the two rates (R2, R3), got {self.later!r}")
            for i, rate in enumerate(self.later):
                check_number(rate, f"later[{i}]", 1e-6, 1.0)
            self._set("later", tuple(float(rate) for rate in self.later))
        if self.threshold is not None:
            check_number(self.threshold, "threshold", 0.0, 1e6)
        if self.cell is not None:
            check_number(self.cell, "cell", 1.0, 1e6)
        if self.merge is not None:
            check_flag(self.merge, "merge")
        check_number(self.alpha, "alpha", -1.0, 1.0)
        for name in ("pixel_mean", "pixel_std"):
            value = getattr(self, name)
            if value is not None:
                self._set(name, _channels(value, name))
            elif self.alpha:
                raise ValueError(
                    f"alpha needs {name}: the image processor's {name[6:]} per channel"
                )
        if self.layers is not None:
            self._set("layers", check_layers(self.layers))
            if len(self.layers) != 2 or self.layers[0] < 1:
                raise ValueError(f"layers must be two layers >= 1, got {self.layers!r}")

    @classmethod
    def released(cls, budget: str) -> VFlowOpt:
        """The authors' settings for LLaVA-OneVision-7B: ``"50%"``, ``"25%"`` or ``"10%"``."""
        known = [name.split("/")[1] for name in cls.PRESETS]
        if budget not in known:
            raise ValueError(f"budget must be one of {', '.join(known)}, got {budget!r}")
        return cls.preset(f"llava-onevision-7b/{budget}")

    def positions_at(self, site: str) -> str:
        return "compact" if site == "prompt" else self.positions

    def _layers(self, info: ModelInfo) -> tuple[int, int]:
        depth = info.depth["decoder"]
        if self.layers is not None:
            first, second = fit_layers(self.layers, depth)
            return first, second
        if depth < 3:
            raise ValueError(f"layers must be given for a language model of {depth} layers")
        return depth // 3, 2 * (depth // 3)

    def stage_layers(self, info: ModelInfo) -> tuple[int, int, int]:
        """Count the layers of the language model behind each of the three cuts, up to the next."""
        first, second = self._layers(info)
        return first, second - first, info.depth["decoder"] - second

    def rates(
        self, share: float, depth: int, layers: tuple[int, int]
    ) -> tuple[float, float, float]:
        """R1, R2, R3 for a mean of ``share`` over ``depth`` layers, cut before ``layers``.

        The mean is (R1 L1 + R1 R2 L2 + R1 R2 R3 L3) / L. R2 and R3 are ``later``, R1 is solved. If that
        would need R1 > 1, R1 is 1 and R2 is solved; then R3 likewise.
        """
        if isinstance(self.keep, tuple):
            return self.keep
        first, second, third = layers[0], layers[1] - layers[0], depth - layers[1]
        r2, r3 = self.later or tuned(share).rates[1:]
        total = share * depth
        r1 = total / (first + r2 * (second + r3 * third))
        if r1 <= 1.0:
            return r1, r2, r3
        r2 = (total - first) / (second + r3 * third)
        if r2 <= 1.0:
            return 1.0, r2, r3
        return 1.0, 1.0, min(1.0, (total - first - second) / third)

    def requirements(self, info: ModelInfo) -> dict[str, frozenset[str]]:
        needs = dict(self.needs)
        if self.alpha:
            needs["encoder"] = needs["encoder"] | {"pixels"}
        return needs

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        first, second = self._layers(info)
        return (
            Stage("encoder", info.last_layer, "end", cuts=False),
            Stage("prompt", 0),
            Stage("decoder", first, "start"),
            Stage("decoder", second, "start"),
        )

    def reduce(self, site: Any) -> Reduction | None:
        if site.site == "encoder":
            importance = calibrated_context(site, self._threshold(site))
            if self.alpha:
                entropy = patch_entropy(self._denormalised(site.pixels), site.grid)
                importance = importance + self.alpha * entropy.softmax(1)
            site.memory["importance"], site.memory["grid"] = importance, site.grid
            return None
        here: LanguageSite = site
        number = self._number(here)
        if to_keep(here, number) is None:
            return None
        importance = here.spread(here.stored("importance"), 1.0)
        recycled = [self._recycles(spans) for spans in here.videos]
        if site.site == "decoder" or not any(recycled):
            return prune(here, importance, number)
        group, row, column = coordinates(here, here.memory["grid"], importance.shape)
        if not all(recycled):  # tokens that are alone in their cells are dropped
            group = group.masked_fill(~torch.tensor(recycled, device=here.device)[:, None], -1)
        cell = cells(group, row, column, self._cell(here))
        step = recycle(importance, cell, number, here.valid_mask)
        return Reduction(step, importance.clamp_min(1e-20))

    def _recycles(self, spans: Sequence[VisualSpan]) -> bool:
        """Tell whether the first cut of a prompt with these images and videos merges the removed tokens."""
        if self.merge is not None:
            return self.merge
        return all(span.kind != "video" for span in spans)

    def _threshold(self, site: Site) -> float | Tensor:
        """t, one for each row of the tower's batch if they differ."""
        if self.threshold is not None:
            return self.threshold
        if not isinstance(self.keep, int):
            return tuned(self._share(site.info)).threshold
        rows = site.counts.tolist()
        patches: list[int] = []
        at = 0
        for crops in site.crops or [1] * len(rows):
            patches += [sum(rows[at : at + crops])] * crops
            at += crops
        found = [tuned(min(1.0, self.keep / max(1, n))).threshold for n in patches]
        return (
            found[0] if len(set(found)) == 1 else torch.tensor(found, device=site.device)[:, None]
        )

    def _cell(self, site: LanguageSite) -> Tensor:
        """(B, 1) sides of the cells of each sample."""
        if self.cell is not None:
            sides = [self.cell] * site.batch
        else:
            sides = [tuned(share).cell for share in self._shares(site)]
        return torch.tensor(sides, device=site.device)[:, None]

    def _share(self, info: ModelInfo) -> float:
        """The mean share of tokens that a budget without a number of tokens leaves."""
        if isinstance(self.keep, tuple):
            depth, (first, second) = info.depth["decoder"], self._layers(info)
            r1, r2, r3 = self.keep
            return r1 * (first + r2 * (second - first + r3 * (depth - second))) / depth
        return float(self.keep)

    def _shares(self, site: LanguageSite) -> list[float]:
        """The mean share of tokens that is left of each sample."""
        if not isinstance(self.keep, int):
            return [self._share(site.info)] * site.batch
        entry, left = torch.stack([site.entry, site.entry_budget(self.keep)]).tolist()
        return [want / max(whole, 1) for want, whole in zip(left, entry, strict=True)]

    def _denormalised(self, pixels: Tensor) -> Tensor:
        assert self.pixel_mean is not None and self.pixel_std is not None
        mean, std = (
            torch.tensor(v, device=pixels.device)[:, None, None]
            for v in (self.pixel_mean, self.pixel_std)
        )
        return ((pixels.float() * std + mean) * 255).round()

    def _number(self, site: LanguageSite) -> Tensor:
        """(B,) tokens left after this stage: r = round(n (1 - R)) of n are dropped, never all."""
        layers = self._layers(site.info)
        stage = 0 if site.site == "prompt" else 1 + layers.index(site.layer)
        out = []
        for n, share in zip(site.counts.tolist(), self._shares(site), strict=True):
            rate = self.rates(share, site.info.depth["decoder"], layers)[stage]
            out.append(min(n, max(1, n - round(n * (1 - rate)))))
        return torch.tensor(out, device=site.device)


def tuned(share: float) -> Tuned:
    """The released values for a mean share of the tokens, interpolated linearly between budgets."""
    budgets = sorted(RELEASED)
    share = min(max(share, budgets[0]), budgets[-1])
    high = next(budget for budget in budgets[1:] if share <= budget)
    low = budgets[budgets.index(high) - 1]
    part = (share - low) / (high - low)
    less, more = RELEASED[low], RELEASED[high]
    pairs = zip((*less.rates, *less[1:]), (*more.rates, *more[1:]), strict=True)
    r1, r2, r3, threshold, cell = (x * (1 - part) + y * part for x, y in pairs)
    return Tuned((r1, r2, r3), threshold, cell)


def _channels(value: object, name: str) -> tuple[float, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) not in (1, 3):
        raise ValueError(f"{name} must be one number per channel, got {value!r}")
    for i, number in enumerate(value):
        check_number(number, f"{name}[{i}]", 1e-6 if name == "pixel_std" else -1e6, 1e6)
    return tuple(float(number) for number in value)


def patch_entropy(pixels: Tensor, grid: tuple[int, ...] | None) -> Tensor:
    """Shannon entropy (bits) of each patch's grey values in 256 bins, (crops, rows * columns).

    Args:
        pixels: (crops, 3, H, W) in 0..255; grey is the mean of the channels.
        grid: (rows, columns) of patches; H and W are multiples of them.
    """
    if grid is None or len(grid) != 2 or pixels.shape[2] % grid[0] or pixels.shape[3] % grid[1]:
        raise ValueError(
            f"alpha needs a grid of whole patches, got {grid} for {tuple(pixels.shape)}"
        )
    high, wide = pixels.shape[2] // grid[0], pixels.shape[3] // grid[1]
    grey = pixels.float().mean(1, keepdim=True).clamp(0, 255)
    patches = F.unfold(grey, (high, wide), stride=(high, wide)).transpose(1, 2).long()
    count = torch.zeros(*patches.shape[:2], 256, device=pixels.device)
    count.scatter_add_(2, patches, torch.ones_like(patches, dtype=count.dtype))
    share = count / (high * wide)
    return -torch.special.xlogy(share, share).sum(2) / math.log(2)


def coordinates(
    site: LanguageSite, patches: tuple[int, ...] | None, shape: torch.Size
) -> tuple[Tensor, Tensor, Tensor]:
    """Group (image, frame or tile; -1 for separators), row and column of each token, all (B, N).

    Images that are a plain grid at the entry of the language model say so; for the others the places
    of the patches in their crop are taken along the way of the features.

    Args:
        patches: (rows, columns) of a crop in the encoder.
    """
    entry = site.map.n_in
    group = torch.full((shape[0], entry), -1.0, device="cpu")
    row, column = torch.zeros_like(group), torch.zeros_like(group)
    plain = torch.zeros_like(group, dtype=torch.bool)
    for b, images in enumerate(site.images):
        frames = 0
        for start, length, grid in images:
            if grid is None:
                continue
            place = torch.arange(length, device="cpu")
            span = slice(start, start + length)
            column[b, span] = (place % grid[-1]).float()
            row[b, span] = (place // grid[-1] % grid[-2]).float()
            group[b, span] = (frames + place // (grid[-1] * grid[-2])).float()
            frames += length // (grid[-1] * grid[-2])
            plain[b, span] = True
    index = site.index.clamp(min=0)
    found = [t.to(site.device).gather(1, index) for t in (group, row, column)]
    if all(grid is not None for images in site.images for _, _, grid in images):
        return found[0], found[1], found[2]
    if patches is None or len(patches) != 2:
        raise ValueError(
            "the places of the visual tokens are not known, so that they have no recycling cells: "
            "use VFlowOpt(merge=False)"
        )
    score: Tensor = site.memory["importance"]
    place = torch.arange(score.shape[1], device=site.device)
    crop = torch.arange(score.shape[0], device=site.device)[:, None].expand(score.shape)
    known = plain.to(site.device).gather(1, index)
    # Pooled tokens have the mean of their patches' places; they belong to the nearest tile.
    tile = site.spread(crop.float(), -1.0).round()
    y = site.spread((place // patches[1]).float().expand(score.shape), -1.0)
    x = site.spread((place % patches[1]).float().expand(score.shape), -1.0)
    apart = (tile < 0) | (y < 0)
    rows = y[~apart].unique()
    # Cells are counted in tokens, also if a token represents joined patches.
    unit = float(rows.diff().median().clamp(min=1)) if rows.numel() > 1 else 1.0
    spread = [(tile + 1e4).masked_fill(apart, -1.0), y / unit, x / unit]
    group, row, column = (
        torch.where(known, ours, theirs) for ours, theirs in zip(found, spread, strict=True)
    )
    return group, row, column


def cells(group: Tensor, row: Tensor, column: Tensor, side: float | Tensor) -> Tensor:
    """(B, N) int64 in 0..N-1, equal for tokens of one group and one square of ``side`` tokens.

    Tokens of group -1 are alone in their cell. ``side`` may be a (B, 1) tensor.
    """
    n = group.shape[1]
    y, x = (
        torch.floor(row / side).nan_to_num(0, 0, 0),
        torch.floor(column / side).nan_to_num(0, 0, 0),
    )
    key = (group.nan_to_num(0, 0, 0).long() * 4096 + y.long()) * 4096 + x.long()
    alone = -1 - torch.arange(n, device=group.device)
    key = torch.where(group < 0, alone, key)
    ordered, order = key.sort(dim=1)
    opens = torch.cat(
        [ordered.new_zeros(ordered.shape[0], 1), (ordered.diff(dim=1) != 0).long()], 1
    )
    return torch.empty_like(order).scatter(1, order, opens.cumsum(1))


def calibrated_context(site: Site, threshold: float | Tensor, chunk: int | None = None) -> Tensor:
    """Attention that each token gets from the tokens that attract attention, (B, N) float32.

    With A the attention map averaged over heads, r_j = mean_i A_ij and K = {j: r_j > t mean(r)}:
    context_i = mean over k in K of A_ki. An empty K is every token (the authors' code averages the
    empty set). Rows are computed ``chunk`` of every sample at a time; None is what
    :func:`vtr.core.site.rows_at_once` says for the batch. ``threshold`` may be a (B, 1) tensor.
    """
    chunk = chunk or rows_at_once(site.batch)
    received = site.attention_received(chunk)
    valid = torch.ones_like(received) if site.valid is None else site.valid.float()
    mean = (received * valid).sum(1, keepdim=True) / valid.sum(1, keepdim=True)
    chosen = (received > threshold * mean).float() * valid
    number = chosen.sum(1, keepdim=True)
    # Only the rows of K are computed again: first in each sample, then rows of weight 0.
    order = chosen.sort(dim=1, descending=True, stable=True).indices
    most = int(number.max())
    q = site.qkv[0][:, :, site.prefix :]
    total = torch.zeros_like(received)
    for start in range(0, most, chunk):
        these = order[:, start : min(start + chunk, most)]
        picked = q.gather(2, these[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))
        mask = site.mask_rows(site.index.gather(1, these) + site.prefix)
        rows = site.attention_from(picked, mask)[..., site.prefix :].mean(1)
        total = total + (rows * chosen.gather(1, these)[..., None]).sum(1)
    return torch.where(number > 0, total / number.clamp(min=1), received)


def recycle(importance: Tensor, cell: Tensor, target: Tensor, valid: Tensor) -> TokenMap:
    """Merge the least important tokens by cells until ``target[b]`` tokens are left in row b.

    The m least important tokens are merged within their cells, each into the slot of the cell's most
    important one of them; m is the smallest number that leaves the target. If even merging all
    leaves more (fewer tokens wanted than there are cells), the most important cells stay and the
    others are dropped.

    Args:
        importance: (B, N) float32.
        cell: (B, N) int64 in 0..N-1: which tokens may be merged with each other.
        target: (B,) int64.
        valid: (B, N) bool.
    """
    batch, n = importance.shape
    device = importance.device
    # Ascending importance (of equal ones the later token first, as a cut would drop them), the invalid
    # last; rank[j] is the place of token j.
    ranked = importance.masked_fill(~valid, float("inf")).flip(1)
    order = n - 1 - torch.sort(ranked, dim=1, stable=True).indices
    order = order.gather(1, torch.sort((~valid).gather(1, order).int(), dim=1, stable=True).indices)
    place = torch.arange(n, device=device).expand(batch, n)
    rank = torch.empty_like(order).scatter(1, order, place)
    number = valid.sum(1, keepdim=True)
    first = torch.full_like(rank, n).scatter_reduce(
        1, cell, torch.where(valid, rank, n), "amin", include_self=True
    )
    opens = ((rank == first.gather(1, cell)) & valid).gather(1, order)
    left = number - (place + 1) + opens.long().cumsum(1)  # after merging the first 1..n tokens
    merged = ((left > target[:, None]) & (place < number)).sum(1, keepdim=True) + 1
    merged = torch.where(target[:, None] >= number, 0, merged.minimum(number))
    inside = valid & (rank < merged)
    last = torch.full_like(rank, -1).scatter_reduce(
        1, cell, torch.where(inside, rank, -1), "amax", include_self=True
    )
    head = order.gather(1, last.gather(1, cell).clamp(min=0))
    index = torch.arange(n, device=device).expand(batch, n)
    representative = torch.where(inside, head, index).masked_fill(~valid, -1)
    stays = representative == index
    # Fewer tokens than cells: the least important heads are dropped with their cells.
    surplus = (stays.sum(1) - target).clamp(min=0)
    worst = torch.where(stays.gather(1, order), stays.gather(1, order).long().cumsum(1), 0)
    gone = ((worst > 0) & (worst <= surplus[:, None])).gather(1, rank)
    lost = gone.gather(1, representative.clamp(min=0))
    return by_representative(representative.masked_fill(lost, -1))
