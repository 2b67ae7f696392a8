"""Find the placeholders in a prompt that visual tokens replace."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtr.compat.transformers import placeholder_names
from vtr.vision.vlm.frames import KINDS


def visual_ids(config: Any) -> dict[int, int]:
    """Token ids that images and videos replace, and the number of their kind."""
    found: dict[int, int] = {}
    for kind, number in KINDS.items():
        for name in placeholder_names(kind):
            value = getattr(config, name, None)
            if value is not None:
                found.setdefault(int(value), number)
    return found


def find(inner: Any, ids: Tensor | None, embeds: Tensor | None) -> Tensor | None:
    """(B, L) int8: 1 at placeholders of images and 2 at those of videos, else 0.

    By id, or by the embedding of the id; None if there is neither.
    """
    given = embeds if ids is None else ids
    if given is None:
        return None
    table = inner.get_input_embeddings()
    out = torch.zeros(given.shape[:2], dtype=torch.int8, device=given.device)
    for i, number in visual_ids(inner.config).items():
        if ids is not None:
            here = ids == i
        else:
            here = (given == table(torch.tensor(i, device=given.device))).all(-1)
        out[here] = number
    return out
