"""Expectations of torch."""

from __future__ import annotations

from vtr.compat.contract import Expectation
from vtr.compat.torch import PARALLEL

CONTRACT = (
    Expectation(
        "torch._dynamo:OptimizedModule", "vtr/compat/around.py", calls=("_orig_mod",)
    ),
    Expectation(PARALLEL[0], "vtr/compat/around.py", calls=("module",)),
    Expectation(PARALLEL[1], "vtr/compat/around.py", has=("module",)),
    Expectation("torch.distributed.fsdp:FSDPModule", "vtr/vision/encoders/timm_blocks.py"),
    Expectation("torch._dynamo:reset", "vtr/vision/vlm/nesting.py"),
    Expectation("torch._dynamo.convert_frame:FRAME_COUNTER", "vtr/vision/vlm/nesting.py"),
    Expectation(
        "torch._dynamo.config", "vtr/kernels/flex.py", has=("patch", "recompile_limit|cache_size_limit")
    ),
    Expectation("torch._subclasses:FakeTensor", "vtr/kernels/attention.py"),
    Expectation("torch._subclasses.fake_tensor:unset_fake_temporarily", "vtr/vision/vlm/attention.py"),
    Expectation(
        "torch._C:_functorch", "vtr/kernels/attention.py", has=("is_gradtrackingtensor", "is_batchedtensor")
    ),
    Expectation("torch.autograd.forward_ad:_current_level", "vtr/kernels/attention.py, vtr/kernels/kept.py"),
    Expectation(
        "torch._C", "vtr/kernels/kept.py",
        has=("_len_torch_function_stack", "_dispatch_tls_local_include_set", "_dispatch_keys", "DispatchKeySet"),
    ),
    Expectation("torch.autograd:_profiler_enabled", "vtr/kernels/kept.py"),
    Expectation("torch._C:_AutoDispatchBelowAutograd", "vtr/kernels/attention.py"),
    Expectation("torch._C:_current_graph_task_id", "vtr/diffusion/attention.py"),
    Expectation("torch.overrides:_get_current_function_mode_stack", "vtr/compat/diffusers.py"),
    Expectation("torch:_int_mm", "vtr/kernels/product.py"),
    Expectation("torch.cpu:_is_amx_tile_supported", "vtr/kernels/product.py"),
    Expectation(
        "torch.ops:aten._scaled_dot_product_flash_attention_for_cpu",
        "vtr/kernels/sdpa.py, vtr/inspect/flops.py",
    ),
    Expectation("torch.multiprocessing.reductions:StorageWeakRef", "vtr/core/recompute.py"),
    Expectation("torch:_foreach_lerp_", "recipes/train_wan.py"),
    Expectation("torch.utils._pytree", "vtr/inspect/profile.py, vtr/inspect/memory.py", has=("tree_iter", "tree_map")),
    Expectation("torch.utils._python_dispatch:TorchDispatchMode", "vtr/inspect/memory.py"),
    Expectation(
        "torch.nn.attention.flex_attention:BlockMask.from_kv_blocks",
        "vtr/kernels/flex.py",
        takes=("BLOCK_SIZE", "mask_mod", "seq_lengths", "compute_q_blocks"),
    ),
    Expectation(
        "torch.nn.attention.flex_attention:flex_attention",
        "vtr/kernels/flex.py",
        takes=("block_mask", "scale", "enable_gqa", "return_aux|return_lse"),
    ),
    Expectation(
        "torch._dynamo.decorators:assume_constant_result",
        "vtr/compat/torch.py",
        calls=("_dynamo_marked_constant",),
    ),
    Expectation("torch.nn:Module._replicate_for_data_parallel", "vtr/core/wrapping.py", calls=("_is_replica",)),
)  # fmt: skip
