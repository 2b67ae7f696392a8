"""The module that lmms-eval loads through its entry points: it names the model classes, and loads little."""

from __future__ import annotations

from typing import Any

from vtr.compat import lmms_eval

MODEL = "vtr"


def manifests() -> list[Any]:
    """The manifests of the entry point ``lmms_eval.models``; imports neither torch nor transformers."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [
        ModelManifest(
            model_id=MODEL,
            chat_class_path="vtr.evaluate.model.VTRChat",
            simple_class_path="vtr.evaluate.simple.VTRSimple",
        )
    ]


def register() -> None:
    """Register the model in this process, also if the entry point is not installed."""
    lmms_eval.register(manifests())
