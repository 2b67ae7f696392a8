"""Small trained models that ship with the package, with their data.

>>> import vtr.zoo
>>> model = vtr.zoo.load("digits-vit")  # doctest: +SKIP
>>> images, labels = vtr.zoo.samples("digits-vit", n=8, seed=0)  # doctest: +SKIP

They are real architectures of real libraries, trained on digits drawn over photographs
(:mod:`vtr.zoo.data`), and they are small: they show what a method does, not what it would do to a
model of a billion parameters. Every model has a card, ``vtr/zoo/cards/NAME.md``, that says how it
was trained and what it scores.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Public name -> module. Resolved on first use: most need torch, and importing vtr.zoo must not.
_PUBLIC = {
    "ModelCard": "vtr.zoo.packaged",
    "card": "vtr.zoo.packaged",
    "models": "vtr.zoo.packaged",
    "vlm_path": "vtr.zoo.packaged",
    "weights_path": "vtr.zoo.packaged",
    "load": "vtr.zoo.loading",
    "load_pipeline": "vtr.zoo.loading",
    "load_vlm": "vtr.zoo.loading",
    "samples": "vtr.zoo.data",
    "detector_path": "vtr.zoo.packaged",
    "evaluate_detector": "vtr.zoo.detection_scores",
    "evaluate_vlm": "vtr.zoo.questions",
    "vqa": "vtr.zoo.questions",
    "evaluate_video_vlm": "vtr.zoo.video_questions",
    "video_qa": "vtr.zoo.video_questions",
    "slides_qa": "vtr.zoo.slide_questions",
    "chat_qa": "vtr.zoo.chat_questions",
}

__all__ = [
    "ModelCard",
    "card",
    "chat_qa",
    "detector_path",
    "evaluate_detector",
    "evaluate_video_vlm",
    "evaluate_vlm",
    "load",
    "load_pipeline",
    "load_vlm",
    "models",
    "samples",
    "slides_qa",
    "video_qa",
    "vlm_path",
    "vqa",
    "weights_path",
]

if TYPE_CHECKING:
    from vtr.zoo.chat_questions import chat_qa
    from vtr.zoo.data import samples
    from vtr.zoo.detection_scores import evaluate_detector
    from vtr.zoo.loading import load, load_pipeline, load_vlm
    from vtr.zoo.packaged import (
        ModelCard,
        card,
        detector_path,
        models,
        vlm_path,
        weights_path,
    )
    from vtr.zoo.questions import evaluate_vlm, vqa
    from vtr.zoo.slide_questions import slides_qa
    from vtr.zoo.video_questions import evaluate_video_vlm, video_qa


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return list(__all__)
