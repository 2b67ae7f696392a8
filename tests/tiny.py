"""Tiny encoders with random weights whose attention is not flat, shared by the tests."""

from __future__ import annotations

from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vtr.core.site import ModelInfo, Site
from vtr.core.tokens import TokenMap


def spread(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights of a size that makes scores differ clearly from token to token."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.dim() >= 2 and not name.endswith(("pos_embed", "token", "latent", "table")):
                fan_in = p[0].numel()
                p.copy_(noise * 1.2 * fan_in**-0.5)
            elif "norm" in name and name.endswith("weight"):
                p.copy_(1 + 0.1 * noise)
            elif name.endswith("gamma") or "gamma_" in name:
                p.copy_(0.6 + 0.1 * noise)
            else:
                p.copy_(0.3 * noise)
    return model.eval()


def vit(seed: int = 0, **options: Any) -> VisionTransformer:
    """A timm ViT: 64 pixels, 8 x 8 tokens, width 48, 6 blocks."""
    settings: dict[str, Any] = {
        "img_size": 64,
        "patch_size": 8,
        "embed_dim": 48,
        "depth": 6,
        "num_heads": 3,
        "num_classes": 10,
    }
    return spread(VisionTransformer(**{**settings, **options}), seed)  # type: ignore[return-value]


def images(batch: int = 2, seed: int = 0, size: int = 64) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def ours(model: nn.Module) -> list[str]:
    """Everything in a model that the package could have left behind."""
    found = []
    for name, module in model.named_modules():
        for key, value in module.__dict__.items():
            if "vtr" in key or type(value).__module__.startswith("vtr"):
                found.append(f"{name}.{key}")
            if key.endswith("hooks") and value:
                found.append(f"{name}.{key}")
    return found


def site(
    *,
    n: int,
    prefix: int = 1,
    batch: int = 2,
    heads: int = 2,
    dim: int = 8,
    layer: int = 0,
    depth: int = 6,
    map: TokenMap | None = None,
    memory: dict[str, Any] | None = None,
    seed: int = 0,
    has_cls: bool = True,
) -> Site:
    """A place of a model that does not exist: random q, k, v and features."""
    generator = torch.Generator().manual_seed(seed)
    tokens = prefix + n
    q, k, v = (torch.randn(batch, heads, tokens, dim, generator=generator) for _ in range(3))
    hidden = torch.randn(batch, n, heads * dim, generator=generator)
    info = ModelInfo(
        family="none",
        depth={"encoder": depth},
        signals={"encoder": frozenset()},
        prefix=prefix,
        has_cls=has_cls,
        dim=heads * dim,
        heads=heads,
    )
    map = TokenMap.identity(batch, n) if map is None else map
    return Site(
        site="encoder",
        layer=layer,
        info=info,
        hidden=hidden,
        map=map,
        memory={} if memory is None else memory,
        valid=map.valid if map.padded else None,
        qkv=lambda: (q, k, v),
        scale=dim**-0.5,
        prefix=prefix,
    )


class Watch:
    """Remembers a model, and checks that it is exactly as it was."""

    def __init__(self, model: nn.Module, x: torch.Tensor) -> None:
        self.model, self.x = model, x
        self.keys = list(model.state_dict())
        self.attributes = {n: sorted(m.__dict__) for n, m in model.named_modules()}
        self.classes = {n: type(m) for n, m in model.named_modules()}
        with torch.no_grad():
            self.out = model(x)

    def check(self) -> None:
        assert list(self.model.state_dict()) == self.keys
        assert ours(self.model) == []
        assert {n: sorted(m.__dict__) for n, m in self.model.named_modules()} == self.attributes
        with torch.no_grad():
            assert torch.equal(self.model(self.x), self.out)

    def check_wrapped(self) -> None:
        """State and classes are untouched while wrapped, too."""
        assert list(self.model.state_dict()) == self.keys
        assert {n: type(m) for n, m in self.model.named_modules()} == self.classes
