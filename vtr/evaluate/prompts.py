"""Conversion of a request of lmms-eval to the inputs of a transformers processor."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from vtr.compat.lmms_eval import asked
from vtr.evaluate.fingerprint import file_hash

GENERATION = ("max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "num_beams")
DEFAULT_NEW_TOKENS = 128


@dataclass(frozen=True, eq=False)
class Prompt:
    """A question with its pictures and how to answer it.

    Attributes:
        messages: for ``apply_chat_template``; pictures and videos are marked, not held.
        images: RGB pictures, in the order of their marks.
        videos: paths, in the order of their marks.
        generation: keyword arguments of ``generate``.
        until: the answer ends before the first of these.
        key: hash of all of it, pixels included.
    """

    messages: list[dict[str, Any]]
    images: tuple[Any, ...]
    videos: tuple[str, ...]
    generation: dict[str, Any]
    until: tuple[str, ...]
    key: str

    @property
    def samples(self) -> bool:
        """True if the answer is drawn by chance."""
        return bool(self.generation["do_sample"])

    def drawn_with(self, seed: int) -> Prompt:
        """The same question for answers drawn with this seed: another key, if chance has a part."""
        if not self.samples:
            return self
        key = hashlib.sha256(f"{self.key} seed {seed}".encode()).hexdigest()[:32]
        return replace(self, key=key)


def prompt_of(request: Any, datasets: Mapping[str, Any], frames: int = 8) -> Prompt:
    """Build the prompt of a request of a simple or a chat task. ``frames``: of a video.

    Raises:
        ValueError: media that transformers' processors do not take (audio).
    """
    given = asked(request)
    sample = datasets[given.task][given.split][given.doc]
    if given.messages is None:
        shown = given.visual(sample) if given.visual is not None else []
        content = [_part(v) for v in _flat(shown or [])]
        turns = [{"role": "user", "content": [*content, {"type": "text", "text": given.context}]}]
    else:
        turns = given.messages(sample)
    return make_prompt(turns, given.generation, frames)


def make_prompt(
    turns: list[dict[str, Any]], generation: Mapping[str, Any], frames: int = 8
) -> Prompt:
    """Build a prompt from lmms-eval's messages, whose content holds ``type`` and ``text`` or ``url``.

    ``frames`` is the number of frames read from a video: part of the question, and of its key.
    """
    messages, images, videos = [], [], []
    digest = hashlib.sha256()
    for turn in turns:
        content = turn["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        kept = []
        for part in parts:
            kind = part["type"]
            if kind == "text":
                kept.append({"type": "text", "text": part["text"]})
            elif kind == "image":
                picture = _picture(part.get("url", part.get("image")))
                images.append(picture)
                digest.update(f"{picture.size}".encode())
                digest.update(picture.tobytes())
                kept.append({"type": "image"})
            elif kind == "video":
                path = part.get("url", part.get("video"))
                if not isinstance(path, str):
                    raise ValueError(
                        f"a video of this task is a {type(path).__name__}, and only paths of files "
                        "can be read"
                    )
                videos.append(path)
                digest.update(f"{file_hash(path)} {frames} frames".encode())
                kept.append({"type": "video"})
            else:
                raise ValueError(f"a prompt with {kind} in it cannot be given to this model")
        messages.append({"role": turn["role"], "content": kept})
    options, until = _generation(generation)
    digest.update(json.dumps([messages, options, until], sort_keys=True).encode())
    return Prompt(messages, tuple(images), tuple(videos), options, until, digest.hexdigest()[:32])


def _part(visual: Any) -> dict[str, Any]:
    if isinstance(visual, str):
        return {"type": "video", "url": visual}
    if isinstance(visual, dict):
        return {"type": "audio", "url": visual}
    return {"type": "image", "url": visual}


def _flat(values: Any) -> list[Any]:
    return [v for part in values for v in (_flat(part) if isinstance(part, list) else [part])]


def _picture(source: Any) -> Any:
    """Return a PIL picture in RGB; a path is read."""
    from PIL import Image

    if isinstance(source, str):
        with Image.open(source) as file:
            return file.convert("RGB")
    if not isinstance(source, Image.Image):
        raise ValueError(f"a picture must be a PIL image or a path, got {type(source).__name__}")
    return source if source.mode == "RGB" else source.convert("RGB")


def _generation(given: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Select the options of ``generate`` from a task's options; others are not for the model."""
    chosen = {k: given[k] for k in GENERATION if given.get(k) is not None}
    draws = bool(chosen.get("do_sample", (chosen.get("temperature") or 0) > 0))
    if draws and not chosen.get("temperature", 1.0):
        draws = False  # a temperature of zero is the greedy answer
    chosen["do_sample"] = draws
    if not draws:
        # Set to None, or the defaults of the model's own generation config would be used.
        chosen |= {"temperature": None, "top_p": None, "top_k": None}
    chosen.setdefault("max_new_tokens", DEFAULT_NEW_TOKENS)
    until = given.get("until") or ()
    return chosen, (until,) if isinstance(until, str) else tuple(until)


def cut(answer: str, until: tuple[str, ...]) -> str:
    """Cut an answer at the first stop word."""
    ends = [answer.find(word) for word in until if word and word in answer]
    return answer[: min(ends)] if ends else answer
