"""bipartite_match against the plain implementation that holds the whole matrix."""

from __future__ import annotations

import pytest
import torch

from vtr.kernels import bipartite, bipartite_match


def _unit(*shape, dtype=torch.float32):
    return torch.nn.functional.normalize(torch.randn(*shape), dim=-1).to(dtype)


def _plain(a, b, a_bias=None, b_mask=None):
    scores = a.float() @ b.float().transpose(1, 2)
    if b_mask is not None:
        scores = scores.masked_fill(~b_mask.expand(a.shape[0], -1)[:, None], float("-inf"))
    score, index = scores.max(dim=-1)
    return (score if a_bias is None else score + a_bias), index


# Every path: direct, two levels with and without padding, several samples or rows per tile.
SIZES = [(1, 1, 1), (2, 7, 3), (1, 98, 98), (9, 98, 97), (1, 288, 289), (30, 130, 131)]
SIZES += [(1, 1000, 1025), (2, 700, 901), (1, 300, 5000)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_same_choice_as_the_plain_implementation(size):
    torch.manual_seed(0)
    batch, rows, columns = size
    a, b = _unit(batch, rows, 64), _unit(batch, columns, 64)
    score, index = bipartite_match(a, b)
    expected, choice = _plain(a, b)
    assert score.dtype == torch.float32 and index.dtype == torch.int64
    assert torch.equal(index, choice)
    torch.testing.assert_close(score, expected, atol=2e-7, rtol=0)


@pytest.mark.parametrize("rows", [30, 400])
def test_compiles_whole(rows):
    a, b, seen = _unit(2, rows, 64), _unit(2, rows, 64), torch.rand(2, rows) > 0.3
    compiled = torch.compile(bipartite_match, fullgraph=True, backend="eager")
    for got, expected in zip(compiled(a, b, b_mask=seen), _plain(a, b, None, seen), strict=True):
        torch.testing.assert_close(got, expected, atol=2e-7, rtol=0)


@pytest.mark.parametrize("columns", [40, 400, 3000])
def test_ties_go_to_the_lowest_index(columns):
    # Integer-valued metrics: products are exact, so equal scores are truly equal.
    torch.manual_seed(1)
    a = torch.randint(-2, 3, (2, 333, 8)).float()
    b = torch.randint(-2, 3, (2, columns, 8)).float()
    b[:, -3:] = b[:, :1]
    score, index = bipartite_match(a, b)
    scores = a @ b.transpose(1, 2)
    assert torch.equal(score, scores.amax(-1))
    assert torch.equal(index, (scores == scores.amax(-1, keepdim=True)).int().argmax(-1))


@pytest.mark.parametrize("size", [(2, 20, 30), (2, 300, 310), (1, 800, 900)], ids=str)
@pytest.mark.parametrize("shared", [True, False])
def test_masked_partners_and_protected_rows(size, shared):
    torch.manual_seed(2)
    batch, rows, columns = size
    a, b = _unit(batch, rows, 32), _unit(batch, columns, 32)
    mask = torch.rand(columns) > 0.6 if shared else torch.rand(batch, columns) > 0.6
    mask[..., -1] = True
    bias = torch.zeros(rows)
    bias[0] = float("-inf")
    score, index = bipartite_match(a, b, a_bias=bias, b_mask=mask)
    expected, choice = _plain(a, b, bias, mask)
    assert torch.equal(index, choice)
    torch.testing.assert_close(score, expected, atol=2e-7, rtol=0)
    assert (score[:, 0] == float("-inf")).all()


@pytest.mark.parametrize("columns", [10, 1000])
def test_all_partners_masked(columns):
    a, b = _unit(1, 300, 8), _unit(1, columns, 8)
    score, index = bipartite_match(a, b, b_mask=torch.zeros(columns, dtype=torch.bool))
    assert (score == float("-inf")).all() and (index == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_compared_in_float32(dtype):
    a, b = _unit(2, 200, 64, dtype=dtype), _unit(2, 210, 64, dtype=dtype)
    score, index = bipartite_match(a, b)
    expected, choice = _plain(a, b)
    assert torch.equal(index, choice) and score.dtype == torch.float32
    torch.testing.assert_close(score, expected)


def test_a_batch_gives_each_sample_what_it_gets_alone():
    a, b = _unit(5, 150, 48), _unit(5, 160, 48)
    _, together = bipartite_match(a, b)
    for i in range(5):
        assert torch.equal(together[i], bipartite_match(a[i : i + 1], b[i : i + 1])[1][0])


def test_own_memory_is_linear():
    """The largest allocation made inside is a tile, not the matrix."""
    rows = 6000
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple) else (out,):
                if isinstance(t, torch.Tensor):
                    largest = max(largest, t.numel())
            return out

    with Watch():
        bipartite_match(_unit(1, rows, 16), _unit(1, rows, 16))
    assert largest <= 2 * max(bipartite._TILE, bipartite._MIN_ROWS * rows) < rows * rows // 10


# ---- on a GPU ---------------------------------------------------------------------------------


def _rounded(x, bits=10):
    """x with the factors of a product as TF32 has them."""
    fraction, exponent = torch.frexp(x)
    return torch.ldexp((fraction * 2 ** (bits + 1)).round(), exponent - bits - 1)


@pytest.fixture(params=["float32", "tf32"])
def on_gpu(request, monkeypatch):
    """The code for GPUs, on tiles of 2,000 scores; with TF32 where the user allows it."""
    monkeypatch.setattr(bipartite, "_GPU_TILE", 2000)
    bmm = torch.bmm
    monkeypatch.setattr(bipartite, "_half_product", lambda a, b: bmm(a.float(), b.float()))
    if request.param == "tf32":
        monkeypatch.setattr(bipartite, "_lowers_float32", lambda: True)
        monkeypatch.setattr(
            bipartite, "_search",
            lambda a, b, mask, product=lambda a, b: bmm(_rounded(a), _rounded(b)), search=bipartite._search:
                search(a, b, mask, product),
        )  # fmt: skip
    return bipartite._match_on_gpu


@pytest.mark.parametrize("size", [(1, 1, 1), (9, 20, 30), (2, 130, 97), (3, 300, 901)], ids=str)
@pytest.mark.parametrize("masked", ["", "shared", "own"])
def test_on_a_gpu_the_same_choice(on_gpu, size, masked):
    torch.manual_seed(3)
    batch, rows, columns = size
    # Products of small integers are exact, so ties are ties.
    a = torch.randint(-2, 3, (batch, rows, 8)).float()
    b = torch.randint(-2, 3, (batch, columns, 8)).float()
    mask = None
    if masked:
        mask = torch.rand(columns) > 0.5 if masked == "shared" else torch.rand(batch, columns) > 0.5
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        score, index = on_gpu(a.to(dtype), b.to(dtype), mask)
        expected, choice = _plain(a, b, None, mask)
        assert score.dtype == torch.float32 and index.dtype == torch.int64
        assert torch.equal(score, expected) and torch.equal(index, choice)


def test_on_a_gpu_products_are_float32_whatever_is_allowed(on_gpu):
    torch.manual_seed(4)
    a, b = _unit(2, 200, 64), _unit(2, 210, 64)
    score, index = on_gpu(a, b, None)
    exact = a.double() @ b.double().mT
    assert (score - exact.amax(2)).abs().max() < 4e-7
    chosen = exact.gather(2, index[..., None])[..., 0]
    assert (chosen - exact.amax(2)).abs().max() < 4e-7
    assert ((_rounded(a) @ _rounded(b).mT).amax(2) - exact.amax(2)).abs().max() > 1e-5


def test_on_a_gpu_memory_is_that_of_a_tile(on_gpu):
    found = []
    kept = bipartite._scores

    def scores(*args):
        found.append(kept(*args).numel())
        return kept(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bipartite, "_scores", scores)
        on_gpu(_unit(3, 640, 8), _unit(3, 20, 8), None)
    # As high as its number of rows divides: less than twice a tile.
    assert sum(found) == 3 * 640 * 20 and max(found) < 2 * 2000


def test_on_a_gpu_halves_are_multiplied_as_halves(monkeypatch):
    a = _unit(2, 40, 16, dtype=torch.float16)
    called = []
    monkeypatch.setattr(
        bipartite, "_half_product", lambda a, b: called.append(a.dtype) or a.float() @ b.float()
    )
    bipartite._match_on_gpu(a, a, None)
    assert called == [torch.float16]
    settings = torch.backends.cuda.matmul  # which cannot be patched
    before, settings.allow_fp16_accumulation = settings.allow_fp16_accumulation, True
    try:
        score, _ = bipartite._match_on_gpu(a, a, None)
    finally:
        settings.allow_fp16_accumulation = before
    assert called == [torch.float16]
    torch.testing.assert_close(score, _plain(a, a)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_compiles_whole(monkeypatch, dtype):
    monkeypatch.setattr(bipartite, "_match_tiles", bipartite._match_on_gpu)
    a = _unit(2, 70, 16, dtype=dtype)
    compiled = torch.compile(bipartite_match, fullgraph=True, backend="eager")
    for got, expected in zip(compiled(a, a), _plain(a, a), strict=True):
        torch.testing.assert_close(got, expected, atol=2e-7, rtol=0)


def test_no_gradient_flows():
    a = _unit(1, 40, 8).requires_grad_()
    score, _ = bipartite_match(a, _unit(1, 40, 8))
    assert not score.requires_grad


@pytest.mark.parametrize(
    ("a", "b", "kwargs", "words"),
    [
        (torch.randn(4, 8), torch.randn(4, 8), {}, "Na, D"),
        (torch.randn(1, 4, 8), torch.randn(1, 0, 8), {}, "no rows"),
        (torch.randn(1, 4, 8), torch.randn(1, 4, 8).half(), {}, "convert"),
        (torch.ones(1, 4, 8).int(), torch.ones(1, 4, 8).int(), {}, "floating"),
        (torch.randn(1, 4, 8), torch.randn(1, 5, 8), {"a_bias": torch.zeros(5)}, "a_bias"),
        (torch.randn(1, 4, 8), torch.randn(1, 5, 8), {"b_mask": torch.zeros(4).bool()}, "b_mask"),
        (torch.randn(1, 4, 8), torch.randn(1, 5, 8), {"b_mask": torch.zeros(5)}, "bool"),
        (torch.randn(1, 4, 8), torch.randn(1, 5, 8), {"a_bias": torch.zeros(4).int()}, "a_bias"),
    ],
)
def test_bad_input_says_what_to_do(a, b, kwargs, words):
    with pytest.raises(ValueError, match=words):
        bipartite_match(a, b, **kwargs)
