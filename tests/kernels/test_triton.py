"""The Triton kernels: in the interpreter everywhere, on a GPU where there is one."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.kernels.cases import SHAPES, make, qkv
from vtr.kernels import (
    BlockMask,
    attention_rows,
    bipartite_match,
    block_sparse_attention,
    block_sparse_attention_reference,
    sparse_linear_attention,
)
from vtr.kernels.mass import block_mass, live_tiles

ROOT = Path(__file__).parents[2]


def _old_interpreter() -> bool:
    """Triton 3.6's interpreter turns arrays of one element into numbers, which numpy 2.4 refuses."""
    triton = tuple(map(int, importlib.metadata.version("triton").split(".")[:2]))
    numpy = tuple(map(int, importlib.metadata.version("numpy").split(".")[:2]))
    return triton < (3, 7) and numpy >= (2, 4)


@pytest.mark.skipif(_old_interpreter(), reason="the interpreter of triton < 3.7 needs numpy < 2.4")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("which", ["persistent", "not persistent"])
def test_in_the_interpreter(which):
    """The variable must be set before triton is imported, hence a process of its own."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "-k", which, "tests/kernels/interpreted.py"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


def test_importing_the_package_imports_no_triton():
    code = "import sys, vtr.kernels; assert 'triton' not in sys.modules, 'triton was imported'"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


GPU_TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def _choices_of_its_own(monkeypatch, tmp_path):
    """What these tests choose is not for others."""
    monkeypatch.setenv("VTR_CACHE", str(tmp_path))


@pytest.fixture
def portable():
    """The Triton forward on a Hopper device too, which else runs a kernel of its own."""
    from vtr.kernels.triton_attention import forward_kernel

    with forward_kernel("triton"):
        yield


@pytest.fixture
def untuned(monkeypatch, portable):
    """The first configuration of each kernel: to time all of them for 60 kinds of call takes an hour."""
    from vtr.kernels import triton_common

    monkeypatch.setattr(triton_common, "_best", {})
    monkeypatch.setattr(triton_common, "_measure", lambda configs, launch: configs[0])


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 72, 96, 128])
@pytest.mark.parametrize("dtype", GPU_TOLERANCE, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_gpu_forward_and_backward(name, dtype, dim, untuned):
    q, k, v, mask = make(name, dim, dtype, device="cuda")
    weights = torch.randn(q.shape, device="cuda")
    results = []
    for call in (
        lambda *t: block_sparse_attention(*t, mask, return_lse=True, backend="triton"),
        lambda *t: block_sparse_attention_reference(*t, mask),
    ):
        tensors = [t.detach().clone().requires_grad_() for t in (q, k, v)]
        out, lse = call(*tensors)
        (out.float() * weights).sum().backward()
        results.append([out, lse, *(t.grad for t in tensors)])
    limit = GPU_TOLERANCE[dtype] * 3
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=limit, rtol=limit)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [32, 48, 80, 88, 112, 160, 192, 256])
def test_gpu_other_head_dims(dim, untuned):
    test_gpu_forward_and_backward("ragged", torch.bfloat16, dim, None)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "flex", "sdpa"])
def test_gpu_backends_agree_on_a_long_ragged_mask(backend):
    torch.manual_seed(0)
    n = 128 * 40 + 57
    live = torch.rand(2, 41, 41) < 0.15
    live |= torch.eye(41, dtype=torch.bool)
    live[:, -1] = True
    mask = BlockMask.from_blocks(live, q_len=n, k_len=n).to("cuda")
    q, k, v = qkv(1, 2, 2, n, n, 128, torch.bfloat16, device="cuda")
    out = block_sparse_attention(q, k, v, mask, backend=backend)
    expected, _ = block_sparse_attention_reference(q, k, v, mask)
    torch.testing.assert_close(out, expected, atol=2e-2, rtol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("which", range(7))
@pytest.mark.parametrize(("dim", "dtype"), [(128, torch.float16), (72, torch.bfloat16)], ids=str)
def test_gpu_every_configuration_is_right(dim, dtype, which, monkeypatch, portable):
    from triton.runtime.errors import OutOfResources

    from vtr.kernels import triton_attention, triton_common

    monkeypatch.setattr(triton_attention, "_forced", "triton")
    # So that persistent programs are among the candidates of the forward.
    monkeypatch.setattr(triton_attention, "amount", lambda device, programs: "many")
    monkeypatch.setattr(triton_common, "_best", {})
    monkeypatch.setattr(
        triton_common, "_measure", lambda configs, launch: configs[which % len(configs)]
    )
    n = 128 * 3 + 40
    dense = torch.rand(n, n) > 0.5
    dense[:128, 128:256] = True
    mask = BlockMask.from_dense(dense).to("cuda")
    q, k, v = qkv(1, 2, 1, n, n, dim, dtype, device="cuda")
    results = []
    for backend in ("triton", "reference"):
        tensors = [t.clone().requires_grad_() for t in (q, k, v)]
        try:
            out = block_sparse_attention(*tensors, mask, backend=backend)
            out.float().pow(2).sum().backward()
        except OutOfResources as error:
            pytest.skip(f"not for this device: {error}")
        results.append([out, *(t.grad for t in tensors)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=6e-2, rtol=6e-2)


def _text_mask(blocks=100, block=64):
    """A band, and one row that sees everything: it is cut into parts."""
    i = torch.arange(blocks)
    live = (i[:, None] - i).abs() <= 1
    live[-1], live[:, -1] = True, True
    n = blocks * block - 5
    return BlockMask.from_blocks(live, q_len=n, k_len=n, block=block).to("cuda")


def _captured(step):
    """A CUDA graph of ``step``, which has run twice before, and the tensors that it returns at each replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = step()
    return graph, made


