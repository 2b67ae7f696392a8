"""ImageBlocks: the images of a prompt do not see each other (BlindSight, arXiv 2507.09071)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from vtr.core.language_attention import share_of
from vtr.core.stopwatch import Stopwatch
from vtr.kernels import BlockMask, block_sparse_attention
from vtr.methods.base import Examples, PrefillMethod, check_count, register
from vtr.methods.common.image_mask import PromptImages, image_blocks, image_mask

if TYPE_CHECKING:
    from vtr.core.language_attention import LanguageAttentionSite


@register
@dataclass(frozen=True, kw_only=True)
class ImageBlocks(PrefillMethod):
    r"""A visual token sees its own image, and the text before it; text sees everything.

    BlindSight (arXiv 2507.09071) found that in many heads of Qwen2-VL, Qwen2.5-VL and Gemma 3 images do not look
    at each other, beyond sink tokens of each image. It sorts heads, by a data set and without training, into dense,
    sink, intra-image, and intra-image with sinks. BlockRank (arXiv 2510.05396) trains a language model
    under the same mask: documents see themselves and the instruction in front of them, and the query sees
    everything.

    .. math::

        M_{ij} = [\,j \le i\,] \cdot [\,i \in \mathrm{text} \;\lor\; j \in \mathrm{text} \;\lor\;
        \mathrm{image}(i) = \mathrm{image}(j)\,]

    This is the intra-image mask (with ``sinks``, that of intra-image with sinks) in all heads. These are our
    readings: which heads get it is not calibrated (``dense_layers`` leaves whole layers dense); a sink is one of the
    first tokens of an image; all text before a token is seen, that between images too; a video is one image, unless
    ``unit`` says otherwise. Positions stay as they are.

    The mask is exact to the token: a block that two images share leaks nothing. Inside, keys are
    reordered so that text scattered between the images fills few blocks.

    Args:
        unit: ``"image"``: an image or a video sees itself; ``"frame"``: a frame of a video sees itself.
        sinks: first tokens of each image (or frame) that everything after them sees; where text separates the
            frames of a video, of each frame.
    """

    name: ClassVar[str] = "image-blocks"
    paper: ClassVar[str] = "BlindSight's intra-image mask, 2025, arXiv 2507.09071"

    unit: str = field(default="image", kw_only=False)
    sinks: int = 0

    @classmethod
    def examples(cls) -> Examples:
        return {
            "some": (cls(block=16, last_rows=1), cls("frame", sinks=1, block=16, last_rows=1)),
            "everything": (cls(sinks=1 << 30, block=16, last_rows=1),),
        }

    def validate(self) -> None:
        super().validate()
        if self.unit not in ("image", "frame"):
            raise ValueError(f'unit must be "image" or "frame", got {self.unit!r}')
        check_count(self.sinks, "sinks", low=0)

    def compute(self, site: LanguageAttentionSite) -> Tensor:
        out = torch.zeros_like(site.q)
        for samples, order, mask in self._masks(site):
            q, k, v = (x.index_select(0, samples) for x in (site.q, site.k, site.v))
            k, v = k.index_select(2, order), v.index_select(2, order)
            part = block_sparse_attention(q, k, v, mask, scale=site.scale, backend=site.backend)
            assert isinstance(part, Tensor)
            out = out.index_copy(0, samples, part)
            site.count(share_of(mask, site.window) * (len(samples) / len(out)))
        return out

    def _masks(self, site: LanguageAttentionSite) -> list[tuple[Tensor, Tensor, BlockMask]]:
        """The samples of each kind of prompt, their order of keys and their mask, built once per call."""
        image = site.image if self.unit == "image" else site.frame
        key = f"{site.q.shape[2]} rows, window {site.window}"
        known = site.memory.get(key)
        if known is None or not torch.equal(known[0], image):
            with Stopwatch(site.notes, "finding", image.device):
                built = self._build(image, site.q.shape[2], site.window)
            known = site.memory[key] = image, *built
        site.notes.setdefault("mask", known[2])
        masks: list[tuple[Tensor, Tensor, BlockMask]] = known[1]
        return masks

    def _build(
        self, image: Tensor, rows: int, window: int | None
    ) -> tuple[list[tuple[Tensor, Tensor, BlockMask]], BlockMask]:
        """The masks, and one of all samples in the order of the prompt, of whole blocks, to look at."""
        device, sides = image.device, self.sides
        kinds, which = image.cpu().unique(dim=0, return_inverse=True)
        masks, blocks = [], []
        for number, kind in enumerate(kinds):
            prompt = PromptImages(kind, rows, self.sinks, window)
            order, mask = image_mask(prompt, sides)
            samples = (which == number).nonzero().flatten()
            masks.append((samples.to(device), order.to(device), mask.to(device)))
            blocks.append(image_blocks(prompt, sides))
        seen = torch.stack(blocks)[which][:, None]
        return masks, BlockMask.from_blocks(seen, q_len=rows, k_len=image.shape[1], block=sides)
