"""Qwen2.5-VL in vLLM with fewer tokens of each picture, which keep their positions in its grid."""

from __future__ import annotations

import dataclasses
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

PLACES = 4
"""Columns behind the embeddings of pictures, which vLLM carries from the tower to the prompt."""

DIGIT = 128
"""Rows and columns travel as two digits of this base, which bfloat16 holds exactly."""


class QwenProcessor(Shortening, Qwen2_5_VLMultiModalProcessor):
    family = "qwen2.5-vl"


@MULTIMODAL_REGISTRY.register_processor(
    QwenProcessor, info=Qwen2_5_VLProcessingInfo, dummy_inputs=Qwen2_5_VLDummyInputsBuilder
)
class VTRQwen2_5_VL(Qwen2_5_VLForConditionalGeneration):
    """vLLM's Qwen2.5-VL, whose pictures are cut by the method of its configuration; videos stay whole.

    Positions of text follow from the pictures' sizes, as without a method, and are known before a token is
    chosen. Each token that stays has its place in the grid behind its embedding, and this is added to the
    position of the picture when the prompt is computed: in every kind of runner, also where a chunk of the
    prompt ends inside a picture. (vLLM's own interface for pruned media is one that its CPU runner does not call.)

    Raises:
        UnsupportedMethodError: the method does not work here, vLLM prunes videos itself, or the model is split
            into stages or has a draft model.
    """

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        cut = cut_of(vllm_config.model_config.hf_config, "qwen2.5-vl")
        if vllm_config.model_config.multimodal_config.video_pruning_rate:
            raise UnsupportedMethodError(
                "vLLM prunes videos (video_pruning_rate) and vtr pictures: use one of the two"
            )
        if vllm_config.parallel_config.pipeline_parallel_size > 1 or vllm_config.speculative_config:
            raise UnsupportedMethodError(
                "positions of pictures are not passed on to other stages or draft models: use neither pipeline "
                "parallelism nor speculative decoding"
            )
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.cut = cut
        self._moves: tuple[Tensor, Tensor] | None = None

    def get_encoder_cudagraph_config(self) -> Any:
        """Turn CUDA graphs of the tower off: they leave :meth:`embed_multimodal` out."""
        return dataclasses.replace(super().get_encoder_cudagraph_config(), modalities=[])

    def embed_multimodal(self, **kwargs: object) -> Any:
        """Compute the tokens of media, (K, C), and of pictures (K, C + 4), with their places."""
        found = list(super().embed_multimodal(**kwargs))
        grids: Any = kwargs.get("image_grid_thw")
        if grids is None:
            return tuple(found)
        video_first = "video" in next(k for k in kwargs if "pixel" in k or "embeds" in k)
        first = len(found) - len(grids) if video_first else 0
        merge = self.config.vision_config.spatial_merge_size
        for i, (_, height, width) in enumerate(grids.tolist(), start=first):
            grid = height // merge, width // merge
            tokens = found[i]
            kept = self.cut.choose(tokens[None], grid, {})[0]
            found[i] = torch.cat([tokens[kept], digits(kept, grid[1]).to(tokens.dtype)], 1)
        return tuple(found)

    def embed_input_ids(
        self,
        input_ids: Tensor,
        multimodal_embeddings: Any = None,
        *,
        is_multimodal: Tensor | None = None,
    ) -> Tensor:
        """Embed a step's tokens; the places of pictures' tokens wait for :meth:`forward`."""
        self._moves, width = None, self.config.text_config.hidden_size
        parts = list(multimodal_embeddings if multimodal_embeddings is not None else ())
        if parts:
            assert is_multimodal is not None
            places = torch.cat([_places(part, width) for part in parts])
            self._moves = is_multimodal.nonzero()[:, 0], places
        plain: Tensor = super().embed_input_ids(
            input_ids, [part[:, :width] for part in parts] or None, is_multimodal=is_multimodal
        )
        return plain

    def forward(self, input_ids: Any, positions: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Compute a step, with the positions of its pictures' tokens filled in.

        In place: vLLM writes its buffer of positions anew in every step, and CUDA graphs read that buffer.
        """
        if self._moves is not None:
            rows, places = self._moves
            self._moves = None
            positions[:, rows.to(positions.device)] += places.to(
                positions.device, positions.dtype
            ).T
        return super().forward(input_ids, positions, *args, **kwargs)

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[Any]
    ) -> tuple[Tensor, int]:
        """Number a prompt: (3, N) int64, and what a later token's position is ahead of its index.

        All tokens of a picture have the position of its first one, to which :meth:`forward` adds.
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
            flat = (
                index.reshape(3, -1) if feature.modality == "video" else np.zeros((3, length), int)
            )
            parts.append(flat + following)
            following += int(index.max()) + 1
            end = offset + length
        parts.append(_line(following, len(input_tokens) - end))
        following += len(input_tokens) - end
        positions = np.concatenate(parts, axis=1)
        return torch.from_numpy(positions), following - len(input_tokens)


def digits(kept: Tensor, columns: int) -> Tensor:
    """Write the rows and columns of (K,) indices of a grid as two digits each: (K, 4) int64."""
    row, column = kept // columns, kept % columns
    return torch.stack([row // DIGIT, row % DIGIT, column // DIGIT, column % DIGIT], 1)


def _places(tokens: Tensor, width: int) -> Tensor:
    """Read time, row and column of (K, width + 4) tokens of a picture: (K, 3) int64; zeros for a video's."""
    if tokens.shape[1] == width:
        return tokens.new_zeros(len(tokens), 3, dtype=torch.long)
    high_row, low_row, high_column, low_column = tokens[:, width:].long().unbind(1)
    row, column = high_row * DIGIT + low_row, high_column * DIGIT + low_column
    return torch.stack([torch.zeros_like(row), row, column], 1)


def _line(start: int, length: int) -> Any:
    return np.broadcast_to(np.arange(length), (3, length)) + start