@pytest.mark.gpu
def test_gpu_graph_capture():
    """Heavy rows, row scale and matching: nothing waits for the device once it ran."""
    mask = _text_mask()
    q, k, v = qkv(1, 2, 2, mask.q_len, mask.k_len, 64, torch.bfloat16, device="cuda")
    row_scale = torch.rand(q.shape[:3], device="cuda")

    def step():
        out = block_sparse_attention(q, k, v, mask, row_scale=row_scale, backend="triton")
        return out, *bipartite_match(q[:, 0, ::2], q[:, 0, 1::2])

    graph, made = _captured(step)
    other = qkv(1, 2, 2, mask.q_len, mask.k_len, 64, torch.bfloat16, seed=1, device="cuda")
    for old, new in zip((q, k, v), other, strict=True):
        old.copy_(new)
    graph.replay()
    expected, _ = block_sparse_attention_reference(q, k, v, mask, row_scale=row_scale)
    torch.testing.assert_close(made[0], expected, atol=2e-2, rtol=2e-2)
    for got, want in zip(made[1:], step()[1:], strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.gpu
@torch.no_grad()
def test_gpu_graph_capture_of_the_other_kernels(untuned):
    """Replayed with other values: sparse beside linear attention, and what looks at the scores of tiles."""
    n, sides = 64 * 9 - 5, (64, 64)
    live = torch.rand(9, 9, generator=torch.Generator().manual_seed(2)) < 0.4
    live[-1] = True
    mask = BlockMask.from_blocks(live, q_len=n, k_len=n, block=64).to("cuda")
    q, k, v = qkv(1, 2, 2, n, n, 64, torch.bfloat16, device="cuda")
    visited = torch.rand(1, 2, 9, 9, device="cuda") < 0.8

    def step():
        out, lse = block_sparse_attention(q, k, v, mask, return_lse=True, backend="triton")
        mass = block_mass(q, k, lse, sides=sides)
        tiles = live_tiles(q, k, visited, sides=sides, threshold=-0.5)
        rows = attention_rows(q[:, :, :3], k, bias=k[:, 0, :, 0] > 0)
        every = sparse_linear_attention(q, k, v, mask, keys="all")
        return out, lse, mass, tiles, rows, *sparse_linear_attention(q, k, v, mask), *every

    graph, made = _captured(step)
    for seed in (1, 2):
        other = qkv(1, 2, 2, n, n, 64, torch.bfloat16, seed=seed, device="cuda")
        for old, new in zip((q, k, v), other, strict=True):
            old.copy_(new)
        graph.replay()
        for got, want in zip(made, step(), strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.gpu
@torch.no_grad()
def test_gpu_a_small_call_keeps_its_launch(untuned):
    """Alignment and strides that other compiled kernels need, on streams of their own."""
    q, k, v, mask = make("grouped", 64, torch.bfloat16, device="cuda")
    room = torch.zeros(q.numel() + 1, dtype=q.dtype, device="cuda")
    odd = room[1:].view(q.shape)
    for seed in range(3):
        for old, new in zip((q, k, v), qkv(*q.shape[:2], k.shape[1], q.shape[2], k.shape[2], 64,
                                           q.dtype, seed=seed, device="cuda"), strict=True):  # fmt: skip
            old.copy_(new)
        odd.copy_(q)
        expected, _ = block_sparse_attention_reference(q, k, v, mask)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        for given in (q, odd, q.mT.contiguous().mT):
            out = block_sparse_attention(given, k, v, mask, backend="triton")
            torch.testing.assert_close(out, expected, atol=2e-2, rtol=2e-2)
            with torch.cuda.stream(side):
                out = block_sparse_attention(given, k, v, mask, backend="triton")
            side.synchronize()
            torch.testing.assert_close(out, expected, atol=2e-2, rtol=2e-2)
    assert len(mask.kept) == 2  # q with rows apart is copied


@pytest.mark.gpu
def test_gpu_a_capture_that_builds_a_mask_says_what_to_do():
    blocks = torch.rand(4, 4, device="cuda") < 0.5
    graph = torch.cuda.graph(torch.cuda.CUDAGraph())
    with pytest.raises(RuntimeError, match="leave its attention out of the graph"), graph:
        BlockMask.from_blocks(blocks, q_len=256, k_len=256, block=64, share=False)
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_gpu_a_capture_with_a_new_mask_says_what_to_do():
    mask = _text_mask(8)
    q, k, v = qkv(1, 1, 1, mask.q_len, mask.k_len, 64, torch.bfloat16, device="cuda")
    graph = torch.cuda.graph(torch.cuda.CUDAGraph())
    with pytest.raises(RuntimeError, match="before the capture"), graph:
        block_sparse_attention(q, k, v, mask, backend="triton")
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_gpu_more_samples_than_a_grid_axis_holds(untuned):
    q, k, v, mask = make("tiny", 64, torch.float16, device="cuda")
    q, k, v = (t.repeat(70_000, 1, 1, 1).requires_grad_() for t in (q, k, v))
    out = block_sparse_attention(q, k, v, mask, backend="triton")
    out.sum().backward()
    for t in (out, q.grad, k.grad, v.grad):
        torch.testing.assert_close(t, t[:1].expand_as(t))
    a = torch.randn(70_000, 20, 16, device="cuda")
    score, index = bipartite_match(a, a)
    torch.testing.assert_close(score, (a @ a.mT).amax(2), atol=1e-4, rtol=1e-4)
    assert index.max() < 20


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [40, 64])
def test_gpu_trains_through_flex(dim):
    """With a head dim of the Triton backward and one without."""
    n = 128 * 5 + 9
    live = torch.rand(5 + 1, 5 + 1) < 0.5
    live |= torch.eye(6, dtype=torch.bool)
    mask = BlockMask.from_blocks(live, q_len=n, k_len=n).to("cuda")
    q, k, v = qkv(1, 2, 2, n, n, dim, torch.bfloat16, device="cuda")
    grads = []
    for backend in ("flex", "reference"):
        tensors = [t.clone().requires_grad_() for t in (q, k, v)]
        out, lse = block_sparse_attention(*tensors, mask, return_lse=True, backend=backend)
        (out.float().sin().sum() + lse.sin().sum()).backward()
        grads.append([out, lse, *(t.grad for t in tensors)])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=6e-2, rtol=6e-2)


