"""torch: private modules, operators and attributes that vtr uses."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._pytree import tree_iter as tree_iter
from torch.utils._pytree import tree_map as tree_map

# ---- compilation ----------------------------------------------------------------------------


def inside_compiled(model: Any) -> Any:
    """Return the module that ``torch.compile`` compiled as ``model``, or ``model`` itself."""
    return getattr(model, "_orig_mod", model)


#: Modules around a model whose forward passes its arguments to the model in their ``module``.
PARALLEL = (
    "torch.nn.parallel.distributed:DistributedDataParallel",
    "torch.distributed.fsdp.fully_sharded_data_parallel:FullyShardedDataParallel",
)


def inside_parallel(model: Any) -> Any:
    """Return the module in one of :data:`PARALLEL`, or ``model`` itself."""
    kinds = (f"{cls.__module__}:{cls.__name__}" for cls in type(model).__mro__)
    return model.module if any(kind in PARALLEL for kind in kinds) else model


def kind_of(module: Any) -> type:
    """Return the class of a module; if ``fully_shard`` has replaced it, the original class."""
    for cls in type(module).__mro__:
        if not any(base.__name__ == "FSDPModule" for base in cls.__mro__):
            return cls
    return type(module)


Function = TypeVar("Function", bound=Callable[..., Any])


def constant_in_graphs(function: Function) -> Function:
    """Mark a function whose result a compiled graph takes as a constant.

    The same as ``torch.compiler.assume_constant_result``, which imports the compiler (seconds) to set
    one attribute.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def forget_compiled() -> None:
    """Drop everything that ``torch.compile`` has compiled in this process."""
    dynamo: Any = sys.modules.get("torch._dynamo")
    convert: Any = sys.modules.get("torch._dynamo.convert_frame")
    if dynamo is not None and convert is not None and convert.FRAME_COUNTER:
        dynamo.reset()


def graph_maker() -> str:
    """Name the tool that records the running code as one graph for all later inputs: ``"torch.export"``
    or ``"torch.jit.trace"``; empty if none does. (``torch.compile`` recompiles if a graph does not fit.)"""
    if torch.compiler.is_compiling():
        return "torch.export" if torch.compiler.is_exporting() else ""
    return "torch.jit.trace" if torch.jit.is_tracing() else ""


def is_symbolic(x: Any) -> bool:
    """Tell whether an object is a placeholder of a value while ``torch.fx`` traces."""
    return isinstance(x, torch.fx.Proxy)


def strict_recompiling(limit: int) -> AbstractContextManager[Any]:
    """A context in which ``limit`` compilations of one function are allowed, and one more is an error
    (Dynamo would otherwise run the function as it is)."""
    import torch._dynamo.config as dynamo

    limits = {"recompile_limit": limit, "fail_on_recompile_limit_hit": True}
    if not hasattr(dynamo, "recompile_limit"):
        limits = {"cache_size_limit": limit}
    made: AbstractContextManager[Any] = dynamo.patch(limits)
    return made


def flex_lse(wanted: bool) -> dict[str, Any]:
    """Return the arguments by which FlexAttention returns its LSE as well: as second result, or as
    ``lse`` of the second. ``return_lse=`` warns of its removal if ``return_aux=`` exists."""
    from torch.nn.attention import flex_attention as flex

    if not wanted:
        return {}
    request = getattr(flex, "AuxRequest", None)
    return {"return_lse": True} if request is None else {"return_aux": request(lse=True)}


# ---- tensors that are not plain -------------------------------------------------------------


def is_fake(x: Any) -> bool:
    """Tell whether a tensor has a shape but no data (torch's fake mode)."""
    return isinstance(x, torch._subclasses.FakeTensor)


