"""Self-attention as the adapters run it when a method looks inside or weighs the keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtr.kernels.precision import full_precision, lowered, lowers


@dataclass
class AttentionCall:
    """One attention call, for a method that computes it.

    Attributes:
        q, k, v: (B, H, T, D), after norms and rotary embedding.
        scale: factor of the logits, None for D^-0.5.
        mask: added to the logits, or bool (True is seen), broadcast to (B, H, T, T); None without.
        dropout: chance to drop a weight.
        dense: computes what the model computes without the method, (B, H, T, D).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float | None
    mask: Tensor | None
    dropout: float
    dense: Callable[[], Tensor]


class Probe:
    """Opens one attention call: carries the key bias in, and q, k, v out.

    Attributes:
        key_bias: (B, T) float32 added to the logits of each key (log sizes), or None.
        policy: (B, T) key weights for training (see :func:`policy_attention`), or None.
        qkv: the (B, H, T, D) tensors of the call, after norms and rotary embedding.
        scale: the factor of the logits.
        out: (B, H, T, D), what each head returns, before the projection that joins the heads.
        method: computes the attention in place of the model, or None.
    """

    __slots__ = ("key_bias", "method", "out", "policy", "qkv", "scale")

    def __init__(
        self,
        key_bias: Tensor | None = None,
        policy: Tensor | None = None,
        method: Callable[[AttentionCall], Tensor] | None = None,
    ) -> None:
        self.key_bias = key_bias
        self.policy = policy
        self.method = method
        self.qkv: tuple[Tensor, Tensor, Tensor] | None = None
        self.scale: float | None = None
        self.out: Tensor | None = None

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Tensor | None = None,
        dropout_p: float = 0.0,
        scale: float | None = None,
        is_causal: bool = False,
        fused: bool = True,
        drop: nn.Module | None = None,
    ) -> Tensor:
        """Attention output (B, H, T, D); remembers it with q, k, v.

        ``drop`` is the model's own dropout module. It is called with the weights if they are computed
        (``fused=False``), so that its hooks see them.
        """

        def dense() -> Tensor:
            return self.compute(q, k, v, mask, dropout_p, scale, is_causal, fused, drop)

        if is_causal and mask is None and self.method is not None:
            tokens = q.shape[2]
            seen = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).tril()
            return self.through(AttentionCall(q, k, v, scale, seen, dropout_p, dense))
        return self.through(AttentionCall(q, k, v, scale, mask, dropout_p, dense))

    def through(self, call: AttentionCall) -> Tensor:
        """Compute a call by the method, or as the model does; remembers q, k, v and the output."""
        self.qkv, self.scale = (call.q, call.k, call.v), call.scale
        self.out = call.dense() if self.method is None else self.method(call)
        return self.out

    def compute(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        dropout_p: float = 0.0,
        scale: float | None = None,
        is_causal: bool = False,
        fused: bool = True,
        drop: nn.Module | None = None,
    ) -> Tensor:
        """Compute attention with the weights of the keys, (B, H, T, D), without a method."""
        if is_causal and mask is None and (self.policy is not None or self.key_bias is not None):
            tokens = q.shape[2]
            mask = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).tril()
        if self.policy is not None:
            if self.key_bias is not None:
                bias = self.key_bias[:, None, None, :]
                mask = bias if mask is None else bias + _additive(mask, bias.dtype)
            return policy_attention(q, k, v, self.policy, scale, mask, dropout_p)
        if self.key_bias is None:
            if fused:
                return F.scaled_dot_product_attention(
                    q, k, v, attn_mask=mask, dropout_p=dropout_p, scale=scale, is_causal=is_causal
                )
            return _eager(q, k, v, mask, dropout_p, scale, is_causal, drop)
        return biased_attention(q, k, v, self.key_bias, mask, dropout_p, scale, fused, drop)


