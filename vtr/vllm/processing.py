"""Fewer places for a picture in the prompt, reserved while vLLM processes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vllm.multimodal.parse import EmbeddingItems

from vtr.vllm.cut import Cut, cut_of


def shorter(updates: Sequence[Any], cut: Cut) -> list[Any]:
    """Shorten what a processor puts in place of each picture; other modalities stay.

    Args:
        updates: vLLM's ``PromptUpdate`` objects, whose replacement of a picture is one token, repeated.
    """
    return [
        dataclasses.replace(update, replacement=_shorter(update.replacement, cut))
        if update.modality == "image"
        else update
        for update in updates
    ]


def _shorter(replacement: Any, cut: Cut) -> Callable[[int], list[int]]:
    def replace(index: int) -> list[int]:
        tokens: list[int] = replacement(index)
        return tokens[: cut.number(len(tokens))]

    return replace


class Shortening:
    """A mixin for multimodal processors of vLLM.

    Class attributes:
        family: of :func:`vtr.vllm.cut.cut_of`.
    """

    family: str

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> list[Any]:
        if "image" in mm_items and isinstance(mm_items["image"], EmbeddingItems):
            raise ValueError("give pictures, not their embeddings: the method looks at the model")
        parent: Any = super()
        updates = parent._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)
        info: Any = self.info  # type: ignore[attr-defined]
        return shorter(updates, cut_of(info.get_hf_config(), self.family))
