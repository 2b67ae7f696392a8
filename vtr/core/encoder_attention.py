"""The site ``attention`` of a vision encoder: the attention of one block, for methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.core.attention_site import AttentionSite
from vtr.core.site import ModelInfo, rows_at_once
from vtr.core.tokens import TokenMap
from vtr.errors import UnsupportedMethodError
from vtr.kernels import BlockMask, attention_rows, block_sparse_attention
from vtr.kernels.density import density
from vtr.kernels.precision import full_precision, lowered


class EncoderAttentionSite(AttentionSite):
    """The attention of one block of a vision encoder.

    Queries and keys are the same T tokens: ``prefix`` protected ones (class token, registers), then the N
    visual tokens that are left here. Everything that :class:`AttentionSite` says holds; the state of a layer
    ends with the call, as encoders have no later one that continues it.

    Attributes:
        info: the model.
        hidden: (B, T, C), what enters the block, before its norm.
        prefix: number of protected tokens in front.
        grid: (height, width) or (frames, height, width) of the model's input in tokens, or None.
        map: from the visual tokens of the model's input to those here.
        valid: (B, T) bool, False for padding; None without padding.
        dropout: chance to drop a weight in training, that of the model.
    """

    def __init__(
        self,
        *,
        info: ModelInfo,
        hidden: Tensor,
        prefix: int,
        grid: tuple[int, ...] | None,
        map: TokenMap,
        bias: Callable[[], Tensor | None],
        policy: bool,
        dropout: float,
        training: bool,
        **common: Any,
    ) -> None:
        super().__init__(**common, state={})
        self.info, self.hidden, self.prefix, self.grid, self.map = info, hidden, prefix, grid, map
        self.dropout, self.training = dropout, training
        self.valid: Tensor | None = None
        if map.has_padding:
            self.valid = F.pad(map.valid, (prefix, 0), value=True)
        self._make_bias, self._policy = bias, policy
        self._bias: Tensor | None = None

    @property
    def tokens(self) -> int:
        """T, the protected tokens and the visual ones that are left."""
        return self.q.shape[2]

    @property
    def index(self) -> Tensor:
        """(B, T) int64: the place of each token in the model's input, prefix included; that of a merged token is
        its representative's, and that of padding is 0."""
        front = torch.arange(self.prefix, device=self.q.device).expand(self.q.shape[0], -1)
        return torch.cat([front, (self.map.kept + self.prefix).clamp(min=0)], 1)

    @property
    def bias(self) -> Tensor | None:
        """(B or 1, H or 1, T or 1, T) float32 that the block adds to its logits: relative positions, the caller's
        mask, log sizes of merged tokens, -inf for padding. None if it adds nothing."""
        if self._make_bias is not None:
            self._bias, self._make_bias = self._make_bias(), None  # type: ignore[assignment]
        return self._bias

    # ---- what attention computes ------------------------------------------------------------

    def dense(self) -> Tensor:
        """Compute what the model computes without a method, (B, H, T, D)."""
        return self._dense()

    def heads(self, heads: Tensor) -> Tensor:
        """Compute some heads alone, (n,) int64: (B, n, T, D), dense."""
        self._refuse_policy()
        self.count(heads.numel() / self.q.shape[1])
        q, k, v = (x.index_select(1, heads) for x in (self.q, self.k, self.v))
        bias = self.bias
        if bias is not None and bias.shape[1] > 1:
            bias = bias.index_select(1, heads)
        return self._sdpa(q, k, v, bias)

    def masked(self, mask: Tensor, share: float | Tensor) -> Tensor:
        """Compute attention over the pairs that a mask keeps, (B, H, T, D). The whole map is computed, and then
        masked: this saves no time.

        Args:
            mask: bool (B or 1, H or 1, T, T), True for pairs that are kept, at least one in each row.
            share: of the pairs that are kept, for the report.
        """
        self._refuse_policy()
        self.count(share)
        bias = mask if self.bias is None else self.bias.masked_fill(~mask, -float("inf"))
        return self._sdpa(self.q, self.k, self.v, bias)

    def sparse(self, mask: BlockMask) -> Tensor:
        """Compute attention over what a block mask of T x T tokens keeps, (B, H, T, D); other blocks are not
        computed.

        Raises:
            ValueError: the mask has another size.
            UnsupportedMethodError: the block adds a bias to its logits, drops weights in training, or another
                method has a policy for training; the kernel has none of these.
        """
        if (mask.q_len, mask.k_len) != (self.tokens, self.tokens):
            raise ValueError(
                f"the mask is for {mask.q_len} x {mask.k_len} tokens, encoder block {self.layer} has "
                f"{self.tokens} here"
            )
        self._refuse_policy()
        if self.bias is not None or (self.training and self.dropout):
            what = "drops attention weights in training"
            if self.bias is not None:
                what = "adds a bias to its logits (relative positions, merged tokens, a mask or padding)"
            raise UnsupportedMethodError(
                f"block {self.layer} of {self.info.family} {what}, which the block-sparse kernel cannot: use a "
                "mask of single pairs (block=None)"
            )
        self.notes["mask"] = mask
        self.count(density(mask))
        q, k, v = lowered(self.q, self.k, self.v)
        out = block_sparse_attention(q, k, v, mask, scale=self.scale, backend=self.backend)
        assert isinstance(out, Tensor)
        return out

    def rows(self, start: int, stop: int) -> Tensor:
        """Compute attention of the tokens ``start`` to ``stop`` over all, (B, H, stop - start, T) float32."""
        bias = self.bias
        if bias is not None and bias.shape[2] > 1:
            bias = bias[:, :, start:stop]
        return attention_rows(self.q[:, :, start:stop], self.k, bias=bias, scale=self.scale)

    def each_rows(self) -> list[tuple[int, int]]:
        """List the (start, stop) of runs of rows, of which one run fits in memory at a time."""
        step = rows_at_once(self.q.shape[0])
        return [(a, min(a + step, self.tokens)) for a in range(0, self.tokens, step)]

    def count(self, share: float | Tensor) -> None:
        """Note that attention was computed over ``share`` of the pairs of all heads; the functions above do it, and
        without a note it was dense."""
        self.notes["density"] = share

    def spend(self, flops: float) -> None:
        """Note FLOPs of one sample that the method spends here beside the attention itself."""
        self.notes["flops"] = self.notes.get("flops", 0.0) + flops

    def _sdpa(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        q, k, v = lowered(q, k, v)
        if bias is not None and bias.dtype != torch.bool and (q.device.type != "cpu"):
            bias = bias.to(q.dtype)
        with full_precision(q.device):  # autocast would round the bias
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=bias, scale=self.scale,
                dropout_p=self.dropout if self.training else 0.0,
            )  # fmt: skip

    def _refuse_policy(self) -> None:
        if self._policy:
            raise UnsupportedMethodError(
                f"another method gives the tokens of block {self.layer} a policy for training, and a method "
                "here computes the attention itself: train them one after the other"
            )
