"""Learned thresholds on a score of tokens, and the scores of Adaptive Sparse ViT (arXiv 2209.13802)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vtr.methods.common.predictor import TokenModules


def head_weighted(row: Tensor, outputs: Tensor) -> Tensor:
    """Weigh the class token's attention in each head by what the head returns for a token: (B, N) float32.

    s_j = sum_h A_h[cls, j] w_hj with w_hj = |o_hj| / (sum_h' |o_h'j| + 1e-8), o_hj the output of head h for
    token j before the heads are joined. It is not normalised over the tokens.

    Args:
        row: (B, H, N), the class token's attention in each head.
        outputs: (B, H, N, D), what the heads return.
    """
    norms = torch.linalg.vector_norm(outputs.float(), dim=-1)
    return (row.float() * norms / (norms.sum(1, keepdim=True) + 1e-8)).sum(1)


def masked_row(row: Tensor, mask: Tensor | None) -> Tensor:
    """Restrict a softmax row over (B, H, N) tokens, and protected ones that it leaves out, to those with mask
    1, (B, N): the same row of DynamicViT's masked softmax, with gradients into the mask."""
    if mask is None:
        return row
    gone = (row * (1 - mask[:, None])).sum(-1, keepdim=True)
    return row * mask[:, None] / (1 - gone).clamp_min(1e-6)


class TokenThresholds(TokenModules):
    """One threshold for each stage, and the share of the tokens that they have kept in training.

    Attributes:
        theta: (stages,) float32 parameter.
        share: (stages,) float32 buffer, running mean of the share of the input's tokens that an image
            keeps; 0 before training. For counts that are the same for every image.
    """

    MOMENTUM = 0.02

    share: Tensor

    def __init__(self, start: tuple[float, ...]) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(start))
        self.register_buffer("share", torch.zeros(len(start)))
        self._shares: tuple[float, ...] = ()

    def hard(self, stage: int, score: Tensor, tau: float, least: int = 0) -> Tensor:
        """Decide by a threshold, with the gradient of sigmoid((score - theta) / tau): (B, N) of 0 and 1.

        ``least`` tokens of each image are 1 in any case.
        """
        soft = ((score - self.theta[stage]) / tau).sigmoid()
        hard = (score > self.theta[stage]).to(soft.dtype)
        if least:
            best = torch.sort(score.detach(), dim=1, descending=True, stable=True).indices[
                :, :least
            ]
            hard = hard.scatter(1, best, 1.0)
        return hard - soft.detach() + soft

    @torch.no_grad()
    def note(self, stage: int, mask: Tensor) -> None:
        """Count a mask (B, N) of training in :attr:`share`."""
        now, self._shares = mask.mean(), ()
        old = self.share[stage]
        # The first batch is its own mean.
        self.share[stage] = torch.where(old == 0, now, old.lerp(now, self.MOMENTUM))

    def shares(self) -> tuple[float, ...]:
        """Return :attr:`share` as numbers; they are read from the device once behind every training step.

        Raises:
            ValueError: no training has filled them.
        """
        if not self._shares:
            self._shares = tuple(self.share.tolist())
        if not all(self._shares):
            raise ValueError(
                "counts='calibrated' needs the mean numbers of tokens, which training fills: train the "
                "thresholds, load weights that were trained, or set handle.modules[0].share to the share of "
                "the tokens left after each stage"
            )
        return self._shares

    def load_state_dict(self, *args: object, **kwargs: object) -> object:  # type: ignore[override]
        self._shares = ()
        return super().load_state_dict(*args, **kwargs)  # type: ignore[arg-type]
