"""CMAI: pairs of low focus are masked; recomputed in loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import vtr

from .language_sites import Prompt

KINDS = ("..ttvvvvvvvvttttt", "tvvvvvtvvvvvvtttt")


def brute_force(prompt: Prompt, sample: int, keep: float) -> tuple[Tensor, Tensor]:
    """The edited attention of a sample, (H, S, S) float64, and which pairs are masked, (S, S) bool."""
    maps = prompt.maps(sample)
    valid, visual = prompt.valid[sample].tolist(), prompt.visual[sample].tolist()
    mean, n = maps.mean(0).tolist(), len(valid)
    text = [i for i in range(n) if valid[i] and not visual[i]]
    masked = torch.zeros(n, n, dtype=torch.bool)
    for t in text:
        seen = [v for v in range(t) if visual[v]]
        focus = {v: sum(mean[t][u] * mean[u][v] for u in text if v < u <= t) for v in seen}
        best = sorted(seen, key=lambda v: (-focus[v], v))[: math.ceil(keep * len(seen) - 1e-9)]
        for v in seen:
            if v not in best:
                masked[t, v] = True
                maps[:, t, v] = 0.0
        if seen:
            maps[:, t] /= maps[:, t].sum(-1, keepdim=True)
    return maps, masked


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prompt_and_its_decoding_equal_the_loops(keep: float, dtype: torch.dtype) -> None:
    prompt, method = Prompt(*KINDS, dtype=dtype), vtr.CMAI(keep, dense_layers=0)
    calls = [prompt.site(0, 14), prompt.site(14, 16), prompt.site(16)]
    out = torch.cat([method.attend(site) for site in calls], 2)
    for b in range(2):
        valid = prompt.valid[b]
        maps, masked = brute_force(prompt, b, keep)
        assert masked.any() and not masked[prompt.visual[b]].any()
        tolerance = 1e-5 if dtype == torch.float32 else 3e-2
        wanted = prompt.outputs(b, maps)[:, valid]
        torch.testing.assert_close(
            out[b, :, valid].double(), wanted, atol=tolerance, rtol=tolerance
        )


def test_rows_sum_to_one_and_masked_pairs_are_those_of_the_loops() -> None:
    prompt, method = Prompt(*KINDS), vtr.CMAI(0.4, dense_layers=0)
    site = prompt.site()
    rows = method.rows(site)
    assert rows is not None
    before = site.attention_rows(rows)
    after = method.edit(site, before, rows)
    live = (rows >= 0)[:, None].expand(after.shape[:3])
    assert float((after.sum(-1)[live] - 1).abs().max()) < 1e-6
    for b in range(2):
        real = rows[b][rows[b] >= 0]
        gone = ((after[b] == 0) & (before[b] > 0))[:, : len(real)]
        assert torch.equal(gone, brute_force(prompt, b, 0.4)[1][real].expand_as(gone))


def test_many_rows_are_edited_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    method = vtr.CMAI(0.4, dense_layers=0)
    wanted = method.attend(Prompt(*KINDS).site())
    monkeypatch.setattr("vtr.core.language_attention._BYTES", 4 * 2 * 4 * 17 * 2)
    torch.testing.assert_close(method.attend(Prompt(*KINDS).site()), wanted, atol=1e-6, rtol=1e-6)


def test_a_row_alone_is_a_row_in_a_padded_batch() -> None:
    prompt, method = Prompt(*KINDS), vtr.CMAI(0.4, dense_layers=0)
    out = method.attend(prompt.site())
    for b in range(2):
        alone = method.attend(prompt.alone(b).site())
        torch.testing.assert_close(out[b, :, prompt.valid[b]], alone[0], atol=2e-6, rtol=1e-5)


def test_keeping_all_and_a_prompt_without_an_image_change_nothing() -> None:
    prompt = Prompt(*KINDS)
    assert torch.equal(vtr.CMAI(1.0).attend(prompt.site()), prompt.site().dense())
    plain, method = Prompt("ttttttt"), vtr.CMAI(0.1)
    for start, end in ((0, 5), (5, 6), (6, 7)):
        site = plain.site(start, end)
        torch.testing.assert_close(method.attend(site), site.dense(), atol=2e-6, rtol=1e-5)


def test_a_sample_without_an_image_decodes_as_ever_beside_one_with() -> None:
    prompt, method = Prompt("tvvvvttt", "tttttttt"), vtr.CMAI(0.3, dense_layers=0)
    for start, end in ((0, 6), (6, 7), (7, 8)):
        site = prompt.site(start, end)
        out, dense = method.attend(site), site.dense()
        torch.testing.assert_close(out[1], dense[1], atol=2e-6, rtol=1e-5)
        assert float((out[0, :, -1] - dense[0, :, -1]).abs().max()) > 1e-3


def test_a_window_lets_go_of_the_oldest_columns() -> None:
    prompt, method = Prompt("ttvvvvvvvvttttttt"), vtr.CMAI(0.4, dense_layers=0)
    for start, end in ((0, 12), (12, 13), (13, 15), (15, 17)):
        site = prompt.site(start, end, window=9)
        out = method.attend(site)
        looks, text = prompt.state["looks"], prompt.state["text"]
        assert looks.shape[2] == site.k.shape[2] and looks.shape[1] == text.shape[1] == end - 10
        assert text[0].tolist() == [max(i - (end - site.k.shape[2]), -1) for i in range(10, end)]
        assert out.shape == site.q.shape and torch.isfinite(out).all()


@pytest.mark.parametrize("keep", [0.0, 1.5, "half"])
def test_bad_shares_are_named(keep: object) -> None:
    with pytest.raises(ValueError, match="keep must be in"):
        vtr.CMAI(keep)  # type: ignore[arg-type]
