"""From the tower's tokens to the visual tokens of the prompt: what each image became."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vtr.signals import Frames
from vtr.vision.vlm.frames import KINDS, Piece, frames_of

if TYPE_CHECKING:
    from vtr.vision.vlm.call import Call

Grid = tuple[int, ...] | None
Spreader = Callable[[Tensor], list[Tensor]]


class Capture:
    """One call of ``get_image_features`` or ``get_video_features``.

    Attributes:
        memory: per applied method, what it stored in the encoder.
        kind: ``"image"`` or ``"video"``.
        lengths: visual tokens of each image, tile or video.
        tiled: whether they are tiles; those that follow one another in the prompt are one image.
        pieces: what they are made of, one for each of ``lengths``.
        stays: (visual tokens of all pieces,) bool, those that the model puts into the prompt, or
            None (all).
        spread: scores (crops, patches) or features (crops, patches, D) -> per image a (length,) or
            (length, D) float32 tensor, NaN for separators; or None where the tower's tokens cannot be
            followed.
        alive: (crops, patches) bool, the tower's tokens that were left, or None (all).
        separators: whether separators stay where the tower was cut.
        cutters: names of the methods that cut in the tower.
        crops: size of the tower's batch.
        first: (C,) the first visual token, by which its features are known again.
        patches: patches of each crop where crops differ in size, else empty.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.memory: dict[int, dict[str, Any]] = {}
        self.lengths: list[int] = []
        self.pieces: list[Piece] = []
        self.stays: Tensor | None = None
        self.tiled = False
        self.spread: Spreader | None = None
        self.alive: Tensor | None = None
        self.separators = False
        self.cutters: tuple[str, ...] = ()
        self.crops = 0
        self.first: Tensor | None = None
        self.patches: list[int] = []


class Captures:
    """What the towers did for the coming call of the language model, per modality."""

    def __init__(self) -> None:
        self.of: dict[str, Capture] = {}

    def made(self, outputs: dict[str, Any]) -> bool:
        """Whether these are the features that were captured (generate makes them before the forward)."""
        for modality, capture in self.of.items():
            found = first_token(outputs.get(modality))
            if found is None or capture.first is None or not torch.equal(found, capture.first):
                return False
        return True

    def memory(self, key: int) -> dict[str, Any]:
        """A copy of what a method stored in the encoder: without a cache, one run of the tower serves
        many calls of the language model."""
        out: dict[str, Any] = {}
        for capture in self.of.values():
            out.update(capture.memory.get(key, {}))
        return out

    def only(self, what: str) -> Capture:
        if len(self.of) != 1:
            found = " and ".join(self.of) or "none"
            raise RuntimeError(
                f"{what} needs exactly one run of the vision tower before the language model, found "
                f"{found}: prompts with both images and videos need a method that looks at the prompt"
            )
        return next(iter(self.of.values()))

    def rows(self, call: Call, kind: str) -> list[tuple[int, int]]:
        """(start, stop) of each sample's tokens in the flat sequence of all tokens of a modality.

        Beam search and several returned sequences repeat samples after the tower has run.
        """
        counts = (call.kinds == KINDS[kind]).sum(1).tolist()
        total = sum(piece.length for piece in self.pieces(kind))
        times, rest = divmod(sum(counts), total) if total else (0, 1)
        if rest or any(len(set(counts[i : i + times])) > 1 for i in range(0, len(counts), times)):
            raise RuntimeError(
                f"the prompt has {sum(counts)} visual tokens, the vision tower made {total}: give the "
                "language model all of an image's tokens in one call (no chunked prefill)"
            )
        out, start = [], 0
        for i in range(0, len(counts), times):
            out += [(start, start + counts[i])] * times
            start += counts[i]
        return out

    def pieces(self, kind: str) -> list[Piece]:
        """The images or videos of all samples, with the tokens that are in the prompt."""
        capture = self.of[kind]
        if capture.stays is None:
            return capture.pieces
        parts = capture.stays.cpu().split(capture.lengths)
        return [
            piece._replace(frame=piece.frame[stays], place=piece.place[stays])
            for piece, stays in zip(capture.pieces, parts, strict=True)
        ]

    def spreader(self, call: Call) -> Callable[[Tensor, float | None], Tensor]:
        return Spread(self, call)

    def frames(self, call: Call, joined: bool) -> Frames:
        """Where and when the visual tokens are; unknown where the tower did not run."""
        per_sample: dict[str, list[list[Piece]]] = {}
        for kind in self.of:
            found = per_sample[kind] = []
            for start, stop in self.rows(call, kind):
                at, mine = 0, []
                for piece in self.pieces(kind):
                    if start <= at < stop:
                        mine.append(piece)
                    at += piece.length
                found.append(mine)
        tiled = any(capture.tiled for capture in self.of.values())
        return frames_of(call, per_sample, tiled, joined)


def first_token(output: Any) -> Tensor | None:
    """The first visual token (C,) of what a ``get_image_features`` returned."""
    found = getattr(output, "pooler_output", None)
    if found is None or len(found) == 0:
        return None
    token = found[0]
    while token.dim() > 1:
        token = token[0]
    return token.detach()


class Spread:
    """Scores of the encoder at the visual tokens of the prompt: (crops, patches) -> (B, N)."""

    def __init__(self, captures: Captures, call: Call) -> None:
        self.captures, self.call = captures, call

    def __call__(self, scores: Tensor, newline: float | None) -> Tensor:
        capture = self.captures.only("spread")
        if capture.spread is None:
            raise RuntimeError("this family's visual tokens cannot be traced to the tower's")
        flat = torch.cat(capture.spread(scores.detach().float())).to(self.call.live.device)
        if flat.shape[0] != sum(capture.lengths):
            raise RuntimeError(
                f"scores of shape {tuple(scores.shape)} became {flat.shape[0]} values for "
                f"{sum(capture.lengths)} visual tokens: give one per patch of every crop"
            )
        if capture.stays is not None:
            flat = flat[capture.stays.to(flat.device)]
        width = self.call.map.n_in
        rows = []
        for start, stop in self.captures.rows(self.call, capture.kind):
            row = flat[start:stop]
            gone = row.isnan()
            if newline is None:
                lowest = row[~gone].amin() if bool((~gone).any()) else row.new_zeros(())
                row = torch.where(gone, lowest, row)
            else:
                row = row.masked_fill(gone, newline)
            fill = row.new_full((width - row.shape[0], *row.shape[1:]), -float("inf"))
            rows.append(torch.cat([row, fill]))
        return torch.stack(rows)
