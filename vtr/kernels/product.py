"""Matrix products: float32 on the CPU, by the faster of the two libraries that torch includes; int8.

``torch.mm`` calls MKL, which uses AVX-512 only on Intel processors: on an AMD EPYC (Zen 5) it has half
the speed of oneDNN, which uses AVX-512 there; on an Intel Xeon with AMX it is 1.3 to 1.4 times as fast as
oneDNN, and used. torch offers oneDNN for float32 behind one operator, the
one that its compiler uses for linear layers. It is faster than torch's products in bfloat16 and float16
as well, unless the processor has tiles for them (AMX).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from vtr.compat import torch as compat

#: With fewer multiplications than this, MKL is done before oneDNN is called.
LEAST = 1 << 20


@lru_cache(maxsize=1)
def has_avx512() -> bool:
    """Tell whether oneDNN's operator is there and the processor has AVX-512."""
    capable = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return capable and compat.has_linear_pointwise()


@lru_cache(maxsize=1)
def mkl_is_faster() -> bool:
    """Tell whether MKL uses AVX-512 too: it does on Intel's processors."""
    return torch.backends.mkl.is_available() and compat.is_intel()


@lru_cache(maxsize=1)
def _has_tiles() -> bool:
    return compat.has_amx_tiles()


def has_onednn(dtype: torch.dtype, device: torch.device) -> bool:
    """Tell whether :func:`onednn` takes such tensors: float32, AVX-512 that MKL does not use, oneDNN not switched off."""
    return (
        dtype == torch.float32
        and device.type == "cpu"
        and has_avx512()
        and not mkl_is_faster()
        and bool(torch.backends.mkldnn.enabled)
    )


def gains(dtype: torch.dtype, device: torch.device) -> bool:
    """Tell whether attention on such tensors is fastest by :func:`onednn` in float32."""
    if dtype in (torch.bfloat16, torch.float16):
        return not _has_tiles() and has_onednn(torch.float32, device)
    return has_onednn(dtype, device)


def stacks(dtype: torch.dtype, device: torch.device) -> bool:
    """Tell whether attention on such tensors is fastest with the query heads that share keys as one head:
    in low precision by flash attention, which prepares keys and values anew in every call."""
    low = dtype in (torch.bfloat16, torch.float16)
    return low and device.type == "cpu" and not gains(dtype, device)


def onednn(a: Tensor, b: Tensor) -> Tensor:
    """Multiply a (M, K) by the transpose of b (N, K), float32: (M, N)."""
    return compat.linear_pointwise(a, b)


def integer_product(a: Tensor, b: Tensor) -> Tensor:
    """Multiply a (M, K) by the transpose of b (N, K), int8, exactly: (M, N) int32.

    CUDA needs M > 16 and multiples of 8 as N and K.
    """
    return compat.integer_product(a, b.t())
