"""Re-ttention against its formulas, written out on the whole map."""

from __future__ import annotations

import pytest
import torch

from tests.methods.sites import TOLERANCE, Run, attention, tensors
from vtr.core.registry import create
from vtr.methods.common.kept import Kept, kept_bytes
from vtr.methods.radial import RadialAttention
from vtr.methods.random_sparse import OwnFrame
from vtr.methods.rectified import RectifiedSparse
from vtr.methods.rettention import Rettention
from vtr.methods.sliding_tile import SlidingTile

VIDEO, IMAGE = (3, 4, 10), (1, 8, 16)


def _band(grid, text, text_first, width):
    """The authors' mask by its definition: places in the frame at most half a width apart."""
    frames, n = grid[0], grid[1] * grid[2]
    place = torch.arange(n).repeat(frames)
    near = (place[:, None] - place[None]).abs() <= width // 2
    out = torch.ones(frames * n + text, frames * n + text, dtype=torch.bool)
    first = text if text_first else 0
    out[first : first + frames * n, first : first + frames * n] = near
    return out


def _drifted(qkv, step, seed=1):
    """Inputs that change slowly from step to step."""
    g = torch.Generator().manual_seed(seed)
    return [t + 0.05 * step * torch.randn(t.shape, generator=g).to(t.dtype) for t in qkv]


@pytest.mark.parametrize(
    ("grid", "text", "text_first"), [(IMAGE, 0, False), (VIDEO, 0, False), (VIDEO, 9, True), (VIDEO, 9, False)]
)  # fmt: skip
@pytest.mark.parametrize("clamp", [False, True])
def test_a_run_follows_the_formulas(grid, text, text_first, clamp):
    method = Rettention(density=0.3, dense_steps=2, refresh=3, block=16, clamp=clamp, drift=0.1)
    run = Run(method, grid, text_first=text_first)
    seen = _band(grid, text, text_first, int(grid[1] * grid[2] * 0.3))
    ratio = residual = None
    base = tensors(grid, text)
    for step in range(10):
        qkv = _drifted(base, step)
        out = run(qkv, step)
        dense, dense_lse = attention(*qkv, torch.tensor(True), 0.25)
        sparse, sparse_lse = attention(*qkv, seen, 0.25)
        if step < 2:
            assert not run.state
            expected = dense
        elif (step - 2) % 3 == 0:
            ratio = torch.exp(sparse_lse - dense_lse)
            residual = dense - ratio[..., None] * sparse
            expected = dense
        else:
            used = ratio.clamp(max=1) if clamp else ratio
            expected = used[..., None] * sparse + residual
            ratio = ratio + 0.1
        torch.testing.assert_close(out.double(), expected, atol=2e-5, rtol=2e-5)