def without_fake_tensors() -> AbstractContextManager[Any]:
    """A context in which tensors have data, also inside torch's fake mode."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    made: AbstractContextManager[Any] = unset_fake_temporarily()
    return made


def transformed(tensors: Iterable[Tensor]) -> bool:
    """Tell whether one of the tensors belongs to ``torch.func`` (grad, vmap) or to forward-mode AD."""
    functorch: Any = torch._C._functorch
    given = list(tensors)
    return any(
        functorch.is_gradtrackingtensor(t) or functorch.is_batchedtensor(t) for t in given
    ) or (
        forward_ad._current_level >= 0
        and any(forward_ad.unpack_dual(t).tangent is not None for t in given)
    )


def _bits(*names: str) -> int:
    """Return the numeric form of a set of dispatch keys."""
    made: Any = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, names[0]))
    for name in names[1:]:
        made = made.add(getattr(torch._C.DispatchKey, name))
    bits: int = made.raw_repr()
    return bits


# What a thread adds to the keys of every operator, outside of inference mode and inside: nothing.
_NO_STATE = frozenset({_bits("BackendSelect", "ADInplaceOrView"), _bits("BackendSelect")})
# The keys of a tensor in memory, made outside of inference mode or inside. A view of negated or conjugated values,
# and a tensor of torch.func, have more of them.
_IN_MEMORY = frozenset(
    bits
    for kind in ("CPU", "CUDA")
    for bits in (
        _bits(kind, "ADInplaceOrView", f"Autograd{kind}", f"Autocast{kind}"),
        _bits(kind, f"Autocast{kind}"),
    )
)


def unobserved() -> bool:
    """Tell whether nobody takes part in the calls of operators in this thread, so that one of ours may be
    called as a function: no compiler, tracer, mode, transform, forward-mode AD or profiler."""
    return (
        not torch.compiler.is_compiling()  # first, as it keeps the rest out of what is compiled
        and not torch._C._len_torch_function_stack()
        and torch._C._dispatch_tls_local_include_set().raw_repr() in _NO_STATE
        and forward_ad._current_level < 0
        and not torch.autograd._profiler_enabled()
    )


#: The dispatch keys of a tensor, a set with a numeric form ``raw_repr()``.
keys_of = torch._C._dispatch_keys


def is_plain(x: Tensor) -> bool:
    """Tell whether a tensor has no subclass, and its values lie in the memory of a CPU or CUDA device."""
    return type(x) is Tensor and keys_of(x).raw_repr() in _IN_MEMORY


def below_autograd() -> AbstractContextManager[Any]:
    """A context in which operators record nothing for autograd, as in the body of a custom operator."""
    made: AbstractContextManager[Any] = torch._C._AutoDispatchBelowAutograd()
    return made


def function_modes() -> list[Any]:
    """Return the function modes that are on, the innermost last."""
    modes: list[Any] = torch.overrides._get_current_function_mode_stack()
    return modes


def in_backward() -> bool:
    """Tell whether this thread is inside a backward pass."""
    return torch._C._current_graph_task_id() >= 0


def is_replica(module: nn.Module) -> bool:
    """Tell whether a module is one of the copies that ``nn.DataParallel`` creates for a call."""
    return bool(getattr(module, "_is_replica", False))


# ---- operators ------------------------------------------------------------------------------


def has_linear_pointwise() -> bool:
    """Tell whether this torch has a separate operator for oneDNN's linear layer."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear_pointwise(a: Tensor, b: Tensor) -> Tensor:
    """Multiply a (M, K) by the transpose of b (N, K) with oneDNN: (M, N)."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return found


def is_intel() -> bool:
    """Tell whether the processor is Intel's, for which MKL has its fastest code."""
    try:
        told = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        told = platform.processor()
    return "GenuineIntel" in told


def integer_product(a: Tensor, b: Tensor) -> Tensor:
    """Multiply a (M, K) by b (K, N), both int8: (M, N) int32."""
    return torch._int_mm(a, b)


def has_amx_tiles() -> bool:
    """Tell whether the processor has tiles for products in low precision (AMX)."""
    return bool(torch.cpu._is_amx_tile_supported())


def cpu_flash_operator() -> Any:
    """Return the operator of the CPU's flash attention, for FLOP counters."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def cpu_flash(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Run the CPU's flash attention of (B, H, S, D); also returns its LSE (B, H, S) or (B, S, H)."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, attn_mask=mask, scale=scale
    )
    return out, lse


def blend(kept: list[Tensor], new: list[Tensor], share: float) -> None:
    """Move each of ``kept`` a ``share`` of the way to ``new``, in place."""
    torch._foreach_lerp_(kept, new, share)
