"""Models of a class that vtr does not name: a tower, a projector, a language model, and one placeholder for each visual token.

What such a class needs is found by its structure, and that it works is proven on a tiny twin (:mod:`vtr.vision.vlm.proof`).
Methods look at the prompt and in the decoder; the tower of an unknown class is not opened.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from vtr.compat.transformers import MODALITIES, kinds_of, language_module
from vtr.vision.vlm.attention import runs_otherwise
from vtr.vision.vlm.family import VLMFamily
from vtr.vision.vlm.features import Capture
from vtr.vision.vlm.frames import Piece, plain, still, unknown
from vtr.vision.vlm.masks import unknown_kinds
from vtr.vision.vlm.pictures import Pictures
from vtr.vision.vlm.placeholders import visual_ids

NOT_OPENED = "its tower is not opened: cut at the prompt or in the decoder"


class Generic(VLMFamily):
    """A class that is known by its structure alone.

    Args:
        title: of the model.
        two_way: whether the tokens of a picture see one another.
        blind: why methods cannot read the attention of its layers, or empty.
        inside: why methods cannot compute it, or empty.
    """

    cuts = NOT_OPENED
    fixed = False

    def __init__(
        self, title: str, two_way: bool = False, blind: str = "", inside: str = ""
    ) -> None:
        self.title, self.two_way, self.blind, self.inside = title, two_way, blind, inside

    def tower(self, inner: Any, kind: str) -> nn.Module | None:
        return None

    def fixed_size(self, inner: Any) -> str:
        return "its tower is not opened"

    def pictures(self, inner: Any, kind: str, given: dict[str, Any]) -> Pictures | None:
        return None

    def crops(self, inner: Any, capture: Capture, given: dict[str, Any]) -> list[int]:
        return []

    def describe(self, inner: Any, capture: Capture, given: dict[str, Any]) -> None:
        """Pictures by their grids in patches if they were given, else each run of placeholders."""
        lengths, grids = capture.lengths, given.get(f"{capture.kind}_grid_thw")
        if isinstance(grids, Tensor) and grids.dim() == 2 and grids.shape[1] == 3:
            pieces = _on_grids(capture.kind, grids.tolist(), sum(lengths))
            if pieces is not None:
                capture.pieces = pieces
                capture.lengths = [piece.length for piece in pieces]
                return
        if all(n == 1 for n in lengths):  # the tokens of all pictures lie end to end
            capture.runs = True
            capture.pieces = [unknown(capture.kind, sum(lengths))]
            capture.lengths = [sum(lengths)]
            return
        capture.tiled = capture.kind == "image"
        capture.pieces = [
            still(n) if capture.kind == "image" else unknown("video", n) for n in lengths
        ]


def _on_grids(kind: str, grids: list[list[int]], total: int) -> list[Piece] | None:
    """Pictures of (frames, rows, columns) patches, of which merge x merge become a token; None if none does."""
    patches = sum(math.prod(grid) for grid in grids)
    merge = math.isqrt(patches // total) if total and patches % total == 0 else 0
    if not merge or merge * merge * total != patches:
        return None
    if any(h % merge or w % merge for _, h, w in grids):
        return None
    return [plain(kind, t, (h // merge, w // merge)) for t, h, w in grids]


def is_vlm(inner: Any) -> bool:
    """Tell whether a model computes features of pictures and has placeholders for them."""
    config = getattr(inner, "config", None)
    return any(hasattr(inner, name) for name in MODALITIES) and bool(visual_ids(config))


def lacking(inner: Any) -> str:
    """Say which part of a model differs from the structure that is known; empty if none does."""
    language = language_module(inner)
    layers = getattr(language, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        return f"its language model ({type(language).__name__}) has no list of layers"
    return runs_otherwise(layers[0]) or unknown_kinds(kinds_of(language))
