"""Tensors that live from one denoising step to the next, in few bits or outside the GPU."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from vtr.kernels import BlockMask

PRECISIONS = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8": torch.float8_e4m3fn,
}
_FLOAT8_MAX = 448.0


class Kept:
    """A tensor stored in a chosen precision, on its device or in (pinned) CPU memory.

    ``float8`` is e4m3 with one bfloat16 scale per row (last axis): a relative error of at most 2^-4
    for values down to 2^-14 of their row's largest.
    """

    def __init__(self, precision: str | None, offload: bool) -> None:
        """``precision``: a key of :data:`PRECISIONS`, or None for the tensor's own."""
        self.precision = precision
        self.offload = offload
        self._parts: list[Tensor] = []

    def store(self, x: Tensor) -> None:
        """Takes the place of what was stored; (..., D) floating point."""
        parts = [x.detach()]
        if self.precision == "float8":
            # The scale is rounded before it divides, so that its rounding is no error; what rounding
            # pushes past the largest float8 would become NaN there.
            scale = (x.detach().abs().amax(-1, keepdim=True).float() / _FLOAT8_MAX).bfloat16()
            scale = torch.where(scale == 0, torch.ones_like(scale), scale)
            scaled = (x.detach().float() / scale.float()).clamp(-_FLOAT8_MAX, _FLOAT8_MAX)
            parts = [scaled.to(torch.float8_e4m3fn), scale]
        elif self.precision is not None:
            parts = [x.detach().to(PRECISIONS[self.precision])]
        if self.offload:
            old = self._parts
            if [(t.shape, t.dtype) for t in old] != [(t.shape, t.dtype) for t in parts]:
                pin = x.is_cuda
                old = [
                    torch.empty(t.shape, dtype=t.dtype, pin_memory=pin, device="cpu") for t in parts
                ]
            # Copies of one stream run in order, so neither waits for the other here.
            for target, part in zip(old, parts, strict=True):
                target.copy_(part, non_blocking=True)
            parts = old
        self._parts = parts

    def load(self, device: torch.device) -> Tensor:
        """The tensor on ``device``, in the precision stored (float32 for float8)."""
        parts = [t.to(device, non_blocking=True) for t in self._parts]
        if self.precision == "float8":
            return parts[0].float() * parts[1].float()
        return parts[0]

    @property
    def bytes(self) -> int:
        """Memory of what is stored."""
        return sum(t.numel() * t.element_size() for t in self._parts)


def kept_bytes(rows: int, dim: int, precision: str) -> int:
    """Return the bytes that :class:`Kept` needs for ``rows`` rows of ``dim`` values."""
    extra = 2 if precision == "float8" else 0
    return rows * (dim * PRECISIONS[precision].itemsize + extra)


class Measured:
    """The values that a layer and branch keep from their last dense step.

    Attributes:
        ratio: (B, H, S) float32. residual: of (B, H, S, D), or None. step: when it was measured.
        ident: the mask that it was measured with.
    """

    def __init__(self, precision: str | None, offload: bool, residual: bool) -> None:
        self.ratio = torch.empty(0, device="cpu")
        self.residual = Kept(precision, offload) if residual else None
        self.step = -1
        self.ident = -1

    @property
    def bytes(self) -> int:
        """Memory of both."""
        residual = 0 if self.residual is None else self.residual.bytes
        return self.ratio.numel() * self.ratio.element_size() + residual

    def check(self, layer: int, mask: BlockMask) -> None:
        """Raise ``RuntimeError`` if the ratio is not one of this mask."""
        if self.ident != int(mask.ident):
            raise RuntimeError(
                f"layer {layer}: the mask has changed since step {self.step}, when Re-ttention "
                "measured its ratio; the size must stay the same for a whole run"
            )


def warn_if_short(need: int, device: torch.device) -> None:
    """Warn if a GPU has fewer than ``need`` bytes free."""
    free, _ = torch.cuda.mem_get_info(device)
    if need > free:
        warnings.warn(
            f"Re-ttention will keep {need / 2**30:.1f} GiB for this branch of the guidance, "
            f'and {free / 2**30:.1f} GiB are free; precision="float8" keeps about half of '
            "that, offload=True keeps it in CPU memory, residual=False next to nothing",
            stacklevel=2,
        )
