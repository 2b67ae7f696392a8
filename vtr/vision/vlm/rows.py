"""Attention of a language model's layer, as methods see it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vtr.core.site import QKV
from vtr.core.tokens import take
from vtr.kernels import attention_rows
from vtr.kernels.precision import full_precision
from vtr.vision.vlm.masks import visible
from vtr.vision.vlm.sequence import SequenceLayout

if TYPE_CHECKING:
    from vtr.vision.vlm.call import LanguageCall


class Seen:
    """The input of a layer: ``hidden`` (B, L, C), rotary tables, and whether the layer has run since."""

    __slots__ = ("done", "hidden", "layer", "layout", "rope")

    def __init__(
        self,
        layer: int,
        hidden: Tensor,
        rope: tuple[Tensor, Tensor],
        layout: SequenceLayout,
        done: bool,
    ) -> None:
        self.layer = layer
        self.hidden = hidden
        self.rope = rope
        self.layout = layout
        self.done = done


class VisualQKV:
    """q, k, v of the visual tokens at a decoder site."""

    def __init__(self, call: LanguageCall, where: Seen | None) -> None:
        self.call, self.where = call, where

    def __call__(self) -> QKV:
        call, where = self.call, checked(self.call, self.where)
        slots = call.layout.slots.clamp(min=0)
        cos, sin = where.rope
        rope = (along(cos, slots), along(sin, slots))
        q, k, v = call.project(where, take(where.hidden, slots), rope, ("q", "k", "v"))
        groups = q.shape[1] // k.shape[1]
        return q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)


class TextRows:
    """Attention of text rows at a decoder site."""

    def __init__(self, call: LanguageCall, where: Seen | None, text: Tensor) -> None:
        self.call, self.where, self.text = call, where, text

    def __call__(self, rows: Tensor) -> tuple[QKV, Tensor]:
        call, where = self.call, checked(self.call, self.where)
        wanted = self.text.gather(1, rows.clamp(min=0)).masked_fill(rows < 0, -1)
        slots = wanted.clamp(min=0)
        cos, sin = where.rope
        module = call.owner.layers[where.layer]
        q, own, v = call.project(
            where,
            take(where.hidden, slots),
            (along(cos, slots), along(sin, slots)),
            ("q", "k", "v"),
        )
        keys = call.keys(where)
        before = call.columns_before(where.layer)
        column = torch.arange(where.hidden.shape[1], device=slots.device)
        sees = call.layout.valid[:, None] & (column <= wanted[..., None])
        earlier = before[:, None].expand(-1, slots.shape[1], -1) & (wanted >= 0)[..., None]
        allowed = visible(call, where.layer, wanted, torch.cat([earlier, sees], 2))[:, None]
        weights = attention_rows(q, keys.to(q), scale=module.self_attn.scaling, bias=allowed)
        target = call.layout.slots + before.shape[1]
        index = target.clamp(min=0)[:, None, None].expand(
            -1, weights.shape[1], weights.shape[2], -1
        )
        seen = weights.gather(3, index).masked_fill(~call.layout.valid_slots[:, None, None], 0)
        groups = q.shape[1] // own.shape[1]
        return (q, own.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)), seen

    def ones(self, rows: Tensor) -> Tensor:
        """(B, R, N): logits between text rows and visual tokens of vectors of ones, rotated."""
        call, where = self.call, checked(self.call, self.where)
        layout = call.layout
        wanted = self.text.gather(1, rows.clamp(min=0)).masked_fill(rows < 0, -1)
        width = call.owner.layers[where.layer].self_attn.head_dim
        turn = call.owner.turning(where.layer)

        def turned(slots: Tensor) -> Tensor:
            cos, sin = (along(x, slots.clamp(min=0)).float() for x in where.rope)
            ones = cos.new_ones(slots.shape[0], 1, slots.shape[1], width)
            return turn(ones, cos, sin)[:, 0]

        text, visual = turned(wanted), turned(layout.slots)
        with full_precision(text.device):
            product = text @ visual.transpose(1, 2) / width**0.5
        none = (wanted < 0)[..., None] | ~layout.valid_slots[:, None]
        return product.masked_fill(none, 1.0)

    def received(self, chunk: int) -> Tensor:
        """(B, N): mean attention over heads and all queries of this call."""
        call, where = self.call, checked(self.call, self.where)
        layout, module = call.layout, call.owner.layers[where.layer]
        batch, length = layout.valid.shape
        keys, before = call.keys(where), call.columns_before(where.layer)
        column = torch.arange(length, device=keys.device)
        target = layout.slots.clamp(min=0) + before.shape[1]
        total = torch.zeros(layout.slots.shape, device=keys.device)
        for start in range(0, length, chunk):
            rows = column[start : start + chunk].expand(batch, -1)
            real = layout.valid.gather(1, rows)
            cos, sin = where.rope
            rope = (along(cos, rows), along(sin, rows))
            q, _, _ = call.project(where, take(where.hidden, rows), rope, ("q",))
            sees = layout.valid[:, None] & (column <= rows[..., None])
            earlier = before[:, None].expand(-1, rows.shape[1], -1)
            allowed = visible(call, where.layer, rows, torch.cat([earlier, sees], 2))
            allowed = allowed & real[..., None]
            weights = attention_rows(
                q, keys.to(q), scale=module.self_attn.scaling, bias=allowed[:, None]
            )
            paid = weights.mean(1).masked_fill(~real[..., None], 0).sum(1)
            total = total + paid.gather(1, target)
        return (total / layout.valid.sum(1, keepdim=True)).masked_fill(~layout.valid_slots, 0)


def checked(call: LanguageCall, where: Seen | None) -> Seen:
    if where is None:
        raise RuntimeError("the layer's input was not seen: a method looked before the model ran")
    if where.layout is not call.layout:
        raise RuntimeError(
            f"a method looks at the attention of layer {where.layer}, which another method has "
            "shortened before: give them different layers, or apply one of them"
        )
    return where


def along(x: Tensor, slots: Tensor) -> Tensor:
    """TextRows ``slots`` (B, K) of rotary tables (B or 1, L, D)."""
    return take(x.expand(slots.shape[0], -1, -1), slots)
