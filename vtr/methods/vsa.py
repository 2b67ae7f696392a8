"""VSA: attention to the best tiles, and a learned share of coarse attention to all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from vtr.kernels.masks import budgets, layouts
from vtr.kernels.masks.layouts import Layout
from vtr.methods.base import (
    BlockChoice,
    DynamicAttention,
    Examples,
    Grid,
    GridView,
    ModelInfo,
    Presets,
    check_share,
    register,
)
from vtr.methods.common.coarse import CoarseTiles
from vtr.methods.common.gates import fastvideo_gates
from vtr.methods.common.learned import LayerModules, LearnedAttention
from vtr.methods.common.order import check_tile, reorder

if TYPE_CHECKING:
    from vtr.diffusion.site import DiffusionAttentionSite


@register
@dataclass(frozen=True, kw_only=True)
class VSA(Presets, LearnedAttention, DynamicAttention):
    r"""Video Sparse Attention (NeurIPS 2025, arXiv 2505.13389), which is trained.

    Tokens are put in order tile by tile. With q_I, k_J and v_J the means of the tokens of a tile
    (after rotary embedding) and n tiles:

    1. ``S_IJ = scale q_I . k_J``, the coarse scores;
    2. each query tile attends to the ``ceil(density n)`` tiles of highest score, at least one: O_s;
    3. ``O_c = softmax(S) v``, one row for all tokens of a tile;
    4. ``out = O_s + G * O_c``, with ``G = Linear(hidden)`` per token, head and channel, without a
       sigmoid: ``hidden`` is what enters the attention module.

    .. math::

        S_{IJ} = \bar q_I \cdot \bar k_J / \sqrt{d}, \qquad
        o = \operatorname{softmax}_{J \in \operatorname{top}(S_I)}(q k^T / \sqrt{d}) \, v + G \odot
        \operatorname{softmax}(S) \, \bar v

    G is learned together with the model (:mod:`vtr.train.sla`), from zero, which leaves 2 alone. The
    gates of a released model are taken out of its state dict: ``vtr.apply(pipe, method,
    modules=method.from_fastvideo(state))``. A model that was trained so needs G, and with dense attention
    it is another model.

    Differences from the authors' code: text of a joint sequence is seen by all queries and sees
    everything, and has no part in 3 (their models have it in cross attention); tiles that the
    end of the grid cuts off are filled up with places that are no keys, as there, and these and blocks
    of text are counted in the density that the trace says.

    Args:
        density: share of the tiles that a query tile attends to, in (0, 1]. The authors train down to
            0.1.
        tile: (frames, height, width) tokens of a tile. A tile whose number of tokens is no multiple of
            ``block`` is filled up with empty places.
        gate: True for the learned G. Without training: None leaves out 3 and 4, False takes G = 1, as
            the authors' code does for a model without these layers. An untrained model loses
            quality with False.
    """

    name: ClassVar[str] = "vsa"
    paper: ClassVar[str] = "VSA: Trainable Sparse Attention, NeurIPS 2025, arXiv 2505.13389"

    PRESETS: ClassVar = {
        "fastwan2.1-t2v-1.3b": {"density": 0.2},
        "fastwan2.1-t2v-14b": {"density": 0.1},
        "fastwan2.2-ti2v-5b": {"density": 0.2},
    }
    """The sparsity with which FastVideo's scripts distil these models (0.8, 0.9, 0.8)."""

    density: float = field(default=0.1, kw_only=False)
    tile: tuple[int, int, int] = (4, 4, 4)
    block: int = 64
    gate: bool | None = True

    @classmethod
    def examples(cls) -> Examples:
        bare = cls(0.3, tile=(1, 2, 4), block=16, gate=None)
        return {
            "some": (bare, replace(bare, gate=False), replace(bare, gate=True, untrained=True)),
            "everything": (replace(bare, density=1.0),),
        }

    def validate(self) -> None:
        super().validate()
        check_share(self.density, "density")
        self._set("tile", check_tile(self.tile))
        if not (self.gate is None or isinstance(self.gate, bool)):
            raise ValueError(f"gate must be True, False or None, got {self.gate!r}")
        if self.gate is not True and (self.weights is not None or self.untrained):
            raise ValueError("weights and untrained are for learned gates: leave gate=True")

    @property
    def learned(self) -> bool:  # type: ignore[override]
        return self.gate is True

    def requirements(self, info: ModelInfo) -> Mapping[str, frozenset[str]]:
        hidden = frozenset({"hidden"} if self.gate else ())
        return {site: wanted | hidden for site, wanted in self.needs.items()}

    def build(self, info: ModelInfo) -> LayerModules | None:  # type: ignore[override]
        return super().build(info) if self.gate else None

    def module(self, info: ModelInfo) -> nn.Module:
        assert info.dim is not None and info.heads is not None and info.head_dim is not None
        gate = nn.utils.skip_init(nn.Linear, info.dim, info.heads * info.head_dim)
        for parameter in gate.parameters():
            nn.init.zeros_(parameter)
        return gate

    def from_fastvideo(self, state: Mapping[str, Tensor]) -> LayerModules:
        """Return the gates of a released model, for ``modules=`` of ``vtr.apply``.

        Args:
            state: the state dict of its transformer, with tensors
                ``blocks.N.to_gate_compress.weight`` and ``.bias`` among others, for every block N that
                is not in ``dense_layers``. Prefixes and ``attn1.`` are allowed; a missing bias is zero.

        Raises:
            ValueError: there are no gates, or their sizes differ.
        """
        return fastvideo_gates(state, self.dense_layers)

    def layout(self, grid: Grid) -> Layout:
        return layouts.tiled(grid, self.tile, self.sides, whole=True)

    def scores(self, view: GridView) -> Tensor:
        tiles = self._tiles(view)
        return tiles.to_blocks(tiles.scores(view))

    def budget(self, scores: Tensor, view: GridView) -> Tensor:
        tiles = self._tiles(view)
        number = budgets.number_of(self.density, tiles.number, rounding="ceil")
        return tiles.to_blocks(budgets.top_k(tiles.of_blocks(scores), number))

    def compute(self, view: GridView, chosen: BlockChoice) -> Tensor:
        out = super().compute(view, chosen)
        if self.gate is None:
            return out
        tiles = self._tiles(view)
        coarse = tiles.attention(view).to(out.dtype)[:, :, :, None]
        if self.gate:
            gates = reorder(self._gates(view.site).to(out.dtype), tiles.places)
            coarse = coarse * gates.unflatten(2, (-1, self.block))
        return (out.unflatten(2, (-1, self.block)) + coarse).flatten(2, 3)

    def _tiles(self, view: GridView) -> CoarseTiles:
        def build() -> CoarseTiles:
            return CoarseTiles(view.layout, view.site.grid, self.tile, view.q.device)

        found: CoarseTiles = view.site.for_size("tiles", build)
        return found

    def _gates(self, site: DiffusionAttentionSite) -> Tensor:
        """G of each token of the grid, (B, H, N, D)."""
        gate, hidden = self.of(site), site.hidden
        assert hidden is not None
        found: Tensor = gate(hidden.to(next(gate.parameters()).dtype))
        return found.unflatten(2, (site.q.shape[1], -1)).transpose(1, 2)
