"""The connectivity predictor of Sparsifiner (CVPR 2023, arXiv 2303.13755): a low-rank guess of an attention map."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vtr.kernels.masks.budgets import top_k
from vtr.kernels.pooled import pool_blocks
from vtr.kernels.precision import full_precision
from vtr.methods.common.predictor import TokenModules


class Connectivity(nn.Module):
    """Guesses the attention map of one layer: rows of coefficients times a basis of K rows.

    ``coefficients = softmax_K((Wq q) (P^T Wk k)^T H^-0.5)``, with ``Wq`` and ``Wk`` from D to D / 2 channels that
    all heads share, P (T, K) and H the number of heads; the guess is ``coefficients U^T`` with U (T, K). The
    authors' code has this scale, not that of the channels.

    All start as the authors', normal with deviation 0.02 and biases at zero.

    Args:
        dim: channels D of a head.
        tokens: T of the model's input, protected ones included.
        rank: K.
    """

    def __init__(self, dim: int, tokens: int, rank: int) -> None:
        super().__init__()
        self.queries = nn.Linear(dim, dim // 2)
        self.keys = nn.Linear(dim, dim // 2)
        self.down = nn.Parameter(torch.empty(tokens, rank))
        self.up = nn.Parameter(torch.empty(tokens, rank))
        for weight in (self.queries.weight, self.keys.weight, self.down, self.up):
            nn.init.trunc_normal_(weight, std=0.02)
        for layer in (self.queries, self.keys):
            nn.init.zeros_(layer.bias)

    def forward(self, q: Tensor, k: Tensor, index: Tensor, valid: Tensor | None) -> Tensor:
        """Compute the coefficients of each row.

        Args:
            q, k: (B, H, T', D) of the tokens that are left.
            index: (B, T') int64, their places in the model's input.
            valid: (B, T') bool, False for padding, or None.

        Returns:
            (B, H, T', K) float32; each row sums to 1.
        """
        down = self.down[index]
        if valid is not None:
            down = down * valid[..., None]
        with full_precision(q.device):
            rows, keys = self.queries(q.float()), self.keys(k.float())
            short = down[:, None].transpose(-1, -2) @ keys
            logits = (rows @ short.transpose(-1, -2)) * q.shape[1] ** -0.5
        return logits.softmax(-1)

    def guess(self, coefficients: Tensor, index: Tensor) -> Tensor:
        """Multiply with the whole basis, (B, H, T', T'): what is trained."""
        with full_precision(coefficients.device):
            return coefficients @ self.up[index][:, None].transpose(-1, -2)

    def basis(self, index: Tensor, threshold: float) -> Tensor:
        """(B, T', K), the absolute values of the basis; those up to ``threshold`` are zero."""
        found = self.up[index].abs()
        return found.masked_fill(found <= threshold, 0.0)


class ConnectivityModules(TokenModules):
    """One :class:`Connectivity` for each layer that is masked."""

    def __init__(self, modules: dict[int, Connectivity]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(layer): module for layer, module in modules.items()})

    def at(self, layer: int) -> Connectivity:
        """Return the module of a layer."""
        found = self.layers[str(layer)]
        assert isinstance(found, Connectivity)
        return found


def sparse_coefficients(coefficients: Tensor, number: int) -> Tensor:
    """Zero all but the ``number`` largest coefficients of each row."""
    kept = top_k(coefficients, min(number, coefficients.shape[-1]))
    return coefficients * kept


def chosen_keys(
    coefficients: Tensor, basis: Tensor, number: int, prefix: int, valid: Tensor | None
) -> Tensor:
    """Keep the ``number`` keys of each row with the largest guess; rows of protected tokens keep all.

    Args:
        coefficients: (B, H, T, K).
        basis: (B, T, K).
        valid: (B, T) bool, keys that may be chosen, or None.

    Returns:
        bool (B, H, T, T). Of equal guesses the first key is kept.
    """
    with full_precision(basis.device):
        guess = coefficients @ basis[:, None].transpose(-1, -2)
    if valid is not None:
        guess = guess.masked_fill(~valid[:, None, None], -torch.inf)
    kept = top_k(guess, number)
    kept[:, :, :prefix] = True
    return kept if valid is None else kept & valid[:, None, None]


def chosen_blocks(coefficients: Tensor, basis: Tensor, number: int, block: int) -> Tensor:
    """Keep the ``number`` blocks of keys of each block of rows with the largest mean guess.

    The mean of a product over a block of rows and a block of keys is the product of the means, so that the map of
    all pairs is never built.

    Returns:
        bool (B, H, NQ, NK).
    """
    rows, columns = pool_blocks(coefficients, block), pool_blocks(basis, block)
    with full_precision(basis.device):
        return top_k(rows @ columns[:, None].transpose(-1, -2), number)
