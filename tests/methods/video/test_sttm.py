"""STTM: quadtrees and links between frames, recomputed node by node."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vtr
from tests.methods.video.by_hand import SEEDS, clip, cos
from tests.vision.vlm.models import llava
from tests.vision.vlm.videos import VIDEOS

Node = tuple[list[int], Tensor]  # its tokens in the frame, and its value


def cuts(size: int) -> list[range]:
    """The cells of one side, as the next level joins them."""
    odd = size % 2
    return [range(1)] * odd + [range(i, i + 2) for i in range(odd, size, 2)]


def slow_tree(x: Tensor, threshold: float, root: int) -> list[Node]:
    """The nodes of one frame of (H, W, C)."""
    h, w, _ = x.shape
    level = [[([r * w + c], x[r, c].double()) for c in range(w)] for r in range(h)]
    levels, children = [level], []
    while min(len(level), len(level[0])) > 2:
        below, level = level, []
        inside: list[list[list[Node]]] = []
        for rows in cuts(len(below)):
            blocks = [[below[r][c] for r in rows for c in cs] for cs in cuts(len(below[0]))]
            inside.append(blocks)
            level.append(
                [([i for n in b for i in n[0]], sum(n[1] for n in b) / len(b)) for b in blocks]
            )
        levels.append(level)
        children.append(inside)
    top = max(0, len(levels) - 1 - root)

    def nodes(at: int, r: int, c: int) -> list[Node]:
        node = levels[at][r][c]
        if at == 0:
            return [node]
        if all(cos(child[1], node[1]) >= threshold for child in children[at - 1][r][c]):
            return [node]
        where = {id(n): (i, j) for i, row in enumerate(levels[at - 1]) for j, n in enumerate(row)}
        return [n for child in children[at - 1][r][c] for n in nodes(at - 1, *where[id(child)])]

    return [
        n
        for r in range(len(levels[top]))
        for c in range(len(levels[top][0]))
        for n in nodes(top, r, c)
    ]


def slow(x: Tensor, threshold: float, temporal: float, root: int) -> dict[int, Tensor]:
    """The tokens that are left of (T, H, W, C): index of the place, and value."""
    p = x.shape[1] * x.shape[2]
    nodes = [(t, *n) for t in range(len(x)) for n in slow_tree(x[t], threshold, root)]
    group = list(range(len(nodes)))
    for i, (t, cells, value) in enumerate(nodes):
        for j, (s, others, other) in enumerate(nodes):
            if s == t + 1 and set(cells) & set(others) and cos(value, other) >= temporal:
                old, new = group[j], group[i]
                group = [new if g == old else g for g in group]
    out = {}
    for g in set(group):
        mine = [n for n, own in zip(nodes, group, strict=True) if own == g]
        place = min(t * p + min(cells) for t, cells, _ in mine)
        out[place] = sum(v for _, _, v in mine) / len(mine)
    return out


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("h", "w", "root"), [(4, 4, 0), (7, 7, 1), (5, 6, 0), (6, 3, 0), (2, 5, 1)]
)
def test_equals_the_trees_by_hand(seed: int, h: int, w: int, root: int) -> None:
    x = clip(5, h * w, seed=seed, noise=0.4).view(5, h, w, -1)
    x = (
        x
        + 2
        * torch.randn(1, -(-h // 3), -(-w // 3), 12)
        .repeat_interleave(3, 1)
        .repeat_interleave(3, 2)[:, :h, :w]
    )
    stands, weights = vtr.STTM(0.6, 0.8, root=root).merge(x)
    wanted = slow(x, 0.6, 0.8, root)
    assert sorted(set(stands.tolist())) == sorted(wanted) and 1 < len(wanted) < 5 * h * w
    flat = x.reshape(5 * h * w, -1).double()
    for place, value in wanted.items():
        mine = stands == place
        got = (flat[mine] * weights[mine, None]).sum(0)
        torch.testing.assert_close(got, value, atol=1e-5, rtol=1e-5)


def test_without_thresholds_nothing_merges() -> None:
    x = torch.ones(3, 4, 4, 6)
    assert vtr.STTM(None, None).merge(x)[0].tolist() == list(range(48))
    assert vtr.STTM(None, 0.9).merge(x)[0].tolist() == list(range(16)) * 3
    whole = vtr.STTM(0.9, None, root=0).merge(x)[0]
    assert whole.unique().tolist() == [16 * t + i for t in range(3) for i in (0, 2, 8, 10)]


@pytest.mark.parametrize("name", ["llava_onevision_mixed", "qwen2_5_vl_video"])
def test_merges_the_states_behind_a_layer(name: str) -> None:
    """A batch leaves what its samples leave alone, and merged tokens are means of their states."""
    model, inputs = VIDEOS[name](2)
    seen: dict[str, Any] = {}
    method = vtr.STTM(0.4, 0.3, layer=1, root=0)
    merge = vtr.STTM.merge

    def noted(self: vtr.STTM, x: Tensor) -> tuple[Tensor, Tensor]:
        made = merge(self, x)
        seen.setdefault("made", []).append((x, *made))
        return made

    with pytest.MonkeyPatch.context() as patch, torch.no_grad(), vtr.apply(model, method) as handle:
        patch.setattr(vtr.STTM, "merge", noted)
        model(**inputs)
    stage = handle.trace.stages[-1]
    assert seen["made"]
    for x, stands, _ in seen["made"]:
        expected = slow(x, 0.4, 0.3, 0)
        assert sorted(set(stands.tolist())) == sorted(expected)
        assert len(expected) < len(stands)
    left = sum(len(stands) - len(set(stands.tolist())) for _, stands, _ in seen["made"])
    kept = stage.total.kept
    entry = int((stage.total.source >= 0).sum())  # nothing is dropped
    assert int((kept >= 0).sum()) == entry - left


def test_pictures_stay_whole() -> None:
    model, inputs = llava(2)
    with torch.no_grad(), vtr.apply(model, vtr.STTM()) as handle:
        cut = model(**inputs).logits
    with torch.no_grad():
        assert torch.equal(cut, model(**inputs).logits)
    assert "no video" in handle.trace.notes["sttm"]


@pytest.mark.parametrize(
    "options", [{"threshold": 1.1}, {"temporal": "x"}, {"layer": 0}, {"root": -1}, {"root": 1.0}]
)
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        vtr.STTM(**options)


def test_a_layer_that_does_not_exist_is_refused() -> None:
    model, _ = llava(1)
    with pytest.raises(ValueError, match=r"layer must be in 1..3 for 4 layers, got 4"):
        vtr.apply(model, vtr.STTM(layer=4))
