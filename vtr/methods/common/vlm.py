"""What the methods for vision-language models share: budgets, pruning, text rows, validation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from vtr.core.budget import Keep, counts
from vtr.core.language_site import LanguageSite
from vtr.core.method import Reduction, Stage, TokenMethod
from vtr.core.site import ModelInfo, Site
from vtr.core.tokens import TokenMap, top_indices


class TextScored(TokenMethod):
    """A method whose cuts rank the visual tokens by a text-to-image attention score.

    ``reduce`` is :meth:`score` followed by :meth:`select`, so that a wrapper (``Debias``) can correct
    the score in between.

    Class attributes:
        padding_fills: whether tokens whose score a wrapper has suppressed fill up a budget that is larger
            than the rest.
    """

    padding_fills: ClassVar[bool] = True

    def first_cut(self, info: ModelInfo) -> Stage:
        """The first stage that cuts by such a score."""
        return next(s for s in self.stages(info) if s.site == "decoder" and s.cuts)

    def score(self, site: LanguageSite) -> Tensor | None:
        """(B, N) float32 ranking score, higher is better; None where nothing is cut here."""
        raise NotImplementedError

    def number(self, site: LanguageSite) -> Tensor:
        """(B,) int64: the tokens that the budget leaves here."""
        raise NotImplementedError

    def select(
        self, site: LanguageSite, score: Tensor, number: Tensor, raw: Tensor
    ) -> Reduction | None:
        """The cut that leaves the ``number`` (B,) best tokens by a (B, N) score.

        ``raw`` is the score before a wrapper corrected it, for what is not a matter of who stays.
        """
        raise NotImplementedError

    def reduce(self, site: Site) -> Reduction | None:
        here = language(site)
        score = self.score(here)
        return None if score is None else self.select(here, score, self.number(here), score)


def language(site: Site) -> LanguageSite:
    """The site, known to be in or before a language model."""
    if not isinstance(site, LanguageSite):
        raise TypeError(f"{site.site}[{site.layer}] is no place of a language model")
    return site


def stored(site: Site, name: str) -> Tensor:
    """What the method stored in the encoder for this prompt.

    Raises ``RuntimeError`` where the vision tower did not run under the method.
    """
    if name not in site.memory:
        raise RuntimeError(
            "the vision tower did not run for this prompt while the method was applied: give the model "
            "pixels, not image features made before, or use a method that looks at the prompt"
        )
    found: Tensor = site.memory[name]
    return found


def last_used(info: ModelInfo) -> int:
    """0-based encoder layer whose output the projector reads."""
    return info.last_layer


def alive(site: Site) -> Tensor:
    """(B,) int64: number of visual tokens of each sample here."""
    if site.valid is None:
        return torch.full((site.batch,), site.n, dtype=torch.long, device=site.device)
    return site.valid.sum(1)


def valid_of(site: Site) -> Tensor:
    """(B, N) bool, ``site.valid`` with None written out."""
    if site.valid is not None:
        return site.valid
    return torch.ones(site.batch, site.n, dtype=torch.bool, device=site.device)


def budget(site: LanguageSite, keep: Keep) -> Tensor:
    """(B,) int64: tokens that ``keep`` leaves of each sample's tokens at the language model's entry.

    An int is a number per image: the images of a sample share the sum of their budgets.
    """
    entry = site.entry
    if isinstance(keep, float):
        return counts(keep, entry)
    sums = [sum(min(keep, length) for _, length, _ in images) for images in site.images]
    return torch.tensor(sums, device=entry.device)


def stage_budget(
    site: LanguageSite, keep: Keep | tuple[Keep, ...], stage: int, stages: int
) -> Tensor:
    """(B,) int64: tokens left after stage number ``stage`` of ``stages``, at most those here.

    ``keep`` is one budget per stage, all of the tokens at the language model's entry, or one for the
    last stage, reached by one ratio per stage.
    """
    if isinstance(keep, tuple):
        return torch.minimum(budget(site, keep[stage]), alive(site))
    last = budget(site, keep)
    entry = site.entry.double().clamp(min=1)
    inner = torch.ceil(entry * (last / entry) ** ((stage + 1) / stages) - 1e-9).long()
    return torch.minimum(torch.maximum(inner, last), alive(site))


def nothing_to_cut(site: Site, number: Tensor) -> bool:
    """Whether every sample may keep all that it has."""
    return bool((number >= alive(site)).all())


def prune(site: Site, score: Tensor, number: Tensor) -> Reduction | None:
    """Keep the ``number[b]`` best tokens of each sample by ``score`` (B, N); None if that is all."""
    wanted, here = torch.stack([number, alive(site)]).tolist()  # one look at the device
    if all(n >= most for n, most in zip(wanted, here, strict=True)):
        return None
    if site.valid is None and len(set(wanted)) == 1:
        kept, padded = top_indices(score, wanted[0])
    else:
        kept, padded = top_indices(score, number, site.valid)
    return Reduction(TokenMap.keep(kept, site.n, padded))


def last_text_row(site: LanguageSite) -> Tensor:
    """(B, N) float32: attention of the last prompt token to the visual tokens, mean over heads."""
    need_text_after(site)
    return site.attention_rows_from_text()[:, :, 0].mean(1)


def need_text_after(site: LanguageSite) -> None:
    """Raise ``ValueError`` for a sample whose image no text follows: nothing looks at it."""
    if not bool((site.text_after.any(1) | (alive(site) == 0)).all()):
        raise ValueError(
            "a prompt of the batch ends with its image, so that no text token sees it and its tokens "
            "cannot be ranked by text: put the question after the image, or use a method that ranks "
            "by the encoder (VisionZip, FlowCut) or by diversity (DivPrune)"
        )


def scaled_layers(layers: Sequence[int], of: int, depth: int) -> tuple[int, ...]:
    """Layers published for a model of ``of`` layers, for one of ``depth``: scaled down, ascending.

    Raises ``ValueError`` where the model has too few.
    """
    out: list[int] = []
    for layer in layers:
        out.append(max(layer * depth // of, out[-1] + 1 if out else 0))
    if out[-1] >= depth - 1:
        raise ValueError(f"layers must be given for a language model of {depth} layers")
    return tuple(out)


def check_count(value: object, name: str, low: int = 1, none: bool = False) -> None:
    """Raise ``ValueError`` unless ``value`` is an int >= ``low`` (or None, if ``none``)."""
    if none and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(
            f"{name} must be an int >= {low}{' or None' if none else ''}, got {value!r}"
        )


def check_number(value: object, name: str, low: float, high: float) -> None:
    """Raise ``ValueError`` unless ``value`` is a number in [low, high]."""
    fits = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not fits or not low <= float(value) <= high:  # type: ignore[arg-type]
        raise ValueError(f"{name} must be a number in [{low}, {high}], got {value!r}")
