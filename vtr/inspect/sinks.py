"""Attention sinks of a prompt, layer by layer: found, listed and drawn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.api import apply, handles
from vtr.methods.common.language_attention import LanguageAttentionMethod
from vtr.methods.common.sinks import received

if TYPE_CHECKING:
    from PIL import Image

    from vtr.core.language_attention import LanguageAttentionSite

COLOURS = {"first": (214, 39, 40), "hidden": (255, 150, 20), "secondary": (31, 100, 220)}
IMAGE = (150, 200, 150)


@dataclass(frozen=True, eq=False)
class Sinks:
    """The attention sinks of a batch of prompts, on the CPU.

    Columns are the tokens of the prompt at their places in the padded batch.

    Attributes:
        received: (layers, B, S) float32, mean attention that a token receives, over heads and over the rows
            that see it.
        norm: (layers, B, S) float32, norm of the hidden state that enters the layer.
        first: (layers, B, S) bool, the first token if it receives more than the threshold.
        hidden: (layers, B, S) bool, later tokens that receive more than the threshold (hidden sinks of arXiv
            2406.15765).
        secondary: (layers, B, S) bool, later tokens whose hidden states have the first token's direction, in
            layers in which that one is massive (secondary sinks of arXiv 2512.22213).
        valid, visual: (B, S) bool, tokens that are no padding, and tokens of images and videos.
    """

    received: Tensor
    norm: Tensor
    first: Tensor
    hidden: Tensor
    secondary: Tensor
    valid: Tensor
    visual: Tensor

    def __repr__(self) -> str:
        layers, batch, columns = self.received.shape
        return f"Sinks({layers} layers, {batch} samples of {columns} columns)"

    def tokens(self, kind: str, layer: int, sample: int = 0) -> list[int]:
        """List the columns of the sinks of one kind: ``"first"``, ``"hidden"`` or ``"secondary"``.

        Raises:
            ValueError: there is no such kind, layer or sample.
        """
        if kind not in COLOURS:
            raise ValueError(f"kind must be one of {', '.join(COLOURS)}, got {kind!r}")
        self._check("layer", layer, self.received.shape[0])
        self._check("sample", sample, self.received.shape[1])
        found: list[int] = getattr(self, kind)[layer, sample].nonzero().flatten().tolist()
        return found

    def summary(self, sample: int = 0) -> str:
        """Count the sinks of each layer, and the attention that the first token receives, as text."""
        self._check("sample", sample, self.received.shape[1])
        lines = ["layer  first token  hidden (visual)  secondary (visual)"]
        column = int(self.valid[sample].int().argmax())
        image = self.visual[sample]
        for n in range(len(self.received)):
            parts = []
            for found in (self.hidden[n, sample], self.secondary[n, sample]):
                parts.append(f"{int(found.sum())} ({int((found & image).sum())})")
            share = float(self.received[n, sample, column])
            lines.append(f"{n:5d}  {100 * share:9.1f} %  {parts[0]:>15}  {parts[1]:>18}")
        return "\n".join(lines)

    def draw(self, sample: int = 0, size: int = 6) -> Image.Image:
        """Draw a sample: a line per layer, a column per token, darker for more attention (by its logarithm).

        Red is the first token if it is a sink, orange a hidden sink, blue a secondary one; a token that is
        both is half of each. The green bar above shows the visual tokens.

        Args:
            sample: number of the sample in the batch.
            size: pixels per layer; a token is as wide as fits 1200 pixels, at least 1.

        Raises:
            ValueError: there is no such sample, or ``size`` is not at least 2.
        """
        from PIL import Image, ImageDraw, ImageFont

        self._check("sample", sample, self.received.shape[1])
        if size < 2:
            raise ValueError(f"size must be at least 2 pixels per layer, got {size}")
        live = self.valid[sample]
        number = max(int(live.sum()), 1)
        share = self.received[:, sample, live].clamp(min=1e-4).log10() / 4 + 1  # 0 at 1e-4, 1 at 1
        grey = 255 * (1 - 0.85 * share.numpy())
        width = max(1, 1200 // number)
        pixels = np.repeat(grey[:, :, None], 3, 2).repeat(size, 0).repeat(width, 1)
        hidden = self.hidden[:, sample, live]
        for kind, colour in COLOURS.items():
            for layer, token in getattr(self, kind)[:, sample, live].nonzero().tolist():
                half = size // 2 if kind == "secondary" and hidden[layer, token] else 0
                rows = slice(layer * size + half, (layer + 1) * size)
                pixels[rows, token * width : (token + 1) * width] = colour
        bar = np.full((8, pixels.shape[1], 3), 255.0)
        bar[:6, np.repeat(self.visual[sample, live].numpy(), width)] = IMAGE
        out = Image.new("RGB", (pixels.shape[1], 24 + 8 + len(pixels)), "white")
        out.paste(Image.fromarray(np.concatenate([bar, pixels]).astype(np.uint8)), (0, 24))
        title = f"{len(self.received)} layers: first sink red, hidden orange, secondary blue"
        ImageDraw.Draw(out).text((2, 4), title, fill="black", font=ImageFont.load_default(14.0))
        return out

    @staticmethod
    def _check(name: str, value: int, number: int) -> None:
        if not 0 <= value < number:
            raise ValueError(f"{name} must be in 0..{number - 1}, got {value}")


def sinks(
    model: Any,
    inputs: Mapping[str, Any],
    *,
    threshold: float = 0.1,
    likeness: float = 0.9,
    rows: int = 8,
) -> Sinks:
    """Find the attention sinks of prompts in every layer of a vision-language model.

    The model runs once, unchanged, and the attention of all rows is computed once more, in parts. Secondary sinks are
    found as by their authors: by the cosine with the first token's hidden state, from the layer before which that one's
    norm rises most on. They end before the layer at which that norm falls by more than half (the authors: at which it
    falls most, wherever that is).

    Args:
        model: a model that :func:`vtr.apply` takes, without a method.
        inputs: keyword arguments of its forward call, with an image or video.
        threshold: mean attention above which a token is a sink, in (0, 1).
        likeness: absolute cosine above which a token is a secondary sink, in (0, 1).
        rows: tokens that fewer rows than this see are no hidden sinks: a mean over few rows says little.

    Returns:
        :class:`Sinks`. ``print(found.summary())`` counts them, ``found.draw()`` draws them.

    Raises:
        ValueError: the model has a method, a number is out of range, or the inputs have no image.
        UnsupportedModelError, UnsupportedMethodError: as :func:`vtr.apply`.
    """
    for name, value in (("threshold", threshold), ("likeness", likeness)):
        if not 0 < value < 1:
            raise ValueError(f"{name} must be in (0, 1), got {value!r}")
    if rows < 1:
        raise ValueError(f"rows must be >= 1, got {rows!r}")
    if handles(model):
        raise ValueError(
            "the model is wrapped already; remove its handles before looking for sinks"
        )
    with torch.no_grad(), apply(model, Watch()) as handle:
        model(**inputs)
        found = handle.trace.notes.get("attention", {})
        layers = [found[n]["sinks"] for n in sorted(found) if "sinks" in found[n]]
    if not layers:
        raise ValueError(
            "the inputs have no image or video: give the processor's, with pixel values"
        )
    mean, number, cosine, norm = (torch.stack(x) for x in list(zip(*layers, strict=True))[:4])
    valid, visual = layers[0][4:]
    column = valid.int().argmax(1)
    place = F.one_hot(column, valid.shape[1]).bool()
    alive = massive_layers(norm[:, torch.arange(len(column)), column])
    above = mean > threshold
    return Sinks(
        received=mean,
        norm=norm.masked_fill(~valid, 0.0),
        first=above & place,
        hidden=above & ~place & valid & (number >= rows),
        secondary=(cosine.abs() > likeness) & alive[..., None] & valid & ~place,
        valid=valid,
        visual=visual,
    )


def massive_layers(norm: Tensor) -> Tensor:
    """Tell in which layers a token is massive, by its norms before each of them, (layers, B) to bool.

    From the layer after the largest rise on, to the layer at which the norm falls by more than half.
    """
    layers = torch.arange(len(norm))[:, None]
    if len(norm) < 2:
        return torch.zeros_like(norm, dtype=torch.bool)
    start = norm.diff(dim=0).argmax(0) + 1
    falls = (norm[1:] < 0.5 * norm[:-1]) & (layers[1:] > start)
    end = torch.where(falls.any(0), falls.int().argmax(0) + 1, len(norm))
    return (layers >= start) & (layers < end)


@dataclass(frozen=True, kw_only=True)
class Watch(LanguageAttentionMethod):
    """Changes nothing, and notes what :func:`sinks` needs of a prompt."""

    name: ClassVar[str] = "sinks"
    paper: ClassVar[str] = "a diagnostic"
    needs: ClassVar[Mapping[str, frozenset[str]]] = {
        "attention": frozenset({"qkv", "prompt", "hidden"})
    }

    def attend(self, site: LanguageAttentionSite) -> Tensor:
        if site.phase == "prefill":
            assert site.hidden is not None
            mean, number = received(site)
            states, index = site.hidden.float(), torch.arange(len(site.bos), device=site.q.device)
            cosine = F.cosine_similarity(states, states[index, site.bos][:, None], dim=-1)
            found = (mean.mean(1), number, cosine, states.norm(dim=-1), site.valid, site.visual)
            site.notes["sinks"] = tuple(x.cpu() for x in found)
        return site.dense()
