"""attention_rows against the softmax written out."""

from __future__ import annotations

import math

import pytest
import torch

from vtr.kernels import attention_rows


def _plain(q, k, bias=None):
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = torch.einsum("bhrd,bhnd->bhrn", q.double(), k.double()) / math.sqrt(q.shape[-1])
    return torch.softmax(scores if bias is None else scores + bias, dim=-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
def test_matches_the_full_map(dtype, heads):
    torch.manual_seed(0)
    q = torch.randn(2, heads[0], 3, 24, dtype=dtype)
    k = torch.randn(2, heads[1], 41, 24, dtype=dtype)
    got = attention_rows(q, k)
    assert got.dtype == torch.float32 and got.shape == (2, heads[0], 3, 41)
    torch.testing.assert_close(got.double(), _plain(q, k), atol=2e-6, rtol=1e-5)


def test_bias_per_key_and_full():
    torch.manual_seed(1)
    q, k = torch.randn(2, 4, 3, 16), torch.randn(2, 4, 10, 16)
    sizes = torch.rand(2, 10).add(1).log()
    expected = _plain(q, k, sizes[:, None, None].double())
    torch.testing.assert_close(attention_rows(q, k, bias=sizes).double(), expected)
    full = torch.randn(2, 1, 3, 10)
    expected = _plain(q, k, full.double())
    torch.testing.assert_close(attention_rows(q, k, bias=full).double(), expected)
    torch.testing.assert_close(
        attention_rows(q, k, bias=sizes[0]), attention_rows(q, k, bias=sizes[:1])
    )


def test_masked_keys_get_nothing_and_a_row_without_keys_is_zero():
    q = torch.randn(1, 2, 4, 8, requires_grad=True)
    k = torch.randn(1, 2, 6, 8)
    allowed = torch.ones(1, 1, 4, 6, dtype=torch.bool)
    allowed[..., 0, :] = False
    allowed[..., 1, 3:] = False
    rows = attention_rows(q, k, bias=allowed)
    assert (rows[:, :, 0] == 0).all() and (rows[:, :, 1, 3:] == 0).all()
    torch.testing.assert_close(rows[:, :, 1:].sum(-1), torch.ones(1, 2, 3))
    rows.pow(2).sum().backward()
    assert q.grad is not None and torch.isfinite(q.grad).all()
    assert (q.grad[:, :, 0] == 0).all() and (q.grad[:, :, 2] != 0).any()


def test_gradient():
    q = torch.randn(1, 2, 2, 4, dtype=torch.float64, requires_grad=True)
    k = torch.randn(1, 1, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(attention_rows, (q, k))


def test_compiles_whole():
    q, k = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 6, 8)
    compiled = torch.compile(attention_rows, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(q, k), attention_rows(q, k))


@pytest.mark.parametrize(
    ("q", "k", "kwargs", "words"),
    [
        (torch.randn(2, 3, 8), torch.randn(1, 2, 6, 8), {}, "unsqueeze"),
        (torch.randn(1, 2, 3, 8), torch.randn(1, 2, 6, 4), {}, "head dimension"),
        (torch.randn(1, 3, 3, 8), torch.randn(1, 2, 6, 8), {}, "multiple"),
        (torch.randn(1, 2, 3, 8), torch.randn(1, 2, 6, 8).half(), {}, "convert"),
        (torch.ones(1, 2, 3, 8).int(), torch.ones(1, 2, 6, 8).int(), {}, "floating-point"),
        (torch.randn(1, 2, 3, 8), torch.randn(1, 2, 6, 8), {"bias": torch.zeros(5)}, "per key"),
        (
            torch.randn(1, 2, 3, 8),
            torch.randn(1, 2, 6, 8),
            {"bias": torch.zeros(1, 1, 2, 6)},
            "broadcast",
        ),
    ],
)
def test_bad_input_says_what_to_do(q, k, kwargs, words):
    with pytest.raises(ValueError, match=words):
        attention_rows(q, k, **kwargs)
