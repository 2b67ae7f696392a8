"""Bands along the diagonal: Re-ttention's and Sparse VideoGen's."""

from __future__ import annotations

import torch
from torch import Tensor

from vtr.kernels.blockmask import BlockMask
from vtr.kernels.masks.build import exact, not_negative, on_cpu, positive, spans


@on_cpu
def band(tokens: int, width: int, *, block: int = 128) -> BlockMask:
    """Keep keys at most ``width // 2`` tokens away: the mask of Re-ttention's image models
    (arXiv 2505.22918; there ``width = int(tokens / 32)``). Not shifted at the borders."""
    return frame_band(1, tokens, width, block=block)


@on_cpu
def frame_band(
    frames: int,
    tokens_per_frame: int,
    width: int,
    *,
    text: int = 0,
    text_first: bool = True,
    block: int = 128,
) -> BlockMask:
    """Keep keys at most ``width // 2`` places away inside the frame, in every frame: Re-ttention's
    mask for CogVideoX (arXiv 2505.22918), whose 226 text tokens come first and are dense both ways."""
    positive(frames=frames, tokens_per_frame=tokens_per_frame, width=width)
    not_negative(text=text)
    total = frames * tokens_per_frame + text
    half, start = width // 2, text if text_first else 0
    token = torch.arange(total, device="cpu")
    video = (token >= start) & (token < start + frames * tokens_per_frame)
    place = (token - start) % tokens_per_frame

    def rule(i: Tensor, j: Tensor) -> Tensor:
        near = (place[i] - place[j]).abs() <= half
        return near | ~video[i] | ~video[j]

    # A block of at most one frame's length wraps around at most once; with the distance taken
    # around the frame, what is far from a block's middle is far from all of it.
    middle = place[torch.arange(0, total, block, device="cpu")] + block // 2
    apart = (middle[:, None] - middle[None]).abs() % tokens_per_frame
    apart = torch.minimum(apart, tokens_per_frame - apart)
    maybe = apart <= half + 2 * block
    dense = spans((~video).long(), block)[1].bool()
    maybe |= dense[:, None] | dense[None]
    low, high = spans(place, block)
    one = spans(torch.div(token - start, tokens_per_frame, rounding_mode="floor"), block)
    whole = (one[0] == one[1]) & ~dense
    surely = whole[:, None] & whole[None]
    surely &= torch.maximum(high[:, None] - low, high - low[:, None]) <= half
    only_text = spans((~video).long(), block)[0].bool()
    surely |= only_text[:, None] | only_text[None]
    # Inside frames the band knows only how far apart two blocks begin.
    inside = whole.clone()
    if total % block:
        inside[-1] = False
    begin = place[torch.arange(0, total, block, device="cpu")]
    alike = begin[:, None] - begin + tokens_per_frame
    alike = alike.masked_fill(~(inside[:, None] & inside), -1)
    return exact(rule, total, total, block=block, maybe=maybe, surely=surely, alike=alike)


@on_cpu
def frame_window(frames: int, tokens_per_frame: int, radius: int, *, block: int = 128) -> BlockMask:
    """All keys of the frames at most ``radius`` frames away."""
    positive(frames=frames, tokens_per_frame=tokens_per_frame)
    not_negative(radius=radius)
    total = frames * tokens_per_frame
    frame = torch.arange(total, device="cpu") // tokens_per_frame

    def rule(i: Tensor, j: Tensor) -> Tensor:
        return (frame[i] - frame[j]).abs() <= radius

    low, high = spans(frame, block)
    maybe = torch.maximum(low[:, None] - high, low - high[:, None]) <= radius
    surely = torch.maximum(high[:, None] - low, high - low[:, None]) <= radius
    return exact(rule, total, total, block=block, maybe=maybe, surely=surely)


@on_cpu
def spatial(
    frames: int, tokens_per_frame: int, width: int, *, text: int = 0, block: int = 128
) -> BlockMask:
    """Keep keys at most ``width`` tokens away in raster order, and all of the first frame: the
    spatial heads of Sparse VideoGen (arXiv 2502.01776). Text, if any, comes last and is dense."""
    positive(frames=frames, tokens_per_frame=tokens_per_frame)
    total = frames * tokens_per_frame
    position = torch.arange(total, device="cpu")
    return _positions(position, position < tokens_per_frame, width, text, block)


@on_cpu
def temporal(
    frames: int, tokens_per_frame: int, width: int, *, text: int = 0, block: int = 128
) -> BlockMask:
    """Keep keys at most ``width`` places away when tokens are ordered place by place, each through
    all frames, and all of the first frame: the temporal heads of Sparse VideoGen (arXiv 2502.01776).

    The mask is for tokens reordered by :func:`temporal_order`, so that the keys of a query are
    neighbours; ``mask.permute`` converts it to raster order. Text, if any, comes last and is dense.
    """
    positive(frames=frames, tokens_per_frame=tokens_per_frame)
    order = temporal_order(frames, tokens_per_frame)
    place, frame = order % tokens_per_frame, order // tokens_per_frame
    return _positions(place * frames + frame, frame == 0, width, text, block)


@on_cpu
def temporal_order(frames: int, tokens_per_frame: int) -> Tensor:
    """The raster indices of tokens in the order of :func:`temporal`, (frames * s,) int64: the
    first frame, which every query sees, then place by place the tokens of the other frames."""
    index = torch.arange(frames * tokens_per_frame, device="cpu").view(frames, tokens_per_frame)
    return torch.cat([index[0], index[1:].t().flatten()])


def _positions(position: Tensor, sink: Tensor, width: int, text: int, block: int) -> BlockMask:
    """Positions at most ``width`` apart, sink keys, and dense text at the end."""
    not_negative(width=width, text=text)
    video = position.numel()
    total = video + text
    position = torch.cat([position, position.new_full((text,), int(position[-1]))])
    sink = torch.cat([sink, sink.new_zeros(text)])
    words = torch.arange(total, device="cpu") >= video

    def rule(i: Tensor, j: Tensor) -> Tensor:
        near = (position[i] - position[j]).abs() <= width
        return near | sink[j] | words[i] | words[j]

    low, high = spans(position, block)
    some_sink, all_sink = (spans(sink.long(), block)[i].bool() for i in (1, 0))
    some_text, all_text = (spans(words.long(), block)[i].bool() for i in (1, 0))
    maybe = torch.maximum(low[:, None] - high, low - high[:, None]) <= width
    maybe |= some_sink | some_text | some_text[:, None]
    surely = torch.maximum(high[:, None] - low, high - low[:, None]) <= width
    surely |= all_sink | all_text | all_text[:, None]
    return exact(rule, total, total, block=block, maybe=maybe, surely=surely)
