"""LV-ViT of :mod:`vtr.vision.lvvit`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vtr.core.wrapping import Bound
from vtr.vision.encoders.attention import Probe
from vtr.vision.encoders.blocks import BlockRunner, block_flops
from vtr.vision.encoders.wrapping import EncoderWrapping
from vtr.vision.lvvit import Block, LVViT

FAMILIES = ("vtr LVViT",)


class LVViTBlock(BlockRunner):
    """A block whose branches are divided by a constant."""

    block: Block

    def attend(self, x: Tensor, probe: Probe | None, kwargs: dict[str, Any]) -> Tensor:
        return self.block.attend(x) if probe is None else self.block.attend(x, probe.attend)

    def feed(self, x: Tensor, kwargs: dict[str, Any]) -> Tensor:
        return self.block.feed(x)

    def keys_of(self, x: Tensor, index: Tensor, kwargs: dict[str, Any]) -> Tensor:
        return self.block.attn.heads(self.block.norm1(x))[1]

    def flops(self, before: int, after: int) -> int:
        attn = self.block.attn
        return block_flops(attn, self.block.mlp, attn.proj.in_features, before, after)


class LVViTWrapping(EncoderWrapping):
    """A wrapped LV-ViT."""

    def __init__(self, model: LVViT) -> None:
        super().__init__(
            model,
            FAMILIES[0],
            [LVViTBlock(block) for block in model.blocks],
            prefix=1,
            has_cls=True,
            dim=model.size.dim,
            heads=model.size.heads,
            tokens=model.pos_embed.shape[1] - 1,
            fixed_size="its positions are a table for one grid",
        )

    def install(self) -> None:
        super().install()
        self.patch(self.root, "forward_head", Bound(self, "forward_head"))

    def forward_head(self, tokens: Tensor, weights: Tensor | None = None) -> Tensor:
        """The model's head; padding, and in training tokens that are masked, are not its largest patch."""
        model: Any = self.root
        if weights is None:
            sizes = self.sizes(tokens)
            weights = None if sizes is None else sizes[:, 1:]
        return LVViT.forward_head(model, tokens, weights)


def locate(target: Any) -> nn.Module | None:
    """The model itself, if it is one."""
    return target if isinstance(target, LVViT) else None


def wrap(root: Any) -> LVViTWrapping:
    return LVViTWrapping(root)
