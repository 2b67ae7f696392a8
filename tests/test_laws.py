"""The laws that every registered method is held to, on a tiny encoder.

Nothing here names a method: one registered tomorrow is tested by existing. A method that the encoder
does not support (by :func:`vtr.supported`) is left out.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vtr
from tests.tiny import images, vit
from vtr.core.method import Method
from vtr.core.registry import registry
from vtr.core.trace import Trace

MODEL = vit(depth=8)
N = 64
METHODS = [s.name for s in vtr.supported(MODEL) if s.supported]
NATIVE = MODEL(images())


def with_keep(name: str, keep: Any) -> Method:
    """A method with a budget; those without the option run with their defaults."""
    cls = registry()[name]
    return cls(keep=keep) if "keep" in {f.name for f in dataclasses.fields(cls)} else cls()


def run(method: Method, x: torch.Tensor, model: Any = MODEL) -> tuple[torch.Tensor, Trace]:
    torch.manual_seed(7)  # methods may draw from the global generator
    with torch.no_grad(), vtr.apply(model, method) as handle:
        return model(x), handle.trace


KEEP = st.one_of(st.integers(1, N), st.floats(0.02, 1.0))


def test_some_methods_are_held_to_the_laws() -> None:
    assert len(METHODS) >= 6, vtr.supported(MODEL)


def check_trace(trace: Trace, batch: int) -> None:
    """Kept indices, counts, composition and freezing of one call."""
    alive = N
    total = None
    layer_tokens = trace.tokens["encoder"]
    assert sorted(layer_tokens) == list(range(8))
    entered = N  # a smaller picture has fewer tokens from the first layer on
    for record in trace.stages:
        if record.site == "image":
            entered = record.tokens_out
        else:
            assert record.site == "encoder"
        assert record.tokens_in == alive, "a stage starts where the last one ended"
        assert record.tokens_out == record.map.n_out == record.total.n_out
        assert record.total.n_in == N and record.grid == (8, 8)
        if record.map is record.total or total is None:  # from the input
            assert record.map.n_in == N
        else:
            assert record.map.n_in == alive
            both = total.then(record.map)
            assert torch.equal(both.kept, record.total.kept)
            assert torch.equal(both.source, record.total.source)
            assert torch.equal(both.size, record.total.size)
        for m in (record.map, record.total):
            check_rows(m, batch)
        alive, total = record.tokens_out, record.total
    # The tokens that really went through: the second half of a block enters the next one.
    cuts = {record.layer for record in trace.stages if record.site == "encoder"}
    for layer in range(8):
        before, after = layer_tokens[layer]
        if layer not in cuts:
            assert before == after
        if layer + 1 < 8 and layer not in cuts and layer + 1 not in cuts:
            assert after == layer_tokens[layer + 1][0]
    assert layer_tokens[0][0] == entered


def check_rows(m: vtr.TokenMap, batch: int) -> None:
    assert m.batch == batch
    for b in range(batch):
        kept = [j for j in m.kept[b].tolist() if j >= 0]
        assert m.padded or len(kept) == m.n_out
        assert kept == sorted(set(kept)) and all(0 <= j < m.n_in for j in kept)
        for slot, j in enumerate(kept):
            assert m.source[b, j] == slot
        assert m.size[b, : len(kept)].min() >= 1 and not m.size[b, len(kept) :].any()
        assert m.size[b].sum() == (m.source[b] >= 0).sum()
        if m.frozen is not None:
            active = set(kept)
            frozen = set(m.frozen[b].nonzero()[:, 0].tolist())
            assert not active & frozen and active | frozen == set(range(m.n_in))


@pytest.mark.parametrize("name", METHODS)
@given(keep=KEEP, batch=st.integers(1, 3), seed=st.integers(0, 99))
@settings(max_examples=12)
def test_maps_and_counts(name: str, keep: Any, batch: int, seed: int) -> None:
    method = with_keep(name, keep)
    out, trace = run(method, images(batch, seed))
    assert out.shape == (batch, 10) and out.isfinite().all()
    check_trace(trace, batch)
    if method.size_weighted and trace.stages:  # a pure merge loses nothing
        assert all((r.total.size.sum(1) == N).all() for r in trace.stages)


@pytest.mark.parametrize("name", METHODS)
@given(keep=KEEP, batch=st.integers(2, 4), seed=st.integers(0, 99))
@settings(max_examples=8)
def test_a_batch_gives_each_sample_what_it_gets_alone(
    name: str, keep: Any, batch: int, seed: int
) -> None:
    method, x = with_keep(name, keep), images(batch, seed)
    out, trace = run(method, x)
    for b in range(batch):
        alone, own = run(method, x[b : b + 1])
        torch.testing.assert_close(out[b : b + 1], alone, atol=2e-4, rtol=2e-4)
        if trace.stages:
            ends = trace.stages[-1].total
            kept = ends.kept[b][ends.kept[b] >= 0]
            assert kept.tolist() == (
                own.kept[0].tolist() if own.kept is not None else list(range(N))
            )


@pytest.mark.parametrize("name", METHODS)
def test_the_same_call_twice_gives_the_same(name: str) -> None:
    method = with_keep(name, 0.4)
    first, second = run(method, images())[0], run(method, images())[0]
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", METHODS)
def test_keeping_everything_changes_no_bit(name: str) -> None:
    method = with_keep(name, 1.0)
    if "keep" not in {f.name for f in dataclasses.fields(method)}:
        pytest.skip("has no budget")
    out, trace = run(method, images())
    assert torch.equal(out, NATIVE) and not trace.stages


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    model = vit(depth=8).to(dtype)
    method = with_keep(name, 0.4)
    out, trace = run(method, images().to(dtype), model)
    assert out.dtype == dtype and out.isfinite().all()
    check_trace(trace, 2)
    assert all(r.map.size.dtype == torch.float32 for r in trace.stages)


@pytest.mark.parametrize("name", METHODS)
def test_the_default_options_reduce(name: str) -> None:
    _, trace = run(registry()[name](), images())
    assert trace.stages, "a method with its default options does something"


@pytest.mark.parametrize("name", METHODS)
def test_one_token_is_enough(name: str) -> None:
    out, trace = run(with_keep(name, 1), images(1))
    assert out.isfinite().all()
    assert min(after for _, after in trace.tokens["encoder"].values()) >= 1


@pytest.mark.parametrize("name", METHODS)
def test_the_trace_counts_what_the_layers_really_get(name: str) -> None:
    model = vit(depth=8)
    seen: list[int] = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda m, a: seen.append(a[0].shape[1] - 1))
        block.mlp.register_forward_pre_hook(lambda m, a: seen.append(a[0].shape[1] - 1))
    _, trace = run(with_keep(name, 0.3), images(), model)
    counted = [n for layer in range(8) for n in trace.tokens["encoder"][layer]]
    assert seen == counted


@pytest.mark.parametrize("name", METHODS)
def test_json_values_make_an_equal_method(name: str) -> None:
    method = with_keep(name, 0.4)
    again = vtr.create(**method.to_dict())
    assert again == method and hash(again) == hash(method) and repr(again) == repr(method)
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.keep = 0.5  # type: ignore[attr-defined]
