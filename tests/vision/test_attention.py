"""Attention with weighed keys, against softmax written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vtr.vision.encoders.attention import Probe, biased_attention, policy_attention, wide_attention


def qkv(
    dtype: torch.dtype = torch.float64, dim: int = 16, n: int = 9
) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(dim + n)
    q, k, v = (
        torch.randn(2, 3, n, dim, generator=g, dtype=torch.float64).to(dtype) for _ in range(3)
    )
    return q, k, v


def written_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    size: Tensor,
    scale: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """softmax(q k^T scale + log s) v, key by key: each key counts ``size`` times."""
    q, k, v, size = q.double(), k.double(), v.double(), size.double()
    logits = (q @ k.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        logits = (
            logits.masked_fill(~mask, -float("inf")) if mask.dtype == torch.bool else logits + mask
        )
    weights = logits.exp() * size[:, None, None, :]
    return (weights / weights.sum(-1, keepdim=True)) @ v


SIZES = torch.tensor([[1, 2, 3, 1, 1, 7, 1, 40, 1], [1, 1, 1, 300, 5, 1, 2, 2, 9]]).float()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("scale", [None, 0.5])
def test_size_bias_equals_counting_keys(fused: bool, scale: float | None) -> None:
    q, k, v = (t.float() for t in qkv())
    got = biased_attention(q, k, v, SIZES.log(), scale=scale, fused=fused)
    torch.testing.assert_close(
        got.double(), written_out(q, k, v, SIZES, scale), atol=1e-5, rtol=1e-5
    )


def test_size_bias_equals_repeated_keys() -> None:
    """What proportional attention means: a key of size s is s equal keys."""
    q, k, v = (t.float() for t in qkv())
    one = SIZES[:1].long()[0]
    repeated = torch.nn.functional.scaled_dot_product_attention(
        q[:1], k[:1].repeat_interleave(one, 2), v[:1].repeat_interleave(one, 2)
    )
    torch.testing.assert_close(
        biased_attention(q[:1], k[:1], v[:1], SIZES[:1].log()), repeated, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("dim", [6, 16, 30, 64, 72])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_the_wide_form_equals_the_bias(dim: int, scale: float | None) -> None:
    """The form that CUDA takes, run on this device."""
    q, k, v = (t.float() for t in qkv(dim=dim))
    got = wide_attention(q, k, v, SIZES.log(), scale=scale)
    assert got.shape == v.shape
    torch.testing.assert_close(
        got.double(), written_out(q, k, v, SIZES, scale), atol=2e-5, rtol=2e-5
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_wide_form_in_half_precision(dtype: torch.dtype) -> None:
    q, k, v = qkv(dtype, dim=64, n=9)
    exact = written_out(q, k, v, SIZES)
    step = torch.finfo(dtype).eps
    got = wide_attention(q, k, v, SIZES.log()).double()
    assert (got - exact).abs().max() < 8 * step
    # One extra dimension alone would lose the bits of the log sizes in bfloat16.
    assert got.isfinite().all()


@pytest.mark.parametrize("form", [wide_attention, biased_attention])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_padding_has_no_weight(form: object, dtype: torch.dtype) -> None:
    q, k, v = qkv(dtype, dim=64)
    sizes = SIZES.clone()
    sizes[0, 6:] = 0
    got = form(q, k, v, sizes.log())  # type: ignore[operator]
    cut = form(q[:1], k[:1, :, :6], v[:1, :, :6], sizes[:1, :6].log())  # type: ignore[operator]
    tolerance = {torch.float32: 1e-5}.get(dtype, 8 * torch.finfo(dtype).eps)
    torch.testing.assert_close(got[:1], cut, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("boolean", [True, False])
def test_a_mask_is_added_to_the_bias(fused: bool, boolean: bool) -> None:
    q, k, v = (t.float() for t in qkv())
    mask = (torch.rand(1, 1, 9, 9) < 0.6) | torch.eye(9, dtype=torch.bool)
    given = mask if boolean else torch.where(mask, 0.3, -2.0)
    got = biased_attention(q, k, v, SIZES.log(), mask=given, fused=fused)
    expected = written_out(q, k, v, SIZES, mask=given if boolean else given.double())
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)


def test_gradients_of_the_forms() -> None:
    q, k, v = (t.requires_grad_() for t in qkv(n=4, dim=6))
    bias = SIZES[:, :4].double().log()

    def slow(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return written_out(q, k, v, SIZES[:, :4])

    expected = torch.autograd.grad(slow(q, k, v).square().sum(), (q, k, v))
    for form in (wide_attention, biased_attention):
        got = torch.autograd.grad(form(q, k, v, bias).square().sum(), (q, k, v))
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_policy_attention_by_hand() -> None:
    """DynamicViT: a token with policy 0 is no key for the others, and still sees itself."""
    q, k, v = qkv(n=5)
    policy = torch.tensor([[1, 0, 1, 0.25, 1], [1, 1, 0, 0, 0.5]])
    got = policy_attention(q, k, v, policy, None)
    for b in range(2):
        for h in range(3):
            for i in range(5):
                weights = []
                for j in range(5):
                    logit = torch.dot(q[b, h, i], k[b, h, j]).double() / 4.0
                    weights.append(logit.exp() * (1.0 if i == j else policy[b, j].double()))
                row = torch.stack(weights) / sum(weights)
                torch.testing.assert_close(
                    got[b, h, i].double(), row @ v[b, h].double(), atol=1e-5, rtol=1e-5
                )


def test_policy_of_ones_is_plain_attention_and_passes_gradients() -> None:
    q, k, v = (t.float() for t in qkv())
    ones = torch.ones(2, 9, requires_grad=True)
    got = policy_attention(q, k, v, ones, None)
    torch.testing.assert_close(
        got, torch.nn.functional.scaled_dot_product_attention(q, k, v), atol=1e-5, rtol=1e-5
    )
    got.square().sum().backward()
    assert ones.grad is not None and ones.grad.abs().min() > 0
    q, k, v = (t.requires_grad_() for t in qkv(n=4, dim=4))
    policy = torch.rand(2, 4, dtype=torch.float64) + 0.2

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return policy_attention(q, k, v, policy, None)

    # The softmax is in float32: compare with gradients of the same formula in float64.
    logits = q @ k.transpose(-1, -2) * 0.5
    own = torch.eye(4, dtype=torch.float64)
    gate = policy[:, None, None, :] * (1 - own) + own
    weights = logits.exp() * gate
    exact = weights / weights.sum(-1, keepdim=True) @ v
    for a, b in zip(
        torch.autograd.grad(run(q, k, v).square().sum(), (q, k, v)),
        torch.autograd.grad(exact.square().sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_policy_with_a_mask() -> None:
    q, k, v = (t.float() for t in qkv())
    mask = (torch.rand(9, 9) < 0.5) | torch.eye(9, dtype=torch.bool)
    ones = torch.ones(2, 9)
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(
        policy_attention(q, k, v, ones, None, mask), plain, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("fused", [True, False])
def test_a_probe_without_bias_changes_nothing(fused: bool) -> None:
    q, k, v = (t.float() for t in qkv())
    probe = Probe()
    got = probe.attend(q, k, v, fused=fused)
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(got, plain, atol=1e-5, rtol=1e-5)
    assert probe.qkv is not None and probe.qkv[0] is q and probe.qkv[2] is v
    causal = probe.attend(q, k, v, fused=fused, is_causal=True)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(causal, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", ["bias", "policy"])
@pytest.mark.parametrize("fused", [True, False])
def test_causal_attention_stays_causal(form: str, fused: bool) -> None:
    q, k, v = (t.float() for t in qkv())
    probe = Probe(SIZES.log()) if form == "bias" else Probe(policy=torch.ones(2, 9))
    got = probe.attend(q, k, v, is_causal=True, fused=fused)
    triangle = torch.ones(9, 9, dtype=torch.bool).tril()
    sizes = SIZES if form == "bias" else torch.ones(2, 9)
    torch.testing.assert_close(
        got.double(), written_out(q, k, v, sizes, mask=triangle), atol=1e-5, rtol=1e-5
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_a_gpu_the_flash_kernel_takes_the_bias(dtype: torch.dtype) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = (t.cuda() for t in qkv(dtype, dim=64))
    exact = written_out(q.cpu(), k.cpu(), v.cpu(), SIZES)
    backend = (
        [SDPBackend.FLASH_ATTENTION]
        if dtype != torch.float32
        else list(SDPBackend.__members__.values())[1:]
    )
    with sdpa_kernel(backend):
        got = biased_attention(q, k, v, SIZES.cuda().log())
    assert (got.cpu().double() - exact).abs().max() < max(1e-4, 8 * torch.finfo(dtype).eps)


def test_a_policy_keeps_the_models_dropout() -> None:
    q, k, v = (torch.randn(2, 2, 40, 8) for _ in range(3))
    probe = Probe(policy=torch.ones(2, 40))
    torch.manual_seed(0)
    got = probe.attend(q, k, torch.ones_like(v), dropout_p=0.5)
    weights = (q @ k.transpose(-2, -1) * 8**-0.5).softmax(-1)
    torch.manual_seed(0)
    expected = torch.nn.functional.dropout(weights, 0.5) @ torch.ones_like(v)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(got, torch.ones_like(got), atol=1e-2)


@pytest.mark.parametrize("mode", ["plain", "autocast", "autocast behind norms"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_on_the_cpu_does_not_round_the_bias(dtype: torch.dtype, mode: str) -> None:
    q, k, v = (torch.randn(2, 3, 60, 16).to(dtype) for _ in range(3))
    bias = torch.randint(1, 90, (2, 60)).float().log()
    exact = ((q.double() @ k.double().transpose(-2, -1)) / 4 + bias[:, None, None]).softmax(-1)
    exact = exact @ v.double()
    rounded = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=bias[:, None, None].to(dtype)
    )
    if mode == "autocast behind norms":  # they make queries and keys float32
        q, k = q.float(), k.float()
    with torch.autocast("cpu", dtype, enabled=mode != "plain"):
        got = biased_attention(q, k, v, bias)
    assert got.dtype == dtype
    assert (got - exact).abs().mean() < 0.6 * (rounded - exact).abs().mean()
