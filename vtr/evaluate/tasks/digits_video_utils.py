"""The questions and scores of the built-in video benchmark for lmms-eval: the whole answer must be right."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def doc_to_visual(doc: dict[str, Any]) -> list[str]:
    """The path of the clip; files lie beside this one."""
    return [str(Path(__file__).parent / doc["video"])]


def doc_to_text(doc: dict[str, Any], lmms_eval_specific_kwargs: Any = None) -> str:
    return str(doc["question"])


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """1 or 0, for all questions and for those of this kind."""
    right = float(results[0].strip() == doc["answer"])
    return {"accuracy": right, doc["kind"].replace(" ", "_"): right}
