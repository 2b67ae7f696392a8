"""FlowCut's information flow against its formulas (arXiv 2505.19536), token by token."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import vtr
from tests.tiny import images, site, vit
from vtr.core.site import ModelInfo, Site
from vtr.core.tokens import TokenMap
from vtr.methods.flowcut import _mean_mask, flow_scores, relative_entropy


def softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    total = sum(math.exp(x - top) for x in logits)
    return [math.exp(x - top) / total for x in logits]


def share(row: list[float]) -> list[float]:
    return [x / sum(row) for x in row]


def written_out(
    q: Tensor, k: Tensor, v: Tensor, prefix: int, cls: bool
) -> tuple[list[float], list[float]]:
    """Inflow r and score (r + s) n of one sample; q, k, v (H, T, D)."""
    q, k, v = q.double(), k.double(), v.double()
    heads, tokens, dim = q.shape
    r_rows, s_rows = [], []
    for h in range(heads):
        mean = sum(q[h, j] for j in range(prefix, tokens)) / (tokens - prefix)
        query = q[h, 0] if cls else mean
        r_rows.append(
            softmax([float(query @ k[h, j]) / math.sqrt(dim) for j in range(tokens)])[prefix:]
        )
        s_rows.append(softmax([float(v[h, 0] @ v[h, j]) for j in range(tokens)])[prefix:])
    r = share([sum(row[j] for row in r_rows) / heads for j in range(tokens - prefix)])
    s = share([sum(row[j] for row in s_rows) / heads for j in range(tokens - prefix)])
    strength = [
        float((sum(v[h, prefix + j] for h in range(heads)) / heads).abs().sum())
        for j in range(tokens - prefix)
    ]
    score = [(a + (b if cls else 0.0)) * n for a, b, n in zip(r, s, strength, strict=True)]
    return r, score


@given(
    st.integers(2, 16),
    st.integers(0, 999),
    st.sampled_from([(0, False), (1, True), (2, True), (3, False)]),
)
def test_scores(n: int, seed: int, front: tuple[int, bool]) -> None:
    prefix, cls = front
    s = site(n=n, prefix=prefix, seed=seed, has_cls=cls)
    r, score = flow_scores(s)
    for b in range(2):
        inflow, expected = written_out(*(t[b] for t in s.qkv), prefix, cls)
        torch.testing.assert_close(
            r[b].double(), torch.tensor(inflow).double(), atol=1e-5, rtol=1e-4
        )
        torch.testing.assert_close(
            score[b].double(), torch.tensor(expected).double(), atol=1e-4, rtol=1e-4
        )


def test_entropy() -> None:
    uniform = torch.full((1, 8), 1 / 8)
    peaked = torch.tensor([[1.0, 0, 0, 0, 0, 0, 0, 0]])
    n = torch.tensor([8])
    assert relative_entropy(uniform, n).item() == pytest.approx(1.0)
    assert relative_entropy(peaked, n).item() == 0.0, "0 log 0 is 0, not NaN"
    row = torch.tensor([[0.5, 0.25, 0.25, 0]])
    expected = (0.5 * math.log(2) + 0.5 * math.log(4)) / math.log(4)
    assert relative_entropy(row, torch.tensor([4])).item() == pytest.approx(expected)


def literal(
    model: Any, x: Tensor, target: int, end: int
) -> tuple[list[int], list[tuple[int, int]]]:
    """One image through the network: kept tokens, and (layer, number left) of every cut."""
    h = model._pos_embed(model.patch_embed(x))[0]
    prefix, cls = model.num_prefix_tokens, model.cls_token is not None
    alive = list(range(h.shape[0] - prefix))
    total: dict[int, float] = {}
    cuts = []
    for layer, block in enumerate(model.blocks):
        normed = block.norm1(h)
        tokens, width = normed.shape
        q, k, v = block.attn.qkv(normed).reshape(tokens, 3, 3, -1).permute(1, 2, 0, 3)
        weights = (q @ k.transpose(-1, -2) * (width // 3) ** -0.5).softmax(-1)
        h = h + block.attn.proj((weights @ v).transpose(0, 1).reshape(tokens, width))
        h = h + block.mlp(block.norm2(h))
        if layer > end:
            continue
        r, score = written_out(q, k, v, prefix, cls)
        fresh = dict(zip(alive, score, strict=True))
        total = fresh if not total else {j: 0.5 * total[j] + 0.5 * fresh[j] for j in alive}
        left = end - layer
        if left % 2:
            continue
        n = len(alive)
        if left == 0:
            number = target
        else:
            entropy = -sum(p * math.log(p) for p in r if p > 0)
            drop = round((n - target) / math.sqrt(left) * (1 - (entropy / math.log(n)) ** 2))
            number = max(n - drop, target)
        best = sorted(sorted(alive, key=lambda j: -total[j])[:number])
        h = h[[*range(prefix), *[prefix + alive.index(j) for j in best]]]
        if number < n:
            cuts.append((layer, number))
        alive = best
        total = {j: total[j] for j in alive}
    return alive, cuts


@pytest.mark.parametrize(
    "options", [{}, {"class_token": False, "global_pool": "avg"}], ids=["cls", "no-cls"]
)
@pytest.mark.parametrize(("keep", "end"), [(10, None), (20, 6), (33, 5), (63, 7)])
def test_the_schedule_and_the_kept_tokens(
    options: dict[str, Any], keep: int, end: int | None
) -> None:
    model, x = vit(depth=8, **options), images(3)
    with vtr.apply(model, vtr.FlowCut(keep=keep, end=end)) as handle, torch.no_grad():
        model(x)
    stages = handle.trace.stages
    last = stages[-1].total
    assert stages[-1].layer == (6 if end is None else end) and last.n_out == keep
    for b in range(3):
        with torch.no_grad():
            alive, cuts = literal(model, x[b : b + 1], keep, 6 if end is None else end)
        assert last.kept[b].tolist() == alive
        mine, before = [], 64
        for s in stages:
            number = int(s.total.valid[b].sum())
            if number < before:
                mine.append((s.layer, number))
            before = number
        assert mine == cuts


def test_a_peaked_inflow_drops_more() -> None:
    """Same tokens, sharper queries: the earlier cut is larger."""
    left = []
    for sharpness in (0.1, 6.0):
        s = site(n=40, layer=0, depth=8, seed=1)
        s.qkv[0].mul_(sharpness)
        got = vtr.FlowCut(keep=5, end=4).reduce(s)
        left.append(40 if got is None else got.map.n_out)  # type: ignore[union-attr]
    assert left[1] < left[0]


def test_layers_between_cuts_only_look() -> None:
    memory: dict[str, Any] = {}
    first = site(n=12, layer=1, depth=8, memory=memory, seed=1)
    assert vtr.FlowCut(keep=4, end=4).reduce(first) is None
    once = memory["score"].clone()
    torch.testing.assert_close(once, flow_scores(first)[1])
    second = site(n=12, layer=3, depth=8, memory=memory, seed=2)
    assert vtr.FlowCut(keep=4, end=4).reduce(second) is None
    torch.testing.assert_close(memory["score"], 0.5 * once + 0.5 * flow_scores(second)[1])


def test_language_is_a_flag() -> None:
    with pytest.raises(ValueError, match="language must be True or False"):
        vtr.FlowCut(language="no")  # type: ignore[arg-type]


def test_the_mean_querys_mask_is_made_of_a_few_queries_at_a_time() -> None:
    """Relative positions of many images would be a map of all pairs for each of them."""
    torch.manual_seed(0)
    batch, heads, n = 3, 2, 150
    bias = torch.randn(1, heads, n, n).masked_fill(torch.rand(1, heads, n, n) < 0.3, -float("inf"))
    bias[..., 7] = -float("inf")  # seen by none
    valid = torch.ones(batch, n, dtype=torch.bool)
    valid[1, 100:] = False
    site = Site(
        site="encoder",
        layer=0,
        info=ModelInfo("test", {"encoder": 1}, {}),
        hidden=torch.zeros(batch, n, 4),
        map=TokenMap.identity(batch, n),
        memory={},
        valid=valid,
        mask=lambda: bias,
    )
    sizes, look = [], site.mask_rows

    def spy(rows: Tensor) -> Tensor | None:
        sizes.append(rows.shape[1])
        return look(rows)

    site.mask_rows = spy  # type: ignore[method-assign, assignment]
    got = _mean_mask(site)
    assert got is not None and max(sizes) <= 64 and sum(sizes) == n
    seen = (bias > -float("inf")) & valid[:, None, :, None]
    wanted = torch.where(seen, bias, 0.0).sum(2) / seen.sum(2)
    torch.testing.assert_close(got[:, :, 0], wanted.nan_to_num(-float("inf")))