@pytest.mark.gpu
def test_gpu_tf32_by_the_newer_setting(monkeypatch, untuned):
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32")
    q, k, v, mask = make("long-keys", 128, device="cuda")
    out = block_sparse_attention(q, k, v, mask, backend="triton")
    expected, _ = block_sparse_attention_reference(*(t.double() for t in (q, k, v)), mask)
    torch.testing.assert_close(out, expected.float(), atol=1e-2, rtol=1e-2)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_gpu_tensors_on_another_device_than_the_current_one(untuned):
    q, k, v, mask = make("grouped", 64, torch.bfloat16, device="cuda:1")
    tensors = [t.requires_grad_() for t in (q, k, v)]
    assert torch.cuda.current_device() == 0
    out = block_sparse_attention(*tensors, mask, backend="triton")
    out.sum().backward()
    score, _ = bipartite_match(q[:, 0].detach(), q[:, 1].detach())
    assert torch.cuda.current_device() == 0
    expected, _ = block_sparse_attention_reference(*tensors, mask)
    torch.testing.assert_close(out, expected, atol=2e-2, rtol=2e-2)
    want = (q[:, 0].float() @ q[:, 1].float().mT).amax(2)
    torch.testing.assert_close(score, want, atol=1e-3, rtol=1e-3)


