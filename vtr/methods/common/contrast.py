"""The base of methods that contrast the logits of a step with those of a run that sees less."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vtr.core.budget import check_number
from vtr.core.language_site import LanguageSite
from vtr.core.method import Examples, Stage, TokenMethod
from vtr.core.site import ModelInfo, Site


@dataclass(frozen=True, kw_only=True)
class ContrastMethod(TokenMethod):
    """Base of contrastive decoding: l = (1 + alpha) l_full - alpha l_other, among plausible tokens.

    It acts while ``generate`` runs, on the logits of every step, before the processors of the caller and of the
    generation configuration. A call of the model outside of ``generate`` is unchanged. l_full are the logits of the
    model, with whatever other methods are applied to it. l_other comes from one of two sources:

    - ``runs = True``: a second run of the model on the same prompt with fewer visual tokens, with its own KV
      cache. The subclass writes :meth:`keep`, which says the tokens. It costs a second forward pass per step.
    - ``runs = False``: the head of the language model reads a vector that the subclass computes once per prompt
      in :meth:`read`.

    Tokens with l_full < max(l_full) + ln(beta) cannot be chosen (adaptive plausibility, Li et al., arXiv
    2210.15097); the maximum is over the tokens that no other processor has forbidden. Beam search adds up
    log-probabilities, so that what is left is normalised again there. Samples without pictures are
    not changed. Assisted decoding is refused.

    A subclass that looks into the vision tower names the layers in :meth:`looks` and stores in ``site.memory`` in
    :meth:`look`.

    Class attributes:
        runs: whether l_other is that of a second run.

    Args:
        alpha: weight of the contrast; with 0 the model is left as it is, and beta has no effect.
        beta: smallest probability of a token that may be chosen, as a share of the largest; 1 leaves the most
            probable token alone, 0 leaves all.
    """

    sites: ClassVar[tuple[str, ...]] = ("logits",)
    runs: ClassVar[bool] = True

    alpha: float = 1.0
    beta: float = 0.1

    def validate(self) -> None:
        check_number(self.alpha, "alpha", 0, 1e6)
        check_number(self.beta, "beta", 0, 1)

    @classmethod
    def examples(cls) -> Examples:
        return {"some": (cls(),), "everything": (cls(alpha=0.0),), "counted": ()}

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        if not self.alpha:
            return ()
        looks = [Stage("encoder", layer, "end", cuts=False) for layer in self.looks(info)]
        return (*looks, Stage("logits", 0, cuts=False))

    def looks(self, info: ModelInfo) -> Sequence[int]:
        """List the 0-based encoder layers at whose end :meth:`look` is called."""
        return ()

    def look(self, site: Site) -> None:
        """Store in ``site.memory`` what :meth:`keep` or :meth:`read` need."""

    def reduce(self, site: Site) -> None:
        self.look(site)

    def keep(self, site: LanguageSite) -> Tensor:
        """Choose the visual tokens that the second run sees, once per prompt.

        Args:
            site: the entry of the language model; ``hidden`` (B, N, C) are the visual embeddings.

        Returns:
            (B, K) int64 ascending indices into N, -1 for padding.
        """
        raise NotImplementedError(f"{type(self).__name__} must define keep(site)")

    def read(self, site: LanguageSite) -> Tensor:
        """Compute the vectors that the head of the language model reads, (B, C), once per prompt."""
        raise NotImplementedError(f"{type(self).__name__} must define read(site)")

    def contrast(self, full: Tensor, other: Tensor) -> Tensor:
        """Combine logits or log-probabilities (B, V) float32 of the two sources: exactly ``full`` if they agree."""
        return full + self.alpha * (full - other)

    def plausible(self, full: Tensor) -> Tensor:
        """Tell which tokens may be chosen, (B, V) bool, from logits (B, V) of which some may be -inf."""
        least = math.log(self.beta) if self.beta else -float("inf")
        return full >= full.amax(-1, keepdim=True) + least
