"""Data without labels for a search in a language model: the answers that the dense model gives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from vtr.core.budget import check_count
from vtr.strategies.batches import OUTSIDE, placed


def answered(
    model: Any, batches: Iterable[Mapping[str, Any]], tokens: int = 8
) -> list[dict[str, Any]]:
    """Let the dense model answer, and append its answers to the prompts as ``labels``.

    A loss at the last token of a prompt judges the first word of an answer alone. With these batches it judges
    all of them, and needs no right answers.

    Args:
        model: a vision-language model of transformers, in eval mode, without methods.
        batches: inputs of its forward, padded on the left.
        tokens: of an answer at most. Answers are greedy.

    Returns:
        New batches: ``input_ids`` and other tensors of its shape are longer by the answers, and ``labels`` (B, T)
        has the answers' ids, and -100 elsewhere and behind the end of an answer.

    Raises:
        ValueError: a prompt is padded on the right, or ``tokens`` is not an int of at least 1.
    """
    check_count(tokens, "tokens")
    found = []
    for number, batch in enumerate(batches):
        inputs = placed({k: v for k, v in batch.items() if k != "labels"}, model, cast=True)
        ids = inputs["input_ids"]
        mask = inputs.get("attention_mask")
        if mask is not None and not bool(mask[:, -1].all()):
            raise ValueError(f"batch {number} is padded on the right: pad prompts on the left")
        with torch.no_grad():
            whole = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        answers = whole[:, ids.shape[1] :]
        found.append(_joined(inputs, ids, answers, _ends(model)))
    return found


def _ends(model: Any) -> set[int]:
    """The ids that end an answer."""
    given = getattr(model.generation_config, "eos_token_id", None)
    several = given if isinstance(given, (list, tuple)) else [given]
    return {int(end) for end in several if end is not None}


def _joined(
    inputs: Mapping[str, Any], ids: Tensor, answers: Tensor, ends: set[int]
) -> dict[str, Any]:
    ended = torch.zeros_like(answers, dtype=torch.bool)
    for end in ends:
        ended |= answers == end
    # The end itself is a part of the answer; what follows it is padding.
    behind = ended.long().cumsum(1) - ended.long() > 0
    out = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.shape == ids.shape:
            more = answers if name == "input_ids" else torch.zeros_like(answers)
            more = (~behind).to(value.dtype) if name == "attention_mask" else more.to(value.dtype)
            value = torch.cat([value, more], 1)
        out[name] = value
    labels = answers.masked_fill(behind, OUTSIDE)
    return {**out, "labels": torch.cat([torch.full_like(ids, OUTSIDE), labels], 1).cpu()}
