"""q, k, v of a language model's layer for a few tokens, without running the layer."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from vtr.compat.torch import without_fake_tensors
from vtr.compat.transformers import (
    ATTENTION_PARTS,
    CACHE,
    FIRST_NORMS,
    HALF,
    HALVES,
    LAYER_ARGUMENTS,
    PROJECTED,
    ROTARY,
    SHARED_STATES,
    WATCHED,
    answering,
    cache_name,
    cannot_ask,
    rotary_home,
)


def runs_otherwise(layer: Any) -> str:
    """Say why a decoder layer cannot be given a shorter sequence from outside; empty if it can."""
    names = inspect.signature(type(layer).forward).parameters
    more = any(p.kind is p.VAR_KEYWORD for p in names.values())
    lacking = [n for n in LAYER_ARGUMENTS if n not in names and not (more and n == "position_ids")]
    if cache_name(type(layer).forward) is None:
        lacking.append(" or ".join(CACHE))
    return f"{type(layer).__name__} takes no {', '.join(lacking)}" if lacking else ""


def opens(layer: Any) -> str:
    """Say why q, k, v of a decoder layer cannot be computed from outside; empty if they can."""
    attn = getattr(layer, "self_attn", None)
    if attn is None or not hasattr(layer, "input_layernorm"):
        return f"{type(layer).__name__} is no pre-norm layer with self_attn and input_layernorm"
    title = type(attn).__name__
    for name in PROJECTED:
        if not hasattr(attn, name):
            return f"{title} has no {name}"
    # Others without weights are dropout, or functions in the form of modules (of Hub kernels).
    children = ((n, m) for n, m in attn.named_children() if n not in ATTENTION_PARTS)
    odd = [n for n, m in children if "norm" in n or next(m.parameters(), None) is not None]
    odd += [name for name, _ in attn.named_parameters(recurse=False)]  # attention sinks
    if getattr(getattr(attn, "config", None), "clip_qkv", None) is not None:
        odd.append("clip_qkv")
    for name in ("q_norm", "k_norm"):
        weight = getattr(getattr(attn, name, None), "weight", None)
        if weight is not None and weight.shape != (attn.head_dim,):
            odd.append(f"{name} over all heads")
    if odd:
        return f"{title} has {', '.join(odd)}, which are not known here"
    if not getattr(attn, "use_rope", True):
        return f"{title} has no rotary embedding in this layer"
    if not _halves_turn(attn):
        return f"{title} has another rotary embedding than that of halves"
    return ""


def shows(language: Any, layer: Any) -> str:
    """Say why q, k, v of a decoder layer cannot be seen by running its attention; empty if they can."""
    attn = getattr(layer, "self_attn", None)
    if attn is None:
        return f"{type(layer).__name__} has no self_attn"
    taken = inspect.signature(type(attn).forward).parameters
    lacking = [name for name in WATCHED if name not in taken]
    lacking += [name for name in ("scaling", "head_dim") if not hasattr(attn, name)]
    if lacking or rotary_home(attn) is None:
        return f"{type(attn).__name__} has no {', '.join(lacking) or ROTARY}"
    return cannot_ask(language, attn)


def watch(
    language: Any, layer: Any, hidden: Tensor, rope: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """See q (B, H, R, D), k and v (B, Hk, R, D) of tokens that a layer's attention computes when it runs.

    It serves classes whose projections are not known here: the attention runs with a function in place of its
    softmax that only looks.

    Args:
        language: the language model of the layer.
        hidden: (B, R, C) what enters the layer.
        rope: cos and sin (B or 1, R, D').
    """
    attn, seen = layer.self_attn, list[tuple[Tensor, Tensor, Tensor]]()

    def look(q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> tuple[Tensor, None]:
        seen.append((q, k, v))
        return q.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[3]), None

    device = device_of(attn) or hidden.device
    x = hidden.to(device)
    norm = next((getattr(layer, name) for name in FIRST_NORMS if hasattr(layer, name)), None)
    x = x if norm is None else norm(x)
    given: dict[str, Any] = {"position_embeddings": (rope[0].to(device), rope[1].to(device))}
    if SHARED_STATES in inspect.signature(type(attn).forward).parameters:
        given[SHARED_STATES] = {}
    with answering(language, attn, look):
        attn(hidden_states=x, attention_mask=None, **given)
    return seen[0]


def turn(attn: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the rotary embedding of an attention module's class to x (B, H, R, D)."""
    apply = getattr(rotary_home(attn), ROTARY)
    both = list(inspect.signature(apply).parameters)[1] == "k"
    out: Tensor = apply(x, x, cos, sin)[0] if both else apply(x, cos, sin)
    return out


def _halves_turn(attn: Any) -> bool:
    """Tell whether the rotary embedding of an attention module is :func:`rotate`: tried on a few numbers."""
    home = rotary_home(attn)
    if home is None:
        return False
    with without_fake_tensors():  # numbers are needed, also for a model of fake tensors
        return _turns_so(home, device_of(attn.q_proj) or torch.device("cpu"))


def _turns_so(home: Any, device: torch.device) -> bool:
    q, cos, sin = (torch.linspace(-1, 2, 24, device=device) + i for i in range(3))
    q, k = q.reshape(1, 1, 3, 8), q.reshape(1, 1, 3, 8) + 1
    cos, sin = cos.reshape(1, 3, 8), sin.reshape(1, 3, 8)
    wanted = rotate(q, cos, sin), rotate(k, cos, sin)
    try:
        made = getattr(home, ROTARY)(q, k, cos, sin)
    except Exception:  # a kernel of the Hub in its place that takes no such numbers
        half = getattr(home, HALF, None)
        if half is None:
            return False
        made = tuple(x * cos[:, None] + half(x) * sin[:, None] for x in (q, k))
    return all(torch.allclose(a, b, atol=1e-5) for a, b in zip(made, wanted, strict=True))


def has_halves(layer: Any) -> bool:
    """Tell whether a decoder layer is known to be attention and MLP, each behind a norm and a residual."""
    cls = type(layer)
    return cls.__name__ in HALVES and cls.__module__.startswith("transformers.")


def project(
    layer: Any, hidden: Tensor, rope: tuple[Tensor, Tensor], which: Sequence[str]
) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, H, R, D), k and v (B, Hk, R, D) of tokens, as the layer's own attention makes them.

    Args:
        hidden: (B, R, C) what enters the layer.
        rope: cos and sin (B or 1, R, D').
        which: those of ``"q"``, ``"k"``, ``"v"`` that are wanted; the others are empty tensors.
    """
    attn = layer.self_attn
    device = device_of(attn.q_proj) or hidden.device
    x = layer.input_layernorm(hidden.to(device))
    empty = x.new_zeros(0)

    def heads(name: str) -> Tensor:
        if name not in which:
            return empty
        y = getattr(attn, f"{name}_proj")(x).reshape(*x.shape[:2], -1, attn.head_dim)
        norm = getattr(attn, f"{name}_norm", None)
        if norm is not None:
            y = norm(y)
        y = y.transpose(1, 2)
        return y if name == "v" else rotate(y, rope[0].to(device), rope[1].to(device))

    return heads("q"), heads("k"), heads("v")


def device_of(module: nn.Module) -> torch.device | None:
    """The device of a module, also of one whose quantised weights are buffers.

    None if it holds nothing, or if its weights come when it runs (accelerate's offloading).
    """
    held = next(chain(module.parameters(), module.buffers()), None)
    return None if held is None or held.device.type == "meta" else held.device


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (B, H, R, D) in halves, on the first D' = cos.shape[-1] dimensions."""
    cos, sin = cos[:, None], sin[:, None]
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    low, high = turned.chunk(2, -1)
    turned = turned * cos + torch.cat([-high, low], -1) * sin
    return torch.cat([turned, rest], -1) if rest.shape[-1] else turned
