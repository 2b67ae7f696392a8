"""Every mask function against its definition, token by token."""

from __future__ import annotations

import itertools
import math
import random
import time

import pytest
import torch

from vtr.kernels import BlockMask, block_sparse_attention, masks


def _blocks_of(tokens, block):
    """Which blocks hold any True token pair."""
    n = tokens.shape[0]
    grid = -(-n // block)
    padded = torch.zeros(grid * block, grid * block, dtype=torch.bool)
    padded[:n, :n] = tokens
    return padded.view(grid, block, grid, block).any(3).any(1)


# ---- radial -----------------------------------------------------------------------------------

RADIAL = [(9, 24, 8, 1.0), (12, 20, 16, 0.4), (5, 7, 16, 1.0), (33, 16, 8, 0.7), (1, 10, 4, 1.0)]


def _paper_rule(frames, size, unit, decay, sink):
    n = frames * size
    keep = torch.zeros(n, n, dtype=torch.bool)
    for a, b in itertools.product(range(n), range(n)):
        r, d = abs(a // size - b // size), abs(a % size - b % size)
        g = int(math.log2(max(r, 1)))
        width = size / 2**g * (decay if g else 1)
        if g == 0:
            keep[a, b] = True
        elif width >= unit:
            keep[a, b] = d + 1 <= width
        else:
            keep[a, b] = d + 1 <= unit and r % math.ceil(unit / width) == 0
        keep[a, b] |= sink and b < size
    return keep


@pytest.mark.parametrize("sink", [True, False])
@pytest.mark.parametrize(("frames", "size", "block", "decay"), RADIAL)
def test_radial_paper(frames, size, block, decay, sink):
    mask = masks.radial(frames, size, block=block, decay=decay, sink=sink)
    expected = _blocks_of(_paper_rule(frames, size, block, decay, sink), block)
    assert torch.equal(mask.to_dense(blocks=True), expected)


def test_radial_with_blocks_of_one_token_is_the_papers_formula():
    frames, size = 12, 6
    mask = masks.radial(frames, size, block=1, sink=True)
    for a, b in itertools.product(range(frames * size), repeat=2):
        i, k, j, p = a // size, a % size, b // size, b % size
        g = int(math.log2(max(abs(i - j), 1)))
        if 2**g <= size:
            keep = abs(k - p) + 1 <= size / 2**g
        else:
            keep = k == p and abs(i - j) % math.ceil(2**g / size) == 0
        assert bool(mask.to_dense()[a, b]) == (keep or j == 0)


def _released_rule(frames, size, block, decay, sink, text=0, mended=True):
    """The released procedure step by step: a frame pair's token map on a canvas aligned to the
    blocks, shrunk by column densities. Mended, the canvas ends where the frame does, and a block's
    own frame is kept whatever its density."""
    video, total = frames * size, frames * size + text
    grid = -(-total // block)
    whole = torch.zeros(grid, grid, dtype=torch.bool)
    whole[video // block :], whole[:, video // block :] = True, True
    place = torch.arange(size)
    apart = (place[:, None] - place[None]).abs()
    for i, j in itertools.product(range(frames), repeat=2):
        r = abs(i - j)
        reach = 2 ** size.bit_length() / 2 ** r.bit_length()
        keep = torch.ones(size, size, dtype=torch.bool)
        if not (sink and j == 0):
            keep = apart <= (size if r <= 1 else max(reach * decay, block))
            if reach < 128 and r % int(128 / reach):
                keep = torch.zeros_like(keep)
        sides = [(f * size) % block + -(-size // block) * block for f in (i, j)]
        canvas = torch.zeros(sides, dtype=torch.bool)
        at = [(f * size) % block for f in (i, j)]
        canvas[at[0] : at[0] + size, at[1] : at[1] + size] = keep
        n, m = (side // block for side in sides)
        if mended:
            n, m = (-(-(a + size) // block) for a in at)
            canvas = torch.nn.functional.pad(canvas, (0, block, 0, block))
        cut = canvas[: n * block, : m * block].view(n, block, m, block)
        columns = cut.sum(1) / block
        strong = (columns > 1 / 3).sum(-1) / ((columns > 0).sum(-1) + 1e-9) > 0.6
        if mended and i == j:
            strong |= cut.any(3).any(1)
        rows, cols = (i * size) // block, (j * size) // block
        whole[rows : rows + n, cols : cols + m] |= strong
    return whole


@pytest.mark.parametrize("sink", [True, False])
@pytest.mark.parametrize(
    ("frames", "size", "block", "decay", "text"),
    [
        (6, 256, 128, 1.0, 0),
        (8, 64, 16, 0.3, 0),
        (9, 48, 16, 1.0, 32),
        (8, 72, 16, 0.8, 0),  # frames and blocks do not meet
        (16, 24, 16, 0.5, 0),
        (40, 32, 16, 1.0, 0),  # far enough for the frequency rule
        (10, 40, 16, 0.6, 23),
        (9, 23, 16, 0.5, 0),  # a frame may need one block more than its length does
        (11, 5, 16, 1.0, 4),  # three frames and more in a block
    ],
)
def test_radial_released(frames, size, block, decay, text, sink):
    expected = _released_rule(frames, size, block, decay, sink, text)
    mask = masks.radial(
        frames, size, block=block, decay=decay, sink=sink, text=text, rule="released"
    )
    assert torch.equal(mask.to_dense(blocks=True), expected)


@pytest.mark.parametrize("sink", [True, False])
@pytest.mark.parametrize(
    ("frames", "size", "block", "text"),
    [(8, 64, 16, 0), (9, 48, 16, 32), (40, 32, 16, 23), (3, 3600, 128, 256)],
)
def test_radial_released_is_the_released_code_where_frames_are_whole_blocks(
    frames, size, block, text, sink
):
    """And at 720 x 1280 (3,600 tokens per frame), where no frame loses its last block either."""
    expected = _released_rule(frames, size, block, 0.4, sink, text, mended=False)
    mask = masks.radial(frames, size, block=block, decay=0.4, sink=sink, text=text, rule="released")
    assert torch.equal(mask.to_dense(blocks=True), expected)


@pytest.mark.parametrize(
    ("frames", "decay", "sink", "block", "text"),
    [
        (18, 0.2, True, 128, 0),  # Wan 2.1, 69 frames
        (20, 0.8, True, 64, 0),  # Wan 2.2, 77 frames
        (30, 0.95, False, 128, 256),  # HunyuanVideo, 117 frames
        (128, 1.0, False, 128, 256),  # HunyuanVideo, 509 frames
    ],
)
def test_radial_released_at_the_authors_sizes(frames, decay, sink, block, text):
    """Block by block at 768 x 1280. A frame is 30 or 60 whole blocks, so that all follows from how far
    apart two frames, and two blocks inside them, are."""
    size, inside = 3840, torch.arange(block)
    n = size // block
    off = torch.arange(-n + 1, n)[:, None, None] * block
    apart = (inside[None, :, None] - inside[None, None] - off).abs()
    expected = torch.zeros(frames, n, frames, n, dtype=torch.bool)
    for r in range(frames):
        reach = 4096 / 2 ** r.bit_length()
        keep = apart <= (size if r <= 1 else max(reach * decay, block))
        if reach < 128 and r % int(128 / reach):
            keep = torch.zeros_like(keep)
        share = keep.sum(1) / block
        strong = (share > 1 / 3).sum(1) / ((share > 0).sum(1) + 1e-9) > 0.6
        pair = strong[torch.arange(n) - torch.arange(n)[:, None] + n - 1]
        for i in range(frames - r):
            expected[i, :, i + r], expected[i + r, :, i] = pair, pair
    if sink:
        expected[:, :, 0] = True
    mask = masks.radial(
        frames, size, block=block, decay=decay, sink=sink, text=text, rule="released"
    )
    live = mask.to_dense(blocks=True)
    video = frames * n
    assert torch.equal(live[:video, :video], expected.view(video, video))
    assert live[video:].all() and live[:, video:].all()


@pytest.mark.parametrize(
    ("frames", "decay", "sink", "density"),
    [
        (18, 0.2, True, 0.287),
        (20, 0.8, True, 0.353),
        (30, 0.95, False, 0.275),
        (30, 1.0, False, 0.293),
        (128, 1.0, False, 0.115),
    ],
)
def test_radial_released_densities(frames, decay, sink, density):
    """At 768 x 1280 (3,840 tokens per frame), the sizes of the released scripts."""
    mask = masks.radial(frames, 3840, decay=decay, sink=sink, rule="released")
    assert mask.density == pytest.approx(density, abs=6e-4)


@pytest.mark.parametrize("rule", ["paper", "released"])
def test_radial_grows_as_n_log_n(rule):
    """Live blocks over f log f level off as frames double (n^2 would near double it)."""
    frames = [64, 128, 256, 512]
    blocks = [masks.radial(f, 512, sink=False, rule=rule).col.numel() for f in frames]
    share = [n / (f * math.log2(f)) for n, f in zip(blocks, frames, strict=True)]
    growth = [later / before for before, later in itertools.pairwise(share)]
    assert growth == sorted(growth, reverse=True) and growth[-1] < 1.04


@pytest.mark.parametrize("rule", ["paper", "released"])
def test_radial_at_720p_takes_any_length(rule):
    """81 frames at 720 x 1280 are 21 latent frames of 3,600 tokens, which no block size divides."""
    started = time.perf_counter()
    mask = masks.radial(21, 3600, rule=rule)
    # Measured at 12 to 16 ms; the limit only rules out a token-level construction.
    assert time.perf_counter() - started < 1.0
    assert mask.grid == (591, 591) and mask.to_dense(blocks=True).any(1).all()


@pytest.mark.parametrize("text_first", [True, False])
def test_radial_text_is_dense_both_ways(text_first):
    mask = masks.radial(10, 30, block=16, text=21, text_first=text_first, sink=False)
    dense = mask.to_dense()
    words = slice(0, 21) if text_first else slice(300, 321)
    assert dense[words].all() and dense[:, words].all() and not dense.all()
    video = slice(21, None) if text_first else slice(0, 300)
    rule = _paper_rule(10, 30, 16, 1.0, False)
    assert (dense[video, video] | ~rule).all()


# ---- bands ------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [16, 24])
@pytest.mark.parametrize(("n", "width"), [(100, 7), (96, 40), (50, 1), (20, 99)])
def test_band(n, width, block):
    i = torch.arange(n)
    expected = (i[:, None] - i[None]).abs() <= width // 2
    assert torch.equal(masks.band(n, width, block=block).to_dense(), expected)


@pytest.mark.parametrize("text_first", [True, False])
@pytest.mark.parametrize("text", [0, 19])
@pytest.mark.parametrize(
    ("frames", "size", "width"), [(3, 40, 9), (4, 10, 5), (7, 33, 200), (2, 90, 3)]
)
def test_frame_band(frames, size, width, text, text_first):
    mask = masks.frame_band(frames, size, width, text=text, text_first=text_first, block=16)
    place = torch.arange(size).repeat(frames)
    video = (place[:, None] - place[None]).abs() <= width // 2
    expected = torch.ones(frames * size + text, frames * size + text, dtype=torch.bool)
    at = slice(text, None) if text_first else slice(0, frames * size)
    expected[at, at] = video
    assert torch.equal(mask.to_dense(), expected)


@pytest.mark.parametrize("text", [0, 11])
@pytest.mark.parametrize(("frames", "size", "width"), [(4, 30, 17), (6, 16, 0), (1, 50, 8)])
def test_spatial_and_temporal(frames, size, width, text):
    n = frames * size
    raster = torch.arange(n)
    expected = torch.ones(n + text, n + text, dtype=torch.bool)
    expected[:n, :n] = (raster[:, None] - raster[None]).abs() <= width
    expected[:n, :size] = True
    mask = masks.spatial(frames, size, width, text=text, block=16)
    assert torch.equal(mask.to_dense(), expected)

    place_major = raster % size * frames + raster // size
    expected[:n, :n] = (place_major[:, None] - place_major[None]).abs() <= width
    expected[:n, :size] = True
    mask = masks.temporal(frames, size, width, text=text, block=16)
    order = torch.cat([masks.temporal_order(frames, size), torch.arange(n, n + text)])
    assert torch.equal(mask.to_dense(), expected[order][:, order])
    assert torch.equal(mask.permute(order.argsort()).to_dense(), expected)


# ---- grids ------------------------------------------------------------------------------------


def _axis_window(q, size, window, stride, dilation, causal):
    """Keys that query q sees along one axis, from the definition."""
    residue, place = q % dilation, q // dilation
    length = len(range(residue, size, dilation))
    group = place // stride * stride
    if causal:
        end = min(group + stride - 1, length - 1)
        keys = [k for k in range(length) if end - window < k <= place]
    else:
        start = min(group + stride // 2, length - 1) - window // 2
        start = min(max(start, 0), length - window)
        keys = range(start, start + window)
    return {residue + k * dilation for k in keys}


@pytest.mark.parametrize(
    ("shape", "window", "stride", "dilation", "causal"),
    [
        ((40,), 7, 1, 1, False),
        ((41,), 8, 3, 1, False),
        ((40,), 6, 2, 3, False),
        ((30,), 5, 1, 1, True),
        ((9, 11), (3, 5), (1, 2), 1, False),
        ((8, 10), (4, 3), 1, (2, 1), (True, False)),
        ((4, 6, 7), (3, 3, 5), (1, 3, 1), (1, 2, 1), (True, False, False)),
        ((3, 5, 4), (3, 5, 4), 1, 1, False),
    ],
)
@pytest.mark.parametrize("text", [0, 9])
def test_neighborhood(shape, window, stride, dilation, causal, text):
    mask = masks.neighborhood(
        shape, window, stride=stride, dilation=dilation, causal=causal, text=text, block=16
    )

    def spread(value):
        return value if isinstance(value, tuple) else (value,) * len(shape)

    n = math.prod(shape)
    expected = torch.ones(n + text, n + text, dtype=torch.bool)
    cells = list(itertools.product(*map(range, shape)))
    settings = list(zip(shape, *map(spread, (window, stride, dilation, causal)), strict=True))
    for a, query in enumerate(cells):
        sees = [_axis_window(q, *line) for q, line in zip(query, settings, strict=True)]
        for b, key in enumerate(cells):
            expected[a, b] = all(k in axis for k, axis in zip(key, sees, strict=True))
    assert torch.equal(mask.to_dense(), expected)


def test_neighborhood_on_random_grids():
    """200 grids of one to three axes, any window, stride and dilation that fit."""
    draw = random.Random(0)
    for _ in range(200):
        shape = tuple(draw.randint(1, 9) for _ in range(draw.randint(1, 3)))
        window = tuple(draw.randint(1, n) for n in shape)
        stride = tuple(draw.randint(1, w) for w in window)
        dilation = tuple(draw.randint(1, n // w) for n, w in zip(shape, window, strict=True))
        causal = tuple(draw.random() < 0.3 for _ in shape)
        mask = masks.neighborhood(
            shape, window, stride=stride, dilation=dilation, causal=causal, block=16
        )
        expected = torch.ones(1, 1, dtype=torch.bool)
        for line in zip(shape, window, stride, dilation, causal, strict=True):
            axis = torch.zeros(line[0], line[0], dtype=torch.bool)
            for query in range(line[0]):
                axis[query, list(_axis_window(query, *line))] = True
            expected = torch.kron(expected.int(), axis.int()).bool()
        assert torch.equal(mask.to_dense(), expected), (shape, window, stride, dilation, causal)


@pytest.mark.parametrize(
    ("shape", "tile", "window", "text"),
    [
        ((4, 8, 8), (2, 4, 4), (1, 1, 2), 0),
        ((6, 8, 12), (2, 4, 4), (3, 1, 3), 16),
        ((5, 7, 9), (2, 4, 4), (2, 2, 1), 5),
        ((30,), (8,), (3,), 0),
    ],
)
def test_sliding_tile(shape, tile, window, text):
    mask = masks.sliding_tile(shape, tile, window, text=text, block=16)
    n = math.prod(shape)
    cells = list(itertools.product(*map(range, shape)))
    expected = torch.ones(n + text, n + text, dtype=torch.bool)
    for (a, query), (b, key) in itertools.product(enumerate(cells), repeat=2):
        keep = True
        for q, k, size, t, w in zip(query, key, shape, tile, window, strict=True):
            count = -(-size // t)
            first = min(max(q // t - w // 2, 0), count - w)
            keep &= first <= k // t < first + w
        expected[a, b] = keep
    order = torch.cat([masks.tile_order(shape, tile), torch.arange(n, n + text)])
    assert sorted(order.tolist()) == list(range(n + text))
    assert torch.equal(mask.to_dense(), expected[order][:, order])


def test_sliding_tile_of_whole_blocks_has_no_partial_block():
    """The published setting: tiles of 6 x 8 x 8 = 384 tokens, three blocks of 128."""
    mask = masks.sliding_tile((30, 48, 80), (6, 8, 8), (3, 3, 5))
    assert (mask.tile < 0).all() and not mask.tiles.numel()
    assert mask.density == pytest.approx(3 * 3 * 5 / (5 * 6 * 10))


# ---- random, and what all have in common ------------------------------------------------------


def test_random_has_the_density_asked_for():
    mask = masks.random(1280, 0.3, heads=3)
    assert mask.density == pytest.approx(0.3) and mask.patterns == 3
    blocks = mask.to_dense(blocks=True)
    assert (blocks.sum(-1) == 3).all()
    assert blocks.diagonal(dim1=-2, dim2=-1).all()
    assert torch.equal(masks.random(1280, 0.3, heads=3).to_dense(), mask.to_dense())
    assert not torch.equal(masks.random(1280, 0.3, heads=3, seed=1).to_dense(), mask.to_dense())


EVERY = {
    "radial": lambda: masks.radial(6, 50, block=16, text=7),
    "released": lambda: masks.radial(6, 50, block=16, rule="released"),
    "band": lambda: masks.band(150, 20, block=16),
    "frame_band": lambda: masks.frame_band(3, 40, 12, text=9, block=16),
    "spatial": lambda: masks.spatial(4, 30, 20, block=16),
    "temporal": lambda: masks.temporal(4, 30, 20, block=16),
    "neighborhood": lambda: masks.neighborhood((4, 6, 6), 3, block=16),
    "sliding_tile": lambda: masks.sliding_tile((4, 8, 8), (2, 4, 4), (1, 2, 2), block=16),
    "random": lambda: masks.random(130, 0.4, block=16),
}


@pytest.mark.parametrize("name", EVERY)
def test_every_mask_has_a_picture_and_runs(name):
    mask = EVERY[name]()
    assert isinstance(mask, BlockMask)
    image = mask.picture(size=64)
    assert (
        len(
            set(
                image.get_flattened_data()
                if hasattr(image, "get_flattened_data")
                else image.getdata()
            )
        )
        >= 2
    )
    q, k, v = (torch.randn(1, 2, mask.q_len, 16) for _ in range(3))
    out = block_sparse_attention(q, k, v, mask)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask.to_dense())
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: masks.radial(0, 10), "frames"),
        (lambda: masks.radial(4, 10, decay=float("nan")), "decay"),
        (lambda: masks.radial(4, 10, rule="mine"), "rule"),
        (lambda: masks.radial(4, 10, text=-1), "text"),
        (lambda: masks.radial(4, 10, text=3, text_first=True, rule="released"), "text last"),
        (lambda: masks.band(10, 0), "width"),
        (lambda: masks.neighborhood((8, 8), 9), "does not fit"),
        (lambda: masks.neighborhood((8, 8), (3, 3, 3)), "one value per axis"),
        (lambda: masks.neighborhood((8, 8), 3, stride=4), "stride <= window"),
        (lambda: masks.sliding_tile((8,), (4,), (3,)), "2 tiles"),
        (lambda: masks.random(100, 0.0), "density"),
        (lambda: masks.spatial(4, 10, -1), "width"),
    ],
)
def test_bad_sizes_say_what_to_do(call, words):
    with pytest.raises(ValueError, match=words):
        call()
