"""ToFe's loss (arXiv 2507.16260), for :class:`vtr.train.tokens.TokenTuner`.

The paper trains backbone, predictor and approximator jointly with a loss that includes the computation budget, and
does not give its terms. :data:`LOSS` is our reading of it: cross-entropy + 0.5 KL to the dense teacher's classes + 0.5
mean square error to the teacher's tokens on the tokens active at the end (DynamicViT's terms, arXiv 2106.02034,
section 3.4) + 20 (mean over the batch of the expected share of the dense cost - target)^2. The term has the mean over
the batch, so that each image may have its own number of tokens.
"""

from __future__ import annotations

from vtr.train.losses import TokenLoss

LOSS = TokenLoss(target=1 / 3, budget=20.0, logits=0.5, tokens=0.5)
"""Weights of the terms; ``dataclasses.replace(LOSS, target=0.5)`` has another target."""
