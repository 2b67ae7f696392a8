"""Compile flash-attn-4's kernels with our lists and mask function, without a GPU.

Run as ``python -m tests.kernels.flash_compile ARCHITECTURE DIM KEY_HEADS BY_HEAD PART`` in a separate process:
the library reads its settings when it is imported. ``PART`` is forward, heavy or backward.
"""

from __future__ import annotations

import os
import sys


def main(architecture: str, dim: int, key_heads: int, by_head: bool, part: str) -> None:
    os.environ["FLASH_ATTENTION_ARCH"] = os.environ["CUTE_DSL_ARCH"] = architecture
    os.environ["FLASH_ATTENTION_NUM_SMS"] = "132"

    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from tests.kernels.cases import token_mask
    from vtr.compat.flash_attn import flash_backward, flash_forward, missing_flash
    from vtr.kernels import BlockMask, flash_lists

    assert not missing_flash(), missing_flash()
    if architecture.startswith("sm_100"):  # else it asks the driver
        from cutlass.utils import HardwareInfo

        HardwareInfo.__init__ = lambda self, *args, **kwargs: None
        HardwareInfo.get_max_active_clusters = lambda self, *args, **kwargs: 66
        HardwareInfo.get_device_multiprocessor_count = lambda self, *args, **kwargs: 132
    block = (128, 128) if part == "backward" else (128, 64)
    tokens = token_mask((4, 900, 1000) if by_head else (900, 1000), block)
    mask = BlockMask.from_dense(tokens, block=block)
    capability = 10 if architecture.startswith("sm_100") else 9
    forward, backward = flash_lists.tiles(dim, capability, block)
    lists = flash_lists.lists_of(mask.tensors(), [900, 1000, *block], forward, backward)
    columns = lists.columns
    with FakeTensorMode(allow_non_fake_inputs=True):

        def there(tensors):
            return [t.to("cuda") for t in tensors]

        q = torch.empty(2, 900, 4, dim, dtype=torch.bfloat16, device="cuda")
        k = torch.empty(2, 1000, key_heads, dim, dtype=torch.bfloat16, device="cuda")
        lse = torch.empty(2, 4, 900, device="cuda")
        tables = there(lists.tables)
        if part == "backward":
            made = flash_backward(
                q, k, k, q, q, lse, lse, there(columns), backward, lists.keeps(), tables, 0.1
            )
            assert [t.shape for t in made] == [q.shape, k.shape, k.shape]
            return
        by_part = part == "heavy"
        if by_part:
            tables.append(torch.empty(mask.patterns, 900, dtype=torch.int32, device="cuda"))
        keeps = lists.keeps(by_part=by_part)
        out, found = flash_forward(q, k, k, there(lists.blocks), forward, keeps, tables, 0.1, True)
        assert out.shape == q.shape and found.shape == lse.shape and found.dtype == torch.float32


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:4]), sys.argv[4] == "1", sys.argv[5])
