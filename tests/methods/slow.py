"""A language model run layer by layer in plain code, with cuts made by hand: what methods must equal.

One sample at a time, attention in float64 loops over heads, no cache, no padding; shares nothing with
the package but the model's own weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.vision.vlm.models import IMAGE

Cut = Callable[["Sequence", dict[int, "Seen"]], None]


class Seen:
    """What one layer saw: its input, positions, and which places are visual."""

    def __init__(
        self, layer: Any, x: Tensor, positions: Tensor, visual: Tensor, rotary: Any
    ) -> None:
        self.layer, self.x, self.positions, self.visual, self.rotary = (
            layer,
            x,
            positions,
            visual,
            rotary,
        )

    def project(self) -> tuple[Tensor, Tensor, Tensor]:
        """q (H, L, D) and k, v (H, L, D), rotated, key heads repeated."""
        attention = self.layer.self_attn
        h = self.layer.input_layernorm(self.x)
        parts = []
        for proj in (attention.q_proj, attention.k_proj, attention.v_proj):
            parts.append(proj(h).view(h.shape[0], -1, attention.head_dim).transpose(0, 1))
        cos, sin = self.rotary(h[None], self.positions[None])
        half = attention.head_dim // 2
        for i in (0, 1):
            turned = torch.cat([-parts[i][..., half:], parts[i][..., :half]], -1)
            parts[i] = parts[i] * cos[0] + turned * sin[0]
        groups = attention.num_key_value_groups
        return (
            parts[0],
            parts[1].repeat_interleave(groups, 0),
            parts[2].repeat_interleave(groups, 0),
        )

    def attention(self) -> Tensor:
        """(H, L, L) causal attention map, rows are queries."""
        q, k, _ = (t.double() for t in self.project())
        logits = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
        above = torch.ones(logits.shape[1:], dtype=torch.bool).triu(1)
        return logits.masked_fill(above, -float("inf")).softmax(-1)

    def last_row(self) -> Tensor:
        """(N,) attention of the last token to the visual tokens, mean over heads."""
        return self.attention()[:, -1][:, self.visual].mean(0)


class Sequence:
    """The sequence of one sample between two layers."""

    def __init__(self, x: Tensor, visual: Tensor) -> None:
        self.x, self.visual = x, visual
        self.positions = torch.arange(len(x))
        self.alive = torch.arange(
            int(visual.sum())
        )  # visual tokens left, by their index at the entry

    def keep(
        self, tokens: list[int], compact: bool, values: dict[int, Tensor] | None = None
    ) -> None:
        """Keep the visual tokens with these numbers (among those alive), with new values for some."""
        place = self.visual.nonzero()[:, 0]
        for token, value in (values or {}).items():
            self.x[place[token]] = value
        stays = ~self.visual
        stays[place[tokens]] = True
        self.x, self.visual = self.x[stays], self.visual[stays]
        self.positions = torch.arange(len(self.x)) if compact else self.positions[stays]
        self.alive = self.alive[tokens]


@torch.no_grad()
def run(
    model: Any,
    ids: Tensor,
    images: Tensor,
    before: dict[int, Cut],
) -> tuple[Tensor, list[int]]:
    """Logits of the last token, and the visual tokens that are left.

    Args:
        ids: (L,) without padding.
        images: features of its visual tokens, (N, C), projected.
        before: layer -> what happens to the sequence before it.
    """
    lm = model.model.language_model
    visual = ids == IMAGE
    x = model.get_input_embeddings()(ids).clone()
    x[visual] = images
    sequence, seen = Sequence(x, visual), {}
    for i, layer in enumerate(lm.layers):
        seen[i] = Seen(layer, sequence.x, sequence.positions, sequence.visual, lm.rotary_emb)
        if i in before:
            before[i](sequence, seen)
            seen[i] = Seen(layer, sequence.x, sequence.positions, sequence.visual, lm.rotary_emb)
        here = seen[i]
        v = here.project()[2].double()
        mixed = (here.attention() @ v).transpose(0, 1).reshape(len(here.x), -1).float()
        h = here.x + layer.self_attn.o_proj(mixed)
        sequence.x = h + layer.mlp(layer.post_attention_layernorm(h))
    return model.lm_head(lm.norm(sequence.x)[-1]), sequence.alive.tolist()


def best(scores: Tensor, k: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda j: -float(scores[j]))[:k])


@torch.no_grad()
def features(model: Any, inputs: dict[str, Any]) -> list[Tensor]:
    """Projected visual tokens of each sample."""
    extra = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
    found = torch.cat(list(model.model.get_image_features(**extra).pooler_output))
    return list(found.split((inputs["input_ids"] == IMAGE).sum(1).tolist()))


def samples(inputs: dict[str, Any]) -> list[Tensor]:
    """The ids of each sample without padding."""
    return [
        row[m.bool()] for row, m in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    ]


class Tower:
    """The vision tower of a LLaVA, run image by image in plain code up to the layer that is used."""

    def __init__(self, model: Any) -> None:
        tower = model.model.vision_tower
        self.model, self.tower = model, getattr(tower, "vision_model", tower)
        self.layers = list(self.tower.encoder.layers)
        self.heads = tower.config.num_attention_heads
        layer = model.config.vision_feature_layer
        self.last = len(self.layers) + layer if layer < 0 else layer - 1

    @torch.no_grad()
    def start(self, image: Tensor) -> Tensor:
        """(T, C), the class token first."""
        x = self.tower.embeddings(image[None])
        return self.tower.pre_layrnorm(x)[0]

    def qkv(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v (H, T, D) float64 of a layer with input x (T, C)."""
        block = self.layers[layer]
        h = block.layer_norm1(x)
        attention = block.self_attn
        q, k, v = (
            p(h).view(len(h), self.heads, -1).transpose(0, 1).double()
            for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        return q, k, v

    @torch.no_grad()
    def step(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Output (T, C) of a layer, its attention map (H, T, T), keys and values (H, T, D)."""
        block = self.layers[layer]
        q, k, v = self.qkv(layer, x)
        maps = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1)
        mixed = (maps @ v).transpose(0, 1).reshape(len(x), -1).float()
        h = x + block.self_attn.out_proj(mixed)
        return h + block.mlp(block.layer_norm2(h)), maps, k, v

    @torch.no_grad()
    def project(self, x: Tensor) -> Tensor:
        """Visual tokens of patches (N, C)."""
        return self.model.model.multi_modal_projector(x[None])[0]
