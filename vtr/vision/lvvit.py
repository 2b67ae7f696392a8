"""LV-ViT (Jiang et al., All Tokens Matter, NeurIPS 2021, arXiv 2104.10858), in plain PyTorch.

The backbone of DynamicViT's, EViT's and Adaptive Sparse ViT's larger rows, which no library of models has today.
The names of its tensors are those of the authors' checkpoints (zihangJiang/TokenLabeling), which
:meth:`LVViT.load` reads. All encoder methods of vtr work on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class LVViTSize:
    """The sizes of a model.

    Attributes:
        dim, depth, heads: of the blocks, whose MLP is three times as wide.
        skip: each branch of a block is divided by it before it is added.
        stem: channels of the convolutions in front of the patches.
        patch: pixels of the side of a patch.
    """

    dim: int
    depth: int
    heads: int
    skip: float = 2.0
    stem: int = 64
    patch: int = 16


SIZES = {
    "t": LVViTSize(240, 12, 4, skip=1.0),
    "s": LVViTSize(384, 16, 6),
    "m": LVViTSize(512, 20, 8),
    "l": LVViTSize(768, 24, 12, skip=3.0, stem=128),
}
"""The authors' models: 8.5, 26.2, 55.8 and 150.5 million parameters (the last one for 448 pixels)."""


class Stem(nn.Module):
    """Patches by four convolutions, the first of stride 2, the last of half a patch's side."""

    def __init__(self, size: LVViTSize) -> None:
        super().__init__()
        width, half = size.stem, size.patch // 2
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.proj = nn.Conv2d(width, size.dim, half, stride=half)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        out: Tensor = self.proj(x)
        return out


class Attention(nn.Module):
    """Self-attention, without a bias of q, k and v."""

    def __init__(self, size: LVViTSize) -> None:
        super().__init__()
        self.num_heads = size.heads
        self.qkv = nn.Linear(size.dim, 3 * size.dim, bias=False)
        self.proj = nn.Linear(size.dim, size.dim)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v, (B, H, T, D) each."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def forward(self, x: Tensor, attend: Attend = F.scaled_dot_product_attention) -> Tensor:
        out: Tensor = self.proj(attend(*self.heads(x)).transpose(1, 2).flatten(2))
        return out


class FeedForward(nn.Module):
    """Linear, GELU, Linear, three times as wide inside."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 3 * dim)
        self.fc2 = nn.Linear(3 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class DropBranch(nn.Module):
    """Stochastic depth: in training a branch is left out of a sample with probability ``rate``."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.rate:
            return x
        kept = torch.rand(x.shape[0], 1, 1, device=x.device) >= self.rate
        return x * kept.to(x.dtype) / (1 - self.rate)


class Block(nn.Module):
    """x + attention(norm(x)) / skip, then the same with the MLP."""

    def __init__(self, size: LVViTSize, rate: float) -> None:
        super().__init__()
        self.skip = size.skip
        self.norm1 = nn.LayerNorm(size.dim)
        self.attn = Attention(size)
        self.drop_path = DropBranch(rate)
        self.norm2 = nn.LayerNorm(size.dim)
        self.mlp = FeedForward(size.dim)

    def attend(self, x: Tensor, attend: Attend = F.scaled_dot_product_attention) -> Tensor:
        """x plus its attention branch; ``attend`` computes q, k, v -> output, (B, H, T, D) each."""
        return x + self.drop_path(self.attn(self.norm1(x), attend)) / self.skip

    def feed(self, x: Tensor) -> Tensor:
        """x plus its MLP branch."""
        return x + self.drop_path(self.mlp(self.norm2(x))) / self.skip

    def forward(self, x: Tensor) -> Tensor:
        return self.feed(self.attend(x))


