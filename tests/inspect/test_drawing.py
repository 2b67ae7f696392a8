"""Pictures: every kind of token must look like what became of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import vtr
from tests import tiny
from vtr.core.language_site import Frames, View, VisualSpan
from vtr.core.tokens import TokenMap
from vtr.core.trace import StageRecord, Trace
from vtr.inspect.drawing import DIM, HATCHED, MERGED, stack

SIZE = 64
TITLE = 24
GREY = 0.7


def trace_of(token_map: TokenMap, grid: tuple[int, ...] | None = (2, 2)) -> Trace:
    n, m = token_map.n_in, token_map.n_out
    return Trace([StageRecord("encoder", 0, "test", n, m, token_map, token_map, grid)], batch=1)


def panels(picture: Image.Image, size: int = SIZE, gap: int = 8) -> list[np.ndarray]:
    """The panels without their titles, in [0, 1]."""
    pixels = np.asarray(picture).astype(float) / 255
    number = (pixels.shape[1] + gap) // (size + gap)
    return [pixels[TITLE:, i * (size + gap) : i * (size + gap) + size] for i in range(number)]


def cell(panel: np.ndarray, index: int, columns: int = 2) -> np.ndarray:
    """Pixels of a token, without its outline."""
    side = panel.shape[1] // columns
    r, c = divmod(index, columns)
    return panel[r * side + 4 : (r + 1) * side - 4, c * side + 4 : (c + 1) * side - 4]


def test_dropped_tokens_are_dark_and_kept_ones_untouched():
    kept = torch.tensor([[0, 3]])
    (panel,) = panels(vtr.draw(trace_of(TokenMap.keep(kept, 4)), size=SIZE))
    for token, brightness in enumerate((GREY, DIM * GREY, DIM * GREY, GREY)):
        assert cell(panel, token) == pytest.approx(brightness, abs=0.01)


def test_merged_tokens_share_a_colour_and_an_outline():
    step = TokenMap.merged(torch.tensor([[0, 2]]), torch.tensor([[0, 0, 1, 1]]))
    (panel,) = panels(vtr.draw(trace_of(step), size=SIZE))
    colours = [cell(panel, i).reshape(-1, 3) for i in range(4)]
    assert all(np.ptp(c, axis=0).max() < 0.01 for c in colours)
    mean = [c.mean(0) for c in colours]
    assert mean[0] == pytest.approx(mean[1], abs=0.01)
    assert mean[2] == pytest.approx(mean[3], abs=0.01)
    assert np.abs(mean[0] - mean[2]).max() > 0.1
    assert min(m.min() for m in mean) >= MERGED * GREY - 0.01
    # An outline runs between the groups and not inside of one.
    middle = SIZE // 2
    assert np.abs(panel[middle, 8] - mean[2]).max() > 0.1
    assert panel[8, middle] == pytest.approx(mean[0], abs=0.01)


def test_a_group_of_one_is_not_coloured():
    step = TokenMap.merged(torch.tensor([[0, 1, 3]]), torch.tensor([[0, 1, 1, 2]]))
    (panel,) = panels(vtr.draw(trace_of(step), size=SIZE))
    assert cell(panel, 0) == pytest.approx(GREY, abs=0.01)
    assert np.abs(cell(panel, 1) - GREY).max() > 0.1


def test_frozen_tokens_are_hatched():
    step = TokenMap.keep(torch.tensor([[0]]), 4)
    step.frozen = torch.tensor([[False, True, True, False]])
    (panel,) = panels(vtr.draw(trace_of(step), size=SIZE))
    values = np.unique(cell(panel, 1).round(2))
    assert values == pytest.approx([HATCHED * GREY, 0.75], abs=0.011)
    assert np.unique(cell(panel, 3).round(2)) == pytest.approx([DIM * GREY], abs=0.011)


def test_one_panel_per_stage_on_the_picture_of_the_sample():
    model = tiny.vit()
    images = torch.rand(2, 3, 64, 64)
    with vtr.apply(model, vtr.EViT(keep=0.5)) as handle, torch.no_grad():
        model(images)
        stages = handle.trace.stages
        first, *after = panels(vtr.draw(handle, images, sample=1, size=SIZE))
    assert len(after) == len(stages) == 3
    assert first == pytest.approx(images[1].permute(1, 2, 0).numpy(), abs=0.005)
    for panel, stage in zip(after, stages, strict=True):
        source, size = stage.total.source[1], stage.total.size[1]
        for token in range(64):
            alone = source[token] >= 0 and size[source[token]] == 1
            # An 8 x 8 cell of a 64-pixel panel has no inside after the outline: look at it enlarged.
            now, before = (cell(np.kron(p, np.ones((2, 2, 1))), token, 8) for p in (panel, first))
            assert np.allclose(now, before, atol=0.01) == bool(alone)


def test_many_stages_are_thinned_and_the_last_one_stays():
    model = tiny.vit(depth=12)
    with vtr.apply(model, vtr.ToMe(r=4)) as handle, torch.no_grad():
        model(torch.rand(1, 3, 64, 64))
        drawn = panels(vtr.draw(handle, panels=4, size=SIZE))
        last = panels(vtr.draw(Trace(handle.trace.stages[-1:]), size=SIZE))
    assert len(drawn) == 4
    assert np.array_equal(drawn[-1], last[0])


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_pictures_of_more_than_eight_bits_are_not_cut_off(dtype):
    grey = np.arange(SIZE * SIZE, dtype=np.uint8).reshape(SIZE, SIZE)
    deep = grey / np.float32(255) if dtype == np.float32 else grey.astype(dtype) * 257
    first, _ = panels(vtr.draw(trace_of(TokenMap.identity(1, 4)), Image.fromarray(deep), size=SIZE))
    assert first == pytest.approx(grey[..., None].repeat(3, -1) / 255, abs=0.01)


@pytest.mark.parametrize("kind", ["pil", "array", "uint8 tensor", "grey", "wide range"])
def test_pictures_of_every_kind(kind):
    generator = np.random.default_rng(0)
    array = generator.integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8)
    array[0, 0], array[0, 1] = 0, 255
    image = {
        "pil": Image.fromarray(array),
        "array": array,
        "uint8 tensor": torch.from_numpy(array).permute(2, 0, 1),
        "grey": array[..., 0],
        "wide range": torch.from_numpy(array).permute(2, 0, 1).float() / 50 - 2,
    }[kind]
    step = TokenMap.identity(1, 4)
    first, second = panels(vtr.draw(trace_of(step), image, size=SIZE))
    expected = array / 255 if kind != "grey" else array[..., :1].repeat(3, -1) / 255
    assert first == pytest.approx(expected, abs=0.01)
    assert np.array_equal(first, second)


def test_oblong_grids():
    step = TokenMap.keep(torch.tensor([[5]]), 6)
    (panel,) = panels(vtr.draw(trace_of(step, (2, 3)), size=60), size=60)
    assert panel[45, 50] == pytest.approx(GREY, abs=0.01)
    assert panel[45, 30] == pytest.approx(DIM * GREY, abs=0.01)


def test_what_cannot_be_drawn_is_refused():
    step = TokenMap.identity(1, 4)
    with pytest.raises(ValueError, match="no reduction"):
        vtr.draw(Trace())
    with pytest.raises(ValueError, match="sample"):
        vtr.draw(trace_of(step), sample=1)
    with pytest.raises(ValueError, match="grid"):
        vtr.draw(trace_of(step, None))


def test_block_masks_draw_themselves():
    kernels = pytest.importorskip("vtr.kernels")
    mask = kernels.BlockMask.from_dense(torch.eye(64, dtype=torch.bool), block=(16, 16))
    assert isinstance(vtr.draw(mask), Image.Image)


def test_stacked_pictures_keep_their_size():
    parts = [Image.new("RGB", (30, 10)), Image.new("RGB", (20, 40))]
    assert stack(parts, gap=5).size == (30, 55)


def test_the_input_can_be_left_out():
    step = TokenMap.identity(1, 4)
    image = np.zeros((SIZE, SIZE, 3), dtype=np.uint8)
    assert len(panels(vtr.draw(trace_of(step), image, size=SIZE))) == 2
    assert len(panels(vtr.draw(trace_of(step), image, size=SIZE, show_input=False))) == 1


def test_each_sample_has_its_own_grid():
    """A vision-language model's samples differ; the shorter one is padded at the end."""
    kept = torch.tensor([[0, 3], [1, 2]])
    whole = TokenMap.keep(kept, 6)
    grids = ((2, 3), (2, 2))
    record = StageRecord("prompt", 0, "test", 6, 2, whole, whole, None, grids)
    trace = Trace([record])
    (panel,) = panels(vtr.draw(trace, sample=1, size=SIZE))
    for token, brightness in enumerate((DIM * GREY, GREY, GREY, DIM * GREY)):
        assert cell(panel, token) == pytest.approx(brightness, abs=0.01)
    record.grids = ((2, 3), None)
    with pytest.raises(ValueError, match=r"of sample 1 .* one image in the prompt"):
        vtr.draw(trace, sample=1)


