"""The fields of a request for a chat completion: which are taken, and which are refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vtr.serve.errors import RequestError

# Fields of OpenAI's API that would change the answer and that are not supported, with the values that change
# nothing; None changes nothing in any of them.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "frequency_penalty": (0,),
    "function_call": (),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "moderation": (),
    "n": (1,),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": (),
    "web_search_options": (),
}
#: Fields that label a request and do not change its answer.
LABELS = ("metadata", "prompt_cache_key", "safety_identifier", "user")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(_Strict):
    """Words of a message."""

    type: Literal["text"]
    text: str


class Address(_Strict):
    """A picture or video: a data URL, or an address if fetching is allowed."""

    url: str
    detail: Literal["auto", "low", "high", "original"] | None = None


class ImagePart(_Strict):
    """A picture of a message."""

    type: Literal["image_url"]
    image_url: Address


class VideoPart(_Strict):
    """A video of a message."""

    type: Literal["video_url"]
    video_url: Address


Part = Annotated[TextPart | ImagePart | VideoPart, Field(discriminator="type")]


class Message(_Strict):
    """One turn of the chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: str | None = None

    @property
    def parts(self) -> list[TextPart | ImagePart | VideoPart]:
        """The content as parts."""
        if isinstance(self.content, str):
            return [TextPart(type="text", text=self.content)]
        return self.content


class StreamOptions(_Strict):
    """Options of a streamed answer."""

    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


Number = Annotated[float, Field(allow_inf_nan=False)]
Scalar = bool | int | Number


class WantedReduction(_Strict):
    """The field ``vtr``: which method reduces the visual tokens of this request.

    Attributes:
        method: the name of a method, or ``"dense"``.
        keep: its budget, or one per layer or stage.
        options: further options: numbers, lists of numbers, and ``site``.
    """

    method: Annotated[str, Field(max_length=64)] | None = None
    keep: int | Number | Annotated[list[int | Number], Field(max_length=256)] | None = None
    options: dict[str, Scalar | str | list[Scalar] | None] = {}


class ChatRequest(_Strict):
    """A request for a chat completion."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1, max_length=1000)]
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    vtr: WantedReduction | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The words that end an answer."""
        words = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(words)

    @property
    def new_tokens(self) -> int | None:
        """New tokens that the answer may have at most."""
        if self.max_completion_tokens is not None:
            return self.max_completion_tokens
        return self.max_tokens


def read_request(body: Any) -> ChatRequest:
    """Check the JSON value of a request.

    Raises:
        RequestError: status 400, with the name of the field that is wrong or not supported.
    """
    if not isinstance(body, Mapping):
        raise RequestError("the request must be a JSON object")
    given = {name: value for name, value in body.items() if name not in LABELS}
    for name, neutral in UNSUPPORTED.items():
        value = given.pop(name, None)
        if value is not None and not any(_same(value, other) for other in neutral):
            raise RequestError(
                f"{name} is not supported by this server; leave it out",
                param=name,
                code="unsupported_parameter",
            )
    if isinstance(given.get("messages"), list):
        # Clients send the messages of earlier answers back with their empty fields.
        given["messages"] = [_without_nones(message) for message in given["messages"]]
    try:
        request = ChatRequest.model_validate(given)
    except ValidationError as error:
        raise _refused(error) from None
    _check_turns(request)
    return request


def _same(value: Any, other: Any) -> bool:
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)


def _without_nones(message: Any) -> Any:
    if not isinstance(message, dict):
        return message
    return {
        name: value
        for name, value in message.items()
        if value is not None and not (name in ("annotations", "tool_calls") and value == [])
    }


def _refused(error: ValidationError) -> RequestError:
    found = error.errors(include_url=False, include_context=False, include_input=False)
    first = max(
        found, key=lambda one: len(one["loc"])
    )  # of the variants, the one that fits furthest
    # Places name the variants of a union, which no client knows.
    place = [str(part) for part in first["loc"] if not _variant(str(part))]
    param = ".".join(place) or None
    message = first["msg"]
    if first["type"] == "extra_forbidden":
        message = "this field is unknown; leave it out"
    elif first["type"] == "union_tag_invalid":
        message = f"{message}. Audio, files and other parts are not supported"
    return RequestError(f"{param or 'request'}: {message}", param=param)


def _variant(name: str) -> bool:
    return name in ("str", "text", "int", "float", "image_url", "video_url") or "[" in name


def _check_turns(request: ChatRequest) -> None:
    for i, message in enumerate(request.messages):
        empty = not any(not isinstance(p, TextPart) or p.text.strip() for p in message.parts)
        if empty and message.role != "assistant":
            raise RequestError(f"messages.{i}.content is empty", param=f"messages.{i}.content")
        media = any(not isinstance(part, TextPart) for part in message.parts)
        if media and message.role != "user":
            raise RequestError(
                f"messages.{i}: pictures and videos belong to messages of the role user, not {message.role}",
                param=f"messages.{i}.content",
            )
    if request.messages[-1].role != "user":
        raise RequestError("the last message must have the role user", param="messages")
    if any(not word for word in request.stops):
        raise RequestError("stop must not be an empty string", param="stop")
    if request.stream_options is not None and not request.stream:
        raise RequestError("stream_options need stream=true", param="stream_options")
