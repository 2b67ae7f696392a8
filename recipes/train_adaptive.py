"""Recipe of the built-in Adaptive Sparse ViT: three thresholds for the built-in ViT, whose own weights stay as they are.

One CPU core, under two minutes.
"""

from __future__ import annotations

from dataclasses import dataclass

from recipes import train_dynamicvit
from vtr.core.method import Method
from vtr.methods.adaptive_sparse_vit import AdaptiveSparseViT
from vtr.train.losses import TokenLoss


@dataclass(frozen=True)
class Recipe(train_dynamicvit.Recipe):
    """Everything that decides what a run computes.

    Attributes (beside those of :class:`recipes.train_dynamicvit.Recipe`):
        target: wanted share of the dense blocks' cost. Blocks 0 and 1, before the first cut, are a third of it.
    """

    steps: int = 80
    batch: int = 32
    learning_rate: float = 4e-4  # of thresholds that begin at 0.0014, 0.0027 and 0.0041
    warmup: int = 5
    target: float = 0.4

    def method(self) -> Method:
        return AdaptiveSparseViT()

    def loss(self) -> TokenLoss:
        return TokenLoss(target=self.target, tokens=0.0)


class Trainer(train_dynamicvit.Trainer):
    """A run of a :class:`Recipe`."""
