"""Numbers of tokens that are learned: a probability for each candidate, and what follows for the tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LearnedRates(nn.Module):
    """Differentiable discrete proxies of DiffRate (ICCV 2023, arXiv 2305.17997, section 3.2), two per block.

    Each block but the first has a number of tokens that stay after pruning, and one after merging: the
    expectation over the candidates, rounded up. Gradients pass through the rounding.

    Args:
        tokens: visual tokens at the input of the model.
        depth: blocks.
        granularity: distance of the candidates: ``tokens``, ``tokens - granularity``, ..., above 0.
        dim: width of the model.
        prefix: its protected tokens, which cost as others do.

    Attributes:
        scores: (depth - 1, 2, K), of which the softmax is the probability of each candidate; zero when new.
    """

    candidates: Tensor

    def __init__(
        self, tokens: int, depth: int, granularity: int, dim: int, prefix: int = 1
    ) -> None:
        super().__init__()
        self.tokens, self.dim, self.prefix = tokens, dim, prefix
        numbers = torch.arange(tokens, 0, -granularity, device="cpu").float()
        self.register_buffer("candidates", numbers, persistent=False)
        self.scores = nn.Parameter(torch.zeros(depth - 1, 2, len(numbers), device="cpu"))

    @property
    def trained(self) -> bool:
        """Tell whether any score differs from those of new rates."""
        return bool(self.scores.detach().any())

    def expected(self) -> Tensor:
        """Return (depth - 1, 2): the tokens after pruning and after merging, whole numbers with gradients."""
        mean = self.scores.float().softmax(-1) @ self.candidates
        return mean + (mean.ceil() - mean).detach()

    def survival(self) -> Tensor:
        """Return (depth - 1, 2, tokens): the probability that more than j tokens stay, for j = 0, 1, ..."""
        rank = torch.arange(self.tokens, device=self.scores.device)
        return self.scores.float().softmax(-1) @ (self.candidates[:, None] > rank).float()

    def counts(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the tokens after pruning and after merging in every block. Reads from the device."""
        numbers = self.expected().detach().round().long().tolist()
        prune, merge = zip(*numbers, strict=True)
        return (self.tokens, *prune), (self.tokens, *merge)

    def cost(self) -> Tensor:
        """Return the cost of the blocks as a share of their dense cost, with gradients (section 3.4).

        A block costs 4 n C^2 + 2 n^2 C + 8 n' C^2 for n tokens before and n' behind its cut. As in the authors'
        code the gradient of the smaller number of a block goes to both of its numbers.
        """
        c, dense = self.dim, self.tokens + self.prefix
        whole = 12 * dense * c**2 + 2 * dense**2 * c
        before = self.scores.new_tensor(float(dense), dtype=torch.float32)
        total = torch.full_like(before, whole)  # the first block
        for pair in self.expected() + self.prefix:
            least = torch.minimum(pair.min(), before).detach()
            after = least + (pair - pair.detach()).sum()
            total = total + 4 * before * c**2 + 2 * before**2 * c + 8 * after * c**2
            before = after
        return total / (whole * (len(self.scores) + 1))


def straight_through(survival: Tensor, number: int, alive: int) -> Tensor:
    """Return a mask (N,) of ranked tokens: 0 for those from ``number`` on that were ``alive``, 1 for the others.

    Its gradient is that of the probability to survive, for every token: so the number can grow again.

    Args:
        survival: (N,), by rank.
    """
    hard = torch.ones_like(survival)
    hard[number:alive] = 0
    return hard + (survival - survival.detach())
