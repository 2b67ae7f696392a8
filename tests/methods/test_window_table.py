"""SlidingTile with a table: windows of their own for every step, layer and head."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

import vtr
from tests.diffusion.models import CASES, replaced
from tests.methods.sites import Run, attention, tensors, visible
from vtr.core.registry import create
from vtr.methods.sliding_tile import SlidingTile

GRID, TILE = (4, 5, 8), (2, 3, 4)  # 2 x 2 x 2 tiles, smaller ones at the end of the second axis
WINDOWS = [(2, 2, 2), (1, 2, 2), (2, 1, 2), (2, 2, 1), (1, 1, 1)]


def window_of(step, layer, head):
    """The first two steps are dense; in the third one layer is."""
    if step < 2 or (step, layer) == (2, 1):
        return WINDOWS[0]
    return WINDOWS[1 + (step + 2 * layer + head) % 4]


def write(path, steps=4, layers=2, heads=3, of=window_of):
    every = itertools.product(range(steps), range(layers), range(heads))
    path.write_text(json.dumps({f"{s}_{n}_{h}": of(s, n, h) for s, n, h in every}))
    return str(path)


def _seen(window, grid=GRID, tile=TILE):
    """By the definition of a sliding tile, token by token in raster order."""
    place = torch.tensor(list(itertools.product(*map(range, grid)))) // torch.tensor(tile)
    count = torch.tensor([-(-n // t) for n, t in zip(grid, tile, strict=True)])
    w = torch.tensor(window)
    centre = torch.minimum(torch.maximum(place, w // 2), count - 1 - (w - 1) // 2)
    apart = place[None] - centre[:, None]
    return ((apart >= -(w // 2)) & (apart <= (w - 1) // 2)).all(-1)


@pytest.mark.parametrize("text_first", [False, True])
@pytest.mark.parametrize(("padded", "key_heads"), [(False, 3), (True, 3), (False, 1)])
def test_every_head_has_its_window(tmp_path, text_first, padded, key_heads):
    method = SlidingTile(tile=TILE, table=write(tmp_path / "windows.json"), block=16)
    text, n = 6, torch.Size(GRID).numel()
    valid = torch.tensor([[True] * 6, [True] * 2 + [False] * 4]) if padded else None
    first = text if text_first else 0
    qkv = tensors(GRID, text, heads=3, key_heads=key_heads)
    shown = visible(GRID, text, text_first, valid, 2)[:, None, None]
    for layer in range(2):
        run = Run(method, GRID, text_first=text_first, text_valid=valid, steps=4, layer=layer)
        for step in range(4):
            seen = torch.ones(3, n + text, n + text, dtype=torch.bool)
            for head in range(3):
                window = window_of(step, layer, head)
                seen[head, first : first + n, first : first + n] = _seen(window)
            expected, _ = attention(*qkv, seen[None] & shown, 0.25)
            torch.testing.assert_close(run(qkv, step).double(), expected, atol=1e-5, rtol=1e-5)
            whole = all(window_of(step, layer, h) == (2, 2, 2) for h in range(3))
            assert (run.notes["density"] == 1.0) == whole


def test_its_work_is_that_of_the_heads_windows(tmp_path):
    """Whole tiles of whole blocks: the share is the mean over heads of the windows' shares."""
    grid, tile = (4, 4, 8), (2, 2, 4)
    table = write(tmp_path / "w.json", of=lambda s, n, h: WINDOWS[(s + h) % 5])
    run = Run(SlidingTile(tile=tile, table=table, block=16), grid, steps=4)
    qkv = tensors(grid, heads=3)
    for step in range(4):
        run(qkv, step)
        share = [torch.Size(WINDOWS[(step + h) % 5]).numel() / 8 for h in range(3)]
        assert run.notes["density"] == pytest.approx(sum(share) / 3)