def test_one_panel_is_the_last_stage():
    first, last = (TokenMap.keep(torch.tensor([k]), 4) for k in ([0, 1, 2], [3]))
    trace = Trace(
        [StageRecord("encoder", i, "t", 4, 1, m, m, (2, 2)) for i, m in enumerate((first, last))]
    )
    (panel,) = panels(vtr.draw(trace, panels=1, size=SIZE))
    assert cell(panel, 3) == pytest.approx(GREY, abs=0.01)
    assert cell(panel, 0) == pytest.approx(DIM * GREY, abs=0.01)


def test_what_is_no_picture_is_refused():
    trace = trace_of(TokenMap.keep(torch.tensor([[0]]), 4))
    for bad in ("x.png", 3, torch.zeros(5), torch.zeros(2, 5, 8, 8)[0]):
        with pytest.raises(ValueError, match="image must be a PIL image"):
            vtr.draw(trace, bad)
    with pytest.raises(ValueError, match="not finite"):
        vtr.draw(trace, torch.full((3, 8, 8), float("nan")))
    with pytest.raises(ValueError, match="image must be a PIL image"):
        vtr.draw(trace, torch.zeros(0, 0, 3))
    for what in (None, torch.nn.Linear(1, 1), "handle"):
        with pytest.raises(ValueError, match="draw takes a handle, a trace or a block mask"):
            vtr.draw(what)
    with pytest.raises(ValueError, match="image is a batch of 2, the call had 1 samples"):
        vtr.draw(trace, torch.zeros(2, 3, 8, 8))
    for option in ({"panels": 0}, {"size": 0}):
        with pytest.raises(ValueError, match="must be >= 1, got 0"):
            vtr.draw(trace, **option)
    # A palette is colours, not numbers.
    red = Image.new("RGB", (8, 8), "red").convert("P", palette=Image.Palette.ADAPTIVE)
    shown, _ = panels(vtr.draw(trace, red, size=SIZE))
    assert shown.reshape(-1, 3).mean(0) == pytest.approx((1, 0, 0), abs=0.02)


