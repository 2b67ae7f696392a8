"""HiP: the best key blocks are found by a hierarchical search, in logarithmic time per row."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from vtr.methods.base import (
    Examples,
    Keep,
    PrefillMethod,
    Presets,
    check_count,
    check_keep,
    count,
    register,
)
from vtr.methods.common.hierarchy import PLACES, Search, check_stages, stage_search, tree_search
from vtr.methods.common.key_blocks import BlockGrid, check_side

if TYPE_CHECKING:
    from vtr.core.language_attention import LanguageAttentionSite


@register
@dataclass(frozen=True, kw_only=True)
class HiP(Presets, PrefillMethod):
    r"""HiP (arXiv 2406.09827) and InfiniteHiP (arXiv 2502.08910): top-k key blocks by hierarchical search.

    It assumes that scores of neighbouring keys are alike, which holds for the raster of an image and for
    frames. Per head and block of rows the keys before the window are cut into runs, a run is judged by a few
    of its keys, and the best runs are halved until they are single key blocks; see
    :func:`vtr.methods.common.hierarchy.tree_search`. With ``pruning`` the search is that of InfiniteHiP,
    :func:`vtr.methods.common.hierarchy.stage_search`. Attention to the blocks found, the window and the
    sinks is exact. Nothing is skipped while all keys fit.

    .. math::

        \text{at each level: } \text{keep the } n \text{ runs } R \text{ of largest } \max_{i \in I} \max_{j
        \in \mathrm{probes}(R)} q_i \cdot k_j,
        \text{ and halve them}

    Against the papers: the smallest run is a block of the kernel (16 keys or more), theirs has 2 and 8
    keys; keys of the window and of the sinks are not searched, in both; text and the last rows are
    dense, decoding as well. InfiniteHiP also changes positions and moves the cache to the host; this method
    does neither.

    Args:
        keys: keys found per block of rows, a number or a share of all keys, rounded up to key blocks.
            The authors' ``mask_k``.
        block: keys per block of the mask: 16, 32, 64 or 128.
        rows: rows per block of the mask, likewise.
        window: most recent keys that a row always sees, its own among them.
        sink: first keys that are always seen, rounded up to key blocks.
        probes: keys by which a run is judged (their ``block_k``).
        place: of them in the run: ``"first"``, ``"center"``, or ``"even"``, at equal distances.
        stride: every stride-th row of a block is compared with them.
        pruning: (chunk, keep) in keys for each stage; the first chunk is the largest, and the last one is
            ``block``. It replaces ``keys``, ``probes`` and ``place``.
    """

    name: ClassVar[str] = "hip"
    paper: ClassVar[str] = "HiP, ICLR 2025, arXiv 2406.09827; InfiniteHiP, 2025, arXiv 2502.08910"

    PRESETS: ClassVar = {
        "llama-3.1-8b/infinitehip": {
            "pruning": ((256, 32768), (32, 8192), (16, 2048)), "block": 16, "rows": 64,
            "sink": 256, "window": 1024, "stride": 1, "dense_layers": (0, 1, 2, 3, 31),
        },
    }  # fmt: skip
    """InfiniteHiP's stages; the last one has chunks of 16 keys in place of 8, a block of the kernel."""

    keys: Keep = field(default=512, kw_only=False)
    block: int = 64
    rows: int = 64
    window: int = 128
    sink: int = 0
    probes: int = 2
    place: str = "first"
    stride: int = 2
    pruning: tuple[tuple[int, int], ...] | None = None

    @classmethod
    def examples(cls) -> Examples:
        small: dict[str, Any] = {"block": 16, "rows": 16, "window": 1, "last_rows": 1}
        return {
            "some": (cls(16, **small), cls(16, **small, pruning=((32, 32), (16, 16)))),
            "everything": (cls(1.0, **small), cls(1.0, **small, pruning=((16, 1 << 20),))),
        }

    @property
    def sides(self) -> tuple[int, int]:
        return self.rows, self.block

    def validate(self) -> None:
        super().validate()
        self._set("keys", check_keep(self.keys, "keys"))
        check_side(self.rows, "rows")
        for name, low in (("window", 1), ("sink", 0), ("probes", 1), ("stride", 1)):
            check_count(getattr(self, name), name, low=low)
        if self.place not in PLACES:
            raise ValueError(f"place must be one of {', '.join(PLACES)}, got {self.place!r}")
        if self.pruning is not None:
            self._set("pruning", check_stages(self.pruning, self.block))

    def blocks(self, site: LanguageAttentionSite) -> Tensor:
        grid = BlockGrid.of(site, self.sides)
        sinks, recent = -(-self.sink // self.block), grid.recent(self.window)
        column = torch.arange(grid.key_blocks, device=grid.device)
        keep = grid.visible() & ((column < sinks) | (column >= recent[:, None]))
        search = Search(site.q, site.k, grid, grid.oldest().clamp(min=sinks), recent, self.stride)
        if self.pruning is not None:
            found = stage_search(search, self.pruning)
        else:
            number = -(-count(self.keys, grid.keys) // self.block)
            found = tree_search(search, number, self.probes, self.place)
        site.spend(search.flops)
        return found | keep
