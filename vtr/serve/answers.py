"""Answers in OpenAI's format, built from the types of its own client."""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from openai.types import CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from vtr.serve.engine import AnswerJob, Done

END = b"data: [DONE]\n\n"


def event(value: dict[str, Any]) -> bytes:
    """Write one event of a stream."""
    return b"data: " + json.dumps(value).encode() + b"\n\n"


@dataclass(frozen=True)
class AnswerWriter:
    """Writes the answer to one job.

    Args:
        model: its name, as the request has it.
        job: what is answered.
    """

    model: str
    job: AnswerJob
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, text: str, done: Done) -> dict[str, Any]:
        """Return a complete answer."""
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": done.reason}
        completion = ChatCompletion.model_validate(
            {
                **self._head("chat.completion"),
                "choices": [{**choice, "logprobs": None}],
                "usage": self.usage(done),
            }
        )
        return completion.model_dump(exclude_unset=True)

    def piece(self, delta: dict[str, str], reason: str | None = None) -> bytes:
        """Write a piece of a streamed answer."""
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        return self._chunk([choice])

    def end(self, done: Done) -> bytes:
        """Write the last piece of a streamed answer, which has the counts and no text."""
        return self._chunk([], usage=self.usage(done))

    def usage(self, done: Done) -> dict[str, Any]:
        """Count tokens: those of the dense prompt as OpenAI counts them, and visual ones before and after."""
        prepared, choice = self.job.prepared, self.job.choice
        counted = CompletionUsage(
            prompt_tokens=prepared.length,
            completion_tokens=done.tokens,
            total_tokens=prepared.length + done.tokens,
        )
        ours = {
            "method": "dense" if choice is None else str(choice),
            "visual_tokens_before": prepared.visual,
            "visual_tokens_after": done.left,
        }
        return {**counted.model_dump(exclude_unset=True), "vtr": ours}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        chunk = {**self._head("chat.completion.chunk"), "choices": choices, **more}
        return event(ChatCompletionChunk.model_validate(chunk).model_dump(exclude_unset=True))
