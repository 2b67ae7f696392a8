"""The token map: where each input token went, and what is computed from it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Fill = Literal["copy", "zero"]


class TokenMap:
    """One reduction of B sequences of N_in tokens to N_out slots. Treat it as immutable.

    Attributes:
        source: (B, N_in) int64, the slot that each input token went to, -1 if it was dropped (or is
            only frozen).
        kept: (B, N_out) int64, for each slot the input token that it holds (a merged slot: its
            representative), -1 for padding. Padding comes last.
        size: (B, N_out) float32, number of input tokens in the slot, 0 for padding.
        frozen: (B, N_in) bool or None, tokens that are not computed but keep their place.
        has_padding: whether ``kept`` may hold -1 (known on the host, so that nothing has to ask the device).
    """

    __slots__ = ("frozen", "has_padding", "kept", "size", "source")

    def __init__(
        self,
        source: Tensor,
        kept: Tensor,
        size: Tensor,
        frozen: Tensor | None = None,
        has_padding: bool = False,
    ) -> None:
        self.source = source
        self.kept = kept
        self.size = size
        self.frozen = frozen
        self.has_padding = has_padding

    def to(self, device: torch.device | str) -> TokenMap:
        """The same map on another device."""
        frozen = None if self.frozen is None else self.frozen.to(device)
        parts = (self.source.to(device), self.kept.to(device), self.size.to(device))
        return TokenMap(*parts, frozen, self.has_padding)

    def __repr__(self) -> str:
        extra = "" if self.frozen is None else ", with frozen tokens"
        return f"TokenMap(batch={self.batch}, {self.n_in} -> {self.n_out}{extra})"

    @property
    def batch(self) -> int:
        return self.kept.shape[0]

    @property
    def n_in(self) -> int:
        return self.source.shape[1]

    @property
    def n_out(self) -> int:
        return self.kept.shape[1]

    @property
    def valid(self) -> Tensor:
        """(B, N_out) bool, False for padding slots."""
        return self.kept >= 0

    # ---- makers -----------------------------------------------------------------------------

    @classmethod
    def identity(cls, batch: int, n: int, device: torch.device | str | None = None) -> TokenMap:
        """The map that changes nothing."""
        index = torch.arange(n, device=device).expand(batch, n)
        return cls(index, index, torch.ones(batch, n, device=device))

    @classmethod
    def keep(cls, kept: Tensor, n_in: int, has_padding: bool = False) -> TokenMap:
        """Pruning: keep the tokens ``kept`` (B, N_out) int64, ascending, and drop the others.

        With ``has_padding`` entries of -1 (at the end of a row) are padding.
        """
        batch, n_out = kept.shape
        slots = torch.arange(n_out, device=kept.device).expand(batch, n_out)
        source = kept.new_full((batch, n_in + int(has_padding)), -1)
        if has_padding:  # padding slots write into one extra column, which is cut off again
            source = source.scatter(1, torch.where(kept < 0, n_in, kept), slots)[:, :n_in]
            size = (kept >= 0).float()
        else:
            source = source.scatter(1, kept, slots)
            size = torch.ones(batch, n_out, device=kept.device)
        return cls(source, kept, size, has_padding=has_padding)

    @classmethod
    def merged(cls, kept: Tensor, source: Tensor, has_padding: bool = False) -> TokenMap:
        """Merging: slot s holds every input token j with ``source[:, j] == s``; sizes are counted.

        Args:
            kept: (B, N_out) int64 representatives, each in its own slot.
            source: (B, N_in) int64, -1 for tokens that are dropped.
        """
        size = _scatter_sum(torch.ones_like(source, dtype=torch.float32), source, kept.shape[1])
        return cls(source, kept, size, has_padding=has_padding)

    # ---- operations -------------------------------------------------------------------------

    def gather(self, x: Tensor) -> Tensor:
        """Rows of the kept tokens: x (B, N_in, ...) -> (B, N_out, ...). Padding slots are zero."""
        self._check(x, self.n_in, "gather")
        out = take(x, self.kept.clamp(min=0) if self.has_padding else self.kept)
        return _zero(out, ~self.valid) if self.has_padding else out

    def merge(
        self,
        x: Tensor,
        weights: Tensor | None = None,
        normalize: bool = True,
        keep_norm: bool = False,
    ) -> Tensor:
        """Combine the tokens of each slot: x (B, N_in, C) -> (B, N_out, C).

        Args:
            weights: (B, N_in), how much each token counts; 1 where absent. Gradients flow into it.
            normalize: weighted mean (True) or weighted sum (False).
            keep_norm: give each slot of several tokens the largest norm among them (MLERP, see
                :class:`Reduction`).

        Half-precision inputs are summed in float32 and rounded once; float64 stays float64.
        """
        self._check(x, self.n_in, "merge")
        batch, n_in, n_out = x.shape[0], self.n_in, self.n_out
        # Halves are widened by the product with the weights: a copy of all of x would be the largest
        # tensor here.
        wide = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
        w = torch.ones_like(self.source, dtype=wide) if weights is None else weights
        w = w.to(wide)
        if normalize:
            total = _scatter_sum(w, self.source, n_out)
            w = w / take(total, self.source.clamp(min=0)).clamp_min(torch.finfo(w.dtype).tiny)
        kept = self.kept.clamp(min=0) if self.has_padding else self.kept
        out = take(x, kept) * take(w, kept)[..., None]
        if self.has_padding:
            out = _zero(out, ~self.valid)
        moved = n_in if self.has_padding else n_in - n_out
        if moved > 0:
            # Only tokens that are not representatives travel; there are n_in - n_out of them.
            is_rep = torch.zeros_like(self.source, dtype=torch.bool)
            if self.has_padding:
                slot = self.source.clamp(min=0)
                index = torch.arange(n_in, device=x.device).expand(batch, n_in)
                is_rep = (self.source >= 0) & (self.kept.gather(1, slot) == index)
                travel = index
                moves = (self.source >= 0) & ~is_rep
            else:
                is_rep = is_rep.scatter(1, self.kept, torch.ones_like(self.kept, dtype=torch.bool))
                travel = torch.argsort(is_rep, dim=1, stable=True)[:, :moved]
                moves = take(self.source, travel) >= 0
            slot = take(self.source, travel).clamp(min=0)
            part = take(x, travel) * (take(w, travel) * moves)[..., None]
            row = torch.arange(batch, device=x.device)[:, None] * n_out + slot
            out.view(batch * n_out, *x.shape[2:]).index_add_(0, row.flatten(), part.flatten(0, 1))
        if keep_norm:
            out = self._with_largest_norm(out, x)
        return out.to(x.dtype)

    def _with_largest_norm(self, out: Tensor, x: Tensor) -> Tensor:
        """``out`` (B, N_out, C), each slot of several tokens of x scaled to the largest of their norms."""
        norm = torch.linalg.vector_norm(x, dim=-1, dtype=out.dtype)
        slot = torch.where(self.source < 0, self.n_out, self.source)
        largest = norm.new_zeros(x.shape[0], self.n_out + 1).scatter_reduce(1, slot, norm, "amax")
        length = torch.linalg.vector_norm(out, dim=-1).clamp_min(torch.finfo(out.dtype).tiny)
        factor = torch.where(self.size > 1, largest[:, :-1] / length, 1.0)
        return out * factor[..., None]

    def total(self, x: Tensor) -> Tensor:
        """Sum the numbers of the tokens in each slot: x (B, N_in) -> (B, N_out). Padding slots are zero."""
        self._check(x, self.n_in, "total")
        return _scatter_sum(x, self.source, self.n_out)

    def restore(self, y: Tensor, fill: Fill | Tensor = "copy") -> Tensor:
        """Back to full length: y (B, N_out, C) -> (B, N_in, C).

        Every token gets the value of its slot. Tokens that have none (dropped or frozen) get zeros
        (``"zero"``), the value of the nearest kept token before them in the sequence, else the first
        one (``"copy"``), or their own row of a (B, N_in, C) tensor.
        """
        self._check(y, self.n_out, "restore")
        source = self.source
        if isinstance(fill, Tensor):
            got = take(y, source.clamp(min=0))
            gone = (source < 0).reshape(*source.shape, *(1,) * (y.dim() - 2))
            return torch.where(gone, fill.to(y.dtype), got)
        if fill == "copy":
            index = torch.arange(self.n_in, device=y.device).expand_as(source)
            last = torch.where(source >= 0, index, -1).cummax(1).values
            first = (source >= 0).int().argmax(1, keepdim=True)
            return take(y, source.gather(1, torch.where(last < 0, first, last)).clamp(min=0))
        if fill == "zero":
            return _zero(take(y, source.clamp(min=0)), source < 0)
        raise ValueError(f"fill must be 'copy', 'zero' or a tensor, got {fill!r}")

    def then(self, other: TokenMap) -> TokenMap:
        """This map followed by ``other`` (whose inputs are this map's slots)."""
        if other.n_in != self.n_out:
            raise ValueError(
                f"cannot compose {self!r} with {other!r}: {self.n_out} != {other.n_in}"
            )
        gone = self.source < 0
        source = take(other.source, self.source.clamp(min=0)).masked_fill(gone, -1)
        # A later map chooses among valid slots only, so that padding is the later map's alone.
        kept = take(self.kept, other.kept.clamp(min=0) if other.has_padding else other.kept)
        if other.has_padding:
            kept = kept.masked_fill(other.kept < 0, -1)
        size = _scatter_sum(self.size, other.source, other.n_out)
        frozen = self.frozen
        if other.frozen is not None:
            later = take(other.frozen, self.source.clamp(min=0)) & ~gone
            frozen = later if frozen is None else frozen | later
        return TokenMap(source, kept, size, frozen, other.has_padding)

    def with_prefix(self, prefix: int) -> TokenMap:
        """The same map for sequences that carry ``prefix`` protected tokens in front."""
        if prefix == 0:
            return self
        head = torch.arange(prefix, device=self.kept.device).expand(self.batch, prefix)
        source = torch.where(self.source < 0, -1, self.source + prefix)
        kept = self.kept + prefix
        if self.has_padding:
            kept = torch.where(self.kept < 0, -1, kept)
        ones = torch.ones(self.batch, prefix, device=self.size.device)
        frozen = self.frozen
        if frozen is not None:
            frozen = torch.cat([torch.zeros_like(head, dtype=torch.bool), frozen], 1)
        return TokenMap(
            torch.cat([head, source], 1),
            torch.cat([head, kept], 1),
            torch.cat([ones, self.size], 1),
            frozen,
            self.has_padding,
        )

    def _check(self, x: Tensor, n: int, what: str) -> None:
        if x.dim() < 2 or x.shape[0] != self.batch or x.shape[1] != n:
            raise ValueError(
                f"{what} expects a tensor of shape ({self.batch}, {n}, ...), got {tuple(x.shape)}"
            )


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` (B, K) int64 of x (B, N, ...) -> (B, K, ...)."""
    if x.dim() == 2:
        return x.gather(1, index)
    batch, n = x.shape[:2]
    flat = (index + torch.arange(batch, device=x.device)[:, None] * n).reshape(-1)
    rows = x.reshape(batch * n, *x.shape[2:]).index_select(0, flat)
    return rows.reshape(batch, index.shape[1], *x.shape[2:])


def top_indices(
    scores: Tensor, k: int | Tensor, valid: Tensor | None = None
) -> tuple[Tensor, bool]:
    """The ``k`` best tokens of each row in ascending position order.

    Args:
        scores: (B, N), higher is better. NaN counts as the worst.
        k: one number for all rows, or a (B,) tensor of numbers.
        valid: (B, N) bool or None; tokens that may be chosen.

    Returns:
        kept (B, K) int64 with -1 for padding at the end of a row, and whether padding may occur.
        Ties go to the lower index on every device.
    """
    n = scores.shape[1]
    scores = scores.float().nan_to_num(nan=-float("inf"))
    if valid is None and not isinstance(k, Tensor):
        order = torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :k]
        return order.sort(1).values, False
    if valid is None:
        valid = torch.ones_like(scores, dtype=torch.bool)
    limit = valid.sum(1)
    number = torch.minimum(limit, k if isinstance(k, Tensor) else torch.full_like(limit, k))
    # Two stable sorts: by score, then the forbidden to the end, whatever their score.
    order = torch.sort(scores, dim=1, descending=True, stable=True).indices
    order = order.gather(1, torch.sort((~valid).gather(1, order).int(), dim=1, stable=True).indices)
    least, width = torch.stack(torch.aminmax(number)).tolist()  # one look at the device
    order = order[:, :width]
    chosen = torch.arange(width, device=scores.device) < number[:, None]
    kept = torch.where(chosen, order, n).sort(1).values
    return torch.where(kept == n, -1, kept), least < width


def _scatter_sum(x: Tensor, slot: Tensor, n: int) -> Tensor:
    """Sum x (B, N) into (B, n) by slot (B, N); entries with slot -1 are left out."""
    index = torch.where(slot < 0, n, slot)
    return torch.zeros(x.shape[0], n + 1, dtype=x.dtype, device=x.device).scatter_add(1, index, x)[
        :, :n
    ]


def _zero(x: Tensor, where: Tensor) -> Tensor:
    return x.masked_fill(where.reshape(*where.shape, *(1,) * (x.dim() - 2)), 0)
