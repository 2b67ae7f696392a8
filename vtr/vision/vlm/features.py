"""From the tower's tokens to the visual tokens of the prompt: what each image became."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vtr.core.language_site import Frames
from vtr.core.trace import Trace
from vtr.vision.vlm.frames import KINDS, Piece, frames_of, still, unknown
from vtr.vision.vlm.pictures import Coarse

if TYPE_CHECKING:
    from vtr.vision.vlm.call import LanguageCall

Grid = tuple[int, ...] | None
Spreader = Callable[[Tensor], list[Tensor]]


class Capture:
    """One call of ``get_image_features`` or ``get_video_features``.

    Attributes:
        memory: per applied method, what it stored in the encoder.
        kind: ``"image"`` or ``"video"``.
        lengths: visual tokens of each image, tile or video.
        tiled: whether they are tiles; those that follow one another in the prompt are one image.
        scattered: whether tiles have text between them; all of a sample are one image.
        runs: whether the tokens of all images lie end to end; each run of placeholders is an image.
        pieces: what they are made of, one for each of ``lengths``.
        stays: (visual tokens of all pieces,) bool, those that the model puts into the prompt, or
            None (all).
        spread: scores (crops, patches) or features (crops, patches, D) -> per image a (length,) or
            (length, D) float32 tensor, NaN for separators; or None if the tower's tokens cannot be
            followed.
        left: (crops, patches) bool, the tower's tokens that were left, or None (all).
        separators: whether separators stay if the tower was cut.
        cutters: names of the methods that cut in the tower.
        crops: size of the tower's batch.
        numbers: () -> how many crops each image, or frames each video, has in the tower's batch.
        first: (C,) the first visual token, by which its features are known again.
        patches: patches of each crop if crops differ in size, else empty.
        coarse: which tokens repeat others, because the tower was given smaller pictures, or None.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.memory: dict[int, dict[str, Any]] = {}
        self.lengths: list[int] = []
        self.pieces: list[Piece] = []
        self.stays: Tensor | None = None
        self.tiled = False
        self.scattered = False
        self.runs = False
        self.spread: Spreader | None = None
        self.left: Tensor | None = None
        self.separators = False
        self.cutters: tuple[str, ...] = ()
        self.crops = 0
        self.numbers: Callable[[], list[int]] = lambda: [1] * self.crops
        self.first: Tensor | None = None
        self.patches: list[int] = []
        self.coarse: Coarse | None = None


