"""FLOPs of a model: counted on the real modules, and by formula.

:func:`count_flops` runs a call under ``torch.utils.flop_counter``. The formulas (:func:`vit_macs`,
:func:`llm_flops`, :func:`kv_bytes`) need only sizes; they are the cross-check of the counter and give
published figures of models that nobody wants to build.

One multiply-add (MAC) is two FLOPs. Papers on vision transformers print MACs and often call them
"GFLOPs".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from vtr.compat.torch import cpu_flash_operator

if TYPE_CHECKING:
    from vtr.api import Handle


def _attention_flops(
    q: Sequence[int], k: Sequence[int], v: Sequence[int], *args: Any, **kwargs: Any
) -> int:
    """Count two matrix products per query head for shapes (B, H, N, D), (B, Hk, M, D), (B, Hk, M, Dv)."""
    batch, heads, n, width = q
    return 2 * batch * heads * n * k[2] * (width + v[3])


def _missing_formulas() -> dict[Any, Callable[..., int]]:
    # torch 2.11 counts the CPU's fused attention as nothing; later versions know it.
    op = cpu_flash_operator()
    return {} if op in flop_registry else {op: _attention_flops}


@contextmanager
def _without_fast_path() -> Iterator[None]:
    """Run ``nn.MultiheadAttention`` by operations that the counter knows.

    In eval mode it is one operation (``_native_multi_head_attention``, and a whole
    ``nn.TransformerEncoderLayer`` another), which counts as nothing: of open_clip's ViTs a third.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def count_flops(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Count the FLOPs of one call ``fn(*args, **kwargs)``, without gradients.

    Args:
        fn: a module or any function; a module keeps its mode and may lie on the meta device.

    Returns:
        FLOPs (two per multiply-add) of all matrix products, convolutions and attention calls.
        Element-wise work, norms, sorting and indexing are not counted. Causal attention counts as
        full attention.
    """
    with (
        torch.no_grad(),
        _without_fast_path(),
        FlopCounterMode(display=False, custom_mapping=_missing_formulas()) as counter,
    ):
        fn(*args, **kwargs)
    return int(counter.get_total_flops())


def reduced_flops(handle: Handle, counted: int, dense: int, batch: int) -> int:
    """Correct the FLOPs that :func:`count_flops` found in a call of a wrapped model.

    The counter takes causal attention as full attention, but a sparse causal mask as what it computes.
    With sparse attention in a language model the FLOPs are therefore those of the dense call, less what
    the report says is saved.

    Args:
        handle: of the method, after the call.
        counted, dense: what :func:`count_flops` returned for this call, and for the dense model.
        batch: samples in the call.
    """
    if not handle.trace.notes.get("attention"):
        return counted
    flops = handle.report().flops
    if "language" not in flops:  # a generator: its attention is not causal
        return counted
    return dense - batch * sum(whole - part for whole, part in flops.values())


def vit_macs(
    tokens: Sequence[tuple[int, int]],
    dim: int,
    *,
    mlp_ratio: float = 4.0,
    patches: int = 0,
    patch: int | tuple[int, int] = 16,
    channels: int = 3,
    classes: int = 0,
) -> int:
    """Compute the multiply-adds of a plain vision transformer for one image.

    ``macs = patches * patch^2 * channels * C + sum_l [4 n C^2 + 2 n^2 C + 2 r n' C^2] + classes * C``

    with, in block l, n tokens in the attention and n' in the MLP. It gives 4.60 G for DeiT-S/16 at
    224 pixels, 17.56 G for DeiT-B/16 and 61.6 G for ViT-L/16, and EViT's published
    4.0/3.5/3.0/2.6/2.3 G (arXiv 2202.07800, table 1) for DeiT-S at keep rates 0.9 to 0.5.

    Args:
        tokens: per block ``(n, n')``, class token and other prefix tokens included; the two differ
            in a block that cuts between attention and MLP.
        dim: width C.
        mlp_ratio: r, hidden width of the MLP over C.
        patches: number of patches that are embedded (0 leaves the embedding out).
        patch: side of a patch in pixels, or (height, width).
        channels: of the image.
        classes: of the classifier (0 leaves it out).

    Raises:
        ValueError: a number of tokens or a size is not positive.
    """
    if dim < 1 or mlp_ratio <= 0:
        raise ValueError(f"dim and mlp_ratio must be positive, got {dim} and {mlp_ratio}")
    if any(n < 1 or m < 1 for n, m in tokens):
        raise ValueError(f"tokens must hold positive numbers, got {tuple(tokens)}")
    height, width = (patch, patch) if isinstance(patch, int) else patch
    total = patches * height * width * channels * dim + classes * dim
    for n, m in tokens:
        total += 4 * n * dim * dim + 2 * n * n * dim + 2 * m * dim * round(mlp_ratio * dim)
    return total


def llm_flops(tokens: Sequence[int], dim: int, *, kv_dim: int, ff_dim: int, vocab: int = 0) -> int:
    """Compute the FLOPs of the prefill of a decoder with gated MLPs (Llama, Qwen, Mistral) for one sample.

    ``sum_l [2 n (2 d^2 + 2 d kv) + 6 n d ff + 4 n^2 d] + 2 d vocab``

    Args:
        tokens: number of tokens n in each layer.
        dim: width d.
        kv_dim: width of the keys (key-value heads times head dimension).
        ff_dim: hidden width of the MLP.
        vocab: size of the vocabulary; the head is computed for one row (0 leaves it out).

    Attention is counted as full, like the counter does, although the mask is causal.
    """
    total = 2 * dim * vocab
    for n in tokens:
        total += 2 * n * (2 * dim * dim + 2 * dim * kv_dim) + 6 * n * dim * ff_dim + 4 * n * n * dim
    return total


def kv_bytes(tokens: Sequence[int], kv_dim: int, itemsize: int) -> int:
    """Compute the bytes of the key-value cache of one sample: ``sum_l 2 n kv_dim itemsize``.

    Args:
        tokens: number of tokens n in each layer's cache.
        kv_dim: width of the keys (key-value heads times head dimension).
        itemsize: bytes per element, 2 for bfloat16.
    """
    return sum(2 * n * kv_dim * itemsize for n in tokens)


def cache_bytes(cache: Any) -> int:
    """Count the bytes of the keys and values in a transformers cache (the ``cache`` of an output); of a layer
    whose entries a method has chosen, those of all tensors that it holds.

    Raises:
        TypeError: the object holds no layers of keys and values.
    """
    layers = getattr(cache, "layers", cache)
    try:
        total = sum(part.nbytes for part in layers if hasattr(part, "nbytes"))
        pairs = [
            (part.keys, part.values) if hasattr(part, "keys") else (part[0], part[1])
            for part in layers
            if not hasattr(part, "nbytes")
        ]
    except (TypeError, IndexError, AttributeError) as error:
        raise TypeError(f"not a cache of keys and values: {type(cache).__name__}") from error
    for pair in pairs:
        for tensor in pair:
            if isinstance(tensor, torch.Tensor):
                total += tensor.numel() * tensor.element_size()
    return total
