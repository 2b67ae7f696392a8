"""Decoding steps over chosen columns: what is computed, what is always read, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.methods.decode_sites import alone, always, attention, others, read, seen, sets_of, step
from tests.methods.prompts import INFO, TOLERANCE, dense, qkv, site_of
from vtr.core.site import ModelInfo
from vtr.kernels.columns import take_columns
from vtr.methods.base import DecodeMethod, ReusingMethod
from vtr.methods.common.decode import best_columns, listed, paged


@dataclass(frozen=True, kw_only=True)
class Loudest(DecodeMethod):
    """Keeps what all query heads of a key head attend to most."""

    name: ClassVar[str] = "loudest"
    paper: ClassVar[str] = "none"

    def select(self, site: Any) -> Tensor | None:
        scores = site.last_attention().unflatten(1, (site.k.shape[1], -1)).sum(2)
        _, visual, number, most, _ = self.sides(site)
        return self.read(site, best_columns(scores, visual, number, most))


def loudest(site: Any, keys: int | float, recent: int) -> list[list[set[int]]]:
    group, weight, out = site.q.shape[1] // site.k.shape[1], attention(site), []
    for b in range(site.q.shape[0]):
        candidates, base = others(site, b, recent), always(site, b, recent)
        number = keys if isinstance(keys, int) else int(np.ceil(keys * len(candidates) - 1e-9))
        row = []
        for h in range(site.k.shape[1]):
            total = weight[b, h * group : (h + 1) * group].sum(0)
            row.append(base | set(sorted(candidates, key=lambda c: -total[c])[:number]))
        out.append(row)
    return out


# ---- site.select ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("window", [None, 30])
def test_chosen_columns_are_a_softmax_over_them_alone(
    dtype: torch.dtype, window: int | None
) -> None:
    """In any order, with holes, padding and columns outside of the window among them."""
    site = step(dtype=dtype, window=window)
    g = torch.Generator().manual_seed(3)
    columns = torch.stack([torch.randperm(60, generator=g)[:25] for _ in range(4)]).view(2, 2, 25)
    columns[:, 1, ::4] = -1
    sees = seen(site)
    sets = [
        [{c for c in head if sees[b, c]} for head in row] for b, row in enumerate(sets_of(columns))
    ]
    out = site.select(columns)
    assert out.dtype == dtype
    np.testing.assert_allclose(out.double(), read(site, sets), atol=TOLERANCE[dtype])
    work = sum(len(head) for row in sets for head in row) / 2
    assert float(site.notes["work"]) == pytest.approx(work)
    assert float(site.pairs) == seen(site).sum()


def test_all_columns_are_dense_attention_and_one_is_its_value() -> None:
    site = step()
    every = torch.arange(60).expand(2, 2, -1)
    torch.testing.assert_close(site.select(every), dense(site), atol=1e-6, rtol=0)
    assert float(site.notes["work"]) == float(site.pairs)
    one = torch.tensor([[[40], [7]], [[20], [59]]])  # of sample 1, columns from 13 on are tokens
    rows = [[site.v[b, h, one[b, h, 0]] for h in (0, 0, 1, 1)] for b in (0, 1)]
    values = torch.stack([torch.stack(row) for row in rows])
    torch.testing.assert_close(site.select(one)[:, :, 0], values, atol=1e-6, rtol=0)


def test_a_head_without_columns_is_zero() -> None:
    site = step()
    columns = torch.full((2, 2, 3), -1)
    columns[0, 0, 1] = 9
    out = site.select(columns)
    assert not out[1].any() and not out[0, 2:].any() and out[0, :2].any()
    assert not site.select(columns[:, :, :0]).any()
    assert not step(padding=(0, 60)).select(torch.arange(60).expand(2, 2, -1))[1].any()


def test_select_refuses_what_is_no_step_and_no_columns() -> None:
    site = step()
    with pytest.raises(ValueError, match=r"columns must be int64 of the shape \(2, 2, 'n'\)"):
        site.select(torch.zeros(2, 4, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"int64 .* got torch\.int32 \(2, 2, 3\)"):
        site.select(torch.zeros(2, 2, 3, dtype=torch.int32))
    prompt = site_of(*qkv(8, 8))
    with pytest.raises(ValueError, match=r"decoding steps, and this prefill has 8 rows"):
        prompt.select(torch.zeros(1, 2, 3, dtype=torch.int64))


def test_a_dense_step_by_its_attention_is_the_dense_step() -> None:
    for dtype, tolerance in TOLERANCE.items():
        site, again = step(dtype=dtype), step(dtype=dtype)
        assert site.last_attention() is site.last_attention()
        np.testing.assert_allclose(site.last_attention(), attention(site), atol=1e-5)
        torch.testing.assert_close(site.dense_step(), again.dense_step(), atol=tolerance, rtol=0)
        assert float(site.notes["work"]) == float(again.notes["work"]) == float(site.pairs)


def test_the_last_row_of_a_prompt_is_that_of_each_sample() -> None:
    q, k, v = qkv(12, 12, batch=2)
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[1, 8:] = False
    site = site_of(q, k, v, valid=valid)
    assert site.last_row.tolist() == [[11], [7]]
    wanted = torch.stack([site.attention_rows(site.last_row)[b, :, 0] for b in (0, 1)])
    torch.testing.assert_close(site.last_attention(), wanted)
    assert not site.last_attention()[1, :, 8:].any()


@pytest.mark.parametrize("make", ["cache", "static", "transposed", "expanded", "odd"])
def test_gathered_columns(make: str) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2, 20, 6, generator=g)
    if make == "static":
        x = torch.randn(3, 2, 50, 6, generator=g)[:, :, :20]
    if make == "transposed":
        x = torch.randn(3, 20, 2, 6, generator=g).transpose(1, 2)
    if make == "expanded":
        x = x[:1].expand(3, -1, -1, -1)
    if make == "odd":
        x = torch.randn(3, 2, 20, 7, generator=g)[..., :6]
    columns = torch.randint(20, (3, 2, 9), generator=g)
    wanted = x.gather(2, columns[..., None].expand(-1, -1, -1, 6))
    assert torch.equal(take_columns(x, columns), wanted)
    assert torch.equal(take_columns(x[1:2, :1], columns[1:2, :1]), wanted[1:2, :1])


# ---- what is chosen, and what is always read -----------------------------------------------------


@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize(("keys", "recent"), [(4, 1), (0.3, 1), (0.3, 12), (7, 9)])
def test_a_step_reads_the_best_visual_keys_and_all_others(
    keys: int | float, recent: int, window: int | None
) -> None:
    site = step(window=window)
    method = Loudest(keys, recent=recent)
    wanted = loudest(site, keys, recent)
    columns = method.select(site)
    assert columns is not None and sets_of(columns) == wanted
    np.testing.assert_allclose(method.attend(site), read(site, wanted), atol=1e-5)


def test_a_sample_in_a_batch_is_the_sample_alone() -> None:
    for method in (Loudest(6, recent=10), Loudest(0.2)):
        site = step(100, batch=3, padding=(0, 40, 90))
        out = method.attend(site)
        for b in range(3):
            own = method.attend(alone(site, b))
            torch.testing.assert_close(out[b : b + 1], own, atol=1e-6, rtol=0)


def test_padding_between_a_prompt_and_its_answer_is_not_recent() -> None:
    """A batch that is padded on the right, three steps later."""
    valid = torch.ones(2, 60, dtype=torch.bool)
    valid[1, 30:57] = False
    q, k, v = qkv(1, 60, batch=2)
    site = site_of(q, k, v, valid=valid, before=3, after=3)
    method = Loudest(4, recent=8)
    columns = method.select(site)
    assert columns is not None and sets_of(columns) == loudest(site, 4, 8)
    own = method.attend(alone(site, 1, before=3, after=3))
    torch.testing.assert_close(method.attend(site)[1:], own, atol=1e-6, rtol=0)


def test_prompts_and_turns_are_dense() -> None:
    for rows in (60, 5):
        site = site_of(*qkv(rows, 60))
        assert torch.equal(Loudest(1).attend(site), site.dense())


def test_a_share_of_one_and_more_keys_than_there_are() -> None:
    for keys in (1.0, 4096):
        site = step()
        torch.testing.assert_close(Loudest(keys).attend(site), dense(site), atol=1e-6, rtol=0)
        assert Loudest(keys).sides(site).all
    assert not Loudest(51).sides(step()).all and Loudest(52).sides(step()).all


def test_sides_are_found_once_for_layers_that_hold_the_same() -> None:
    memory: dict[Any, Any] = {}
    first, again = (step(memory=memory) for _ in range(2))
    other = step(memory=memory, held=1)
    method = Loudest(3)
    assert method.sides(first) is method.sides(again)
    assert method.sides(other) is not method.sides(first)
    assert method.sides(step(memory=memory, window=30)).most == 3
    assert len(memory) == 3


def test_equal_scores_go_to_the_lower_column() -> None:
    scores = torch.tensor([[[0.5, 0.0, 0.5, 0.0, 0.5, float("nan")]]])
    columns, number = torch.tensor([[0, 1, 2, 4, 5, -1]]), torch.tensor([3])
    assert best_columns(scores, columns, number, 3).tolist() == [[[0, 2, 4]]]
    assert best_columns(scores, columns, torch.tensor([2]), 2).tolist() == [[[0, 2]]]
    assert best_columns(scores, columns, torch.tensor([4]), 4).tolist() == [[[0, 1, 2, 4]]]
    assert best_columns(scores, columns, torch.tensor([2]), 4).tolist() == [[[-1, -1, 0, 2]]]


def test_lists_and_pages() -> None:
    mask = torch.tensor([[True, False, True, True], [False, False, True, False]])
    assert listed(mask, 3).tolist() == [[0, 2, 3], [2, -1, -1]]
    assert listed(mask[:, :0], 0).shape == (2, 0)
    assert paged(torch.arange(5)[None], 2).tolist() == [[[0, 1], [2, 3], [4, -1]]]


# ---- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keys": 0}, "keys must be an int >= 1"),
        ({"keys": 1.5}, r"keys must be .* a float in \(0, 1\]"),
        ({"recent": 0}, "recent must be an int >= 1, got 0"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Loudest(**options)


def test_an_author_is_told_what_to_write() -> None:
    with pytest.raises(TypeError, match=r"DecodeMethod must define select\(site\): the columns"):
        DecodeMethod().check(INFO)
    with pytest.raises(NotImplementedError, match=r"ReusingMethod must define choose\(site\)"):
        ReusingMethod(2, dense_layers=0).select(step(layer=0))


def test_layers_that_choose() -> None:
    info = ModelInfo("test", {"attention": 32}, {"attention": frozenset({"qkv", "prompt"})})
    assert ReusingMethod().choosing(info) == (2,)
    assert ReusingMethod(layers=(5, 9)).choosing(info) == (2, 5, 9)
    assert ReusingMethod(layers=(5,), dense_layers=(0, 3)).choosing(info) == (1, 5)
    with pytest.raises(ValueError, match=r"layers \[1\] cannot choose: they are in dense_layers"):
        ReusingMethod(layers=(1, 9)).check(info)
    with pytest.raises(ValueError, match=r"layers must be in 0\.\.31"):
        ReusingMethod(layers=(40,)).check(info)