class Captures:
    """Record of the towers for the coming call of the language model, per modality."""

    def __init__(self) -> None:
        self.of: dict[str, Capture] = {}
        self.trace = Trace()  # of the towers

    def made(self, outputs: dict[str, Any]) -> bool:
        """Tell whether these are the features that were captured (generate computes them before the forward)."""
        for modality, capture in self.of.items():
            found, known = first_token(outputs.get(modality)), capture.first
            # The features may have gone to another GPU on their way.
            if found is None or known is None or not torch.equal(found, known.to(found.device)):
                return False
        return True

    def memory(self, key: int) -> dict[str, Any]:
        """A copy of what a method stored in the encoder: without a cache, one run of the tower serves
        many calls of the language model. Of two runs (images, then videos), the crops of both."""
        found = [capture.memory[key] for capture in self.of.values() if key in capture.memory]
        if len(found) < 2:
            return dict(found[0]) if found else {}
        captures = list(self.of.values())
        names = dict.fromkeys(name for memory in found for name in memory)
        return {name: join([m.get(name) for m in found], captures, name) for name in names}

    def rows(self, call: LanguageCall, kind: str) -> list[tuple[int, int]]:
        """(start, stop) of each sample's tokens in the flat sequence of all tokens of a modality.

        Beam search and several returned sequences repeat samples after the tower has run.
        """
        counts = call.counts(kind)
        total = sum(piece.length for piece in self.pieces(kind))
        times, rest = divmod(sum(counts), total) if total else (0, 1)
        if rest or any(len(set(counts[i : i + times])) > 1 for i in range(0, len(counts), times)):
            raise RuntimeError(
                f"the prompt has {sum(counts)} visual tokens, the vision tower made {total}: give the "
                "language model all of an image's tokens in one call (no chunked prefill), and hide "
                "none of them by attention_mask"
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

    def by_runs(self, call: LanguageCall) -> None:
        """Take each run of placeholders for an image, if the model does not tell one from the next."""
        for kind, capture in self.of.items():
            if not capture.runs:
                continue
            here = (call.kinds == KINDS[kind]).cpu()
            times = max(1, int(here.sum()) // sum(capture.lengths))
            lengths = []
            for row in here[::times].tolist():
                text = "".join("x" if visual else " " for visual in row)
                lengths += [len(run) for run in text.split()]
            capture.lengths = lengths
            capture.pieces = [unknown(kind, n) if kind == "video" else still(n) for n in lengths]
            capture.runs = False

    def spreader(self, call: LanguageCall) -> Spread:
        return Spread(self, call)

    def frames(self, call: LanguageCall, joined: bool) -> Frames:
        """Frames and places of the visual tokens; unknown if the tower did not run."""
        per_sample: dict[str, list[list[Piece]]] = {}
        for kind in self.of:
            found = per_sample[kind] = []
            pieces = self.pieces(kind)
            for start, stop in self.rows(call, kind):
                at, mine = 0, []
                for piece in pieces:
                    if start <= at < stop:
                        mine.append(piece)
                    at += piece.length
                found.append(mine)
        tiled = any(capture.tiled for capture in self.of.values())
        scattered = any(capture.scattered for capture in self.of.values())
        return frames_of(call, per_sample, tiled, scattered, joined)


def visual_features(output: Any) -> Any:
    """The visual tokens that a ``get_image_features`` returned, of each picture; those in front of the projector if
    the model applies it itself; None if it returned none."""
    found = getattr(output, "pooler_output", None)
    return getattr(output, "last_hidden_state", None) if found is None else found


def first_token(output: Any) -> Tensor | None:
    """The first visual token (C,) of what a ``get_image_features`` returned."""
    found = getattr(output, "pooler_output", None)
    for token in () if found is None else found:
        if token.numel():  # a sample without an image has none
            return token.reshape(-1, token.shape[-1])[0].detach()
    return None


def join(values: list[Any], captures: list[Capture], name: str) -> Any:
    """One value of those that a method stored in each run of the tower, crops behind each other.

    Rows of images of other sizes are padded with zeros to the longest, as each run pads its own.
    """
    first = values[0]
    if all(
        isinstance(v, Tensor) and v.shape[:1] == (c.crops,)
        for v, c in zip(values, captures, strict=True)
    ):
        if all(
            v.dim() > 1 and v.shape[1] == max(c.patches, default=0)
            for v, c in zip(values, captures, strict=True)
        ):
            width = max(v.shape[1] for v in values)
            values = [
                torch.cat([v, v.new_zeros(v.shape[0], width - v.shape[1], *v.shape[2:])], 1)
                for v in values
            ]
        if len({v.shape[1:] for v in values}) == 1:
            return torch.cat(values)
    elif isinstance(first, dict):
        if all(isinstance(v, dict) and v.keys() == first.keys() for v in values):
            return {k: join([v[k] for v in values], captures, name) for k in first}
    elif not any(isinstance(v, Tensor) for v in values) and all(v == first for v in values):
        return first
    raise RuntimeError(
        f"what a method found in the vision tower ({name!r}) for images and for videos cannot be put "
        "together: give it prompts with one of them, or use a method that looks at the prompt"
    )


class Spread:
    """Scores of the encoder at the visual tokens of the prompt: (crops, patches) -> (B, N).

    The crops are those of images and those of videos, in the order in which the towers ran.
    """

    def __init__(self, captures: Captures, call: LanguageCall) -> None:
        self.captures, self.call = captures, call

    def __call__(self, scores: Tensor, newline: float | None) -> Tensor:
        of, call = self.captures.of, self.call
        for kind in KINDS:
            if kind not in of and any(call.counts(kind)):
                raise RuntimeError(
                    f"spread: the vision tower did not run for the {kind}s of this call"
                )
        parts: tuple[Tensor, ...] = (scores,)
        if len(of) > 1:
            crops = [capture.crops for capture in of.values()]
            if sum(crops) != scores.shape[0] or 0 in crops:
                raise ValueError(
                    f"scores have {scores.shape[0]} rows, the vision tower had {crops} crops of "
                    f"{' and '.join(of)}s: give one row per crop, made by a look into the tower"
                )
            parts = scores.split(crops)
        shape = (call.valid.shape[0], call.map.n_in, *scores.shape[2:])
        out = torch.full(shape, -float("inf"), device=call.valid.device)
        for kind, part in zip(of, parts, strict=True):
            self.lay(out, kind, part)
        gone = out.isnan()
        if newline is not None:
            return out.masked_fill(gone, newline)
        least = out.masked_fill(gone | out.isinf(), float("inf")).flatten(1).amin(1)
        least = torch.where(least.isinf(), 0.0, least)
        return torch.where(gone, least.reshape(-1, *(1,) * (out.dim() - 1)), out)

    def lay(self, out: Tensor, kind: str, scores: Tensor) -> None:
        """Write the scores of a modality to its tokens (B, N), NaN for separators."""
        capture = self.captures.of[kind]
        if capture.spread is None:
            raise RuntimeError("this family's visual tokens cannot be traced to the tower's")
        if capture.left is not None and scores.shape[1] != capture.left.shape[1]:
            raise ValueError(
                f"a method has scores of {scores.shape[1]} of the {capture.left.shape[1]} tokens of "
                f"each crop: {', '.join(capture.cutters)} cut the tower before it looked. Methods that "
                "look into the tower go together with cuts behind it: use one of the two"
            )
        flat = torch.cat(capture.spread(scores.detach().float())).to(out.device)
        if flat.shape[0] != sum(capture.lengths):
            raise RuntimeError(
                f"scores of shape {tuple(scores.shape)} became {flat.shape[0]} values for "
                f"{sum(capture.lengths)} visual tokens: give one per patch of every crop"
            )
        if capture.stays is not None:
            flat = flat[capture.stays.to(flat.device)]
        self.write(out, kind, flat)

    def write(self, out: Tensor, kind: str, flat: Tensor) -> None:
        """Write one value (or row) for each token of a modality to its place in (B, N, ...)."""
        call = self.call
        # Each sample's tokens in their order, counted on the device: writing to a mask would wait.
        kinds = call.kinds.gather(1, call.arrived.clamp(min=0)).masked_fill(call.arrived < 0, 0)
        here = kinds == KINDS[kind]
        first = torch.tensor([start for start, _ in self.captures.rows(call, kind)], device="cpu")
        first = first.to(out.device, non_blocking=True)
        place = (here.long().cumsum(1) - 1 + first[:, None]).clamp(0, len(flat) - 1)
        here = here.reshape(*here.shape, *(1,) * (out.dim() - 2))
        out.copy_(torch.where(here, flat[place].to(out.dtype), out))
