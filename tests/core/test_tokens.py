"""The laws of the token map, on random maps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vtr.core.tokens import TokenMap, take, top_indices


def random_prune(batch: int, n: int, k: int, g: torch.Generator) -> TokenMap:
    return TokenMap.keep(top_indices(torch.rand(batch, n, generator=g), k)[0], n)


def random_padded(batch: int, n: int, g: torch.Generator) -> TokenMap:
    number = torch.randint(1, n + 1, (batch,), generator=g)
    kept, padded = top_indices(torch.rand(batch, n, generator=g), number)
    return TokenMap.keep(kept, n, padded)


def random_merge(batch: int, n: int, k: int, g: torch.Generator, drop: bool = False) -> TokenMap:
    """Every other token joins a random slot (or is dropped, where ``drop``)."""
    kept = top_indices(torch.rand(batch, n, generator=g), k)[0]
    source = torch.randint(-1 if drop else 0, k, (batch, n), generator=g)
    source = source.scatter(1, kept, torch.arange(k).expand(batch, k))
    return TokenMap.merged(kept, source)


def random_map(kind: str, batch: int, n: int, k: int, g: torch.Generator) -> TokenMap:
    if kind == "prune":
        return random_prune(batch, n, k, g)
    if kind == "padded":
        return random_padded(batch, n, g)
    return random_merge(batch, n, k, g, drop=kind == "partial")


KINDS = st.sampled_from(["prune", "merge", "partial", "padded"])


@st.composite
def maps(draw: st.DrawFn, kinds: st.SearchStrategy[str] = KINDS) -> TokenMap:
    n = draw(st.integers(1, 12))
    k = draw(st.integers(1, n))
    g = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    return random_map(draw(kinds), draw(st.integers(1, 4)), n, k, g)


def check_map(m: TokenMap) -> None:
    """What is true of every map."""
    batch, n_in, n_out = m.batch, m.n_in, m.n_out
    assert m.source.shape == (batch, n_in) and m.kept.shape == m.size.shape == (batch, n_out)
    assert m.source.dtype == m.kept.dtype == torch.int64 and m.size.dtype == torch.float32
    for b in range(batch):
        kept = m.kept[b].tolist()
        alive = [j for j in kept if j >= 0]
        assert m.has_padding or len(alive) == n_out
        assert kept == alive + [-1] * (n_out - len(alive)), "padding comes last"
        assert alive == sorted(set(alive)), "ascending and unique"
        assert all(0 <= j < n_in for j in alive)
        source = m.source[b].tolist()
        assert all(-1 <= s < len(alive) for s in source)
        for slot, j in enumerate(alive):
            assert source[j] == slot, "a representative is in its own slot"
        counted = [float(source.count(slot)) for slot in range(n_out)]
        assert m.size[b].tolist() == counted


def slow_merge(m: TokenMap, x: Tensor, w: Tensor, normalize: bool) -> Tensor:
    out = torch.zeros(m.batch, m.n_out, x.shape[2], dtype=torch.float64)
    for b in range(m.batch):
        total = torch.zeros(m.n_out, dtype=torch.float64)
        for j, slot in enumerate(m.source[b].tolist()):
            if slot >= 0:
                out[b, slot] += w[b, j].double() * x[b, j].double()
                total[slot] += w[b, j].double()
        if normalize:
            out[b] /= total.clamp_min(1e-300)[:, None]
    return out


@given(maps())
def test_map_is_well_formed(m: TokenMap) -> None:
    check_map(m)
    assert m.valid.sum().item() == (m.kept >= 0).sum().item()


@given(maps(st.just("merge")))
def test_pure_merge_conserves_mass(m: TokenMap) -> None:
    assert m.size.sum(1).tolist() == [m.n_in] * m.batch


@given(maps())
def test_restore_of_gather_gives_back_the_kept(m: TokenMap) -> None:
    x = torch.randn(m.batch, m.n_in, 3)
    y = m.gather(x)
    for fill in ("copy", "zero", torch.randn_like(x)):
        back = m.restore(y, fill)
        for b in range(m.batch):
            for slot, j in enumerate(m.kept[b].tolist()):
                if j >= 0:
                    assert torch.equal(y[b, slot], x[b, j])
                    assert torch.equal(back[b, j], x[b, j])
                else:
                    assert not y[b, slot].any()
            for j, slot in enumerate(m.source[b].tolist()):
                if slot >= 0:
                    assert torch.equal(back[b, j], y[b, slot])
                elif isinstance(fill, Tensor):
                    assert torch.equal(back[b, j], fill[b, j])
                elif fill == "zero":
                    assert not back[b, j].any()
                else:  # the nearest token before it that has a value, else the first one
                    before = [i for i in range(j) if m.source[b, i] >= 0]
                    after = [i for i in range(m.n_in) if m.source[b, i] >= 0]
                    near = before[-1] if before else after[0]
                    assert torch.equal(back[b, j], y[b, m.source[b, near]])


@given(maps(), st.booleans())
def test_merge_is_the_weighted_sum(m: TokenMap, normalize: bool) -> None:
    x = torch.randn(m.batch, m.n_in, 3)
    w = torch.rand(m.batch, m.n_in) + 0.1
    got = m.merge(x, w, normalize)
    torch.testing.assert_close(got.double(), slow_merge(m, x, w, normalize), atol=1e-5, rtol=1e-5)
    plain = m.merge(x, normalize=normalize)
    expected = slow_merge(m, x, torch.ones_like(w), normalize)
    torch.testing.assert_close(plain.double(), expected, atol=1e-5, rtol=1e-5)


@given(maps(), KINDS, st.integers(0, 10_000))
def test_composition_equals_applying_in_turn(first: TokenMap, kind: str, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    if first.has_padding:  # a later map chooses among valid slots
        limit = int(first.valid.sum(1).min())
        scores = torch.rand(first.batch, first.n_out, generator=g)
        number = torch.randint(1, limit + 1, (first.batch,), generator=g)
        kept, padded = top_indices(scores, number, first.valid)
        second = TokenMap.keep(kept, first.n_out, padded)
    else:
        n = first.n_out
        second = random_map(
            kind, first.batch, n, int(torch.randint(1, n + 1, (1,), generator=g)), g
        )
    both = first.then(second)
    check_map(both)
    x = torch.randn(first.batch, first.n_in, 3)
    assert torch.equal(both.gather(x), second.gather(first.gather(x)))
    in_turn = second.merge(first.merge(x), first.size)
    torch.testing.assert_close(both.merge(x), in_turn, atol=1e-5, rtol=1e-5)
    y = torch.randn(first.batch, both.n_out, 3)
    assert torch.equal(both.restore(y, "zero"), first.restore(second.restore(y, "zero"), "zero"))


def test_frozen_tokens_are_carried_through_composition() -> None:
    kept = torch.tensor([[0, 2, 3]])
    step = TokenMap.keep(kept, 5)
    first = TokenMap(step.source, step.kept, step.size, step.source < 0)
    second = TokenMap.keep(torch.tensor([[1, 2]]), 3)
    frozen = TokenMap(second.source, second.kept, second.size, second.source < 0)
    both = first.then(frozen)
    assert both.frozen is not None
    assert both.frozen.tolist() == [[True, True, False, False, True]]
    assert first.then(second).frozen is not None


@given(maps(), st.integers(0, 3))
def test_prefix_is_put_in_front(m: TokenMap, prefix: int) -> None:
    whole = m.with_prefix(prefix)
    check_map(whole)
    assert (whole.n_in, whole.n_out) == (m.n_in + prefix, m.n_out + prefix)
    x = torch.randn(m.batch, m.n_in + prefix, 2)
    w = torch.rand(m.batch, m.n_in + prefix) + 0.1
    assert torch.equal(whole.gather(x)[:, :prefix], x[:, :prefix])
    assert torch.equal(whole.gather(x)[:, prefix:], m.gather(x[:, prefix:]))
    torch.testing.assert_close(whole.merge(x, w)[:, prefix:], m.merge(x[:, prefix:], w[:, prefix:]))
    torch.testing.assert_close(whole.merge(x, w)[:, :prefix], x[:, :prefix])


@given(maps(), st.sampled_from([torch.bfloat16, torch.float16]))
def test_merge_in_half_precision_rounds_once(m: TokenMap, dtype: torch.dtype) -> None:
    x = torch.randn(m.batch, m.n_in, 4).to(dtype)
    w = torch.rand(m.batch, m.n_in) + 0.1
    got = m.merge(x, w)
    assert got.dtype == dtype
    exact = m.merge(x.float(), w)
    # One rounding: half a unit in the last place of the result (subnormals: their step).
    step = torch.finfo(dtype).eps / 2
    tolerance = exact.abs() * step * 1.01 + torch.finfo(dtype).tiny * torch.finfo(dtype).eps + 1e-7
    assert ((got.float() - exact).abs() <= tolerance).all()


def test_float64_stays_float64() -> None:
    m = TokenMap.merged(torch.tensor([[0, 2]]), torch.tensor([[0, 0, 1]]))
    assert m.merge(torch.randn(1, 3, 2, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("kind", ["prune", "merge", "partial", "padded"])
@pytest.mark.parametrize("normalize", [True, False])
def test_gradients_of_merge(kind: str, normalize: bool) -> None:
    g = torch.Generator().manual_seed(3)
    m = random_map(kind, 2, 6, 3, g)
    x = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    w = (torch.rand(2, 6, dtype=torch.float64) + 0.5).requires_grad_()

    def run(x: Tensor, w: Tensor) -> Tensor:
        return m.merge(x, w, normalize)

    assert torch.autograd.gradcheck(run, (x, w))
    assert torch.autograd.gradcheck(m.gather, (x,))
    y = torch.randn(2, m.n_out, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y: m.restore(y, "copy"), (y,))


def test_identity_changes_nothing() -> None:
    m = TokenMap.identity(2, 5)
    check_map(m)
    x = torch.randn(2, 5, 3)
    assert (
        torch.equal(m.gather(x), x) and torch.equal(m.merge(x), x) and torch.equal(m.restore(x), x)
    )


def test_wrong_shapes_are_refused() -> None:
    m = TokenMap.keep(torch.tensor([[0, 2]]), 3)
    with pytest.raises(ValueError, match=r"gather expects a tensor of shape \(1, 3"):
        m.gather(torch.randn(1, 4, 2))
    with pytest.raises(ValueError, match=r"restore expects a tensor of shape \(1, 2"):
        m.restore(torch.randn(1, 3, 2))
    with pytest.raises(ValueError, match="fill must be"):
        m.restore(torch.randn(1, 2, 2), "mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cannot compose"):
        m.then(TokenMap.identity(1, 3))


@given(
    st.integers(1, 4), st.integers(1, 12), st.integers(1, 14), st.integers(0, 9999), st.booleans()
)
def test_top_indices(batch: int, n: int, k: int, seed: int, with_valid: bool) -> None:
    g = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 4, (batch, n), generator=g).float()  # many ties
    scores[torch.rand(batch, n, generator=g) < 0.2] = float("nan")
    valid = torch.rand(batch, n, generator=g) < 0.7 if with_valid else None
    if valid is not None:
        valid[:, 0] = True
    kept, padded = top_indices(scores, k, valid)
    for b in range(batch):
        allowed = [j for j in range(n) if valid is None or valid[b, j]]
        value = scores[b].nan_to_num(nan=-float("inf")).tolist()
        best = sorted(sorted(allowed, key=lambda j: (-value[j], j))[:k])
        got = [j for j in kept[b].tolist() if j >= 0]
        assert got == best
        assert padded or len(got) == kept.shape[1]
    assert kept.shape[1] <= k


def test_top_indices_with_a_number_per_row() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0], [1.0, 2.0, 3.0]])
    kept, padded = top_indices(scores, torch.tensor([1, 3]))
    assert padded and kept.tolist() == [[0, -1, -1], [0, 1, 2]]
    kept, padded = top_indices(scores, torch.tensor([2, 2]))
    assert not padded and kept.tolist() == [[0, 2], [1, 2]]


def test_take_of_rows() -> None:
    x = torch.randn(2, 4, 3, 5)
    index = torch.tensor([[3, 0], [1, 1]])
    got = take(x, index)
    assert torch.equal(got[0, 0], x[0, 3]) and torch.equal(got[1, 1], x[1, 1])
