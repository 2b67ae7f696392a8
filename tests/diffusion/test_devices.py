"""Diffusion transformers and the kernels under them on a simulated GPU."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vtr
from tests.diffusion.models import CASES
from tests.kernels.cases import SHAPES, added_rows, make
from tests.simulated import Machine, OnDevice, gpu, moved
from vtr.kernels import (
    BlockMask,
    attention_rows,
    bipartite_match,
    block_sparse_attention,
    merge_states,
    pool_blocks,
    pooled_block_scores,
)
from vtr.kernels.masks.budgets import number_of, top_k
from vtr.video import TokenMemory

pytestmark = pytest.mark.usefixtures("without_gradients")

TIMES = (900.0, 800.0, 700.0)


def methods(backend: str) -> dict[str, vtr.Method]:
    more: dict[str, Any] = {"block": 16, "backend": backend}
    return {
        "sliding-tile": vtr.SlidingTile(window=0.4, tile=(1, 2, 2), **more),
        "neighborhood": vtr.NeighborhoodAttention(window=0.3, **more),
        "random-sparse": vtr.RandomSparse(density=0.5, **more),
        "own-frame": vtr.OwnFrame(**more),
        "radial": vtr.RadialAttention(dense_layers=0, dense_steps=0, **more),
        "rectified": vtr.RectifiedSparse(drop=0.5, p=0.1, **more),
        "draft": vtr.DraftAttention(density=0.3, patch=(2, 4), **more),
        "jenga": vtr.Jenga(drop=0.6, p=0.1, text_gain=0.5, **more),
        "spargeattn": vtr.SpargeAttn(cdf=0.5, similarity=0.05, key_block=16, **more),
        "vsa": vtr.VSA(density=0.3, tile=(1, 2, 4), gate=False, **more),
        "xattention": vtr.XAttentionDiT(threshold=0.5, stride=4, **more),
        "rettention": vtr.Rettention(density=0.4, dense_layers=1, dense_steps=1, refresh=2, **more),
        "offloaded": vtr.Rettention(
            density=0.4, dense_layers=0, dense_steps=1, offload=True, precision="float8", **more
        ),
        "adaspa": vtr.AdaSpa(0.4, search=(0, 2), **more),
        "liteattention": vtr.LiteAttention(0.0, **more),
        "topk-sparse": vtr.TopKSparse(0.4, **more),
        "sla": vtr.SLA(0.4, query_block=32, untrained=True, **more),
        "svg2": vtr.SVG2(0.5, query_clusters=3, key_clusters=5, key_block=16, rounds=3, **more),
        "sito": vtr.SiTo(),
        "todo": vtr.ToDo(bias=True),
        "toma": vtr.ToMA(window=(2, 2, 3), tau=0.1),
        "tomesd": vtr.ToMeSD(),
        "tofu": vtr.ToMeSD(drop_layers=1, keep_norm=True, refresh=2),
    }


def steps(model: Any, inputs: dict[str, Any]) -> list[Tensor]:
    times = (torch.full_like(inputs["timestep"], time) for time in TIMES)
    return [model(**{**inputs, "timestep": time})[0] for time in times]


def close(found: Any, wanted: Any) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert isinstance(a, OnDevice)
        torch.testing.assert_close(a.cpu(), b, atol=1e-4, rtol=1e-4)


def agree(
    name: str, method: vtr.Method | vtr.Plan, before: bool = True, default: bool = False
) -> Machine:
    model, inputs = CASES[name].build(), CASES[name].call()
    with vtr.apply(model, method):
        wanted = steps(model, inputs)
    with gpu() as machine:
        if not before:
            model.to("cuda")
        with vtr.apply(model, method) as handle:
            model.to("cuda")
            there = moved(inputs)
            machine.waits.clear()
            with torch.device("cuda" if default else "cpu"):
                found = steps(model, there)
            machine.waits.clear()
            close(steps(model, there)[:1], wanted[:1])  # a second run, with the masks of the first
            waits = machine.waits.copy()
            assert str(handle.report()) and str(handle.trace)
            if isinstance(method, (vtr.SlidingTile, vtr.RadialAttention)):
                assert vtr.draw(handle.trace) is not None
            close(found, wanted)
            model.to("cpu")
            for a, b in zip(steps(model, inputs), wanted, strict=True):
                torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
        machine.waits = waits
    return machine


# Waits of ours per model call once the masks are made: the timestep is read. Rectified SpaAttn makes a
# mask in every layer and call: its live blocks and tiles are counted, and the plan of ``sdpa`` read.
# So do LiteAttention and SVG2, whose blocks are cut at the ends of clusters: the plan reads their tiles too;
# and AdaSpa in a search.
PER_CALL = {"sliding-tile": 1, "radial": 1, "random-sparse": 1, "rettention": 1, "tomesd": 1,
            "sito": 1, "todo": 1, "tofu": 1,
            "rectified": 1 + 4 * 3, "liteattention": 1 + 4 * 3, "svg2": 1 + 5 * 3,
            "adaspa": 1 + 4 * 3,
            **dict.fromkeys(("draft", "jenga", "spargeattn", "vsa", "xattention"), 1 + 5 * 3)}  # fmt: skip


@pytest.mark.parametrize("name", methods("sdpa"))
def test_wan(name: str) -> None:
    machine = agree("wan", methods("sdpa")[name])
    if name in PER_CALL:
        assert sum(machine.ours().values()) <= PER_CALL[name] * len(TIMES), machine.ours()


def test_windows_from_a_plan() -> None:
    case, method = CASES["wan"], vtr.SearchedTile(0.3, tile=(1, 2, 3), block=16, backend="sdpa")
    model, inputs = case.build(), case.call()
    calls = [{**inputs, "timestep": torch.full_like(inputs["timestep"], t)} for t in TIMES]
    wanted = vtr.calibrate(model, calls, method)
    with gpu():
        model.to("cuda")
        found = vtr.calibrate(model, [moved(given) for given in calls], method)
        model.to("cpu")
    assert torch.equal(found.tables[0]["window"], wanted.tables[0]["window"])
    assert found.fingerprint == wanted.fingerprint
    machine = agree("wan", wanted)
    assert sum(machine.ours().values()) <= len(TIMES), machine.ours()


def test_windows_from_a_table(tmp_path: Path) -> None:
    places = itertools.product(range(len(TIMES)), range(3), range(2))
    windows = {f"{s}_{n}_{h}": [3, 2, 2] if s == n else [1, 2, 1 + h] for s, n, h in places}
    (tmp_path / "windows.json").write_text(json.dumps(windows))
    table = str(tmp_path / "windows.json")
    method = vtr.SlidingTile(tile=(1, 2, 3), table=table, block=16, backend="sdpa")
    machine = agree("wan", method)
    assert sum(machine.ours().values()) <= len(TIMES), machine.ours()


@pytest.mark.parametrize("name", ["own-frame", "rectified", "rettention", "todo", "toma", "tomesd"])
@pytest.mark.parametrize("model", ["flux", "pixart", "hunyuan-video"])
def test_other_families(model: str, name: str) -> None:
    agree(model, methods("auto")[name], before=name not in ("toma", "tomesd"))


@pytest.mark.parametrize("name", methods("sdpa"))
def test_a_default_device_changes_nothing(name: str) -> None:
    agree("wan", methods("sdpa")[name], default=True)


def test_training_with_padded_text_does_not_wait_in_every_layer() -> None:
    case, model = CASES["qwen-image"], CASES["qwen-image"].build().train()
    inputs = case.call()
    inputs["encoder_hidden_states_mask"] = torch.ones_like(inputs["encoder_hidden_states_mask"])
    inputs["encoder_hidden_states_mask"][:, -1] = 0
    with gpu() as machine, vtr.apply(model, vtr.OwnFrame(block=16)):
        model.to("cuda")
        inputs = moved(inputs)
        model(**inputs)  # makes the masks
        machine.waits.clear()
        model(**inputs)
        model.to("cpu")
    # The timestep, whether there is padding, and whether it is that of the call before.
    assert sum(machine.ours().values()) == 3, machine.ours()


# ---- kernels --------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["sdpa", "flex", "reference"])
@pytest.mark.parametrize("name", SHAPES)
def test_block_sparse_attention(name: str, backend: str) -> None:
    q, k, v, mask = make(name)
    more = {"row_scale": torch.rand(q.shape[:3]), "added": added_rows(q, mask), "return_lse": True}
    wanted = block_sparse_attention(q, k, v, mask, backend="reference", **more)
    with gpu() as machine:
        there, more = moved((q, k, v)), moved(more)
        on_device = mask.to("cuda")
        with pytest.raises(ValueError, match="on different devices"):
            block_sparse_attention(*there, mask, backend=backend, **more)
        close(block_sparse_attention(*there, on_device, backend=backend, **more), wanted)
        machine.waits.clear()
        block_sparse_attention(*there, on_device, backend=backend, **more)
        assert backend == "reference" or not machine.waits


def test_masks_made_on_the_device() -> None:
    dense, blocks = torch.rand(2, 3, 70, 90) > 0.5, torch.rand(2, 3, 5, 6) > 0.5
    for made, given in (
        (lambda x: BlockMask.from_dense(x, block=16), dense),
        (lambda x: BlockMask.from_blocks(x, q_len=70, k_len=90, block=16, share=False), blocks),
        (lambda x: BlockMask.from_dense(x, block=16).transpose(), dense),
        (lambda x: BlockMask.from_flex(BlockMask.from_dense(x, block=16).to_flex()), dense),
    ):
        wanted = made(given)
        with gpu():
            found = made(given.cuda())
            assert found.device.type == "cuda"
            for a, b in zip(found.tensors()[:-1], wanted.tensors()[:-1], strict=True):
                assert torch.equal(a.cpu(), b)
            assert found.density == wanted.density
            assert found.picture() is not None


def test_a_new_mask_waits_once() -> None:
    with gpu() as machine:
        live = (torch.rand(2, 3, 5, 6) > 0.5).cuda()
        machine.waits.clear()
        BlockMask.from_blocks(live, q_len=70, k_len=90, block=16, share=False)
        # Where the live blocks are, and which tiles are needed.
        assert sum(machine.waits.values()) == 2


def test_small_kernels() -> None:
    q, k, v = (torch.randn(2, 4, 40, 16) for _ in range(3))
    a, b, seen = torch.randn(2, 30, 8), torch.randn(2, 20, 8), torch.rand(2, 20) > 0.3

    def run(device: str) -> list[Tensor]:
        x, y, z = (t.to(device) for t in (q, k, v))
        found = [attention_rows(x[:, :, :3], y, bias=torch.ones(2, 40, device=device))]
        halves = (torch.arange(40, device=device) < 20).expand(40, 40)
        masks = [BlockMask.from_dense(half, block=16) for half in (halves, ~halves)]
        parts = [block_sparse_attention(x, y, z, m, return_lse=True, backend="sdpa") for m in masks]
        found += merge_states(*parts[0], *parts[1])
        found.append(pool_blocks(x, 16))
        scores = pooled_block_scores(x, y, block=16)
        found.append(top_k(scores, number_of(0.5, scores.shape[-1])))
        bias = torch.zeros(30, device=device)
        found += bipartite_match(a.to(device), b.to(device), a_bias=bias, b_mask=seen.to(device))
        return found

    wanted = run("cpu")
    with gpu() as machine:
        close(run("cuda"), wanted)
        machine.waits.clear()
        bipartite_match(*(torch.randn(1, 9, 4, device="cuda") for _ in range(2)))
        assert not machine.waits


@pytest.mark.parametrize("evict", ["oldest", "random", "size", "novelty"])
@pytest.mark.parametrize("match", ["place", "nearest"])
def test_token_memory(match: str, evict: str) -> None:
    first = torch.randn(6, 8)
    frames = [first + 0.05 * i * torch.randn(6, 8) for i in range(6)]
    found = []
    with gpu():
        for device in ("cpu", "cuda"):
            memory = TokenMemory(14, similarity=0.9, match=match, evict=evict, window=2)
            for time, frame in enumerate(frames):
                memory.add(frame[None].to(device), float(time))
            assert memory.tokens.device.type == device
            found.append([memory.tokens, memory.size, memory.frame])
        close(found[1], found[0])
