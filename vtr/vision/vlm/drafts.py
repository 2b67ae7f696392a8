"""Assisted decoding (a draft model, prompt lookup) on a wrapped model."""

from __future__ import annotations

from typing import Any


class DraftsAfterPrompt:
    """A candidate generator of transformers whose first round of drafts is dropped.

    The first round of assisted decoding runs prompt and drafted tokens in one call. Methods that rank
    by the last text token would rank by a draft, and a rejected draft would have to leave a cache
    whose record of the cuts knows it. Without drafts that call is an ordinary prefill, so that
    the same tokens are kept as without assistance.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.started = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inner"], name)

    def get_candidates(self, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        # A draft model must read the prompt in the first round: its drafts are computed, and rejected here.
        drafted = self.inner.get_candidates(input_ids, *args, **kwargs)
        first, self.started = not self.started, True
        return (input_ids, None) if first else drafted

    def update_candidate_strategy(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner.update_candidate_strategy(*args, **kwargs)
