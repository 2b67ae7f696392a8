"""Qwen2.5-VL in vLLM with fewer tokens of each picture, which keep their positions in its grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from vtr.errors import UnsupportedMethodError
from vtr.vllm.cut import cut_of
from vtr.vllm.processing import Shortening

NOTHING = 1e-18
"""A pruning rate of videos that is above 0, so that vLLM asks for positions, and prunes nothing: 1 - 1e-18 is 1."""

PLACES = 4
"""Columns behind the embeddings that vLLM carries from the tower to :meth:`recompute_mrope_positions`."""

DIGIT = 128
"""Rows and columns travel as two digits of this base, which bfloat16 holds exactly."""


class QwenProcessor(Shortening, Qwen2_5_VLMultiModalProcessor):
    family = "qwen2.5-vl"


@MULTIMODAL_REGISTRY.register_processor(
    QwenProcessor, info=Qwen2_5_VLProcessingInfo, dummy_inputs=Qwen2_5_VLDummyInputsBuilder
)
class VTRQwen2_5_VL(Qwen2_5_VLForConditionalGeneration):
    """vLLM's Qwen2.5-VL, whose pictures are cut by the method of its configuration; videos stay whole.

    The positions of text follow from the pictures' sizes, as without a method, and are known before a token is
    chosen; those of the tokens that stay are filled in when they are (vLLM's interface for pruned media).

    Raises:
        UnsupportedMethodError: the method does not work here, or vLLM prunes videos itself.
    """

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        cut = cut_of(vllm_config.model_config.hf_config, "qwen2.5-vl")
        media = vllm_config.model_config.multimodal_config
        if media.video_pruning_rate not in (None, 0, NOTHING):
            raise UnsupportedMethodError(
                "vLLM prunes videos (video_pruning_rate) and vtr pictures: use one of the two"
            )
        media.video_pruning_rate = NOTHING
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.cut = cut

    def embed_multimodal(self, **kwargs: object) -> Any:
        """Compute the tokens of media, each (K, C + 4): behind a picture's tokens are their places."""
        found = list(super().embed_multimodal(**kwargs))
        grids: Any = kwargs.get("image_grid_thw")
        if grids is None:
            return tuple(found)
        video_first = next(k for k in kwargs if "grid_thw" in k or "pixel" in k or "embeds" in k)
        first = len(found) - len(grids) if "video" in video_first else 0
        merge = self.config.vision_config.spatial_merge_size
        for i, (_, height, width) in enumerate(grids.tolist(), start=first):
            grid = height // merge, width // merge
            tokens = found[i][:, :-PLACES]
            kept = self.cut.choose(tokens[None], grid, {})[0]
            found[i] = torch.cat([tokens[kept], digits(kept, grid[1]).to(tokens.dtype)], 1)
        return tuple(found)

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[Any]
    ) -> tuple[Tensor, int]:
        """Number a prompt: (3, N) int64, and what a later token's position is ahead of its index.

        The tokens of a picture that is cut get the first places of its grid until it is known which stay.
        """
        features = sorted(mm_features, key=lambda feature: feature.mm_position.offset)
        parts: list[Any] = []
        end, following = 0, 0  # columns that have a position, and the position of the next one
        for feature, grid in zip(features, self.iter_mm_grid_thw(mm_features), strict=True):
            offset, *sizes, seconds = grid
            parts.append(_line(following, offset - end))
            following += offset - end
            index = np.indices(sizes)
            index[0] = (index[0] * seconds).astype(np.int64)
            length = feature.mm_position.length
            parts.append(index.reshape(3, -1)[:, :length] + following)
            following += int(index.max()) + 1
            end = offset + length
        parts.append(_line(following, len(input_tokens) - end))
        following += len(input_tokens) - end
        positions = np.concatenate(parts, axis=1)
        return torch.from_numpy(positions), following - len(input_tokens)

    def recompute_mrope_positions(
        self,
        input_ids: list[int] | Tensor,
        multimodal_embeddings: Sequence[Tensor],
        mrope_positions: Tensor,
        num_computed_tokens: int,
    ) -> tuple[Sequence[Tensor], Tensor, int]:
        """Fill in the positions of the pictures' tokens that a chunk of the prompt holds.

        Args:
            input_ids: (N,) the whole prompt.
            multimodal_embeddings: each (K, C + 4), of the media in the chunk, in order; the first and the
                last may be a part.
            mrope_positions: (3, N) of the whole prompt.
            num_computed_tokens: where the chunk begins.

        Returns:
            embeddings (K, C), positions (3, N), and what a later token's position is ahead of its index.
        """
        positions = mrope_positions.clone()
        ids = torch.as_tensor(input_ids, device=positions.device)
        picture = ids == self.config.image_token_id
        media = picture | (ids == self.config.video_token_id)
        places = media.nonzero()[:, 0]
        places = places[places >= num_computed_tokens]
        begins = (ids == self.config.vision_start_token_id).nonzero()[:, 0]
        done = 0
        for tokens in multimodal_embeddings:
            here = places[done : done + len(tokens)]
            done += len(tokens)
            if len(here) == 0 or not bool(picture[here[0]]):
                continue
            start = begins[torch.searchsorted(begins, here[0]) - 1]
            base = positions[0, start] + 1
            row, column = from_digits(tokens[:, -PLACES:].to(positions.device))
            positions[:, here] = torch.stack([torch.zeros_like(row), row, column]) + base
        cleaned = [tokens[:, :-PLACES] for tokens in multimodal_embeddings]
        return cleaned, positions, int(positions.max()) + 1 - positions.shape[1]


def digits(kept: Tensor, columns: int) -> Tensor:
    """Write the rows and columns of (K,) indices of a grid as two digits each: (K, 4) int64."""
    row, column = kept // columns, kept % columns
    return torch.stack([row // DIGIT, row % DIGIT, column // DIGIT, column % DIGIT], 1)


def from_digits(written: Tensor) -> tuple[Tensor, Tensor]:
    """Read (K, 4) of :func:`digits`, of any dtype: rows and columns, (K,) int64."""
    high_row, low_row, high_column, low_column = written.long().unbind(1)
    return high_row * DIGIT + low_row, high_column * DIGIT + low_column


def _line(start: int, length: int) -> Any:
    return np.broadcast_to(np.arange(length), (3, length)) + start
