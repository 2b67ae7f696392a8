"""SLA: softmax attention over the critical blocks plus learned linear attention over the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtr.kernels import sparse_linear_attention
from vtr.kernels.masks.budgets import top_k
from vtr.kernels.precision import full_precision
from vtr.methods.base import BlockChoice, Examples, GridView, ModelInfo, check_share, register
from vtr.methods.common.learned import LearnedAttention
from vtr.methods.topk_sparse import TopKSparse

FEATURES = ("softmax", "elu", "relu")
KEYS = ("marginal", "all")


@register
@dataclass(frozen=True, kw_only=True)
class SLA(LearnedAttention, TopKSparse):
    r"""Sparse-linear attention (SLA, arXiv 2509.24006), to be fine-tuned with the model.

    Per head, for query token i of query block I:

    1. critical blocks: those of :class:`~vtr.methods.TopKSparse`, by softmax attention: O_s;
    2. negligible blocks: of the others the ``negligible`` share with the lowest scores, skipped;
    3. marginal blocks: the rest, by linear attention with a feature map phi:
       O_l = phi(q_i) H_I / (phi(q_i) . z_I), H_I the sum of phi(k_j)^T v_j and z_I that of phi(k_j)
       over their tokens j; 0 if there are no marginal blocks;
    4. output: O_s + Proj(O_l). Proj, the learned part, is a Linear(D, D) in float32 for each attention
       layer, which its heads share; it starts at zero, so that SLA is ``TopKSparse`` before training.

    .. math::

        o_i = \operatorname{softmax}_{\mathrm{critical}}(s_i) v + \mathrm{Proj}\!\left(
        \frac{\phi(q_i) \sum_{j \in \mathrm{marginal}} \phi(k_j)^T v_j}{\phi(q_i) \cdot \sum_{j \in
        \mathrm{marginal}} \phi(k_j)}\right)

    The whole model has to be trained with it: Proj alone is not enough (the authors' advice).
    :mod:`vtr.train.sla` does so, saves both, and loads both.

    Two versions were released. ``keys="marginal"`` is the paper's (their branch ``SLA-1``, whose code has
    no negligible blocks: ``negligible=0``). ``keys="all"`` is that of their main branch and of
    TurboDiffusion: O_l over all keys, the critical ones too, with 1e-5 added to the denominator.

    Text in the sequence, which the papers' models do not have there, is always critical.

    Args:
        density: share of critical blocks, in (0, 1]. Paper: 0.05; TurboDiffusion: 0.1, or 0.15 for quality.
        keys: of the linear attention, ``"marginal"`` or ``"all"``.
        negligible: share of all key blocks that are skipped, in [0, 1]; for ``keys="marginal"``. Paper: 0.1.
        feature: phi, ``"softmax"`` over the head dim, ``"elu"`` (elu + 1) or ``"relu"``.
        block: tokens of a key block. Paper: 64 for both sides.
        query_block: of a query block, if it is another number (TurboDiffusion: 128).
        weights: folder of a fine-tuned model, or the ``modules.safetensors`` in it, for a model that has its
            other weights already (``vtr.train.sla.load`` loads both).
        untrained: compute with new modules outside of training too, which is ``TopKSparse``.
    """

    name: ClassVar[str] = "sla"

    keys: str = "marginal"
    negligible: float = 0.1
    feature: str = "softmax"

    @classmethod
    def examples(cls) -> Examples:
        some = (cls(0.4, block=16, untrained=True),)
        return {"some": some, "everything": (cls(1.0, block=16, untrained=True),)}

    def validate(self) -> None:
        super().validate()
        check_share(self.negligible, "negligible", zero=True)
        for name, known in (("keys", KEYS), ("feature", FEATURES)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}"
                )

    def module(self, info: ModelInfo) -> nn.Module:
        assert info.head_dim is not None
        linear = nn.Linear(info.head_dim, info.head_dim, dtype=torch.float32)
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
        return linear

    def compute(self, view: GridView, chosen: BlockChoice) -> Tensor:
        sparse, linear = sparse_linear_attention(
            view.q, view.keys, view.values, chosen.mask, scale=view.scale, feature=self.feature,
            keys=self.keys, negligible=self._negligible(view, chosen), keys_valid=view.keys_valid,
            backend=view.site.backend,
        )  # fmt: skip
        project = self.of(view.site)
        with full_precision(linear.device):
            found: Tensor = project(linear.to(project.weight.dtype))
        return sparse + found.to(sparse.dtype)

    @torch.no_grad()
    def _negligible(self, view: GridView, chosen: BlockChoice) -> Tensor | None:
        """The blocks that no branch reads, (B, H, NQ, number of key blocks, those of text too) bool."""
        number = int(self.negligible * view.layout.blocks[1])
        if self.keys == "all" or number == 0:
            return None
        scores = self.scores(view).masked_fill(chosen.live, float("inf"))
        lowest = top_k(-scores, number) & ~chosen.live
        return F.pad(lowest, (0, chosen.mask.grid[1] - lowest.shape[-1]))
