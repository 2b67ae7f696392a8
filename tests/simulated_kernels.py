"""What stands in for kernels that only a GPU can run, on the device of ``tests/simulated.py``."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from tests.simulated import OnDevice, held_by


class Launch:
    """A Triton kernel in its interpreter, which reads the CPU's memory: of tensors of the device."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
            if len({x.device for x in given}) > 1 or not isinstance(given[0], OnDevice):
                raise RuntimeError(
                    f"a kernel was given tensors of {[str(x.device) for x in given]}"
                )
            args, kwargs = tree_map(held_by, (args, kwargs))
            self.kernel[grid](*args, **kwargs)

        return launch


def flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: Any,
    return_lse: bool = False,
    return_aux: Any = None,
    **settings: Any,
) -> Any:
    """In the place of compiled FlexAttention: its mask, asked on the device, in full."""
    from torch.nn.attention.flex_attention import create_mask

    seen = create_mask(
        block_mask.mask_mod, *block_mask.shape[:2], q.shape[2], k.shape[2], device=str(q.device)
    )
    # A mask of whole blocks has no function: its lists alone say what is seen.
    blocks = block_mask.to_dense().bool()
    for axis, size in zip((2, 3), block_mask.BLOCK_SIZE, strict=True):
        blocks = blocks.repeat_interleave(size, axis)
    seen = seen & blocks[:, :, : q.shape[2], : k.shape[2]]
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, 1).float() for t in (k, v))
    scores = (q.float() @ k.mT * settings["scale"]).masked_fill(~seen, -float("inf"))
    out = (scores.softmax(-1).nan_to_num(0.0) @ v).to(q.dtype)
    return (out, scores.logsumexp(-1)) if return_lse or return_aux is not None else out


def stand_ins() -> Iterator[Any]:
    """What stands in for kernels that only a GPU can run."""
    import vtr.kernels.attention

    # Called outside of the dispatcher, so that what autograd and vmap do above it is done.
    operator = vtr.kernels.attention._operator._init_fn
    yield mock.patch.object(torch.ops.vtr, "block_sparse_attention", operator)
    yield mock.patch("vtr.kernels.flex._compiled", lambda: flex)
    # A product of halves with a result in float32, which torch has for CUDA alone.
    product = "vtr.kernels.bipartite._half_product"
    yield mock.patch(product, lambda a, b: torch.bmm(a.float(), b.float()))
    if importlib.util.find_spec("triton") is None:
        return
    from vtr.kernels import (
        triton_attention,
        triton_block_mass,
        triton_common,
        triton_int8,
        triton_join,
        triton_linear,
    )

    if triton_common.interpreting():
        for module in (
            triton_attention, triton_block_mass, triton_int8, triton_join, triton_linear
        ):  # fmt: skip
            for name in [n for n in vars(module) if n.startswith("_") and n.endswith("_kernel")]:
                yield mock.patch.object(module, name, Launch(getattr(module, name)))