def sheet(picture: Image.Image, block: int, frame: int, size: int, lines: int = 1) -> np.ndarray:
    """A frame of a contact sheet whose blocks have so many lines of two frames."""
    pixels = np.asarray(picture).astype(float) / 255
    input_height = TITLE + lines * size + (lines - 1) * 4
    stage_height = TITLE + lines * (16 + size) + (lines - 1) * 4
    top = 0 if block == 0 else input_height + 10 + (block - 1) * (stage_height + 10)
    label = 0 if block == 0 else 16
    line, column = divmod(frame, 2)
    top += TITLE + line * (label + size + 4) + label
    return pixels[top : top + size, column * (size + 4) : column * (size + 4) + size]


def video_record(total: TokenMap, frames: Frames) -> StageRecord:
    n, m = total.n_in, total.n_out
    return StageRecord("prompt", 0, "test", n, m, total, total, None, None, frames)


def three_frames() -> Frames:
    """Two still tokens, then three frames of 2 x 2 with a separator behind."""
    frame = torch.tensor([[0, 0, *[1] * 4, *[2] * 4, *[3] * 4, -1]])
    place = torch.tensor([[-1, -1, *[*range(4)] * 3, -1]])
    video = torch.tensor([[0, 0, *[1] * 13]])
    spans = [
        VisualSpan(0, 2, "image", 1, None),
        VisualSpan(2, 13, "video", 3, (2, 2), (0.0, 0.5, 1.0)),
    ]
    return Frames(frame, place, video, [spans])


