"""Refuse with a message what CUDA cannot capture in a graph."""

from __future__ import annotations

import torch

_LISTS = "call once with this mask before the capture, and keep the mask as long as the graph"
_MASK = (
    "build the mask and call once with it before the capture. A method that chooses other blocks in every "
    "step cannot be captured: leave its attention out of the graph"
)


def _capturing(device: torch.device) -> bool:
    if device.type != "cuda" or torch.compiler.is_compiling():
        return False
    # A fake tensor of a device needs no driver, without which torch could not answer.
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def refuse_capture(device: torch.device, what: str) -> None:
    """Raise while a CUDA graph is captured, for code that runs once per mask."""
    if _capturing(device):
        raise RuntimeError(
            f"{what} at the first call with a mask, which reads from the device and cannot be "
            f"captured in a CUDA graph: {_LISTS}"
        )


def refuse_captured_mask(device: torch.device, what: str = "a mask is built") -> None:
    """Raise while a CUDA graph is captured, for code that computes or moves a mask."""
    if _capturing(device):
        raise RuntimeError(
            f"{what}, for which the host waits for the device: it cannot be captured in a CUDA graph; {_MASK}"
        )