def biased_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    fused: bool = True,
    drop: nn.Module | None = None,
) -> Tensor:
    """softmax(scale q k^T + key_bias) v with key_bias (B, T) float32.

    On CUDA without a mask the bias rides in extra head dimensions, because an additive mask would
    rule out the flash kernels: q' = [q, 1, 1, 0...], k' = [k, hi, lo, 0...] with hi + lo =
    key_bias / scale, split in two so that half precision keeps 16 bits of it. On the CPU the mask
    costs nothing, and stays in float32 beside half-precision queries.
    """
    if fused and lowers(q.device):  # autocast would round the bias to its low precision
        q, k, v = lowered(q, k, v)
        with full_precision(q.device):
            return biased_attention(q, k, v, key_bias, mask, dropout_p, scale)
    if q.is_cuda and mask is None and fused:
        return wide_attention(q, k, v, key_bias, dropout_p, scale)
    bias = key_bias[:, None, None, :]
    if mask is not None:
        bias = bias + _additive(mask, bias.dtype)
    if q.device.type != "cpu" or not fused or q.dtype == torch.float64:
        bias = bias.to(q.dtype)
    if fused:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=bias, dropout_p=dropout_p, scale=scale
        )
    return _eager(q, k, v, bias, dropout_p, scale, False, drop)


def wide_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor,
    dropout_p: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """:func:`biased_attention` with the bias in extra head dimensions: no mask, any SDPA kernel.

    A bias of -inf (padding) is held at -3e4 times the scale, whose weight is zero after the softmax.
    """
    dim = q.shape[-1]
    factor = dim**-0.5 if scale is None else scale
    pad = -(dim + 2) % 8
    # -inf would make the low part NaN; float16 ends at 6.5e4.
    bias = (key_bias / factor).clamp(min=-3e4)[:, None, :, None]
    high = bias.to(k.dtype)
    low = (bias - high.float()).to(k.dtype)
    shape = (*k.shape[:-1], 1)
    wide_q = torch.cat([q, q.new_ones(*q.shape[:-1], 2), q.new_zeros(*q.shape[:-1], pad)], -1)
    zeros = k.new_zeros(*k.shape[:-1], pad)
    wide_k = torch.cat([k, high.expand(shape), low.expand(shape), zeros], -1)
    wide_v = F.pad(v, (0, pad + 2))
    out = F.scaled_dot_product_attention(wide_q, wide_k, wide_v, dropout_p=dropout_p, scale=factor)
    return out[..., :dim]


def policy_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    policy: Tensor,
    scale: float | None,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """DynamicViT's masked softmax (arXiv 2106.02034, section 3.3), differentiable in the policy.

    A_ij = exp(l_ij) G_ij / sum_k exp(l_ik) G_ik with G_ij = 1 for i = j, else policy_j in [0, 1]:
    a token with policy 0 is no key for the others but still sees itself. Softmax in float32. Makes
    the full map: for training.

    Args:
        q, k, v: (B, H, T, D).
        policy: (B, T).
    """
    logits = (q @ k.transpose(-2, -1)).float() * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        logits = logits + _additive(mask, torch.float32).float()
    tokens = q.shape[2]
    own = torch.eye(tokens, device=q.device)
    gate = policy.float()[:, None, None, :] * (1 - own) + own
    weights = (logits - logits.amax(-1, keepdim=True).detach()).exp() * gate
    weights = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    if dropout_p:
        weights = F.dropout(weights, dropout_p)
    return weights.to(v.dtype) @ v


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask (True is seen) as 0 and -inf in ``dtype``; another one as it is."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -float("inf"))


def _eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    scale: float | None,
    is_causal: bool,
    drop: nn.Module | None = None,
) -> Tensor:
    attention = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-2, -1)
    if is_causal:
        attention = attention + attention.new_full(attention.shape[-2:], -float("inf")).triu(1)
    elif mask is not None:
        attention = attention + _additive(mask, q.dtype)
    attention = attention.softmax(-1)
    if drop is not None:
        attention = drop(attention)
    elif dropout_p:
        attention = F.dropout(attention, dropout_p)
    return attention @ v