@pytest.mark.gpu
def test_gpu_compiles_whole():
    q, k, v, mask = make("ragged", 64, torch.bfloat16, device="cuda")
    compiled = torch.compile(
        lambda q, k, v, m: block_sparse_attention(q, k, v, m) * 2, fullgraph=True
    )
    expected = block_sparse_attention(q, k, v, mask) * 2
    torch.testing.assert_close(compiled(q, k, v, mask), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [98, 1025, 5000])
def test_gpu_bipartite_match(rows):
    a, b = (torch.nn.functional.normalize(torch.randn(2, rows, 64), dim=-1) for _ in range(2))
    score, index = bipartite_match(a.cuda(), b.cuda())
    expected, _ = bipartite_match(a, b)
    torch.testing.assert_close(score.cpu(), expected, atol=1e-6, rtol=0)
    chosen = torch.einsum("bnd,bnd->bn", a, b.gather(1, index.cpu()[..., None].expand_as(a)))
    torch.testing.assert_close(chosen, expected, atol=1e-6, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["marginal", "negligible", "all"])
@pytest.mark.parametrize("dtype", GPU_TOLERANCE, ids=str)
def test_gpu_linear_attention(dtype, mode, untuned):
    from tests.kernels.test_linear import options

    q, k, v, mask = make("grouped", 72, dtype)
    more = options(mode, 2, 4, mask)
    weight = torch.randn(q.shape)
    results = []
    for backend, device in (("triton", "cuda"), ("reference", "cpu")):
        tensors = [t.to(device).requires_grad_() for t in (q, k, v)]
        own = {n: t if isinstance(t, str) else t.to(device) for n, t in more.items()}
        _, linear = sparse_linear_attention(*tensors, mask.to(device), backend=backend, **own)
        (linear.float() * weight.to(device)).sum().backward()
        results.append([linear.detach().cpu(), *(t.grad.cpu() for t in tensors)])
    # float16 is computed as bfloat16.
    limit = 3e-5 if dtype == torch.float32 else 6e-2
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=limit, rtol=limit)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", GPU_TOLERANCE, ids=str)
def test_gpu_exact_attention_per_tile(dtype, untuned):
    """The Triton kernels against torch on the CPU."""
    q, k, _ = qkv(2, 4, 2, 300, 530, 72, dtype)
    k[:, :, 128:384] *= 0.01
    lse = (q.float() @ k.float().repeat_interleave(2, 1).mT * 72**-0.5).logsumexp(3)
    sides = (64, 128)
    mass = block_mass(q, k, lse, sides=sides)
    got = block_mass(q.cuda(), k.cuda(), lse.cuda(), sides=sides)
    torch.testing.assert_close(got.cpu(), mass, atol=1e-3, rtol=1e-3)
    visited = torch.rand(mass.shape) < 0.8
    live = live_tiles(q, k, visited, sides=sides, threshold=-0.5)
    got = live_tiles(q.cuda(), k.cuda(), visited.cuda(), sides=sides, threshold=-0.5)
    # A maximum within rounding of the threshold may fall on either side.
    assert (got.cpu() != live).float().mean() < 0.02
