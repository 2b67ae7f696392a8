"""DynamicViT's prediction module, and the files that learned modules of token methods are loaded from."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Predictor(nn.Module):
    """DynamicViT's prediction module (arXiv 2106.02034, section 3.2).

    LayerNorm, Linear(C, C), GELU; the second half of the channels is replaced by its mean over the
    active tokens; Linear(C, C/2), GELU, Linear(C/2, C/4), GELU, Linear(C/4, 2), softmax.

    Args:
        dim: C.
        outputs: of the last layer; Sparse DETR and Focus-DETR have one, and take no softmax.
    """

    def __init__(self, dim: int, outputs: int = 2) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU())
        self.head = nn.Sequential(
            nn.Linear(dim, dim // 2),
            nn.GELU(),
            nn.Linear(dim // 2, dim // 4),
            nn.GELU(),
            nn.Linear(dim // 4, outputs),
        )

    def forward(self, x: Tensor, active: Tensor) -> Tensor:
        """x (B, N, C), active (B, N) in [0, 1] -> (B, N, 2) float32: chances to keep, and to drop or freeze."""
        return self.logits(x, active).softmax(-1)

    def logits(self, x: Tensor, active: Tensor) -> Tensor:
        """Compute the (B, N, outputs) float32 numbers whose softmax are the chances."""
        h = self.embed(x.to(next(self.parameters()).dtype))
        local, shared = h.chunk(2, -1)
        weight = active.to(h.dtype)[..., None]
        mean = (shared * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp_min(1e-6)
        h = torch.cat([local, mean.expand_as(shared)], -1)
        logits: Tensor = self.head(h).float()
        return logits


class TokenModules(nn.Module):
    """Base of the learned modules of a token method, which know whether they were trained.

    Attributes:
        batches: int64 scalar buffer, the batches of training that they have seen.
    """

    batches: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("batches", torch.zeros((), dtype=torch.long))
        self._trained = False

    def count(self) -> None:
        """Count one batch of training."""
        self.batches += 1

    @property
    def trained(self) -> bool:
        """Tell whether they have seen a batch. Once they have, nothing more is read from the device."""
        if not self._trained:
            self._trained = bool(self.batches)
        return self._trained

    def load(self, weights: str) -> None:
        """Load a safetensors file, or built-in modules by name; raises ``ValueError`` on a misfit."""
        load_modules(self, weights)


def load_modules(modules: nn.Module, weights: str) -> None:
    """Load learned modules from a safetensors file, or built-in ones by name.

    Raises:
        ValueError: there is no such file, or it is for another width or number of stages.
    """
    from safetensors.torch import load_file

    from vtr.zoo import weights_path

    path = weights_path(weights)
    state = {k: v.float() if v.is_floating_point() else v for k, v in load_file(str(path)).items()}
    try:
        modules.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"{weights}: trained for another width or number of stages ({error})"
        ) from error