@torch.no_grad()
def test_in_a_pipeline(tmp_path):
    """HunyuanVideo: padded text, two heads, dense and single-stream layers, every step its own."""
    from tests.diffusion import pipes

    case, tile, steps = CASES["hunyuan-video"], (2, 2, 3), 4

    def of(step, layer, head):
        return WINDOWS[0] if step == 0 else WINDOWS[(step + layer + head) % 5]

    table = write(tmp_path / "w.json", steps, 3, 2, of)
    pipe, now = pipes.make("hunyuan-video"), {"call": 0}

    def formula(name, q, k, v, valid):
        step, layer = divmod(now["call"], 3)
        now["call"] += 1
        seen = torch.ones(2, q.shape[2], q.shape[2], dtype=torch.bool)
        for head in range(2):
            seen[head, :45, :45] = _seen(of(step, layer, head), case.grid, tile)
        return attention(q, k, v, seen[None] & valid, q.shape[-1] ** -0.5)[0]

    with replaced(pipe.transformer, case.attention, formula):
        want = pipes.call(pipe, "hunyuan-video", steps)
    assert now["call"] == 3 * steps
    with vtr.apply(pipe, SlidingTile(tile=tile, table=table, block=16)):
        found = pipes.call(pipe, "hunyuan-video", steps)
        again = pipes.call(pipe, "hunyuan-video", steps)
    torch.testing.assert_close(found, want, atol=5e-5, rtol=5e-5)
    assert torch.equal(found, again)
    assert not torch.allclose(found, pipes.call(pipe, "hunyuan-video", steps), atol=1e-3)


def test_what_does_not_fit_the_table_is_refused(tmp_path):
    table = write(tmp_path / "windows.json")
    method = SlidingTile(tile=TILE, table=table, block=16)
    qkv = tensors(GRID, heads=3)
    with pytest.raises(RuntimeError, match="for 4 denoising steps, this run has 20"):
        Run(method, GRID)(qkv)
    with pytest.raises(RuntimeError, match="for 4 denoising steps, this run has more"):
        Run(method, GRID, steps=None)(qkv, 4)
    with pytest.raises(RuntimeError, match="for 3 heads, and 2 are here"):
        Run(method, GRID, steps=4)(tensors(GRID, heads=2))
    with pytest.raises(RuntimeError, match="training has no such steps"):
        method.attend(Run(method, GRID, steps=4).site(qkv, training=True))
    with pytest.raises(
        RuntimeError, match=r"for \(2, 2, 2\) tiles; \(4, 7, 8\) tokens .* \(2, 3, 2\)"
    ):
        Run(method, (4, 7, 8), steps=4)(tensors((4, 7, 8), heads=3), 3)
    with pytest.raises(ValueError, match="2 layers of 3 heads; Wan here has 3 of 2"):
        vtr.apply(CASES["wan"].build(), method)
    with pytest.raises(ValueError, match=r"give tile=\(6, 8, 8\) with it"):
        SlidingTile(table=table)
    with pytest.raises(ValueError, match="table must be the path"):
        SlidingTile(tile=TILE, table=3)
    assert create(**method.to_dict()) == method


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("no JSON", "is no JSON object"),
        ("[1, 2]", "is no JSON object"),
        ("{}", "is no JSON object"),
        ('{"0_0": [1, 1, 1]}', "is no JSON object"),
        ('{"0_0_0": 3}', "is no JSON object"),
        ('{"0_0_0": [1, 1]}', "three positive ints"),
        ('{"0_0_0": [1, 0, 1]}', "three positive ints"),
        ('{"0_0_0": [1, 1, 1], "0_1_1": [1, 1, 1]}', r"first that lacks one is \(0, 0, 1\)"),
    ],
)
def test_a_file_that_is_no_table(tmp_path, content, words):
    path = tmp_path / "windows.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=words):
        vtr.apply(CASES["wan"].build(), SlidingTile(tile=TILE, table=str(path)))


def test_the_preset_of_the_released_search_asks_for_its_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    method = SlidingTile.preset("hunyuanvideo-searched")
    assert (method.tile, method.dense_steps) == ((6, 8, 8), 0)
    with pytest.raises(ValueError, match=r"no such file.*branch sta_do_not_delete"):
        vtr.apply(CASES["wan"].build(), method)
    write(tmp_path / "mask_strategy_hunyuan.json", steps=50, layers=60, heads=24)
    with pytest.raises(ValueError, match="60 layers of 24 heads"):
        vtr.apply(CASES["wan"].build(), method)
