"""Layers of detectors' encoders: how one computes some of the tokens, and reads the values of all."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from vtr.compat.detectors import (
    ATTENTION,
    NORM,
    NORM_FIRST,
    OFFSETS,
    PROJECTIONS,
    QUERIES,
    REFERENCES,
    VALUE,
    VALUES,
    WEIGHTS,
    DetectorNames,
)
from vtr.compat.tested import explain
from vtr.compat.transformers import attention_function, attention_implementation
from vtr.core.tokens import TokenMap, take
from vtr.errors import UnsupportedMethodError, UnsupportedModelError
from vtr.vision.encoders.blocks import linear_flops


def named(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a module's forward by name."""
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}


class DetectorLayer:
    """A layer whose attention takes queries and values apart: deformable attention.

    The layer's own forward runs on the chosen tokens, their positions and their reference points. Its attention
    is given the values of all tokens instead of those of its queries.
    """

    parts: tuple[str, ...] = (OFFSETS, WEIGHTS, VALUE)

    def __init__(self, layer: nn.Module, family: DetectorNames) -> None:
        self.layer: Any = layer
        self.family = family
        self.attention: Any = getattr(layer, ATTENTION, None)
        missing = [name for name in self.parts if not hasattr(self.attention, name)]
        if missing:
            problem = f"the attention of a {type(layer).__name__} has no {', '.join(missing)}"
            raise UnsupportedModelError(explain("transformers", problem))

    @property
    def heads(self) -> int:
        return int(self.attention.n_heads)

    @property
    def levels(self) -> int:
        return int(self.attention.n_levels)

    def whole(self, given: dict[str, Any], values: Tensor) -> dict[str, Any]:
        """Collect the arguments of the attention that are of all tokens."""
        return {VALUES: values}

    def few(self, given: dict[str, Any], x: Tensor, step: TokenMap) -> dict[str, Any]:
        """The layer's arguments for the chosen tokens x (B, K, C)."""
        made = {**given, QUERIES: x}
        for name in (self.family.positions, REFERENCES):
            if given.get(name) is not None:
                full = given[name].expand(len(x), *given[name].shape[1:])
                made[name] = step.gather(full)
        return made

    def attend(self, given: dict[str, Any], whole: dict[str, Any]) -> Any:
        """Attend from the queries in the attention's arguments to all tokens."""
        return type(self.attention).forward(self.attention, **{**given, **whole})

    def flops(self, queries: int, tokens: int) -> int:
        """FLOPs of one image: values of all tokens, the rest for the chosen ones (two per multiply-add; a sampled
        point is four values, weighed, and its weight)."""
        values = linear_flops(self.attention.value_proj)
        points = self.attention.n_points * self.attention.n_levels
        width = self.attention.value_proj.out_features
        rest = linear_flops(self.layer) - values + 10 * points * width
        return values * tokens + rest * queries


class PlainLayer(DetectorLayer):
    """A layer of full self-attention: some of the tokens are queries, and all are keys and values."""

    parts = PROJECTIONS

    @property
    def heads(self) -> int:
        return int(self.attention.q_proj.out_features // self.attention.head_dim)

    @property
    def levels(self) -> int:
        return 1

    def whole(self, given: dict[str, Any], values: Tensor) -> dict[str, Any]:
        if getattr(self.layer, NORM_FIRST, False):
            values = getattr(self.layer, NORM)(values)
        return {VALUES: values, "positions": given.get(self.family.positions)}

    def few(self, given: dict[str, Any], x: Tensor, step: TokenMap) -> dict[str, Any]:
        made = super().few(given, x, step)
        mask = given.get("attention_mask")
        if mask is not None:
            made["attention_mask"] = _rows(mask, step)
        return made

    def attend(self, given: dict[str, Any], whole: dict[str, Any]) -> tuple[Tensor, Any]:
        core, rest = self.attention, dict(given)
        x, mask = rest.pop(QUERIES), rest.pop("attention_mask", None)
        positions, values = rest.pop("position_embeddings", None), whole[VALUES]
        placed = x if positions is None else x + positions
        keys = values if whole["positions"] is None else values + whole["positions"]

        def split(projection: Any, y: Tensor) -> Tensor:
            made: Tensor = projection(y).view(*y.shape[:2], -1, core.head_dim).transpose(1, 2)
            return made

        q, k, v = split(core.q_proj, placed), split(core.k_proj, keys), split(core.v_proj, values)
        function = attention_function(core, attention_implementation(core))
        dropout = core.attention_dropout if core.training else 0.0
        out, weights = function(core, q, k, v, mask, dropout=dropout, scaling=core.scaling, **rest)
        return core.o_proj(out.reshape(*x.shape[:2], -1).contiguous()), weights

    def flops(self, queries: int, tokens: int) -> int:
        core = self.attention
        both = linear_flops(core.k_proj) + linear_flops(core.v_proj)
        width = core.q_proj.out_features
        rest = linear_flops(self.layer) - both
        return both * tokens + rest * queries + 4 * width * queries * tokens


def _rows(mask: Tensor, step: TokenMap) -> Tensor:
    """The rows of the chosen queries of a (B or 1, H or 1, L or 1, L) mask."""
    if mask.dim() != 4:
        raise UnsupportedMethodError(
            "the encoder's attention is given a mask without rows (FlashAttention's), which has no part for some of "
            "the queries: call model.set_attn_implementation('sdpa')"
        )
    if mask.shape[2] == 1:
        return mask
    kept = step.kept.clamp(min=0)
    rows = mask.expand(len(kept), *mask.shape[1:]).transpose(1, 2)
    return take(rows, kept).transpose(1, 2)


def layer_of(layer: nn.Module, family: DetectorNames) -> DetectorLayer:
    """Open one layer.

    Raises:
        UnsupportedModelError: its class, or its attention, is not understood.
    """
    if type(layer).__name__ != family.layer:
        raise UnsupportedModelError(
            explain("transformers", f"a layer is a {type(layer).__name__}, not a {family.layer}")
        )
    return (DetectorLayer if family.deformable else PlainLayer)(layer, family)
