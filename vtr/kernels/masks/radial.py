"""The radial mask: attention that thins out with the distance between frames.

Radial Attention (Li et al., NeurIPS 2025, arXiv 2506.19852), section 4. For a query in frame i and
a key in frame j the distance r = |i - j| fixes how far apart inside the frame they may be.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from vtr.kernels.blockmask import BlockMask
from vtr.kernels.masks.build import not_negative, on_cpu, positive

# The released code compares with this number, whatever its block size.
_RELEASED_SPLIT = 128


@on_cpu
def radial(
    frames: int,
    tokens_per_frame: int,
    *,
    block: int = 128,
    decay: float = 1.0,
    sink: bool = True,
    text: int = 0,
    text_first: bool = False,
    rule: str = "paper",
) -> BlockMask:
    """Radial mask of a video of ``frames * tokens_per_frame`` tokens in raster order.

    With s tokens per frame, g = floor(log2 max(r, 1)) and k, l the places inside the frames,
    ``rule="paper"`` keeps a pair of tokens when::

        w = s / 2^g (times decay from r = 2 on);  u = block
        w >= u:  |k - l| + 1 <= w
        w <  u:  |k - l| + 1 <= u  and  r mod ceil(u / w) = 0

    which for ``block=1`` is the formula of the paper. For larger blocks the block is the smallest
    width, as in the paper's experiments; this keeps the cost at O(n log n). A block is kept whole
    if the rule keeps any pair in it.

    ``rule="released"`` is the rule of the released code: half-widths from the power of two above
    s, another frequency rule, and a strict shrink to blocks that drops blocks which a
    diagonal or a frame barely touches (so it is no superset of its token rule). Two faults of the
    released code are corrected. It loses the last block of a frame that lies in one block more than
    its length needs, for queries and keys alike; and if a block is longer than a frame, it may drop
    the block's own frame. Here every block sees the frames of its own tokens. This changes nothing
    if frames are whole blocks, nor at the 3,600 tokens per frame of 720 x 1280.

    Args:
        decay: factor of the widths from the third diagonal on.
        sink: every query sees the first frame (the released code: True for Wan, False for
            HunyuanVideo).
        text: text tokens; they see and are seen by everything, block-wise.
        text_first: the text tokens come before the video instead of after it.

    Raises:
        ValueError: a size is not positive, decay is not a positive number, the rule is unknown,
            or text comes first with the released rule (whose code has it last).
    """
    positive(frames=frames, tokens_per_frame=tokens_per_frame, block=block)
    not_negative(text=text)
    if not (decay > 0 and math.isfinite(decay)):
        raise ValueError(f"decay must be a positive number, got {decay!r}")
    if rule not in ("paper", "released"):
        raise ValueError(f'rule must be "paper" or "released", got {rule!r}')
    if rule == "released" and text_first and text:
        raise ValueError('rule="released" has its text last; use rule="paper" for text first')
    video = frames * tokens_per_frame
    total = video + text
    grid = -(-total // block)
    start = text if text_first else 0
    pieces = _pieces(frames, tokens_per_frame, block, start)
    if rule == "paper":
        live = _paper(pieces, frames, tokens_per_frame, block, decay, sink, grid)
    else:
        live = _released(pieces, frames, tokens_per_frame, block, decay, sink, grid)
        # There a tail shorter than a block is in no block; blocks outside the map are kept.
        border = video // block
        live[border:], live[:, border:] = True, True
    if text:
        first, last = (0, -(-text // block)) if text_first else (video // block, grid)
        live[first:last], live[:, first:last] = True, True
    return BlockMask.from_blocks(torch.from_numpy(live), q_len=total, k_len=total, block=block)


def _pieces(frames: int, size: int, block: int, start: int) -> np.ndarray:
    """Cut the video at the ends of frames and blocks: (4, n) int32 of frame, block, and the first
    and last place inside the frame."""
    ends = start + np.arange(frames + 1) * size
    grid = np.arange(start // block + 1, -(-int(ends[-1]) // block)) * block
    cuts = np.unique(np.concatenate([ends, grid]))
    first, last = cuts[:-1], cuts[1:] - 1
    frame = (first - start) // size
    within = (frame * size) + start
    return np.stack([frame, first // block, first - within, last - within]).astype(np.int32)


def _rows(pieces: np.ndarray) -> list[slice]:
    """Yield runs of pieces to work on at a time, so that the maps of pieces stay small."""
    step = max(1, (1 << 22) // pieces.shape[1])
    return [slice(i, i + step) for i in range(0, pieces.shape[1], step)]


def _collect(live: np.ndarray, keep: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> None:
    """OR a map of pieces into the map of blocks; both index arrays are sorted."""
    new_column = np.flatnonzero(np.diff(columns, prepend=-1))
    new_row = np.flatnonzero(np.diff(rows, prepend=-1))
    by_block = np.logical_or.reduceat(keep, new_column, axis=1)
    by_block = np.logical_or.reduceat(by_block, new_row, axis=0)
    live[np.ix_(rows[new_row], columns[new_column])] |= by_block


def _paper(
    pieces: np.ndarray, frames: int, size: int, block: int, decay: float, sink: bool, grid: int
) -> np.ndarray:
    # The largest |k - l| kept at each frame distance, -1 for none.
    reach = np.empty(frames, dtype=np.int32)
    for r in range(frames):
        group = max(r, 1).bit_length() - 1
        width = size / 2**group * (decay if group else 1.0)
        if width >= block:
            reach[r] = math.floor(width) - 1
        else:
            reach[r] = block - 1 if r % math.ceil(block / width) == 0 else -1
        if group == 0:
            reach[r] = size - 1
    live = np.zeros((grid, grid), dtype=bool)
    frame, of_block, low, high = pieces
    for part in _rows(pieces):
        apart = np.maximum(low[part, None] - high, low - high[part, None])
        np.maximum(apart, 0, out=apart)
        keep = apart <= reach[np.abs(frame[part, None] - frame)]
        if sink:
            keep |= frame == 0
        _collect(live, keep, of_block[part], of_block)
    return live


def _released(
    pieces: np.ndarray, frames: int, size: int, block: int, decay: float, sink: bool, grid: int
) -> np.ndarray:
    power = 2 ** size.bit_length()
    # Half-widths |k - l| <= W at each frame distance, -1 where the frame pair is dropped.
    reach = np.empty(frames, dtype=np.int32)
    for r in range(frames):
        group = r.bit_length()
        width = power / 2**group * decay
        reach[r] = size if r <= 1 else math.floor(width if width >= block else block)
        plain = power / 2**group
        if plain < _RELEASED_SPLIT and r % int(_RELEASED_SPLIT / plain):
            reach[r] = -1
    # More than a third of a block's rows in a column: at least this many.
    enough = block // 3 + 1
    live = np.zeros((grid, grid), dtype=bool)
    frame, of_block, low, high = pieces
    for part in _rows(pieces):
        width = reach[np.abs(frame[part, None] - frame)]
        dropped = width < 0
        if sink:
            dropped &= frame != 0
            width = np.where(frame == 0, size, width)
        rows_low, rows_high = low[part, None], high[part, None]
        # Columns that hold any kept row, and columns that hold enough of them: both are intervals.
        touched = np.minimum(high, rows_high + width) - np.maximum(low, rows_low - width) + 1
        strong = (
            np.minimum(high, rows_high + width + 1 - enough)
            - np.maximum(low, rows_low - width - 1 + enough)
            + 1
        )
        strong[(rows_high - rows_low + 1 < enough).squeeze(1)] = 0
        strong[2 * width + 1 < enough] = 0
        keep = 5 * np.maximum(strong, 0) > 3 * np.maximum(touched, 0)
        keep &= ~dropped
        keep |= frame[part, None] == frame
        _collect(live, keep, of_block[part], of_block)
    return live
