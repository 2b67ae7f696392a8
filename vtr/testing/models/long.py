"""Longer prompts for the tiny vision-language models, for methods inside attention.

Several blocks of 16 tokens and a part of one, with two images or videos in the first sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vtr.testing.models.vlms import IMAGE, VIDEO, Inputs, prompts


def _noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def qwen() -> list[Inputs]:
    """Two images of 40 and 24 tokens, then one of 40."""
    return [_grids(11, [[1, 8, 20], [1, 8, 12]]), _grids(12, [[1, 8, 20]])]


def _grids(seed: int, grids: Sequence[Sequence[int]]) -> Inputs:
    grid = torch.tensor(grids)
    patches = grid.prod(1)
    made = prompts([(patches // 4).tolist()])
    return {
        "pixel_values": _noise(seed, int(patches.sum()), 3 * 2 * 4 * 4),
        "image_grid_thw": grid,
        "mm_token_type_ids": (made["input_ids"] == IMAGE).int(),
        **made,
    }


def internvl() -> list[Inputs]:
    """Ten tiles of four tokens and six, then twelve."""
    return [
        {"pixel_values": _noise(seed, sum(tiles), 3, 28, 28), **prompts([[4 * n for n in tiles]])}
        for seed, tiles in ((11, [10, 6]), (12, [12]))
    ]


def llava_onevision_video() -> list[Inputs]:
    """Two videos, then one, of eight frames of 2 x 2 pooled tokens and a newline."""
    return [
        {
            "pixel_values_videos": _noise(seed, videos, 8, 3, 28, 28),
            **prompts([[(33, VIDEO)] * videos]),
        }
        for seed, videos in ((11, 2), (12, 1))
    ]


LONG: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "qwen2_5_vl": qwen,
    "qwen3_vl": qwen,
    "internvl": internvl,
    "llava_onevision_video": llava_onevision_video,
}
"""The two samples of families whose own ones are short."""
