"""The base of methods that merge or prune tokens inside the blocks of a diffusion transformer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from vtr.core.budget import check_count
from vtr.core.method import Reduction, Stage, TokenMethod
from vtr.core.site import ModelInfo
from vtr.methods.common.schedule import Scheduled


@dataclass(frozen=True, kw_only=True)
class BlockMerging(Scheduled, TokenMethod):
    """Base of the methods that compute blocks on fewer tokens and give each token its result.

    A subclass defines :meth:`find`.

    Attributes (beside those of :class:`Scheduled`):
        ratio: share of the tokens that are merged or pruned away.
        merge_attn: do it around the self-attention.
        merge_mlp: do it around the MLP as well.
        merge_cross: do it around the cross-attention of a UNet as well.
        max_downsample: in a UNet, the coarsest blocks that do it, in rows of the latents for one of their
            grid. Transformers are not concerned.
        refresh: steps for which a block keeps what it has found, 1 to find it anew in each. Each
            branch of guidance has its own; it is found anew if the batch or the grid changes, never kept
            in training mode, and let go of in the last step.
    """

    sites: ClassVar[tuple[str, ...]] = ("block",)
    needs: ClassVar[Mapping[str, frozenset[str]]] = {"block": frozenset({"hidden"})}

    ratio: float = field(default=0.5, kw_only=False)
    merge_attn: bool = True
    merge_mlp: bool = False
    merge_cross: bool = False
    max_downsample: int = 1
    refresh: int = 1

    def validate(self) -> None:
        super().validate()
        check_count(self.refresh, "refresh")
        check_count(self.max_downsample, "max_downsample")
        if not self.parts():
            raise ValueError(
                "merge_attn, merge_mlp and merge_cross are all False: nothing would be merged"
            )

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        numbers = self.working_layers(info, "block")
        if info.downsample:
            numbers = [n for n in numbers if info.downsample[n] <= self.max_downsample]
        if info.downsample and not numbers:
            raise ValueError(
                f"max_downsample={self.max_downsample} (with dense_layers={self.dense_layers}) leaves "
                f"nothing to do: the blocks of this {info.family} are at downsamplings of "
                f"{', '.join(map(str, sorted(set(info.downsample))))}"
            )
        return tuple(Stage("block", n) for n in numbers)

    def parts(self) -> frozenset[str]:
        """Around what tokens are merged: ``"attention"``, ``"mlp"``, ``"cross"``."""
        wanted = {"attention": self.merge_attn, "mlp": self.merge_mlp, "cross": self.merge_cross}
        return frozenset(part for part, on in wanted.items() if on)

    def reduce(self, site: Any) -> Reduction | None:
        """The map of a :class:`vtr.diffusion.site.BlockSite`, None in dense steps."""
        if self.is_dense(site):
            return None
        found: Reduction | None = held(site, "found", self.refresh, lambda: self.find(site))
        return found

    def find(self, site: Any) -> Reduction | None:
        """Find the map from ``site.hidden``; None if nothing is merged."""
        raise NotImplementedError(f"{type(self).__name__} must define find(site)")


@dataclass(frozen=True, kw_only=True)
class CellMerging(BlockMerging):
    """Base of those that leave a token in each cell of the grid.

    Attributes (beside those of :class:`BlockMerging`):
        cell: (frames, height, width) tokens of a cell; cells are cut off at the border.
        seed: of what is drawn, anew for each layer and step and alike for all samples; None draws
            nothing.
    """

    cell: tuple[int, int, int] = (1, 2, 2)
    seed: int | None = 0

    def validate(self) -> None:
        super().validate()
        self._set("cell", check_cell(self.cell, "cell"))
        most = 1 - 1 / math.prod(self.cell)
        if isinstance(self.ratio, bool) or not 0 <= self.ratio <= most:
            raise ValueError(
                f"ratio must be from 0 to {most:g} for a cell of {math.prod(self.cell)} tokens, of "
                f"which one stays, got {self.ratio!r}"
            )
        if self.seed is not None and type(self.seed) is not int:
            raise ValueError(f"seed must be an int or None, got {self.seed!r}")

    def generator(self, site: Any) -> torch.Generator | None:
        """Return the source of what this layer draws in this step, on the CPU; None without a seed."""
        if self.seed is None:
            return None
        number = self.seed * 1_000_003 + site.step * 1_009 + site.layer
        return torch.Generator().manual_seed(number % 2**63)


def check_cell(value: object, name: str) -> tuple[int, int, int]:
    """Return tokens per axis as a tuple, or raise a ``ValueError`` that names the option."""
    cell = tuple(value) if isinstance(value, (tuple, list)) else ()
    if len(cell) != 3 or any(type(n) is not int or n < 1 for n in cell):
        raise ValueError(f"{name} must be positive ints (frames, height, width), got {value!r}")
    return cell


def held(site: Any, key: str, steps: int, make: Callable[[], Any]) -> Any:
    """Return ``make()``, or what it gave at ``key`` less than ``steps`` steps ago for such tokens.

    Steps are compared, not counted: a cache may have skipped some.
    """
    now = (site.hidden.shape[0], site.grid, site.hidden.device)
    step, of, made = site.state.get(key, (0, None, None))
    if steps == 1 or site.step - step >= steps or of != now:
        made = make()
        if steps > 1 and not site.training:
            site.state[key] = site.step, now, made
    if site.steps is not None and site.step >= site.steps - 1:
        site.state.clear()
    return made