def test_the_ratio_is_the_share_of_the_softmax_that_the_mask_keeps():
    method = Rettention(density=0.3, block=16)
    run = Run(method, VIDEO)
    q, k, v = tensors(VIDEO)
    run((q, k, v), 0)
    weights = torch.softmax(q @ k.mT * 0.25, -1)
    kept = (weights * _band(VIDEO, 0, False, 12)).sum(-1)
    torch.testing.assert_close(run.state["measured"].ratio, kept, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("text", [0, 9])
def test_unchanged_input_gives_the_dense_output_in_every_step(dtype, text):
    method = Rettention(density=0.2, block=16, drift=0.0)
    qkv = tensors(VIDEO, text, dtype=dtype)
    run = Run(method, VIDEO)
    expected = run.site(qkv).dense()
    bare, _ = attention(*qkv, _band(VIDEO, text, False, 8), 0.25)
    for step in range(3):
        out = run(qkv, step)
        assert out.dtype == dtype
        torch.testing.assert_close(out, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert (bare - expected).abs().max() > 10 * TOLERANCE[dtype], "the mask alone is far from dense"


def test_the_residual_before_the_projection_is_the_one_after_it():
    """to_out is linear, so to_out(rho s') + [to_out(d) - to_out(rho s)] = to_out(rho s' + d - rho s)."""
    to_out = torch.nn.Linear(32, 24).double()
    dense, before, now = (torch.randn(2, 10, 32).double() for _ in range(3))
    theirs = to_out(now) + (to_out(dense) - to_out(before))
    torch.testing.assert_close(to_out(now + (dense - before)), theirs)


def test_a_full_band_is_dense():
    """Half the width on either side: a density of 2 would be needed to see all; whole blocks do."""
    method = Rettention(density=1.0, block=128, whole_blocks=True, residual=False, drift=0.0)
    qkv = tensors(IMAGE)
    run = Run(method, IMAGE)
    for step in range(2):
        torch.testing.assert_close(run(qkv, step), run.site(qkv).dense(), atol=1e-5, rtol=1e-5)
    assert run.notes["density"] == 1.0


def test_a_density_of_one_is_not_dense_between_refreshes():
    """The band of the authors' code ends at half a frame to each side, and its ratio drifts."""
    method = Rettention(density=1.0, block=16)
    seen = _band(IMAGE, 0, False, 128)
    assert seen.float().mean() == pytest.approx(0.75, abs=0.01)
    qkv, run = tensors(IMAGE), Run(method, IMAGE)
    dense, whole = attention(*qkv, torch.tensor(True), 0.25)
    sparse, part = attention(*qkv, seen, 0.25)
    ratio = torch.exp(part - whole)[..., None]
    for step in range(5):
        grown = 0.04 * max(0, step - 1)
        torch.testing.assert_close(
            run(qkv, step).double(), dense + grown * sparse, atol=2e-5, rtol=2e-5
        )
    assert float((ratio < 1).float().mean()) > 0.9


def test_a_mask_that_changes_from_step_to_step_is_refused():
    searched = SlidingTile(tile=(1, 2, 2), table="windows.json")
    with pytest.raises(ValueError, match="must not be used with another"):
        Rettention(mask=searched)


def test_another_methods_mask_is_reshaped():
    inner = OwnFrame(block=16)
    method = Rettention(mask=inner, block=16, drift=0.0, residual=False)
    qkv = tensors(VIDEO, 9)
    run = Run(method, VIDEO)
    run(qkv, 0)
    frame = torch.arange(120) // 40
    seen = torch.ones(129, 129, dtype=torch.bool)
    seen[:120, :120] = frame[:, None] == frame[None]
    sparse, lse = attention(*qkv, seen, 0.25)
    _, whole = attention(*qkv, torch.tensor(True), 0.25)
    expected = sparse * torch.exp(lse - whole)[..., None]
    torch.testing.assert_close(run(qkv, 1).double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "inner",
    [
        SlidingTile(tile=(1, 2, 5), window=(1, 2, 1), block=16),
        SlidingTile(window=(1, 2, 1), block=32),
    ],
)
def test_a_reordered_mask_keeps_ratios_with_their_tokens(inner):
    method = Rettention(mask=inner, drift=0.0)
    qkv = tensors(VIDEO, 9)
    run = Run(method, VIDEO, text_first=True)
    expected = run.site(qkv).dense()
    for step in range(3):
        torch.testing.assert_close(run(qkv, step), expected, atol=1e-5, rtol=1e-5)


def test_padded_text():
    valid = torch.tensor([[True] * 9, [True] * 2 + [False] * 7])
    method = Rettention(density=0.2, block=16, drift=0.0)
    qkv = tensors(VIDEO, 9)
    run = Run(method, VIDEO, text_valid=valid)
    expected = run.site(qkv).dense()
    for step in range(2):
        torch.testing.assert_close(run(qkv, step), expected, atol=1e-5, rtol=1e-5)
    # What stands in the padding changes nothing.
    qkv[1][1, :, 125:] = 50.0
    torch.testing.assert_close(run(qkv, 2)[:, :, :120], expected[:, :, :120], atol=1e-5, rtol=1e-5)


def test_the_radial_mask():
    inner = RadialAttention(block=16, decay=0.5)
    method = Rettention(mask=inner, block=16, drift=0.0, residual=False)
    grid = (6, 4, 8)
    qkv = tensors(grid)
    run = Run(method, grid)
    run(qkv, 0)
    seen = inner.sequence_mask(Run(inner, grid).site(qkv)).mask.to_dense()
    assert not seen.all()
    sparse, lse = attention(*qkv, seen, 0.25)
    expected = sparse * torch.exp(lse - attention(*qkv, torch.tensor(True), 0.25)[1])[..., None]
    torch.testing.assert_close(run(qkv, 1).double(), expected, atol=1e-5, rtol=1e-5)
    assert create(**method.to_dict()) == method


@pytest.mark.parametrize("precision", [None, "float32", "bfloat16", "float16", "float8"])
@pytest.mark.parametrize("offload", [False, True])
def test_precisions_of_the_residual(precision, offload):
    method = Rettention(density=0.2, block=16, drift=0.0, precision=precision, offload=offload)
    qkv = tensors(VIDEO, dtype=torch.float32)
    run = Run(method, VIDEO)
    expected = run(qkv, 0)
    error = (run(qkv, 1) - expected).abs().max() / expected.abs().max()
    limit = {None: 1e-5, "float32": 1e-5, "bfloat16": 2**-8, "float16": 2**-11, "float8": 2**-4}
    assert error <= limit[precision]
    if precision in ("bfloat16", "float8"):
        assert error > 1e-4, "the residual is stored in few bits"
    size = method.memory(layers=1, batch=2, heads=2, tokens=120, head_dim=16, dtype=torch.float32)
    known = run.state["measured"]
    assert known.residual.bytes == size["residual"]
    assert known.ratio.numel() * 4 == size["ratio"]
    assert run.notes["rettention_bytes"]["residual"] == 4 * size["residual"]
    assert run.notes["kept_bytes"] == size["ratio"] + size["residual"]


def test_double_precision_is_kept_as_it_is():
    method = Rettention(density=0.2, block=16, drift=0.0, backend="reference")
    qkv = tensors(VIDEO, dtype=torch.float64)
    run = Run(method, VIDEO)
    dense = run(qkv, 0)
    torch.testing.assert_close(run(qkv, 1), dense, atol=1e-6, rtol=1e-6)
    rows = 4 * 2 * 2 * 120
    assert run.notes["rettention_bytes"]["residual"] == 8 * 16 * rows


def test_float8_of_rows_without_values_and_with_large_ones():
    x = torch.tensor([[0.0, 0.0], [1e4, -3.0], [1e-6, -1e-6]])
    kept = Kept("float8", False)
    kept.store(x)
    found = kept.load(x.device)
    assert torch.isfinite(found).all()
    assert ((found - x).abs() <= 2**-4 * x.abs() + 1e-12).all()
    assert kept.bytes == kept_bytes(3, 2, "float8")


def test_memory_of_published_models():
    """CogVideoX-2B at 480 x 720 x 49, both guidance branches in a batch of 2."""
    method = Rettention.preset("cogvideox")
    size = method.memory(layers=30, batch=2, heads=30, tokens=17776, head_dim=64)
    assert size["residual"] == 30 * 2 * 30 * 17776 * 64 * 2
    assert size["ratio"] == 30 * 2 * 30 * 17776 * 4
    fewer = method.replace(dense_layers=(0, 1, 99), residual=False)
    assert fewer.memory(layers=30, batch=2, heads=30, tokens=17776, head_dim=64) == {
        "ratio": 28 * 2 * 30 * 17776 * 4, "residual": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("preset", "steps", "first"),
    [("pixart-alpha", 20, 5), ("pixart-sigma", 20, 5), ("hunyuan-dit", 50, 10), ("cogvideox", 50, 15)],
)  # fmt: skip
def test_the_schedules_of_the_authors(preset, steps, first):
    """Dense steps, then a dense refresh every five steps: 12 of PixArt's 20 steps are sparse and 28
    of CogVideoX's 50."""
    run = Run(Rettention.preset(preset, density=0.3, block=16, residual=False), IMAGE, steps=steps)
    qkv, measured = tensors(IMAGE, batch=1, heads=1), []
    for step in range(steps):
        run(qkv, step)
        known = run.state.get("measured")
        measured.append(None if known is None else known.step)
    assert measured[:first] == [None] * first
    assert measured[first:] == [first + (n // 5) * 5 for n in range(steps - first)]
    sparse = sum(m is not None and m != step for step, m in enumerate(measured))
    assert sparse == {20: 12, 50: 32 if first == 10 else 28}[steps]


@pytest.mark.parametrize(
    ("grid", "text", "half"), [((1, 64, 64), 0, 64), ((2, 30, 45), 226, 21)], ids=["image", "video"]
)
def test_the_bands_of_the_authors(grid, text, half):
    """1/32 of 4096 tokens is 128, 64 on either side; of CogVideoX's 1350 places, 42 and 21."""
    site = Run(Rettention(), grid, text_first=True).site(
        [torch.zeros(1, 1, torch.Size(grid).numel() + text, 1)] * 3
    )
    mask = Rettention().sequence_mask(site).mask.to_dense()
    places, row = grid[1] * grid[2], 700
    band = torch.zeros(places, dtype=torch.bool)
    band[row - half : row + half + 1] = True
    want = torch.cat([torch.ones(text, dtype=torch.bool), band.repeat(grid[0])])
    assert torch.equal(mask[text + row], want)
    want[text:] = False  # not clamped at the border: a row there has fewer keys
    want[text:].view(grid[0], -1)[:, : half + 1] = True
    assert torch.equal(mask[text], want)
    assert mask[:text].all()


def test_skipped_steps_neither_drift_nor_count():
    """A cache of the pipeline skipped steps 1 and 2 and the refresh at 5: by step, not by call."""
    method = Rettention(density=0.3, block=16, refresh=5, drift=0.1, residual=False)
    qkv = tensors(VIDEO)
    once, all_steps = Run(method, VIDEO), Run(method, VIDEO)
    for step in range(4):
        expected = all_steps(qkv, step)
    once(qkv, 0)
    torch.testing.assert_close(once(qkv, 3), expected)
    torch.testing.assert_close(once(qkv, 3), expected)
    assert once.state["measured"].step == 0
    torch.testing.assert_close(once(qkv, 7), once.site(qkv).dense(), atol=1e-5, rtol=1e-5)
    assert once.state["measured"].step == 7


def test_another_batch_is_measured_anew():
    """Guidance that is switched off in the midst of a run halves the batch."""
    method = Rettention(density=0.3, block=16)
    run, fresh = Run(method, VIDEO), Run(method, VIDEO)
    run(tensors(VIDEO), 0)
    half = tensors(VIDEO, batch=1, seed=1)
    for step in (1, 2, 3):
        assert torch.equal(run(half, step), fresh(half, step))
    assert run.state["measured"].step == 1


def test_a_changed_size_or_mask_is_refused():
    method = Rettention(density=0.3, block=16)
    run = Run(method, VIDEO)
    run(tensors(VIDEO), 0)
    run.grid = (4, 4, 10)
    with pytest.raises(RuntimeError, match="mask has changed"):
        run(tensors((4, 4, 10)), 1)
    with pytest.raises(RuntimeError, match=r"model.eval\(\)"):
        method.attend(run.site(tensors(VIDEO), training=True))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mask": RectifiedSparse()}, "must not be used with another"),
        ({"mask": Rettention()}, "static mask"),
        ({"mask": SlidingTile(), "whole_blocks": True}, "for the band"),
        ({"density": 0.0}, "density must be"),
        ({"refresh": 0}, "refresh must be"),
        ({"precision": "int8"}, "precision must be one of float32"),
        ({"drift": 2}, "drift must be"),
    ],
)
def test_bad_options_say_what_to_do(options, words):
    with pytest.raises(ValueError, match=words):
        Rettention(**options)


def test_is_written_and_read():
    method = Rettention(mask=SlidingTile(window=(3, 3, 3)), precision="float8")
    assert create(**method.to_dict()) == method


def test_a_batch_is_its_samples():
    method = Rettention(density=0.3, block=16)
    both, alone = Run(method, VIDEO), [Run(method, VIDEO) for _ in range(2)]
    base = tensors(VIDEO)
    for step in range(3):
        qkv = _drifted(base, step)
        out = both(qkv, step)
        for i, run in enumerate(alone):
            torch.testing.assert_close(out[i : i + 1], run([t[i : i + 1] for t in qkv], step))