class LVViT(nn.Module):
    """A classifier whose patches are classified too: classes of the class token + 0.5 * the largest of the patches.

    Differences from the authors' code: in training it returns the same (B, classes) logits; the logits of
    each patch, for a loss on token labels, are those of :meth:`dense`. MixToken is left to the data.

    Args:
        size: a name of :data:`SIZES`, or sizes.
        image: pixels of the side of an image.
        classes: number of classes.
        drop_path: stochastic depth of the last block; those before it have less, in proportion.
    """

    def __init__(
        self,
        size: str | LVViTSize = "s",
        image: int = 224,
        classes: int = 1000,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if isinstance(size, str):
            if size not in SIZES:
                raise ValueError(
                    f"size must be one of {', '.join(SIZES)} or an LVViTSize, got {size!r}"
                )
            size = SIZES[size]
        if image < size.patch or image % size.patch:
            raise ValueError(f"image must be a multiple of {size.patch} pixels, got {image!r}")
        self.size, self.image, self.num_classes, self.embed_dim = size, image, classes, size.dim
        self.patch_embed = Stem(size)
        tokens = (image // size.patch) ** 2
        self.cls_token = nn.Parameter(torch.empty(1, 1, size.dim))
        self.pos_embed = nn.Parameter(torch.empty(1, tokens + 1, size.dim))
        rates = torch.linspace(0, drop_path, size.depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(Block(size, rate) for rate in rates)
        self.norm = nn.LayerNorm(size.dim)
        self.head = nn.Linear(size.dim, classes)
        self.aux_head = nn.Linear(size.dim, classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    @classmethod
    def load(cls, file: str | Path) -> LVViT:
        """Load a checkpoint of the authors, or one saved from this class, in evaluation mode.

        Sizes, classes and image size follow from its tensors.

        Args:
            file: safetensors, or a file of ``torch.save`` with tensors alone (read with ``weights_only``): a
                state dict, or one under ``state_dict``, ``model`` or ``state_dict_ema``.

        Raises:
            ValueError: it holds no LV-ViT of :data:`SIZES`.
        """
        state = _state(Path(file))
        size = next((s for s in SIZES.values() if s.dim == state["cls_token"].shape[-1]), None)
        if size is None:
            raise ValueError(
                f"{file} holds a model of width {state['cls_token'].shape[-1]}, and LV-ViT has "
                f"{', '.join(str(s.dim) for s in SIZES.values())}: make LVViT(LVViTSize(...)) and load its state dict"
            )
        side = math.isqrt(state["pos_embed"].shape[1] - 1)
        model = cls(size, side * size.patch, state["head.weight"].shape[0])
        try:
            model.load_state_dict(dict(state))
        except RuntimeError as error:
            raise ValueError(f"{file} does not hold the tensors of an LV-ViT: {error}") from error
        return model.eval()

    def forward_features(self, images: Tensor) -> Tensor:
        """Images (B, 3, image, image) -> normed tokens (B, 1 + N, dim), the class token first."""
        if images.dim() != 4 or images.shape[2:] != (self.image, self.image):
            raise ValueError(
                f"images must be (B, 3, {self.image}, {self.image}), got {tuple(images.shape)}: the model's "
                "positions are a table for one grid"
            )
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.norm(x)
        return out

    def forward_head(self, tokens: Tensor, weights: Tensor | None = None) -> Tensor:
        """Tokens (B, 1 + N, dim) -> logits (B, classes).

        ``weights`` (B, N): patches with 0 are left out of the largest; None is all. An image without any
        patch is classified by its class token.
        """
        logits: Tensor = self.head(tokens[:, 0])
        patches: Tensor = self.aux_head(tokens[:, 1:])
        if weights is not None:
            patches = patches.masked_fill((weights == 0)[..., None], -float("inf"))
        if patches.shape[1] == 0:
            return logits
        largest = patches.amax(1)
        return logits + 0.5 * largest.masked_fill(largest == -float("inf"), 0.0)

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))

    def dense(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the class token, (B, classes), and of each patch, (B, N, classes), for token labels."""
        tokens = self.forward_features(images)
        return self.head(tokens[:, 0]), self.aux_head(tokens[:, 1:])


def _state(file: Path) -> Mapping[str, Tensor]:
    """The tensors of a checkpoint, without the prefix of a parallel wrapper and of predictors beside it."""
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        held: Any = load_file(file)
    else:
        held = torch.load(file, map_location="cpu", weights_only=True)
    for name in ("state_dict", "model", "state_dict_ema"):
        if isinstance(held, Mapping) and isinstance(held.get(name), Mapping):
            held = held[name]
    own = {k.removeprefix("module."): v for k, v in held.items()}
    own = {k: v for k, v in own.items() if not k.startswith("score_predictor.")}
    if not {"cls_token", "pos_embed", "head.weight"} <= set(own):
        raise ValueError(f"{file} holds no LV-ViT: it has no cls_token, pos_embed and head.weight")
    return own
