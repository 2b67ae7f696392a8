"""Contrasts of a few visual tokens, and the answer that they must give, computed without a cache or a processor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from tests.vision.vlm.models import visual
from vtr.core.tokens import top_indices
from vtr.methods.common.contrast import ContrastMethod


@dataclass(frozen=True, kw_only=True)
class Loudest(ContrastMethod):
    """The second run sees the ``k`` visual embeddings with the largest norm."""

    name: ClassVar[str] = "loudest"
    paper: ClassVar[str] = "none"

    k: int = 3
    beta: float = 0.02

    def keep(self, site: Any) -> Tensor:
        number = site.counts.clamp(max=self.k)
        kept: Tensor = top_indices(site.hidden.float().norm(dim=-1), number, site.valid_mask)[0]
        return kept


@dataclass(frozen=True, kw_only=True)
class Mean(ContrastMethod):
    """The head reads the mean of the visual embeddings."""

    name: ClassVar[str] = "mean"
    paper: ClassVar[str] = "none"
    runs: ClassVar[bool] = False

    beta: float = 0.02

    def read(self, site: Any) -> Tensor:
        weight = site.valid_mask[..., None].to(site.hidden)
        return (site.hidden * weight).sum(1) / weight.sum(1).clamp(min=1)


def language(model: Any) -> Any:
    return getattr(model.model, "language_model", None) or model.model.text_model


@torch.no_grad()
def entered(model: Any, sample: dict[str, Any]) -> dict[str, Any]:
    """Arguments that the language model gets for a prompt."""
    seen: list[dict[str, Any]] = []
    hook = language(model).register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(dict(kwargs)), with_kwargs=True
    )
    try:
        model.generate(**sample, max_new_tokens=1, do_sample=False)
    finally:
        hook.remove()
    return seen[0]


class Reference:
    """The second run and the contrast of one sample, in plain, slow code: no cache, no batch, no processor.

    Args:
        sample: a prompt without padding.
        compact: whether the second run numbers positions anew.
        kept: the visual tokens that the second run sees; None for the ``k`` loudest.
    """

    def __init__(
        self,
        model: Any,
        method: Any,
        sample: dict[str, Any],
        compact: bool = False,
        kept: Any = None,
    ) -> None:
        self.model, self.method = model, method
        given = entered(model, sample)
        self.embeds = given["inputs_embeds"]
        length = self.embeds.shape[1]
        positions = given.get("position_ids")
        positions = torch.arange(length)[None] if positions is None else positions
        self.positions = positions
        self.places = visual(sample["input_ids"])[0].nonzero().flatten()
        self.stack = given.get("deepstack_visual_embeds")
        norms = self.embeds[0, self.places].norm(dim=-1).numpy()
        if kept is None:
            kept = np.argsort(-norms, kind="stable")[: getattr(method, "k", 0)]
        self.kept = np.sort(kept)
        dropped = np.setdiff1d(np.arange(len(self.places)), self.kept)
        gone = set(self.places[torch.tensor(dropped, dtype=torch.long)].tolist())
        self.stays = torch.tensor([i for i in range(length) if i not in gone])
        self.compact = compact

    def _run(self, embeds: Tensor, positions: Tensor, places: Tensor, rows: Tensor) -> np.ndarray:
        more: dict[str, Any] = {}
        if self.stack is not None:
            mask = torch.zeros(1, embeds.shape[1], dtype=torch.bool)
            mask[0, places] = True
            stack = [x[rows] for x in self.stack]
            more = {"visual_pos_masks": mask, "deepstack_visual_embeds": stack}
        mask = torch.ones(1, embeds.shape[1], dtype=torch.long)
        out = language(self.model)(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions,
            use_cache=False,
            **more,
        )
        return self.model.lm_head(out.last_hidden_state[:, -1])[0].double().numpy()

    @torch.no_grad()
    def both(self, text: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Logits (V,) float64 of both runs behind a prompt and ``text``."""
        ids = torch.tensor([text], dtype=torch.long)
        more = self.model.get_input_embeddings()(ids)
        after = self.positions[..., -1:] + 1 + torch.arange(len(text))  # a prompt ends in text
        every = torch.arange(len(self.places))
        full = self._run(
            torch.cat([self.embeds, more], 1), torch.cat([self.positions, after], -1),
            self.places, every,
        )  # fmt: skip
        if not self.method.runs:
            vector = self.embeds[:, self.places].mean(1)
            return full, self.model.lm_head(vector)[0].double().numpy()
        positions = torch.cat([self.positions[..., self.stays], after], -1)
        if self.compact:
            positions = torch.arange(positions.shape[-1])[None]
        at = torch.tensor(
            [i for i, s in enumerate(self.stays.tolist()) if s in set(self.places.tolist())]
        )
        other = self._run(
            torch.cat([self.embeds[:, self.stays], more], 1), positions, at,
            torch.from_numpy(self.kept),
        )  # fmt: skip
        return full, other

    def scores(self, text: list[int]) -> np.ndarray:
        """Contrasted log-probabilities (V,) behind a prompt and ``text``."""
        full, other = self.both(text)
        return contrasted(full, other, self.method.alpha, self.method.beta)

    def greedy(self, steps: int) -> list[int]:
        text: list[int] = []
        for _ in range(steps):
            text.append(int(np.argmax(self.scores(text))))
        return text


def contrasted(full: np.ndarray, other: np.ndarray, alpha: float, beta: float) -> np.ndarray:
    """The formula of contrastive decoding, one token at a time; normalised."""
    out = np.full(len(full), -np.inf)
    top = max(full)
    for token in range(len(full)):
        if beta == 0 or full[token] >= top + np.log(beta):
            out[token] = (1 + alpha) * full[token] - alpha * other[token]
    high = out.max()
    return out - (high + np.log(np.exp(out - high).sum()))
