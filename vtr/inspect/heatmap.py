"""Maps of where a generated picture or video attends to the words of its prompt."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vtr.compat.around import unwrapped
from vtr.diffusion.targets import locate
from vtr.diffusion.watch import TextCall, TextWatch
from vtr.diffusion.words import TOKENIZERS, Recorder, cut_of, front_of, pattern, places, recorded
from vtr.errors import UnsupportedModelError
from vtr.inspect import heatmap_drawing as drawing
from vtr.kernels.rows import attention_rows

if TYPE_CHECKING:
    from PIL import Image

Words = str | Sequence[str] | Mapping[str, Sequence[int]]

_WORDS = """a an and are as at be by for from has have her his in into is it its my of on or our that the
their there these this those to was were which while with your"""
#: Words without a place in a picture, in lower case.
STOP_WORDS = frozenset(_WORDS.split())
# A text token is a global sink of a layer if nearly all queries give it so many times the attention that they
# give the median token of the prompt.
SINK_FACTOR, SINK_SHARE = 10.0, 0.9
SCORES = 2**25  # scores of one chunk of query rows: 128 MiB


@dataclass(frozen=True, eq=False)
class Heatmap:
    """Maps of words over the result of a pipeline, on the CPU.

    Attributes:
        images: ``images`` or ``frames`` of what the pipeline returned.
        maps: word to (frames, height, width) float32 in [0, 1], in tokens of the transformer: the attention
            scaled from its least to its greatest value over all frames; zero if it is the same everywhere.
        attention: word to the same shape: the share of attention that a token gives to the word, summed over
            the word's tokens, averaged over heads, layers and steps.
        sinks: word to the share of layers and steps in which a token of it was filtered out as a global sink.
        frames: the pictures of the sample that was watched; None for latents.
        video: they are the frames of a video.
    """

    images: Any
    maps: dict[str, Tensor]
    attention: dict[str, Tensor]
    sinks: dict[str, float]
    frames: list[Image.Image] | None
    video: bool

    def __repr__(self) -> str:
        shape = " x ".join(map(str, next(iter(self.maps.values())).shape))
        return f"Heatmap({', '.join(map(repr, self.maps))}; {shape} tokens)"

    def draw(self, words: str | Sequence[str] | None = None, *, strength: float = 0.75) -> Any:
        """Draw the maps over the result, a panel for each word.

        Args:
            words: those to draw, of :attr:`maps`; None is all of them.
            strength: opacity of the colour at the maximum of a map, in (0, 1].

        Returns:
            A PIL image, or for a video a list of them, one for each frame of the result (for each frame of
            tokens if the result is latents, which are drawn as grey).

        Raises:
            ValueError: a word has no map, or ``strength`` is out of range.
        """
        if not 0 < strength <= 1:
            raise ValueError(f"strength must be in (0, 1], got {strength}")
        chosen = [words] if isinstance(words, str) else list(self.maps if words is None else words)
        for word in chosen:
            if word not in self.maps:
                raise ValueError(f"no map of {word!r}; there are {', '.join(map(repr, self.maps))}")
        if not chosen:
            raise ValueError("name at least one word to draw")
        maps = {word: self.maps[word] for word in chosen}
        drawn = drawing.overlays(maps, self.frames, strength)
        return drawn if self.video else drawn[0]

    def save(
        self, path: str | Path, words: str | Sequence[str] | None = None, *, fps: float = 8
    ) -> None:
        """Write what :meth:`draw` returns to a file of Pillow's.

        A video becomes an animation as ``.gif``, ``.webp`` or ``.apng``, and in other formats a sheet: a line
        for each word, with at most eight frames of at most 128 pixels of height.

        Raises:
            ValueError: Pillow does not write such files, or as :meth:`draw`.
        """
        target, drawn = drawing.checked(Path(path)), self.draw(words)
        if not self.video:
            drawn.save(target)
        elif target.suffix.lower() in drawing.ANIMATIONS:
            drawing.animate(target, drawn, fps)
        else:
            chosen = (
                [words] if isinstance(words, str) else list(self.maps if words is None else words)
            )
            drawing.sheet([self.draw(word) for word in chosen]).save(target)


def heatmap(
    pipe: Any,
    prompt: str | Sequence[str] | None = None,
    words: Words | None = None,
    *,
    steps: Iterable[int] | None = None,
    layers: Iterable[int] | None = None,
    stop_words: Iterable[str] | None = None,
    filter_sinks: bool = True,
    sample: int = 0,
    **options: Any,
) -> Heatmap:
    """Run a pipeline once, and map where its tokens attend to the words of the prompt.

    The pipeline computes exactly what it computes without this (bit by bit); the attention of the chosen steps
    and layers is computed once more, in float32, for a few query rows at a time, and only its columns of
    the text are kept: no map of all tokens and all tokens is built.

    This is the map of RefAM (Kukleva et al., arXiv 2509.22650): attention to text tokens, without stop
    words, which attract attention that belongs nowhere, and without global attention sinks. What the paper's
    abstract leaves open is our reading: maps are means over heads, layers and steps; a text token is a
    global sink of a layer and step if at least 9 in 10 queries give it more than ten times the attention
    that they give the median token of the prompt, and it is left out there. RefAM also appends stop words
    and colours to the prompt to collect the background; that changes the result, so it is up to the caller
    (``prompt + ". with on the pink"``).

    Args:
        pipe: a pipeline of diffusers whose transformer :func:`vtr.apply` takes, with text in joint
            or cross attention, and without a method.
        prompt: one, or a list of them; None if ``options`` has ``prompt_embeds``.
        words: words or phrases of the prompt, in any case; every occurrence counts, and every token of it.
            None is every word of the prompt that is no stop word and has a token. A mapping from labels to
            0-based places of tokens in the text that attention sees needs no tokenizer.
        steps: 0-based denoising steps to watch, negative ones from the end; None is all.
        layers: 0-based layers to watch among those that see text, likewise.
        stop_words: words whose tokens are left out inside of phrases and are not mapped; None is
            :data:`STOP_WORDS`, ``()`` filters nothing.
        filter_sinks: leave out global sinks.
        sample: 0-based number of the image or video to watch if the run makes several (prompts, and images
            per prompt, which are beside each other). Its words are those of its prompt.
        options: of the pipeline's call.

    Returns:
        :class:`Heatmap`. With guidance, it is the attention of the conditional part.

    Raises:
        ValueError: a word is not in the prompt, has no token, is a stop word, or is behind the end of what
            the encoder reads; steps, layers, ``sample`` or places are out of range.
        UnsupportedModelError: the pipeline is not supported, has no text, or has a method.
    """
    root = _root(pipe)
    prompts, each = _samples(prompt, options)
    if not 0 <= sample < len(prompts) * each:
        raise ValueError(f"sample must be in 0..{len(prompts) * each - 1}, got {sample}")
    text = prompts[sample // each]
    stop = STOP_WORDS if stop_words is None else frozenset(w.lower() for w in stop_words)
    asked = _asked(text, words, stop, second="prompt_2" in options or "prompt_3" in options)
    total = _Sums(
        asked,
        steps=_numbers("steps", steps),
        layers=_numbers("layers", layers),
        filtered=filter_sinks,
    )
    watch = TextWatch(root, len(prompts) * each, sample, total.add)
    total.check_layers(watch.layers)
    family = watch.family.name
    cut = 0 if isinstance(asked, dict) else cut_of(pipe, options)
    given = {} if prompt is None else {"prompt": prompt}
    with recorded(pipe, family, len(prompts)) as tokenizers, watch.running():
        if not isinstance(asked, dict):
            find = _Finder(family, tokenizers, sample // each, text, stop, cut, words is None)
            total.find = find
        out = pipe(**given, **options)
    total.check_seen()
    images = getattr(out, "images", None)
    if images is None:
        images = getattr(out, "frames", None)
    if images is None:
        images = out[0]
    latents = options.get("output_type") == "latent"
    frames = None if latents else drawing.pictures(images, sample, watch.family.video)
    attention, maps = total.attention(), {}
    for word, share in attention.items():
        low, high = share.min(), share.max()
        maps[word] = (share - low) / (high - low) if high > low else torch.zeros_like(share)
    return Heatmap(images, maps, attention, total.sinks(), frames, watch.family.video)


def _root(pipe: Any) -> Any:
    from diffusers import DiffusionPipeline

    if not isinstance(pipe, DiffusionPipeline):
        raise UnsupportedModelError(
            f"heatmap runs a pipeline of diffusers (FluxPipeline, WanPipeline...), got a {type(pipe).__name__}"
        )
    root = locate(unwrapped(pipe))
    assert root is not None  # of a pipeline there is one, or an error
    return root


def _samples(prompt: Any, options: dict[str, Any]) -> tuple[list[str | None], int]:
    """The prompts of a run, None for embeddings, and how many images or videos there are of each."""
    found: list[str | None] = [prompt] if isinstance(prompt, str) else list(prompt or [])
    if not found:
        embeds = options.get("prompt_embeds")
        if embeds is None:
            raise ValueError("give a prompt, or prompt_embeds and words as {label: places}")
        found = [None] * len(embeds)
    names = ("num_images_per_prompt", "num_videos_per_prompt")
    return found, next((int(options[n]) for n in names if options.get(n)), 1)


def _numbers(name: str, values: Iterable[int] | None) -> frozenset[int] | None:
    if values is None:
        return None
    found = frozenset(values)
    if not found or not all(isinstance(n, int) for n in found):
        raise ValueError(
            f"{name} must be 0-based numbers, at least one, or None for all; got {values!r}"
        )
    return found


def _asked(
    prompt: str | None, words: Words | None, stop: frozenset[str], second: bool
) -> list[str] | dict[str, list[int]]:
    """The phrases to find, or the places that were given."""
    if isinstance(words, Mapping):
        found = {label: sorted({int(n) for n in at}) for label, at in words.items()}
        if not found or not all(found.values()) or any(at[0] < 0 for at in found.values()):
            raise ValueError(
                f"words must map labels to 0-based places of tokens, got {dict(words)}"
            )
        return found
    if prompt is None:
        raise ValueError(
            "without a prompt the tokens of words are not known: give their places, {'cat': (4, 5)}"
        )
    if words is None:
        return list(dict.fromkeys(w for w in _bare(prompt) if w.lower() not in stop))
    asked = [words] if isinstance(words, str) else list(dict.fromkeys(words))
    if not asked:
        raise ValueError("words must be at least one word of the prompt, or None for all")
    for phrase in asked:
        # A second prompt is what the second encoder reads: its words are looked for in what it was given.
        if not pattern(phrase).search(prompt) and not second:
            raise ValueError(f"{phrase!r} is not in the prompt {prompt!r}")
        if all(w.lower() in stop for w in _bare(phrase)):
            raise ValueError(
                f"{phrase!r} is a stop word, which is filtered out: give stop_words=() to map it"
            )
    return asked


def _bare(text: str) -> list[str]:
    bare = (word.strip(".,;:!?\"'()[]") for word in text.split())
    return [word for word in bare if any(c.isalnum() for c in word)]


@dataclass
class _Finder:
    """Finds the tokens of phrases once the pipeline has called its tokenizers."""

    family: str
    tokenizers: list[Recorder]
    prompt: int
    text: str | None
    stop: frozenset[str]
    cut: int
    every: bool  # words without a token are left out

    def __call__(self, phrases: list[str], length: int) -> tuple[dict[str, list[int]], list[int]]:
        """The places of each phrase in a text of ``length``, and those of all tokens of the prompt."""
        read = [tokens for r in self.tokenizers if (tokens := r.tokens(self.prompt)) is not None]
        if not read:
            known = ", ".join(TOKENIZERS)
            why = (
                "its pipeline did not call its tokenizer"
                if self.family in TOKENIZERS
                else f"they are known for {known}"
            )
            raise ValueError(
                f"the places of words in the text of {self.family} are not known ({why}): give them, "
                "{'cat': (4, 5)}, 0-based in the text that attention sees"
            )
        found: dict[str, list[int]] = {phrase: [] for phrase in phrases}
        own: list[int] = []
        offset = 0
        for number, tokens in enumerate(read):
            cut = 0 if number else self.cut
            for phrase, at in found.items():
                seen = places(tokens, self.text or "", phrase, self.stop, cut)
                at += [offset + n for n in seen if offset + n < length]
            first = front_of(tokens) + cut
            own += [offset + n - first for n, v in enumerate(tokens.valid) if v and n >= first]
            offset += tokens.length - cut
        for phrase, at in list(found.items()):
            if at:
                continue
            if not self.every:
                raise ValueError(
                    f"{phrase!r} has no token in what the text encoder reads, {read[0].text!r}: it is not "
                    "in there, or behind its last token (max_sequence_length)"
                )
            del found[phrase]
        if not found:
            raise ValueError(f"no word of {self.text!r} has a token besides stop words")
        return found, [n for n in own if n < length]


@dataclass
class _Sums:
    """The sums of attention over the calls of a run."""

    asked: list[str] | dict[str, list[int]]
    steps: frozenset[int] | None
    layers: frozenset[int] | None
    filtered: bool
    find: Any = None
    found: dict[str, list[int]] | None = None
    own: Tensor | None = None
    kept: dict[str, Tensor] = field(default_factory=dict)  # without sinks, and with them
    whole: dict[str, Tensor] = field(default_factory=dict)
    used: dict[str, int] = field(default_factory=dict)  # calls that count
    dropped: dict[str, int] = field(default_factory=dict)  # calls in which a token was a sink
    calls: int = 0
    grid: tuple[int, int, int] = (0, 0, 0)
    steps_seen: int = 0
    count: int = 0

    def check_layers(self, count: int) -> None:
        self.count = count
        for layer in self.layers or ():
            if not -count <= layer < count:
                raise ValueError(f"layers must be in 0..{count - 1}, got {layer}")

    def check_seen(self) -> None:
        if not self.calls:
            raise ValueError(
                f"the run had no attention to text in steps {sorted(self.steps or ())} of {self.steps_seen}"
                if self.steps is not None
                else "the run had no attention to text: a cache, or a pipeline of another kind, skipped it"
            )

    def _wanted(self, call: TextCall) -> bool:
        self.steps_seen = max(self.steps_seen, call.step + 1)
        step = {call.step} if call.steps is None else {call.step, call.step - call.steps}
        layer = {call.layer, call.layer - self.count}
        return (self.steps is None or bool(step & self.steps)) and (
            self.layers is None or bool(layer & self.layers)
        )

    def _places(self, call: TextCall) -> dict[str, list[int]]:
        if self.found is None:
            length = call.text.stop - call.text.start
            if isinstance(self.asked, dict):
                self.found = self.asked
            else:
                self.found, own = self.find(self.asked, length)
                self.own = torch.tensor(own)
            for word, at in self.found.items():
                if at[-1] >= length:
                    raise ValueError(
                        f"the text has {length} tokens, {word!r} is said to be at {at}"
                    )
        return self.found

    def add(self, call: TextCall) -> None:
        """Add one call."""
        found = self._places(call)
        if not self._wanted(call):
            return
        if self.calls and call.grid != self.grid:
            raise RuntimeError(f"the grid changed from {self.grid} to {call.grid} within the run")
        self.grid = call.grid
        columns = sorted({n for at in found.values() for n in at})
        rows, sinks = text_attention(call, columns, self.own if self.filtered else None)
        self.calls += 1
        for word, at in found.items():
            here = [columns.index(n) for n in at]
            good = [n for n in here if not (self.filtered and sinks[n])]
            self.whole[word] = self.whole.get(word, 0) + rows[:, here].sum(1)
            self.dropped[word] = self.dropped.get(word, 0) + (len(good) < len(here))
            if good:
                self.kept[word] = self.kept.get(word, 0) + rows[:, good].sum(1)
                self.used[word] = self.used.get(word, 0) + 1

    def attention(self) -> dict[str, Tensor]:
        """The mean over the calls, (frames, height, width), for each word."""
        assert self.found is not None
        means = {}
        for word in self.found:
            if word not in self.kept:
                warnings.warn(
                    f"{word!r} is a global sink in every layer and step: its map is not filtered",
                    stacklevel=3,
                )
            total, number = self.kept.get(word, self.whole[word]), self.used.get(word, self.calls)
            means[word] = (total / number).cpu().view(self.grid)
        return means

    def sinks(self) -> dict[str, float]:
        return {word: self.dropped[word] / self.calls for word in self.found or ()}


def text_attention(
    call: TextCall, columns: Sequence[int], own: Tensor | None
) -> tuple[Tensor, list[bool]]:
    """Compute the attention of a call to some of its text tokens, chunk by chunk of its queries.

    Args:
        call: with q (1, H, N, D) and S keys.
        columns: 0-based places of the tokens in the text.
        own: (n,) int64, the places that the median is taken over; None is all that any query sees.

    Returns:
        (N, len(columns)) float32, mean over the heads, softmax over all S keys; and for each column whether
        it is a global sink.
    """
    heads, number, keys = call.q.shape[1], call.q.shape[2], call.k.shape[2]
    size = max(1, SCORES // (heads * keys))
    at = torch.tensor(columns, device=call.q.device)
    parts, above = [], torch.zeros(len(columns), device=call.q.device)
    for start in range(0, number, size):
        chunk = slice(start, start + size)
        mask = call.mask
        if mask is not None and mask.shape[-2] > 1:
            mask = mask[..., chunk, :]
        rows = attention_rows(call.q[:, :, chunk], call.k, bias=mask, scale=call.scale)
        text = rows[0, :, :, call.text].mean(0)
        wanted = text[:, at]
        others = text[:, text.any(0)] if own is None else text[:, own.to(text.device)]
        above += (wanted > SINK_FACTOR * others.median(1, keepdim=True).values).sum(0)
        parts.append(wanted)
    return torch.cat(parts), (above >= SINK_SHARE * number).tolist()


__all__ = ["STOP_WORDS", "Heatmap", "heatmap"]
