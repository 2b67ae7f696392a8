"""PixelPrune: which tokens stay, against a loop over the pixels of one token after the other."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import vtr
from vtr.core.site import ModelInfo, Site
from vtr.core.tokens import TokenMap

INFO = ModelInfo("a model", {"pixels": 1}, {"pixels": frozenset({"hidden"})})


def slow(tokens: np.ndarray, threshold: float) -> np.ndarray:
    """(rows, columns) int: the token whose pixels stand for each of tokens (rows, columns, pixels)."""
    rows, columns = tokens.shape[:2]
    shown = tokens.copy()
    out = np.arange(rows * columns).reshape(rows, columns)
    for r in range(rows):
        for c in range(columns):
            if r == c == 0:
                continue
            at = (r, c - 1) if c else (r - 1, c)
            if r and c:
                a, b, corner = shown[r, c - 1], shown[r - 1, c], shown[r - 1, c - 1]
                like_a = np.abs(corner - a).max() <= threshold
                like_b = np.abs(corner - b).max() <= threshold
                if like_a and not like_b:
                    at = (r - 1, c)
            if np.abs(tokens[r, c] - shown[at]).max() <= threshold:
                out[r, c], shown[r, c] = out[at], shown[at]
    return out


def site(tokens: np.ndarray) -> Site:
    rows, columns, _ = tokens.shape
    return Site(
        site="pixels",
        layer=0,
        info=INFO,
        hidden=torch.from_numpy(tokens.reshape(1, rows * columns, -1)).float(),
        map=TokenMap.identity(1, rows * columns),
        grid=(rows, columns),
        memory={},
    )


def picture(rows: int, columns: int, seed: int) -> np.ndarray:
    """Tokens of few colours, whose pixels differ a little, in steps of 1/64."""
    random = np.random.default_rng(seed)
    colours = random.integers(0, 64, (3, 12))
    tokens = colours[random.integers(0, 3, (rows, columns))]
    tokens[: rows // 2 + 1, : columns // 2 + 1] = colours[0]
    return (tokens + random.integers(0, 2, tokens.shape) * (seed % 3)) / 64


@pytest.mark.parametrize("threshold", [0.0, 1 / 64, 2 / 64, 4 / 64])
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (6, 1), (2, 2), (7, 5), (5, 9)])
def test_tokens_stay_as_in_a_loop(size: tuple[int, int], threshold: float) -> None:
    for seed in range(4):
        tokens = picture(*size, seed)
        normal = (tokens - 0.5) / 0.5
        step = vtr.PixelPrune(threshold).reduce(site(normal)).map
        want = slow(tokens, threshold)
        assert step.kept[0][step.source[0]].tolist() == want.ravel().tolist()
        assert step.kept[0].tolist() == np.unique(want).tolist()


def test_a_flat_picture_is_one_token_and_a_rectangle_has_its_corners() -> None:
    tokens = np.zeros((6, 8, 12))
    assert vtr.PixelPrune().reduce(site(tokens)).map.kept.tolist() == [[0]]
    tokens[2:5, 3:6] = 1.0
    # Its first row begins and ends, and the ground begins again below its left edge. The edges between are vertical
    # ones, which the token above predicts.
    want = [0, 2 * 8 + 3, 2 * 8 + 6, 5 * 8 + 3]
    assert vtr.PixelPrune().reduce(site(tokens)).map.kept.tolist() == [want]


def test_channels_are_scaled_by_what_they_were_divided_by() -> None:
    std = (0.25, 0.5, 1.0)
    tokens = picture(5, 6, 1)
    normal = tokens.reshape(5, 6, 3, 4) / np.array(std)[:, None]
    step = vtr.PixelPrune(2 / 64, std).reduce(site(normal.reshape(5, 6, 12))).map
    assert step.kept[0].tolist() == np.unique(slow(tokens, 2 / 64)).tolist()


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="threshold must be a number in"):
        vtr.PixelPrune(-0.1)
    with pytest.raises(ValueError, match="std must be positive numbers"):
        vtr.PixelPrune(std=(0.5, 0.0, 0.5))
    with pytest.raises(ValueError, match="std has 5 numbers, which are not the channels"):
        vtr.PixelPrune(std=(0.5,) * 5).reduce(site(picture(2, 2, 0)))


def test_the_published_setting_is_lossless() -> None:
    assert vtr.PixelPrune.preset("qwen3-vl") == vtr.PixelPrune(threshold=0.0)
