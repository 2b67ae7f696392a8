"""Methods with a static mask: what they keep, token by token, in the model's order of tokens."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from tests.methods.sites import TOLERANCE, Run, attention, tensors, visible
from vtr.core.registry import create
from vtr.kernels import masks
from vtr.methods.base import masked_attention
from vtr.methods.common.grid_windows import compact_tile, fit_window
from vtr.methods.common.tiles import dividing_tile
from vtr.methods.neighborhood import NeighborhoodAttention
from vtr.methods.random_sparse import OwnFrame, RandomSparse
from vtr.methods.sliding_tile import SlidingTile

GRID = (3, 5, 6)
GRID_16 = ((5, 8, 8), 16)


def _with_text(seen, text, text_first):
    """A (N, N) mask of grid tokens with dense text at its place."""
    n = seen.shape[0]
    out = torch.ones(n + text, n + text, dtype=torch.bool)
    first = text if text_first else 0
    out[first : first + n, first : first + n] = seen
    return out


def _cells(grid):
    return torch.tensor(list(itertools.product(*map(range, grid))))


def _own_frame(radius):
    frame = _cells(GRID)[:, 0]
    return (frame[:, None] - frame[None]).abs() <= radius


def _tiles(tile, window):
    """Sliding tiles by their definition: the centre is clamped so that every window is full."""
    place = _cells(GRID) // torch.tensor(tile)
    count = torch.tensor([-(-n // t) for n, t in zip(GRID, tile, strict=True)])
    w = torch.tensor(window)
    centre = torch.minimum(torch.maximum(place, w // 2), count - 1 - (w - 1) // 2)
    apart = place[None] - centre[:, None]
    return ((apart >= -(w // 2)) & (apart <= (w - 1) // 2)).all(-1)


CASES = {
    "own-frame": (OwnFrame(block=16), lambda: _own_frame(0)),
    "own-frame and next": (OwnFrame(radius=1, block=16), lambda: _own_frame(1)),
    "sliding-tile": (
        SlidingTile(tile=(1, 2, 3), window=(2, 3, 1), block=16),
        lambda: _tiles((1, 2, 3), (2, 3, 1)),
    ),
    "sliding-tile of filled blocks": (
        SlidingTile(window=(2, 1, 1), block=16),
        lambda: _tiles(dividing_tile(GRID, 16), (2, 1, 1)),
    ),
    "neighborhood": (
        NeighborhoodAttention(window=3, block=16),
        lambda: masks.neighborhood(GRID, 3, block=16).to_dense(),
    ),
    "neighborhood with a stride": (
        NeighborhoodAttention(window=(3, 4, 3), stride=(1, 2, 3), tile=(1, 2, 2), block=32),
        lambda: masks.neighborhood(GRID, (3, 4, 3), stride=(1, 2, 3), block=16).to_dense(),
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("text_first", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_keeps_what_it_says(name, text_first, padded):
    method, grid_mask = CASES[name]
    text = 7
    qkv = tensors(GRID, text, heads=4, key_heads=2)
    valid = torch.tensor([[True] * 7, [True] * 3 + [False] * 4]) if padded else None
    run = Run(method, GRID, text_first=text_first, text_valid=valid)
    site = run.site(qkv)
    seen = _with_text(grid_mask(), text, text_first)[None]
    seen = (seen & visible(GRID, text, text_first, valid, 2)[:, None])[:, None]
    expected, expected_lse = attention(*qkv, seen, 0.25)
    out, lse = masked_attention(site, method.sequence_mask(site), return_lse=True)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-5)
    scale = torch.rand(2, 4, 97)
    scaled, _ = masked_attention(site, method.sequence_mask(site), row_scale=scale)
    torch.testing.assert_close(scaled, out * scale[..., None], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(method.attend(site), out)
    assert 0 < run.notes["density"] <= 1


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "method",
    [
        SlidingTile(window=1.0, tile=(2, 2, 2), block=16),
        SlidingTile(window=1.0, block=32),
        NeighborhoodAttention(window=1.0, block=16),
        RandomSparse(density=1.0, block=16),
        OwnFrame(radius=3, block=16),
    ],
    ids=lambda m: m.name,
)
@pytest.mark.parametrize("text", [0, 5])
def test_a_full_density_is_dense(method, dtype, text):
    qkv = tensors(GRID, text, dtype=dtype)
    run = Run(method, GRID, text_first=True)
    out, expected = run(qkv), run.site(qkv).dense()
    assert out.dtype == dtype
    torch.testing.assert_close(out, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("text", [0, 21])
@pytest.mark.parametrize("density", [0.2, 0.5])
def test_random_blocks(text, density):
    method = RandomSparse(density=density, block=16)
    qkv = tensors((4, 6, 8), text, heads=3)
    runs = [Run(method, (4, 6, 8), layer=i) for i in range(2)]
    first, second = (r.method.sequence_mask(r.site(qkv)).mask.to_dense(blocks=True) for r in runs)
    grid = first[0, :, :12, :12]
    assert (grid.sum(-1) == round(density * 12)).all() and grid[:, range(12), range(12)].all()
    assert not torch.equal(first, second) and not torch.equal(first[0, 0], first[0, 1])
    assert first[..., 12:].all() and first[..., 12:, :].all()
    again = method.sequence_mask(Run(method, (4, 6, 8)).site(qkv)).mask
    assert torch.equal(again.to_dense(blocks=True), first)


def test_a_batch_is_its_samples():
    qkv = tensors(GRID, 7)
    valid = torch.tensor([[True] * 7, [True] * 3 + [False] * 4])
    method = NeighborhoodAttention(window=3, block=16)
    both = Run(method, GRID, text_valid=valid)(qkv)
    for i in range(2):
        one = Run(method, GRID, text_valid=valid[i : i + 1])([t[i : i + 1] for t in qkv])
        torch.testing.assert_close(both[i : i + 1], one)


def test_one_dilation_is_for_the_axes_that_have_a_window():
    image = (1, 8, 8)
    method = NeighborhoodAttention(window=3, dilation=2, block=16)
    qkv = tensors(image)
    want = NeighborhoodAttention(window=3, dilation=(1, 2, 2), block=16)
    torch.testing.assert_close(Run(method, image)(qkv), Run(want, image)(qkv), rtol=0, atol=0)


def test_a_window_of_more_tiles_than_the_grid_has_is_refused():
    run = Run(SlidingTile.preset("hunyuanvideo", dense_steps=0), (1, 8, 16))
    with pytest.raises(ValueError, match=r"\(1, 1, 2\) tiles. Give window as a share"):
        run(tensors((1, 8, 16)))


def test_the_mask_is_made_once_per_size():
    class Counting(OwnFrame):
        made = 0

        def grid_mask(self, grid):
            Counting.made += 1
            return super().grid_mask(grid)

    run = Run(Counting(block=16), GRID)
    for step in range(3):
        run(tensors(GRID), step)
    run.grid = (2, 5, 6)
    run(tensors((2, 5, 6)))
    assert Counting.made == 2


def test_masks_of_sizes_that_are_gone_are_let_go():
    """Where the text is as long as its prompt, every prompt has a mask of its own."""
    run = Run(OwnFrame(block=16), GRID)
    for text in range(20):
        run.method.sequence_mask(run.site(tensors(GRID, text, batch=1, heads=1)))
    held = run.shared["vtr.size"]
    assert len(held) == 20, "in one run (prompts of a batch) every one comes again"
    for text in range(20, 23):
        site = run.site(tensors(GRID, text, batch=1, heads=1))
        site.call.run = text
        run.method.sequence_mask(site)
        assert len(held) == 16


def test_what_a_size_has_outlives_a_failure():
    site = Run(OwnFrame(block=16), GRID).site(tensors(GRID))
    outer = site.for_size("outer", lambda: [site.for_size("inner", list)])
    with pytest.raises(ZeroDivisionError):
        site.for_size("broken", lambda: 1 / 0)
    assert site.for_size("outer", list) is outer
    assert site.for_size("inner", list) is outer[0]


@pytest.mark.parametrize(
    ("grid", "block"),
    [((21, 30, 52), 128), ((30, 48, 80), 128), ((1, 64, 64), 128), ((13, 30, 45), 64), GRID_16],
)
def test_filled_tiles_cost_what_their_window_holds(grid, block):
    tile = dividing_tile(grid, block)
    tiles = [-(-n // t) for n, t in zip(grid, tile, strict=True)]
    assert math.prod(tile) <= block and math.prod(tiles) * block <= 1.1 * math.prod(grid)
    method = SlidingTile(window=0.25, block=block)
    q = torch.zeros(1, 1, math.prod(grid), 1)
    layout = method.sequence_mask(Run(method, grid).site([q, q, q]))
    window = math.prod(fit_window(0.25, tiles)) / math.prod(tiles)
    assert layout.density <= 1.21 * window


@pytest.mark.parametrize("counts", [(21, 45, 80), (5, 6, 10), (1, 64, 64), (3, 5, 6)])
@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 1.0])
def test_a_window_of_a_share(counts, share):
    window = fit_window(share, counts)
    found = math.prod(window) / math.prod(counts)
    assert all(1 <= w <= n for w, n in zip(window, counts, strict=True))
    # A window is whole numbers: on a grid of 90 tokens the nearest product may be a third off.
    assert abs(math.log(found / share)) < (0.05 if math.prod(counts) > 1000 else 0.3)


@pytest.mark.parametrize(
    ("method", "share"),
    [
        (SlidingTile.preset("hunyuanvideo"), 5**3 / (5 * 6 * 10)),
        (SlidingTile.preset("hunyuanvideo-tuned"), 3**3 / (5 * 6 * 10)),
        (NeighborhoodAttention.preset("hunyuanvideo"), 18 * 24 * 24 / (30 * 48 * 80)),
    ],
    ids=["tiles", "tuned", "neighborhood"],
)
def test_the_settings_of_the_papers_have_whole_blocks(method, share):
    """On 30 x 48 x 80 tokens: as much work as the window holds, and not one partial block."""
    q = torch.zeros(1, 1, 30 * 48 * 80, 1)
    mask = method.sequence_mask(Run(method, (30, 48, 80)).site([q, q, q])).mask
    assert mask.density == pytest.approx(share, abs=1e-6)
    assert not bool((mask.tile >= 0).any())


def test_windows_and_tiles_fit_the_grid():
    assert fit_window(3, (1, 8, 8)) == (1, 3, 3)
    assert fit_window((4, 5), (1, 8, 8)) == (1, 4, 5)
    assert compact_tile((21, 45, 80), 128) == (4, 4, 8)
    assert compact_tile((1, 64, 64), 128) == (1, 8, 16)
    assert math.prod(compact_tile((2, 3, 2), 128)) >= 12


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SlidingTile(window=0), "window must be"),
        (lambda: SlidingTile(window=1.5), "window must be"),
        (lambda: SlidingTile(tile=8), "tile must be"),
        (lambda: NeighborhoodAttention(stride=0.5), "stride must be"),
        (lambda: NeighborhoodAttention(window=(1, 2, 3, 4)), "window must be"),
        (lambda: RandomSparse(density=0), "density must be"),
        (lambda: RandomSparse(seed=0.5), "seed must be"),
        (lambda: OwnFrame(radius=-1), "radius must be"),
        (lambda: SlidingTile(block=48), "block must be"),
        (lambda: SlidingTile.preset("hunyuan"), "Did you mean 'hunyuanvideo'"),
        (lambda: SlidingTile(window=(9, 1, 1)).attend(Run(SlidingTile(), GRID).site(tensors(GRID))),
         "window wants 9"),
        (lambda: NeighborhoodAttention(window=(9, 1, 1)).attend(
            Run(SlidingTile(), GRID).site(tensors(GRID))), "does not fit"),
    ],
)  # fmt: skip
def test_bad_options_say_what_to_do(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    "method",
    [SlidingTile.preset("hunyuanvideo"), NeighborhoodAttention(window=(3, 4, 5)), RandomSparse()],
)
def test_methods_are_written_and_read(method):
    assert create(**method.to_dict()) == method


def test_a_process_has_the_random_blocks_of_its_own_heads():
    """Under context parallelism, where it computes some heads of a layer."""
    method, grid = RandomSparse(density=0.4, block=16), (2, 5, 8)
    qkv = tuple(torch.randn(1, 4, 80, 16) for _ in range(3))
    whole = Run(method, grid)(qkv)
    for first in (0, 2):
        site = Run(method, grid).site(tuple(t[:, first : first + 2] for t in qkv))
        site.first_head, site.all_heads = first, 4
        torch.testing.assert_close(method.attend(site), whole[:, first : first + 2])