def test_a_contact_sheet_shows_what_lived_in_every_frame():
    kept = torch.tensor([[0, 2, 5, 8, 14]])  # of the first frame 0 and 3, of the second 2
    trace = Trace([video_record(TokenMap.keep(kept, 15), three_frames())], batch=1)
    frames = np.stack([np.full((8, 8, 3), v, np.uint8) for v in (255, 204, 153)])
    picture = vtr.draw(trace, frames, size=SIZE, columns=2)
    lives = {(0, 0), (0, 3), (1, 2)}
    for f, light in enumerate((1.0, 0.8, 0.6)):
        assert sheet(picture, 0, f, SIZE, 2) == pytest.approx(light, abs=0.01)
        panel = sheet(picture, 1, f, SIZE, 2)
        for token in range(4):
            bright = light if (f, token) in lives else DIM * light
            assert cell(panel, token) == pytest.approx(bright, abs=0.01), (f, token)
    # Without frames on grey; a model's frame may be two of the file's.
    assert sheet(vtr.draw(trace, which=1, size=SIZE), 0, 0, SIZE).size
    twice = np.repeat(frames, 2, 0)
    assert np.array_equal(vtr.draw(trace, twice, size=SIZE, columns=2), picture)
    assert np.array_equal(vtr.draw(trace, twice[:-1], size=SIZE, columns=2), picture)
    tensor = vtr.draw(trace, torch.from_numpy(frames), size=SIZE, columns=2)
    assert np.array_equal(tensor, picture)

    class Loaded:
        pass

    video = Loaded()
    video.frames = frames
    assert np.array_equal(vtr.draw(trace, video, size=SIZE, columns=2), picture)


def test_a_group_over_time_has_one_colour():
    source = torch.tensor([[0, 1, 2, 3, 4, 5, 2, 6, 7, 8, 2, 9, 10, 11, 12]])
    kept = torch.tensor([[0, 1, 2, 3, 4, 5, 7, 8, 9, 11, 12, 13, 14]])
    trace = Trace([video_record(TokenMap.merged(kept, source), three_frames())], batch=1)
    frames = np.full((3, 8, 8, 3), 178, np.uint8)
    picture = vtr.draw(trace, frames, size=SIZE, columns=2)
    panels = [sheet(picture, 1, f, SIZE, 2) for f in range(3)]
    mean = [cell(panel, 0).reshape(-1, 3).mean(0) for panel in panels]
    assert mean[0] == pytest.approx(mean[1], abs=0.01)
    assert mean[0] == pytest.approx(mean[2], abs=0.01)
    assert np.ptp(mean[0]) > 0.1
    for panel in panels:
        assert cell(panel, 3) == pytest.approx(178 / 255, abs=0.01)


def test_frames_of_an_encoder_over_time():
    """An encoder of videos has one grid over time, height and width."""
    kept = torch.tensor([[0, 7]])
    trace = trace_of(TokenMap.keep(kept, 8), (2, 2, 2))
    picture = vtr.draw(trace, np.full((2, 4, 4, 3), 255, np.uint8), size=SIZE, columns=2)
    for f, alive in ((0, 0), (1, 3)):
        panel = sheet(picture, 1, f, SIZE)
        for token in range(4):
            bright = 1.0 if token == alive else DIM
            assert cell(panel, token) == pytest.approx(bright, abs=0.01)


