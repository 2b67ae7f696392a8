"""Encoders on a CUDA device: the same decisions as on the CPU, and the paths that only exist there."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F

import vtr
from vtr.vision.encoders.attention import biased_attention

pytestmark = pytest.mark.gpu

METHODS = [
    vtr.CLSAttention(keep=0.3),
    vtr.Downsample(keep=0.3),
    vtr.EViT(keep=0.7),
    vtr.ToMe(r=8),
    vtr.FlowCut(keep=0.3),
    vtr.ToFe(keep=0.4),
    vtr.Random(keep=0.5, seed=1),
]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", depth=6).eval()


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_same_tokens_and_output_as_on_the_cpu(model, method):
    images = torch.randn(3, 3, 224, 224)
    with torch.no_grad(), vtr.apply(model, method) as handle:
        expected = model(images)
        kept = handle.trace.kept
        model.cuda()
        try:
            got = model(images.cuda())
            assert torch.equal(handle.trace.kept.cpu(), kept)
        finally:
            model.cpu()
    torch.testing.assert_close(got.cpu(), expected, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_half_precision_runs_and_is_finite(model, method, dtype):
    half = timm.create_model("vit_tiny_patch16_224", depth=6).eval().to("cuda", dtype)
    with torch.no_grad(), vtr.apply(half, method):
        assert half(torch.randn(2, 3, 224, 224, device="cuda", dtype=dtype)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_key_bias_keeps_the_flash_kernel(dtype):
    q, k, v = (torch.randn(2, 4, 257, 64, device="cuda", dtype=dtype) for _ in range(3))
    sizes = torch.randint(1, 9, (2, 257), device="cuda").float()
    backend = torch.nn.attention.SDPBackend.FLASH_ATTENTION
    with torch.nn.attention.sdpa_kernel(backend):  # raises where flash cannot run
        got = biased_attention(q, k, v, sizes.log())
    wanted = F.scaled_dot_product_attention(
        q.float(), k.float(), v.float(), attn_mask=sizes.log()[:, None, None]
    )
    torch.testing.assert_close(got.float(), wanted, atol=2e-2, rtol=2e-2)
