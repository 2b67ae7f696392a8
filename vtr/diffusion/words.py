"""Words of a prompt as places in the text that attention sees."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Families -> the tokenizers of their pipelines whose tokens are the text of attention, one after another.
# Flux has CLIP's vector only in its modulation; SD3 has both CLIP encoders in the same 77 places, and T5
# behind them. Of the other families the places are not known.
TOKENIZERS = {
    "Wan": ("tokenizer",),
    "HunyuanVideo": ("tokenizer",),
    "CogVideoX": ("tokenizer",),
    "Mochi": ("tokenizer",),
    "LTX-Video": ("tokenizer",),
    "Flux": ("tokenizer_2",),
    "Qwen-Image": ("tokenizer",),
    "SD3": ("tokenizer", "tokenizer_3"),
    "PixArt": ("tokenizer",),
    "HunyuanDiT": ("tokenizer", "tokenizer_2"),
}
#: The attribute of Qwen-Image's pipelines with the number of tokens of their template that they cut off, and the
#: argument of HunyuanVideo's call that has it.
START, TEMPLATE = "prompt_template_encode_start_idx", "prompt_template"


class Tokens(NamedTuple):
    """The text that an encoder read, and the characters of its tokens.

    Attributes:
        text: as the tokenizer was given it, in its template.
        spans: (start, end) characters of each token; an empty span is a special token.
        valid: which tokens are no padding.
        length: tokens with padding.
    """

    text: str
    spans: list[tuple[int, int]]
    valid: list[bool]
    length: int


class Recorder:
    """Takes the place of a tokenizer, and remembers the first call with as many texts as there are prompts."""

    def __init__(self, tokenizer: Any, prompts: int) -> None:
        self.__dict__.update(vtr_original=tokenizer, vtr_prompts=prompts, vtr_call=None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.vtr_original, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.vtr_original, name, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = self.vtr_original(*args, **kwargs)
        texts = args[0] if args else kwargs.get("text")
        texts = [texts] if isinstance(texts, str) else texts
        if self.vtr_call is None and isinstance(texts, list) and len(texts) == self.vtr_prompts:
            options = {k: v for k, v in kwargs.items() if k not in ("text", "return_tensors")}
            self.__dict__["vtr_call"] = (list(texts), options, out)
        return out

    def tokens(self, prompt: int) -> Tokens | None:
        """The tokens of one prompt; None if the tokenizer was not called.

        Raises:
            ValueError: the tokenizer does not say which characters its tokens are.
        """
        if self.vtr_call is None:
            return None
        texts, options, out = self.vtr_call
        text, tokenizer = texts[prompt], self.vtr_original
        if isinstance(out, Tensor):  # of a tokenizer that is not transformers'
            spans = tokenizer.offsets(text)
            return Tokens(text, spans, [True] * len(spans), out.shape[1])
        ids = torch.as_tensor(out["input_ids"][prompt]).tolist()
        valid = [True] * len(ids)
        if "attention_mask" in out:
            valid = torch.as_tensor(out["attention_mask"][prompt]).bool().tolist()
        try:
            again = tokenizer(text, **{**options, "return_offsets_mapping": True})
        except NotImplementedError:
            raise ValueError(
                f"the tokenizer {type(tokenizer).__name__} does not say which characters its tokens are: "
                "load its fast form, or give the places of the words, {'cat': (4, 5)}"
            ) from None
        found, spans = list(again["input_ids"]), [tuple(span) for span in again["offset_mapping"]]
        # A batch is padded to its longest text; padding in front moves the tokens.
        first = len(ids) - len(found) if ids[: len(found)] != found else 0
        if ids[first : first + len(found)] != found:
            raise ValueError(
                f"the tokenizer {type(tokenizer).__name__} gave other tokens when it was asked for their "
                "characters: give the places of the words, {'cat': (4, 5)}"
            )
        rest = len(ids) - first - len(found)
        return Tokens(text, [(0, 0)] * first + spans + [(0, 0)] * rest, valid, len(ids))


@contextlib.contextmanager
def recorded(pipe: Any, family: str, prompts: int) -> Iterator[list[Recorder]]:
    """Record the tokenizers of a pipeline inside; they are its own again at the end."""
    before = {
        name: pipe.__dict__[name]
        for name in TOKENIZERS.get(family, ())
        if pipe.__dict__.get(name) is not None
    }
    recorders = {name: Recorder(tokenizer, prompts) for name, tokenizer in before.items()}
    # Not by setattr: a pipeline would enter the recorder into its configuration.
    pipe.__dict__.update(recorders)
    try:
        yield list(recorders.values())
    finally:
        pipe.__dict__.update(before)


def cut_of(pipe: Any, options: dict[str, Any]) -> int:
    """Tokens of the template that the pipeline cuts off at the start of the text.

    Raises:
        ValueError: it is not known, since the caller's template does not say.
    """
    template = options.get(TEMPLATE)
    if template is None:
        parameter = inspect.signature(pipe.__call__).parameters.get(TEMPLATE)
        template = None if parameter is None else parameter.default
    if isinstance(template, dict):
        start = template.get("crop_start")
        if start is None:
            raise ValueError(
                "prompt_template has no 'crop_start' (tokens in front of the prompt): add it, so that the "
                "places of words are known"
            )
        return int(start)
    return int(getattr(pipe, START, 0))


def pattern(phrase: str) -> re.Pattern[str]:
    """Matches a word or phrase, in any case, between the boundaries of words, across any white space.

    Scripts without spaces between words (Chinese, Japanese...) have no boundaries.
    """
    parts = phrase.split()
    if not parts:
        raise ValueError(f"a word must have letters, got {phrase!r}")
    body = r"\s+".join(map(re.escape, parts))
    before = r"(?<!\w)" if _bounded(parts[0][0]) else ""
    behind = r"(?!\w)" if _bounded(parts[-1][-1]) else ""
    return re.compile(before + body + behind, re.IGNORECASE)


def _bounded(character: str) -> bool:
    return character.isalnum() and ord(character) < 0x2E80  # CJK begins there


def front_of(tokens: Tokens) -> int:
    """Padding in front, which attention does not see (of these families, only Qwen-Image may have it)."""
    return next((n for n, valid in enumerate(tokens.valid) if valid), 0)


def places(tokens: Tokens, prompt: str, phrase: str, stop: frozenset[str], cut: int) -> list[int]:
    """The tokens of a phrase, every time it is in the prompt, without the stop words inside of it.

    Args:
        tokens: of the encoder.
        prompt: the part of ``tokens.text`` that may have the phrase; all of it if it is not in there as it is.
        phrase: one word or several.
        stop: words in lower case whose tokens are left out.
        cut: tokens in front that attention does not see.

    Returns:
        0-based places among the tokens that attention sees; none if the phrase is not in the text or has
        no token.
    """
    # A template has words as well: those in front of the prompt are cut off, those behind it are not.
    first = front_of(tokens) + cut
    begin = next((a for a, b in tokens.spans[first:] if b > a), 0)
    whole = re.compile(r"\s+".join(map(re.escape, prompt.split())), re.IGNORECASE)
    found = whole.search(tokens.text, begin)
    low, high = found.span() if found and prompt.strip() else (begin, len(tokens.text))
    wanted: set[int] = set()
    for match in pattern(phrase).finditer(tokens.text, low, high):
        for word in re.finditer(r"\S+", match.group()):
            if word.group().strip(".,;:!?\"'()").lower() in stop:
                continue
            start, end = (match.start() + at for at in word.span())
            wanted |= {
                n for n, (a, b) in enumerate(tokens.spans) if a < end and b > start and b > a
            }
    return sorted(n - first for n in wanted if n >= first)