def test_frames_that_the_model_did_not_see_are_refused():
    trace = Trace([video_record(TokenMap.identity(1, 15), three_frames())], batch=1)
    with pytest.raises(ValueError, match="image has 4 frames, the model saw 3"):
        vtr.draw(trace, np.zeros((4, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="uint8"):
        vtr.draw(trace, np.zeros((3, 8, 8, 3)))
    with pytest.raises(ValueError, match=r"has 2 pictures: choose .*0: image, 1: video"):
        vtr.draw(trace)
    with pytest.raises(ValueError, match=r"image 0 .* not a known rectangle"):
        vtr.draw(trace, which=0)
    with pytest.raises(ValueError, match="columns must be >= 1"):
        vtr.draw(trace, columns=0)


def test_crops_are_drawn_where_they_show_the_whole_image():
    """The base crop, and the crops put together without their newlines."""
    views = (View("whole image", (2, 2), 0, 2), View("crops", (2, 3), 4, 4))
    frame = torch.tensor([[0, 0, 0, 0, 0, 0, 0, -1, 0, 0, 0, -1]])
    none = torch.full((1, 12), -1)
    spans = [[VisualSpan(0, 12, "image", 1, None, None, views)]]
    frames = Frames(frame, none, torch.zeros_like(frame), spans)
    trace = Trace([video_record(TokenMap.keep(torch.tensor([[1, 4, 10]]), 12), frames)], batch=1)
    base, crops = panels(vtr.draw(trace, size=SIZE))
    for token in range(4):
        bright = GREY if token == 1 else DIM * GREY
        assert cell(base, token) == pytest.approx(bright, abs=0.01)
    column = np.array([10, 32, 54])
    for r in range(2):
        for c in range(3):
            bright = GREY if (r, c) in {(0, 0), (1, 2)} else DIM * GREY
            assert crops[16 + 32 * r, column[c]] == pytest.approx(bright, abs=0.01)


def tiled(number: int, raster: bool) -> Trace:
    """Tiles of 2 x 2 tokens, of which the first of each is kept; then a thumbnail of the whole."""
    n = 4 * (number + 1)
    views = (View("tiles", (2, 2), 0, 2, number, raster), View("thumbnail", (2, 2), n - 4, 2))
    frame, none = torch.zeros(1, n, dtype=torch.long), torch.full((1, n), -1)
    frames = Frames(frame, none, frame, [[VisualSpan(0, n, "image", 1, None, None, views)]])
    kept = TokenMap.keep(torch.arange(number)[None] * 4, n)
    return Trace([video_record(kept, frames)], batch=1)


@pytest.mark.parametrize(("shape", "layout"), [((20, 30), (2, 3)), ((31, 19), (3, 2))])
def test_tiles_lie_on_the_image_in_the_rows_that_fit_its_shape(shape, layout):
    image = np.full((*shape, 3), 255, np.uint8)
    _, whole, thumbnail = panels(vtr.draw(tiled(6, True), image, size=96), size=96)
    down, across = (96 // n for n in layout)
    for r in range(layout[0]):
        for c in range(layout[1]):
            tile = whole[r * down : (r + 1) * down, c * across : (c + 1) * across]
            for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
                bright = 1.0 if (i, j) == (0, 0) else DIM
                here = tile[down // 4 + i * down // 2, across // 4 + j * across // 2]
                assert here == pytest.approx(bright, abs=0.01), (r, c, i, j)
    assert thumbnail[20, 20] == pytest.approx(DIM, abs=0.01)


@pytest.mark.parametrize(
    ("raster", "image"), [(True, None), (False, np.zeros((9, 9, 3), np.uint8))]
)
def test_tiles_of_an_unknown_place_stand_in_their_order_on_grey(raster, image):
    """Three tiles: two beside each other, one below, a dark line between them."""
    drawn = panels(vtr.draw(tiled(3, raster), image, size=100, show_input=False), size=100)[0]
    middle = [10, 30, 50, 70, 90]
    cells = np.array([[drawn[y, x].mean() for x in middle] for y in middle])
    expected = np.full((5, 5), DIM * GREY)
    expected[[0, 0, 3], [0, 3, 0]] = GREY
    assert cells == pytest.approx(expected, abs=0.01)


def test_masks_of_sparse_attention_have_a_panel_for_the_layers_that_share_one():
    kernels = pytest.importorskip("vtr.kernels")
    eye = kernels.BlockMask.from_dense(torch.eye(64, dtype=torch.bool), block=(16, 16))
    full = kernels.BlockMask.from_dense(torch.ones(64, 64, dtype=torch.bool), block=(16, 16))
    notes = {i: {"mask": m, "density": m.density} for i, m in enumerate((full, eye, eye, full))}
    trace = Trace(notes={"attention": notes})
    dense, diagonal = panels(vtr.draw(trace, size=SIZE))
    dark = np.array((31, 58, 95)) / 255
    assert dense.reshape(-1, 3).mean(0) == pytest.approx(dark, abs=0.01)
    assert diagonal[8, 8] == pytest.approx(np.array((122, 162, 200)) / 255, abs=0.01)
    assert diagonal[8, 24] == pytest.approx(1.0)
    assert len(panels(vtr.draw(trace, panels=1, size=SIZE))) == 1
    with pytest.raises(ValueError, match="no attention layer kept a mask"):
        vtr.draw(Trace(notes={"attention": {0: {"density": 0.5}}}))
