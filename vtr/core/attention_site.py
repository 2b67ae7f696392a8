"""The view of a method on one attention call, of a diffusion transformer or of a language model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


class AttentionSite:
    """One attention call of one layer. Adapters derive the sites of their models from it.

    Attributes:
        site: ``"attention"``.
        layer, layers: 0-based number of the layer, and how many there are.
        q: (B, H, L, D) queries after norms and rotary embedding.
        k, v: (B, Hk, S, D) keys and values; H is a multiple of Hk (query head ``h`` reads key head
            ``h // (H // Hk)``).
        scale: factor of the scores.
        training: whether the model is in training mode.
        state: dict of this method and layer that outlives the call: for one run of a generator, or as
            long as the KV cache.
        memory: dict of this method for one call of the model, shared by all its layers.
        notes: dict that ends in ``trace.notes["attention"][layer]``.
        table: calibrated numbers of this method by name (:func:`vtr.calibrate`); empty without a plan.
        modules: the learned modules of this method, or None.
        backend: of :func:`vtr.kernels.block_sparse_attention`.
    """

    site = "attention"

    def __init__(
        self,
        *,
        layer: int,
        layers: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        dense: Callable[[], Tensor],
        state: dict[str, Any],
        memory: dict[str, Any],
        notes: dict[str, Any],
        table: Mapping[str, Tensor] | None = None,
        modules: torch.nn.Module | None = None,
        backend: str = "auto",
    ) -> None:
        self.layer, self.layers = layer, layers
        self.q, self.k, self.v, self.scale = q, k, v, scale
        self.state, self.memory, self.notes = state, memory, notes
        self.table: Mapping[str, Tensor] = {} if table is None else table
        self.modules = modules
        self.backend = backend
        self._dense = dense
