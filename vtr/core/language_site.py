"""The view of a method on a vision-language model: its images and videos, its text, its cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vtr.core.budget import Keep, counts
from vtr.core.site import QKV, Site
from vtr.core.tokens import take


class View(NamedTuple):
    """A part of an image's tokens that is a grid, or several grids of the same size (tiles).

    The token at (row, column) is the ``start + row * stride + column``-th of the image's tokens; of
    tile t there come ``t * rows * stride`` before it.

    Attributes:
        name: for titles.
        grid: (rows, columns) of it, or of each tile.
        start, stride: place of its tokens.
        tiles: number of tiles.
        raster: whether they show the whole image together, row by row of tiles. How many make a row is
            decided by processors from the image's size, and models are not told.
    """

    name: str
    grid: tuple[int, int]
    start: int
    stride: int
    tiles: int = 1
    raster: bool = True


class VisualSpan(NamedTuple):
    """One image or video of a prompt.

    Attributes:
        start, length: its span among the sample's visual tokens at the entry of the language model.
        kind: ``"image"`` or ``"video"``.
        frames: number of its frames; 1 for an image. Several frames that the model joins to one set of
            tokens count as one (Qwen's temporal patches of two). 0 if the structure is not known.
        grid: (rows, columns) of each frame, None if it is no plain grid (packed crops).
        times: seconds of each frame in the video, if the model gets them; else None.
        views: for an image without a grid, parts of it that have one (its base crop, its joined crops,
            tiles, a thumbnail).
    """

    start: int
    length: int
    kind: str
    frames: int
    grid: tuple[int, int] | None
    times: tuple[float, ...] | None = None
    views: tuple[View, ...] = ()


class Frames(NamedTuple):
    """Place and time of the visual tokens of a prompt, as :class:`LanguageSite` explains.

    Attributes:
        frame, place, video: (B, N) int64 over the visual tokens at the entry of the language model.
        videos: per sample, its images and videos.
    """

    frame: Tensor
    place: Tensor
    video: Tensor
    videos: list[list[VisualSpan]]


class LanguageSite(Site):
    """A place of a vision-language model: ``prompt`` (entry of the language model) or ``decoder``.

    Everything that :class:`Site` says of visual tokens holds: ``hidden`` (B, N, C) are the visual
    tokens of each sample in the order of the prompt, padded at the end to the largest N, with
    ``valid`` where counts differ; ``map`` starts at the visual tokens of the prompt. ``qkv`` at a
    decoder site are those of the visual tokens (B, H, N, D), rotated, key heads repeated to H.

    Attributes:
        text: (B, T, C) hidden states of the text tokens here, padded at the end.
        text_valid: (B, T) bool, False for padding.
        text_after: (B, T) bool, text tokens that come after the sample's first visual token.
        images: per sample the images of the prompt, in order, as (start, length, grid): the span of
            the image among the sample's visual tokens at the entry of the language model, and its
            (rows, columns) or (frames, rows, columns) there, None if it is no plain grid.

    Where and when a token is (:attr:`frame`, :attr:`place`, :attr:`video`, :attr:`videos`) holds for
    the tokens here, also after earlier cuts; a merged token is where its representative is.
    """

    def __init__(
        self,
        *,
        text: Tensor,
        text_valid: Tensor,
        text_after: Tensor,
        images: list[list[tuple[int, int, tuple[int, ...] | None]]],
        entry: Tensor | None,
        frames: Callable[[], Frames],
        spread: Callable[[Tensor, float | None], Tensor],
        rows: Any,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.text = text
        self.text_valid = text_valid
        self.text_after = text_after
        self.images = images
        self._entry = entry
        self._frames = frames
        self._spread = spread
        self._rows = rows

    @property
    def entry(self) -> Tensor:
        """(B,) int64: the visual tokens of each sample at the entry of the language model."""
        if self._entry is None:
            raise RuntimeError(f"site {self.site}[{self.layer}] knows no prompt in a decoding step")
        return self._entry

    def budget(self, keep: Keep | tuple[Keep, ...], stage: int = 0, stages: int = 1) -> Tensor:
        """Count the tokens that a budget leaves at stage number ``stage`` of ``stages``, (B,) int64.

        An int is a number per image: the images of a sample share the sum of their budgets.

        Args:
            keep: one budget per stage, all of the tokens at the language model's entry, or one for the last
                stage, reached by one ratio per stage.
        """
        entry = self.entry
        last = self.entry_budget(keep[stage] if isinstance(keep, tuple) else keep)
        if isinstance(keep, tuple) or stages == 1:
            return torch.minimum(last, self.counts)
        before = entry.double().clamp(min=1)
        inner = torch.ceil(before * (last / before) ** ((stage + 1) / stages) - 1e-9).long()
        return torch.minimum(torch.maximum(inner, last), self.counts)

    def entry_budget(self, keep: Keep) -> Tensor:
        """Count what one budget leaves of the tokens at the language model's entry, (B,) int64."""
        if isinstance(keep, float):
            return counts(keep, self.entry)
        sums = [sum(min(keep, length) for _, length, _ in images) for images in self.images]
        return torch.tensor(sums, device=self.device)

    def stored(self, name: str) -> Tensor:
        """Read what the method stored under ``name`` in ``memory`` in the encoder, for this prompt.

        Raises:
            RuntimeError: the vision tower did not run under the method.
        """
        if name not in self.memory:
            raise RuntimeError(
                "the vision tower did not run for this prompt while the method was applied: give the model "
                "pixels, not image features made before, or use a method that looks at the prompt"
            )
        found: Tensor = self.memory[name]
        return found

    @property
    def frame(self) -> Tensor:
        """(B, N) int64: the frame that each token belongs to, counted through the prompt in order.

        A still image is one frame. -1 for padding and for separators (newline tokens).
        """
        return self._here(self._frames().frame)

    @property
    def place(self) -> Tensor:
        """(B, N) int64: row * columns + column of each token in its frame's grid.

        -1 for padding, for separators, and where the frame is no plain grid (packed crops, tiles).
        """
        return self._here(self._frames().place)

    @property
    def video(self) -> Tensor:
        """(B, N) int64: the image or video of each token, an index into ``videos[b]``; -1 for padding.

        Separators belong to the image or video that they close.
        """
        return self._here(self._frames().video)

    @property
    def videos(self) -> list[list[VisualSpan]]:
        """Per sample the images and videos of the prompt, in order, as they were before any cut."""
        return self._frames().videos

    def _here(self, values: Tensor) -> Tensor:
        out = values.gather(1, self.index.clamp(min=0))
        return out if self.valid is None else out.masked_fill(~self.valid, -1)

    def spread(self, scores: Tensor, newline: float | None = None) -> Tensor:
        """Scores of the encoder's tokens at the visual tokens here.

        The scores are treated like the features: crops are joined, padding is cut off, a
        visual token built from several patches gets their mean.

        Args:
            scores: (crops, patches), without prefix tokens, in the order of the encoder's batch; or
                features (crops, patches, D), for which ``newline`` is given.
            newline: score of separator tokens, which have no patch. None is the lowest
                score of the sample, so that they are dropped first and a budget counts image content;
                ``inf`` keeps them always.

        Returns:
            (B, N) float32, or (B, N, D); padding is -inf.
        """
        if scores.dim() == 3 and newline is None:
            raise ValueError("spread needs newline= for features: what separator tokens get")
        out = take(self._spread(scores, newline), self.index.clamp(min=0))
        if self.valid is None:
            return out
        gone = ~self.valid if out.dim() == 2 else ~self.valid[..., None]
        return out.masked_fill(gone, -float("inf"))

    def attention_received(self, chunk: int | None = None) -> Tensor:
        """Mean attention that each visual token receives in this layer, (B, N) float32.

        Over heads, and over all tokens of the prompt as queries, text too; those before a token pay it
        none. Softmax over all keys that a query sees. Exact; ``chunk`` query rows at a time (64).
        """
        if self._rows is None:
            raise RuntimeError(f"site {self.site}[{self.layer}] shows no attention")
        return self._rows.received(chunk or 64)

    @property
    def last_text(self) -> Tensor:
        """(B, 1) int64: each sample's last text token, as an index into :attr:`text`."""
        return self.text_valid.sum(1, keepdim=True) - 1

    def attention_rows_from_text(self, rows: Tensor | None = None) -> Tensor:
        """Attention that text tokens pay to the visual tokens in this layer.

        Softmax over all keys that the row sees (text included), float32; computed from q and k of
        these rows only, under any attention backend and with grouped-query attention.

        Args:
            rows: (B, R) int64 indices into :attr:`text`, -1 for no row (which gives zeros); None is
                the last text token.

        Returns:
            (B, H, R, N); padding gets zeros.
        """
        return self._text_rows(rows)[1]

    def rotary_ones(self, rows: Tensor | None = None) -> Tensor:
        """The attention logit of text tokens to the visual tokens if all q and k were ones.

        It depends on their distance alone: the product over sqrt(D) of two vectors of ones that the
        layer's rotary embedding has turned to their positions. ``rows`` as above.

        Returns:
            (B, R, N) float32; padding gets ones.
        """
        if self._rows is None:
            raise RuntimeError(f"site {self.site}[{self.layer}] shows no attention of the text")
        made: Tensor = self._rows.ones(self.last_text if rows is None else rows)
        return made

    def text_qkv(self, rows: Tensor | None = None) -> QKV:
        """q, k, v (B, H, R, D) of text tokens in this layer; ``rows`` as above."""
        return self._text_rows(rows)[0]

    def _text_rows(self, rows: Tensor | None) -> tuple[QKV, Tensor]:
        if self._rows is None:
            raise RuntimeError(f"site {self.site}[{self.layer}] shows no attention of the text")
        return self._rows(self.last_text if rows is None else rows)
