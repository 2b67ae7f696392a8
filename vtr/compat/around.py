"""Wrappers around a model: ``torch.compile``, data parallelism, adapters."""

from __future__ import annotations

from typing import Any

from vtr.compat.peft import inside_adapters
from vtr.compat.torch import inside_compiled, inside_parallel


def unwrapped(target: Any) -> Any:
    """Return the model inside compiled modules (``OptimizedModule``), DistributedDataParallel,
    FullyShardedDataParallel and PEFT's models, in any order; other objects as they are."""
    while True:
        inner = inside_adapters(inside_parallel(inside_compiled(target)))
        if inner is target:
            return target
        target = inner
