"""Entries with fewer bits, against a plain reading of ZipCache's quantiser in loops and float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from vtr.core import packed_attention
from vtr.core.packed_attention import PlainEntries, attend_parts
from vtr.core.packed_entries import PackedEntries, join, split

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def entries(
    dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (3, 2, 11, 7), value_dim: int = 5
) -> tuple[Tensor, Tensor, Tensor]:
    """Random keys with channels far from zero, values with channels of different size, and which places
    hold entries: in unequal numbers, none in the last head. Empty places hold what must not be read."""
    g = torch.Generator().manual_seed(0)
    batch, heads, n, dim = shape
    k = torch.randn(*shape, generator=g) + 20 * torch.randn(1, 1, 1, dim, generator=g)
    v = torch.randn(batch, heads, n, value_dim, generator=g)
    v = v * torch.randn(1, 1, 1, value_dim, generator=g).exp()
    valid = torch.rand(batch, heads, n, generator=g) < torch.rand(batch, heads, 1, generator=g)
    valid[-1, -1] = False
    k, v = (x.masked_fill(~valid[..., None], 1e4) for x in (k, v))
    return k.to(dtype), v.to(dtype), valid


def array(x: Tensor) -> np.ndarray:
    return x.double().numpy()


def brute_force(k: np.ndarray, v: np.ndarray, valid: np.ndarray, bits: int):
    """Keys and values after quantisation, in loops; and the steps, as wide as keys and values."""
    top = 2**bits - 1
    key, value = np.zeros_like(k), np.zeros_like(v)
    key_step, value_step = np.zeros_like(k), np.zeros_like(v)

    def rounded(x, low, high):
        step = (high - low) / top
        return (low if step == 0 else low + np.round((x - low) / step) * step), step

    for b, h in np.ndindex(valid.shape[:2]):
        held = np.flatnonzero(valid[b, h])
        if not len(held):
            continue
        for d in range(k.shape[3]):
            low, high = k[b, h, held, d].min(), k[b, h, held, d].max()
            for t in held:
                key[b, h, t, d], key_step[b, h, t, d] = rounded(k[b, h, t, d], low, high)
        factor = np.sqrt(np.abs(v[b, h, held]).max(0))
        factor[factor == 0] = 1
        for t in held:
            scaled = v[b, h, t] / factor
            for d in range(v.shape[3]):
                found, step = rounded(scaled[d], scaled.min(), scaled.max())
                value[b, h, t, d], value_step[b, h, t, d] = found * factor[d], step * factor[d]
    return key, value, key_step, value_step


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_it_is_the_papers_quantiser(bits):
    k, v, valid = entries()
    found = PackedEntries.pack(k, v, valid, bits).unpack()
    key, value, key_step, value_step = brute_force(array(k), array(v), valid.numpy(), bits)
    # A number half-way between two codes may go either way in float32.
    for x, expected, step in zip(found, (key, value), (key_step, value_step), strict=True):
        apart = np.abs(array(x) - expected)
        assert (apart <= step * (1 + 1e-3) + 1e-5).all()
        assert (apart <= 1e-5).mean() > 0.98


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_the_error_is_at_most_half_a_stored_step(bits, dtype):
    k, v, valid = entries(dtype)
    packed = PackedEntries.pack(k, v, valid, bits)
    key, value = packed.unpack()
    assert key.dtype == value.dtype == dtype and key.shape == k.shape and value.shape == v.shape
    step = array(packed.value_step)[..., None] * array(packed.factor)[:, :, None]
    for x, found, bound in (
        (k, key, array(packed.key_step)[:, :, None] / 2),
        (v, value, step / 2),
    ):
        rounding = torch.finfo(dtype).eps / 2 * np.abs(array(found)) + 1e-6 * np.abs(array(x))
        within = np.abs(array(found) - array(x)) <= bound * (1 + 1e-5) + rounding
        assert within[valid.numpy()].all()
        assert (found[~valid] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_stored_steps_are_hardly_larger_than_the_range_needs(bits, dtype):
    k, v, valid = entries(dtype)
    packed = PackedEntries.pack(k, v, valid, bits)
    *_, step, _ = brute_force(array(k), array(v), valid.numpy(), bits)
    eps = torch.finfo(dtype).eps
    stored = np.broadcast_to(array(packed.key_step)[:, :, None], step.shape)[valid.numpy()]
    assert (stored >= step[valid.numpy()] * (1 - 1e-6)).all()
    assert (stored <= step[valid.numpy()] * (1 + 3 * eps)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_constant_channels_and_zero_values_are_exact(dtype):
    k = torch.full((1, 1, 6, 4), 3.0, dtype=dtype)
    k[..., 1] = torch.arange(6)
    v = torch.zeros(1, 1, 6, 3, dtype=dtype)
    valid = torch.ones(1, 1, 6, dtype=torch.bool)
    key, value = PackedEntries.pack(k, v, valid, 2).unpack()
    assert torch.equal(key[..., [0, 2, 3]], k[..., [0, 2, 3]])
    assert torch.equal(value, v)
    one = PackedEntries.pack(k[:, :, :1], v[:, :, :1], valid[:, :, :1], 2).unpack()[0]
    assert torch.equal(one, k[:, :, :1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ranges_wider_than_float16_stay_finite(dtype):
    k = torch.tensor([[[[-65000.0], [65000.0], [0.0]]]]).to(dtype)
    v = k.expand(1, 1, 3, 2)
    packed = PackedEntries.pack(k, v, torch.ones(1, 1, 3, dtype=torch.bool), 2)
    assert all(x.isfinite().all() for x in packed.tensors() if x.is_floating_point())
    assert all(x.isfinite().all() for x in packed.unpack())


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_no_places_and_no_entries(bits):
    k, v, valid = entries()
    none = PackedEntries.pack(k[:, :, :0], v[:, :, :0], valid[:, :, :0], bits)
    assert [tuple(x.shape) for x in none.unpack()] == [(3, 2, 0, 7), (3, 2, 0, 5)]
    key, value = PackedEntries.pack(k, v, torch.zeros_like(valid), bits).unpack()
    assert (key == 0).all() and (value == 0).all()
    blank = none.gather(torch.full((3, 2, 4), -1))
    assert not blank.valid.any() and all((x == 0).all() for x in blank.unpack())


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_a_sample_alone_is_stored_as_in_a_batch(bits):
    k, v, valid = entries()
    packed = PackedEntries.pack(k, v, valid, bits)
    for b in range(3):
        held = valid[b : b + 1].any(1)[0]  # fewer places than in the batch
        alone = PackedEntries.pack(
            k[b : b + 1, :, held], v[b : b + 1, :, held], valid[b : b + 1, :, held], bits
        ).unpack()
        for x, y in zip(alone, packed.unpack(), strict=True):
            assert torch.equal(x, y[b : b + 1, :, held])


@pytest.mark.parametrize("dim", [1, 5, 7, 8, 64])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_joined_bits_against_numpy(bits, dim):
    codes = np.random.default_rng(0).integers(0, 2**bits, (2, 3, dim), dtype=np.uint8)
    joined = join(torch.from_numpy(codes), bits)
    per = 8 // bits
    width = -(-dim // per)
    expected = np.zeros((2, 3, width), dtype=np.int64)
    for channel in range(dim):
        expected[..., channel % width] += codes[..., channel].astype(int) << (
            channel // width * bits
        )
    assert joined.dtype == torch.uint8 and np.array_equal(joined.numpy(), expected)
    assert np.array_equal(split(joined, bits, dim).numpy(), codes)


def test_bytes_are_those_of_the_tensors_and_as_few_as_the_formula_says():
    batch, heads, n, dim = 2, 3, 40, 64
    k = torch.randn(batch, heads, n, dim, dtype=torch.float16)
    valid = torch.ones(batch, heads, n, dtype=torch.bool)
    for bits in (8, 4, 2):
        packed = PackedEntries.pack(k, k, valid, bits)
        assert packed.nbytes == sum(x.untyped_storage().nbytes() for x in packed.tensors())
        per_entry = 2 * dim * bits // 8 + 2 * 2 + 1  # codes, zero and step, valid
        per_head = 3 * 2 * dim  # zeros, steps and factors of the channels
        assert packed.nbytes == batch * heads * (n * per_entry + per_head)


def test_samples_are_taken_and_entries_gathered_as_they_are_stored():
    k, v, valid = entries()
    packed = PackedEntries.pack(k, v, valid, 4)
    rows = torch.tensor([2, 0, 0, 1])
    for x, y in zip(packed.take(rows).unpack(), packed.unpack(), strict=True):
        assert torch.equal(x, y[rows])
    index = torch.tensor([4, -1, 0]).expand(3, 2, 3)
    moved = packed.gather(index)
    assert torch.equal(moved.valid, valid[..., [4, 0, 0]] & torch.tensor([True, False, True]))
    for x, y in zip(moved.unpack(), packed.unpack(), strict=True):
        assert torch.equal(x[:, :, [0, 2]], y[:, :, [4, 0]]) and (x[:, :, 1] == 0).all()
    meta = packed.to("meta")
    assert {x.device.type for x in meta.tensors()} == {"meta"} and meta.nbytes == packed.nbytes


def test_refusals():
    k, v, valid = entries()
    with pytest.raises(ValueError, match=r"bits must be 8, 4 or 2, got 16"):
        PackedEntries.pack(k, v, valid, 16)
    with pytest.raises(ValueError, match=r"must agree in B, Hk and n, got \(3, 2, 11, 7\)"):
        PackedEntries.pack(k, v, valid[..., 1:], 4)


@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_without_unpacking_is_that_over_unpacked_entries(dtype, rows, monkeypatch):
    k, v, valid = entries(dtype)
    parts = [PackedEntries.pack(k, v, valid, bits) for bits in (4, 2, 8)]
    q = torch.randn(3, 4, rows, 7, generator=torch.Generator().manual_seed(1)).to(dtype)
    plain = PlainEntries(*(x.masked_fill(~valid[..., None], 0) for x in (k, v)))
    sees = torch.rand(3, 2, rows, 44, generator=torch.Generator().manual_seed(2)) < 0.7
    sees &= valid.repeat(1, 1, 4)[:, :, None]
    found = attend_parts(q, [*parts, plain], sees, 0.1)
    assert found.dtype == dtype and found.shape == (3, 4, rows, 5)
    key, value = (
        np.concatenate([array(x) for x in xs], 2)
        for xs in zip(*(p.unpack() for p in parts), plain, strict=True)
    )
    for b, h, r in np.ndindex(3, 4, rows):
        seen = np.flatnonzero(sees[b, h // 2, r])
        expected = np.zeros(5)
        if len(seen):
            score = 0.1 * key[b, h // 2, seen] @ array(q)[b, h, r]
            weight = np.exp(score - score.max())
            expected = weight @ value[b, h // 2, seen] / weight.sum()
        tolerance = 1e-5 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
        np.testing.assert_allclose(array(found)[b, h, r], expected, rtol=tolerance, atol=tolerance)
    monkeypatch.setattr(packed_attention, "_BYTES", 1)  # row by row
    again = attend_parts(q, [*parts, plain], sees, 0.1)
    torch.testing.assert_close(again, found)
