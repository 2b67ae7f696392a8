"""Code that methods share that rank by text-to-image attention."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vtr.core.language_site import LanguageSite


def last_text_row(site: LanguageSite) -> Tensor:
    """(B, N) float32: attention of the last prompt token to the visual tokens, mean over heads."""
    need_text_after(site)
    return site.attention_rows_from_text()[:, :, 0].mean(1)


def need_text_after(site: LanguageSite) -> None:
    """Raise ``ValueError`` for a sample whose image no text follows: nothing looks at it."""
    if not bool((site.text_after.any(1) | (site.counts == 0)).all()):
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
