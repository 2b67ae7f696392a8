"""Float32 matrix products on the CPU, by the faster of the two libraries that torch carries.

``torch.mm`` is MKL's, which does not use AVX-512 on processors of other makers than its own: on an
AMD EPYC (Zen 5) half the speed of oneDNN, which does. torch has oneDNN for float32 behind one
operator, the one that its compiler uses for linear layers. It is ahead of what torch does in bfloat16
and float16 as well, unless the processor has tiles for that (AMX).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from vtr.compat import torch as compat

#: Fewer multiplications than this are done sooner than oneDNN is called.
LEAST = 1 << 20


@lru_cache(maxsize=1)
def _built() -> bool:
    capable = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return capable and compat.has_linear_pointwise()


@lru_cache(maxsize=1)
def _has_tiles() -> bool:
    return compat.has_amx_tiles()


def has_onednn(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether :func:`onednn` takes such tensors here: float32, AVX-512, oneDNN not switched off."""
    return (
        dtype == torch.float32
        and device.type == "cpu"
        and _built()
        and bool(torch.backends.mkldnn.enabled)
    )


def gains(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether attention on such tensors is soonest computed by :func:`onednn` in float32."""
    if dtype in (torch.bfloat16, torch.float16):
        return not _has_tiles() and has_onednn(torch.float32, device)
    return has_onednn(dtype, device)


def onednn(a: Tensor, b: Tensor) -> Tensor:
    """a (M, K) times the transpose of b (N, K), float32: (M, N)."""
    return compat.linear_pointwise(a, b)
