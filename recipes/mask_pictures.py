"""Pictures of the masks of methods for diffusion transformers, on the built-in generator.

What a method computes is found by probing: attention whose values are the rows of an identity matrix gives, for
every query, its weight on every key. So it works for any method, with blocks in any order.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

import vtr
from vtr.methods.common.attention import AttentionMethod

if TYPE_CHECKING:
    from PIL import Image

    from vtr.diffusion.site import DiffusionAttentionSite

BLOCK, LAYER, STEP = 16, 2, 6
SIDE = 5  # pixels of a block
DARK, LINE = (24, 62, 120), (170, 170, 170)
PROMPT, SEED = "a 7 moving right", 0


def methods() -> Mapping[str, Any]:
    """The methods by the names of their pictures, all at a density of about a quarter."""
    common: dict[str, Any] = {"block": BLOCK, "dense_steps": 2, "backend": "sdpa"}
    share: dict[str, Any] = {"density": 0.25, **common}
    return {
        "topk-sparse": vtr.TopKSparse(**share),
        "vsa": vtr.VSA(tile=(1, 4, 4), gate=None, **share),
        "sparge-attn": vtr.SpargeAttn(key_block=BLOCK, **share),
        "svg2": vtr.SVG2(query_clusters=40, key_clusters=40, rounds=10, key_block=BLOCK, **share),
        "xattention-dit": vtr.XAttentionDiT(0.6, stride=4, **common),
        "draft-attention": vtr.DraftAttention(patch=(4, 4), **share),
        "jenga": vtr.Jenga(0.75, p=0.0, neighbours=False, **common),
        "adaspa": vtr.AdaSpa(search=(2,), **share),
        "liteattention": vtr.LiteAttention(0.0, **common),
        "rectified": vtr.RectifiedSparse(
            p=0.0, drop=0.75, order="raster", neighbours=False, rectify=False, **common
        ),
        "sliding-tile": vtr.SlidingTile(window=(3, 1, 3), tile=(1, 4, 4), **common),
        "neighborhood": vtr.NeighborhoodAttention(
            window=(3, 4, 12), stride=(1, 4, 4), tile=(1, 4, 4), **common
        ),
        "radial": vtr.RadialAttention(decay=0.05, sink=False, **common),
        "todo": vtr.ToDo(2, dense_steps=2),
    }


@dataclass(frozen=True, kw_only=True)
class Probe(AttentionMethod):
    """Another method, whose weights are noted in one layer and step.

    Attributes:
        inner: the method.
        found: gets ``"weights"``, (tokens, tokens) of the first sample and head.
    """

    name: ClassVar[str] = "probe"
    paper: ClassVar[str] = "a diagnostic"

    inner: Any = None
    found: dict[str, Tensor] = field(default_factory=dict, compare=False)

    def attend(self, site: DiffusionAttentionSite) -> Tensor:
        if (site.layer, site.step, site.branch) == (LAYER, STEP, "cond"):
            self.found["weights"] = weights(self.inner, site)
        out: Tensor = self.inner.attend(site)
        return out


def weights(method: Any, site: DiffusionAttentionSite) -> Tensor:
    """The weights of one attention call, (tokens, tokens) of the first sample and head."""
    tokens, dim = site.k.shape[2:]
    unit = torch.eye(tokens, dtype=site.v.dtype)
    parts = []
    for start in range(0, tokens, dim):
        columns = unit[:, start : start + dim]
        probed = copy.copy(site)
        probed.v = columns.expand(*site.k.shape[:2], tokens, -1).contiguous()
        probed.state, probed.notes = copy.deepcopy(site.state), {}
        parts.append(method.attend(probed)[0, 0])
    return torch.cat(parts, -1)


def live(method: Any) -> np.ndarray:
    """The share of computed pairs in each pair of blocks, (blocks, blocks) in [0, 1]."""
    from vtr.zoo import load_pipeline

    pipe = load_pipeline("digits-wan")
    pipe.set_progress_bar_config(disable=True)
    probe = Probe(inner=method, dense_steps=method.dense_steps, block=BLOCK)
    with vtr.apply(pipe, probe):
        pipe(PROMPT, generator=torch.Generator().manual_seed(SEED), output_type="latent")
    seen = (probe.found["weights"] > 0).float()
    return seen.unflatten(0, (-1, BLOCK)).unflatten(-1, (-1, BLOCK)).mean((1, 3)).numpy()


def picture(shares: np.ndarray, frames: int = 5) -> Image.Image:
    """Draw the shares: white for nothing, dark for all, lines between the frames."""
    from PIL import Image

    pixels = 255 - shares[..., None] * (255 - np.array(DARK))
    pixels = pixels.repeat(SIDE, 0).repeat(SIDE, 1)
    step = len(pixels) // frames
    for n in range(1, frames):
        pixels[n * step] = LINE
        pixels[:, n * step] = LINE
    framed = np.pad(pixels, ((1, 1), (1, 1), (0, 0)), constant_values=LINE[0])
    return Image.fromarray(framed.round().astype(np.uint8)).quantize(32)


def write(folder: Path) -> None:
    """Write all pictures."""
    folder.mkdir(exist_ok=True)
    for name, method in methods().items():
        picture(live(method)).save(folder / f"{name}.png", optimize=True)
