"""From a checked request to the model's inputs."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtr.serve.errors import RequestError
from vtr.serve.schema import ChatRequest, ImagePart, TextPart, VideoPart


@dataclass(frozen=True, eq=False)
class Prepared:
    """The inputs of one request.

    Attributes:
        inputs: of ``generate``, on the CPU; ``input_ids`` (1, L) int64 among them.
        length: tokens of the dense prompt.
        visual: those of them that represent pictures and videos.
        config: the generation config.
    """

    inputs: dict[str, Any]
    length: int
    visual: int
    config: Any


class Preparing:
    """A model's processor, for one request at a time.

    Args:
        model, processor: of transformers.
        new_tokens: that an answer may have at most.
    """

    def __init__(self, model: Any, processor: Any, new_tokens: int) -> None:
        self.processor, self.new_tokens = processor, new_tokens
        self.defaults = model.generation_config
        config = model.config
        marks = (getattr(config, f"{kind}_token_id", None) for kind in ("image", "video"))
        self.visual = [mark for mark in marks if mark is not None]
        self.context = getattr(config.get_text_config(), "max_position_embeddings", None)
        tokenizer = getattr(processor, "tokenizer", processor)
        self.special = {token for token in tokenizer.all_special_tokens if token}
        self.begins = tokenizer.bos_token
        # A tokenizer changes its own settings for the time of a call.
        self._lock = threading.Lock()

    def prepare(
        self, request: ChatRequest, images: Sequence[Any], videos: Sequence[Any]
    ) -> Prepared:
        """Apply the chat template and the processor.

        Args:
            images: RGB pictures, in the order of the request.
            videos: :class:`vtr.video.Video`, in the order of the request.

        Raises:
            RequestError: the model takes no such media, or prompt and answer are longer than its context.
        """
        messages = self._messages(request)
        media: dict[str, Any] = {}
        if images:
            media["images"] = [list(images)] if len(images) > 1 else list(images)
        if videos:
            if getattr(self.processor, "video_processor", None) is None:
                raise RequestError(f"{request.model} takes no videos", param="messages")
            media |= videos[0].for_processor()
        with self._lock:
            inputs = self._processed(messages, media)
        ids = inputs["input_ids"]
        if images and not any(name.startswith("pixel_values") for name in inputs):
            raise RequestError(f"{request.model} takes no pictures", param="messages")
        length = ids.shape[1]
        visual = int(torch.isin(ids, torch.tensor(self.visual, device="cpu")).sum())
        return Prepared(inputs, length, visual, self._generation(request, length))

    def _messages(self, request: ChatRequest) -> list[dict[str, Any]]:
        messages = []
        for i, message in enumerate(request.messages):
            content: list[dict[str, str]] = []
            for part in message.parts:
                if isinstance(part, TextPart):
                    self._check_words(part.text, f"messages.{i}.content")
                    content.append({"type": "text", "text": part.text})
                elif isinstance(part, ImagePart):
                    content.append({"type": "image"})
                elif isinstance(part, VideoPart):
                    content.append({"type": "video"})
            role = "system" if message.role == "developer" else message.role
            messages.append({"role": role, "content": content})
        return messages

    def _check_words(self, text: str, param: str) -> None:
        """Refuse a text that would end a turn, or represent a picture, in the model's prompt."""
        found = next((token for token in self.special if token in text), None)
        if found is not None:
            raise RequestError(
                f"{param} contains {found}, a special token of the model", param=param
            )

    def _processed(self, messages: list[dict[str, Any]], media: dict[str, Any]) -> dict[str, Any]:
        try:
            text = self.processor.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False
            )
            # One special token too many changes answers; templates write their own.
            if self.begins and text.startswith(self.begins):
                media = {**media, "add_special_tokens": False}
            return dict(self.processor(text=[text], return_tensors="pt", **media))
        except Exception as error:  # templates and processors raise what they like
            raise RequestError(
                f"messages: the model's processor refuses them ({type(error).__name__}: {error})",
                param="messages",
            ) from error

    def _generation(self, request: ChatRequest, length: int) -> Any:
        """Copy the model's own generation config, with what the request changes.

        A temperature above zero draws the answer, zero never does. Without a temperature the model's own config
        decides, except that ``top_p`` below 1 draws at temperature 1.
        """
        wanted, limit = request.new_tokens, self.new_tokens
        if wanted is not None and wanted > limit:
            raise RequestError(
                f"max_tokens is limited to {limit} by this server, got {wanted}", param="max_tokens"
            )
        room = limit if self.context is None else self.context - length
        if room < (wanted or 1):
            raise RequestError(
                f"the model's context has {self.context} tokens; the prompt has {length}, and the answer may "
                f"have {wanted or 1}: send fewer or smaller pictures, less text, or a smaller max_tokens",
                param="messages",
                code="context_length_exceeded",
            )
        config = copy.deepcopy(self.defaults)
        config.max_new_tokens = wanted or min(limit, room)
        temperature = request.temperature
        if temperature is None and request.top_p is not None and request.top_p < 1:
            temperature = 1.0
        if temperature is not None:
            config.do_sample = temperature > 0
            config.temperature = temperature or None
            if not temperature:  # options of sampling are a warning for a greedy answer
                config.top_p = config.top_k = None
        if config.do_sample and request.top_p is not None:
            config.top_p = request.top_p
        return config


def moved(inputs: dict[str, Any], model: Any) -> dict[str, Any]:
    """Move tensors to the model's device, and those of floats to its dtype."""
    found = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            value = value.to(model.device)
            if value.is_floating_point():
                value = value.to(model.dtype)
        found[name] = value
    return found
