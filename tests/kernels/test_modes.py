"""The kernels under torch's modes: autocast, inference mode, torch.func, a default device; and what
another process or a second derivative makes of them."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch
from torch.autograd import forward_ad

from tests.kernels.cases import make, token_mask
from vtr.kernels import (
    BlockMask,
    attention_rows,
    bipartite_match,
    block_sparse_attention,
    block_sparse_attention_reference,
    masks,
    pooled_block_scores,
)


def _unit(rows):
    return torch.nn.functional.normalize(torch.randn(2, rows, 64), dim=-1)


_Q, _K, _V, _MASK = make("ragged")
_SEEN = torch.rand(2, 59) > 0.5
_LONG = _unit(700), _unit(700)
CALLS = {
    "match": lambda: bipartite_match(*_LONG),
    "few": lambda: bipartite_match(_LONG[0][:, :60], _LONG[1][:, :60]),
    "rows": lambda: (attention_rows(_Q, _K, bias=_SEEN),),
    "pooled": lambda: (pooled_block_scores(_Q, _K, block=16),),
    "reference": lambda: block_sparse_attention_reference(_Q, _K, _V, _MASK),
}


@pytest.mark.parametrize("name", CALLS)
def test_autocast_does_not_lower_what_is_float32(name):
    expected = CALLS[name]()
    with torch.autocast("cpu", torch.bfloat16):
        got = CALLS[name]()
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("name", ["match", "few", "rows", "pooled", "attention"])
def test_shapes_on_the_meta_device(name):
    """Which knows no autocast; models are counted there."""
    q, k, v = (t.to("meta") for t in (_Q, _K, _V))
    a, b = (t.to("meta") for t in _LONG)
    calls = {
        "match": lambda: bipartite_match(a, b)[1],
        "few": lambda: bipartite_match(a[:, :60], b[:, :60])[1],
        "rows": lambda: attention_rows(q, k),
        "pooled": lambda: pooled_block_scores(q, k, block=16),
        "attention": lambda: block_sparse_attention(q, k, v, _MASK.to("meta")),
    }
    shapes = {"match": (2, 700), "few": (2, 60), "rows": (2, 2, 75, 59), "pooled": (2, 2, 5, 4)}
    assert calls[name]().shape == shapes.get(name, q.shape)


def test_a_mask_made_in_inference_mode_serves_training():
    with torch.inference_mode():
        mask = BlockMask.from_dense(token_mask((2, 75, 59), (32, 16)), block=(32, 16))
        first = block_sparse_attention(_Q, _K, _V, mask)
    q = _Q.clone().requires_grad_()
    out = block_sparse_attention(q, _K, _V, mask)
    out.sum().backward()
    torch.testing.assert_close(out, first)
    assert torch.isfinite(q.grad).all()


def _jvp(call):
    with forward_ad.dual_level():
        return call(forward_ad.make_dual(_Q, _Q))


TRANSFORMS = {
    "grad": lambda call: torch.func.grad(lambda q: call(q).sum())(_Q),
    "jvp": lambda call: torch.func.jvp(call, (_Q,), (_Q,))[1],
    "vmap": lambda call: torch.func.vmap(call)(torch.stack([_Q, _Q])),
    "forward": lambda call: forward_ad.unpack_dual(_jvp(call)).tangent,
}


@pytest.mark.parametrize("name", ["grad", "jvp", "vmap", "forward"])
def test_transforms_are_refused_except_by_the_reference(name):
    """A custom operator gives forward-mode AD a tangent of zero without a word."""
    with pytest.raises(RuntimeError, match='use backend="reference"'):
        TRANSFORMS[name](lambda q: block_sparse_attention(q, _K, _V, _MASK))
    if name != "forward":
        found = TRANSFORMS[name](
            lambda q: block_sparse_attention(q, _K, _V, _MASK, backend="reference")
        )
        assert found.abs().max() > 0


def test_a_second_derivative_is_refused_except_by_the_reference():
    def second(backend):
        q = _Q.clone().requires_grad_()
        out = block_sparse_attention(q, _K, _V, _MASK, backend=backend)
        (first,) = torch.autograd.grad(out.sin().sum(), q, create_graph=True)
        return torch.autograd.grad(first.pow(2).sum(), q)[0]

    assert second("reference").abs().max() > 0
    with pytest.raises(RuntimeError, match="no second derivative"):
        second("sdpa")


def test_nan_from_the_lse_of_an_empty_row_stays_out_of_the_gradient():
    grads = []
    for backend in ("sdpa", "reference"):
        tensors = [t.clone().requires_grad_() for t in (_Q, _K, _V)]
        out, lse = block_sparse_attention(*tensors, _MASK, return_lse=True, backend=backend)
        # The derivative of log(exp(-inf) + exp(-inf)) is NaN.
        both = torch.logaddexp(lse, lse)
        assert (both == float("-inf")).any()
        (out.sum() + both[torch.isfinite(both)].sum()).backward()
        grads.append([t.grad for t in tensors])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    "way", [copy.deepcopy, copy.copy, dataclasses.replace, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_a_copied_mask_is_a_mask_of_its_own(way):
    """A mask made in a data loader's worker is numbered there; here the number may be another's."""
    mask = BlockMask.from_dense(token_mask((75, 59), (32, 16)), block=(32, 16))
    moved = way(mask)
    assert int(moved.ident) != int(mask.ident)
    assert torch.equal(moved.to_dense(), mask.to_dense())
    assert (moved.q_len, moved.k_len, moved.block) == (mask.q_len, mask.k_len, mask.block)


def test_a_mask_that_is_there_already_is_not_copied():
    """What is derived from a mask is remembered with it."""
    assert _MASK.to("cpu") is _MASK
    assert _MASK.to("meta") is not _MASK


MASKS = {
    "radial": lambda: masks.radial(3, 50, block=16),
    "band": lambda: masks.band(100, 10, block=16),
    "frame_band": lambda: masks.frame_band(3, 50, 10, text=5, block=16),
    "spatial": lambda: masks.spatial(3, 50, 20, block=16),
    "temporal": lambda: masks.temporal(3, 50, 20, block=16),
    "neighborhood": lambda: masks.neighborhood((8, 8), (3, 3), block=16),
    "sliding_tile": lambda: masks.sliding_tile((8, 8), (2, 2), (3, 3), block=16),
    "random": lambda: masks.random(100, 0.3, block=16),
    "exact": lambda: masks.exact(lambda i, j: i >= j, 50, 50, block=16),
    "from_dense": lambda: BlockMask.from_dense(_MASK.to_dense(), block=16),
}


@pytest.mark.parametrize("name", MASKS)
def test_a_default_device_does_not_touch_masks(name):
    """torch.set_default_device("cuda"), here with a device that would show."""
    expected = MASKS[name]()
    with torch.device("meta"):
        mask = MASKS[name]()
        picture = mask.picture()
    assert mask.device.type == mask.ident.device.type == "cpu"
    assert torch.equal(mask.to_dense(), expected.to_dense())
    assert picture.tobytes() == expected.picture().tobytes()


def test_orders_are_made_on_the_cpu():
    with torch.device("meta"):
        orders = masks.tile_order((4, 4), (2, 2)), masks.temporal_order(3, 5)
    assert [order.device.type for order in orders] == ["cpu", "cpu"]
