"""Sparsifiner against its formula in float64, row by row; its training; and what it refuses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import vtr
import vtr.zoo
from tests.tiny import images, vit
from vtr.core.encoder_attention import EncoderAttentionSite
from vtr.methods.common.connectivity import (
    Connectivity,
    ConnectivityModules,
    chosen_keys,
    sparse_coefficients,
)
from vtr.testing.trial import instead


def modules_of(model: Any, method: vtr.Sparsifiner) -> ConnectivityModules:
    """New modules with larger numbers, so that the guesses differ."""
    with vtr.apply(model, method) as handle:
        modules = handle.modules[0]
    draw = torch.Generator().manual_seed(5)
    for parameter in modules.parameters():
        parameter.data.normal_(std=0.5, generator=draw)
    assert isinstance(modules, ConnectivityModules)
    return modules


def seen(model: Any, method: vtr.Sparsifiner, x: Tensor, **given: Any) -> list[tuple[Any, Tensor]]:
    """The attention calls of a run, each with the method's output."""
    found: list[tuple[Any, Tensor]] = []

    def attend(site: EncoderAttentionSite) -> Tensor:
        out = method.attend(site)
        found.append((site, out))
        return out

    with torch.no_grad(), vtr.apply(model, instead(method, "attend", attend), **given):
        model(x)
    return found


def numbers(*tensors: Tensor) -> list[Any]:
    return [t.detach().double().numpy() for t in tensors]


def softmax(x: Any) -> Any:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def guess(module: Connectivity, q: Any, k: Any, heads: int, top: int, threshold: float) -> Any:
    """The paper's map of one head, rows x keys: coefficients of low rank, the largest of them, times the basis."""
    wq, bq, wk, bk = numbers(*module.queries.parameters(), *module.keys.parameters())
    down, up = numbers(module.down, module.up)
    rows, keys = q @ wq.T + bq, k @ wk.T + bk
    coefficients = softmax(rows @ (keys.T @ down) / math.sqrt(heads))
    for row in coefficients:
        row[np.argsort(-row, kind="stable")[top:]] = 0
    basis = np.where(np.abs(up) > threshold, np.abs(up), 0)
    return coefficients @ basis.T


@pytest.mark.parametrize("prefix", [1, 0, 5])
def test_rows_attend_to_the_keys_with_the_largest_guess(prefix: int) -> None:
    more: dict[int, dict[str, Any]] = {
        0: {"class_token": False, "global_pool": "avg"},
        5: {"reg_tokens": 4},
    }
    model = vit(depth=2, **more.get(prefix, {}))
    method = vtr.Sparsifiner(0.25, rank=6, coefficients=3, threshold=0.1, untrained=True)
    modules = modules_of(model, method)
    calls = seen(model, method, images(2), modules=modules)
    tokens = 64 + prefix
    number = math.ceil(0.25 * tokens)
    for site, out in calls:
        q, k, v, found = numbers(site.q, site.k, site.v, out)
        for b, h in np.ndindex(q.shape[:2]):
            scores = guess(modules.at(site.layer), q[b, h], k[b, h], q.shape[1], 3, 0.1)
            logits = q[b, h] @ k[b, h].T * site.scale
            for i in range(tokens):
                keys = np.arange(tokens)
                if i >= prefix:
                    keys = np.argsort(-scores[i], kind="stable")[:number]
                wanted = softmax(logits[i, keys]) @ v[b, h][keys]
                np.testing.assert_allclose(found[b, h, i], wanted, atol=1e-5, rtol=1e-3)
        share = (prefix * tokens + 64 * number) / tokens**2
        assert site.notes["density"] == pytest.approx(share)


def test_blocks_are_chosen_by_the_mean_of_the_guess() -> None:
    model = vit(depth=2)
    method = vtr.Sparsifiner(0.4, rank=6, block=16, coefficients=3, untrained=True)
    modules = modules_of(model, method)
    for site, out in seen(model, method, images(2), modules=modules):
        q, k, v, found = numbers(site.q, site.k, site.v, out)
        live = 0
        for b, h in np.ndindex(q.shape[:2]):
            scores = guess(modules.at(site.layer), q[b, h], k[b, h], q.shape[1], 3, 0.02)
            logits = q[b, h] @ k[b, h].T * site.scale
            for start in range(0, 65, 16):  # the last block is one token
                means = [scores[start : start + 16, c : c + 16].mean() for c in range(0, 65, 16)]
                blocks = np.sort(np.argsort(-np.array(means), kind="stable")[:2])
                keys = np.concatenate([np.arange(65)[16 * c : 16 * c + 16] for c in blocks])
                rows = np.arange(65)[start : start + 16]
                live += len(rows) * len(keys)
                for i in rows:
                    every = np.arange(65) if i == 0 else keys  # the class token sees all
                    wanted = softmax(logits[i, every]) @ v[b, h][every]
                    np.testing.assert_allclose(found[b, h, i], wanted, atol=1e-5, rtol=1e-3)
        share = live / (6 * 65 * 65) + 1 / 65
        assert float(site.notes["density"]) == pytest.approx(share)


def test_flops_are_those_of_the_kept_pairs_and_of_the_guess() -> None:
    model = vit(depth=2)
    method = vtr.Sparsifiner(0.25, rank=6, coefficients=3, untrained=True)
    with torch.no_grad(), vtr.apply(model, method) as handle:
        model(images(2))
        dense, reduced = handle.report().flops["encoder"]
    tokens, dim, heads = 65, 16, 3
    pairs = 4 * tokens**2 * dim * heads * (1 - (65 + 64 * 17) / 65**2)
    spent = 2 * heads * (2 * tokens * dim * 8 + 2 * tokens * 8 * 6 + 3 * tokens**2)
    assert dense - reduced == 2 * round(pairs - spent)


def test_reconstruction_is_the_squared_error_per_image_and_trains_the_modules() -> None:
    model = vit(depth=2).train()
    method = vtr.Sparsifiner(0.25, rank=6, weight=0.5)
    x, torch_seed = images(2), 0
    with vtr.apply(model, method) as handle:
        modules = handle.modules[0]
        assert isinstance(modules, ConnectivityModules) and not modules.trained
        torch.manual_seed(torch_seed)
        out = model(x)
        losses = method.training_losses(handle.trace, modules)
        losses["reconstruction"].backward()
        assert modules.trained
    assert list(losses) == ["reconstruction"]
    assert all(p.grad is not None and bool(p.grad.any()) for p in modules.parameters())
    assert model.blocks[0].attn.qkv.weight.grad is None  # the target and the inputs are constants
    torch.testing.assert_close(out, model(x))  # attention stays dense meanwhile
    errors = []
    for site, _ in seen(model, method, x, modules=modules):
        module = modules.at(site.layer)
        q, k, up, down = numbers(site.q, site.k, module.up, module.down)
        wq, bq, wk, bk = numbers(*module.queries.parameters(), *module.keys.parameters())
        total = 0.0
        for b, h in np.ndindex(q.shape[:2]):
            keys = (k[b, h] @ wk.T + bk).T @ down
            approx = softmax((q[b, h] @ wq.T + bq) @ keys / math.sqrt(3)) @ up.T
            real = softmax(q[b, h] @ k[b, h].T * site.scale)
            total += ((approx - real)[1:] ** 2).sum()
        errors.append(total / 2)
    assert float(losses["reconstruction"].detach()) == pytest.approx(
        0.5 * np.mean(errors), rel=1e-4
    )
    assert vtr.Sparsifiner().training_losses(vtr.Trace(), None) == {}


def test_a_few_steps_lower_the_reconstruction_error() -> None:
    model = vit(depth=2).train().requires_grad_(False)
    method = vtr.Sparsifiner(0.25, rank=8)
    with vtr.apply(model, method) as handle:
        optimizer = torch.optim.Adam(handle.modules.parameters(), lr=1e-2)
        losses = []
        for _ in range(20):
            model(images(2))
            loss = method.training_losses(handle.trace, handle.modules[0])["reconstruction"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


def test_the_second_part_of_training_masks_and_moves_the_model_alone() -> None:
    model = vit(depth=2)
    first = vtr.Sparsifiner(0.25, untrained=True)
    modules = modules_of(model, first)
    with torch.no_grad(), vtr.apply(model, first, modules=modules):
        wanted = model(images(2))
    model.train()
    with vtr.apply(model, first.replace(reconstruct=False), modules=modules) as handle:
        out = model(images(2))
        out.sum().backward()
        assert first.training_losses(handle.trace, modules) == {}
    torch.testing.assert_close(out, wanted)
    assert all(p.grad is None for p in modules.parameters())
    assert bool(model.blocks[0].attn.qkv.weight.grad.any())


def test_tokens_that_are_cut_leave_the_basis() -> None:
    model = vit(depth=2)
    method = vtr.Sparsifiner(0.25, rank=6, coefficients=6, untrained=True)
    modules = modules_of(model, method)
    cut = vtr.Random(keep=30, layers=(0,), seed=1)
    found = {}

    def attend(site: EncoderAttentionSite) -> Tensor:
        found[site.layer] = site, method.attend(site)
        return found[site.layer][1]

    methods = [cut, instead(method, "attend", attend)]
    with torch.no_grad(), vtr.apply(model, methods, modules=modules):
        model(images(2))
    site, out = found[1]
    q, k, v, given = numbers(site.q, site.k, site.v, out)
    assert q.shape[2] == 31
    module = Connectivity(16, 65, 6)
    module.load_state_dict(modules.at(1).state_dict())
    for b in range(2):
        part = Connectivity(16, 31, 6)
        state = module.state_dict()
        part.load_state_dict(state | {n: state[n][site.index[b]] for n in ("down", "up")})
        scores = guess(part, q[b, 0], k[b, 0], 3, 6, 0.02)
        keys = np.argsort(-scores[5], kind="stable")[:17]  # as many as of 65 tokens
        logits = q[b, 0, 5] @ k[b, 0][keys].T * site.scale
        np.testing.assert_allclose(given[b, 0, 5], softmax(logits) @ v[b, 0][keys], atol=1e-5)


def test_modules_are_saved_and_loaded(tmp_path: Path) -> None:
    model = vit(depth=2)
    method = vtr.Sparsifiner(0.25, untrained=True)
    modules = modules_of(model, method)
    modules.count()
    file = tmp_path / "modules.safetensors"
    save_file({n: t.contiguous() for n, t in modules.state_dict().items()}, file)
    outputs = []
    with torch.no_grad():
        for given, more in (
            (vtr.Sparsifiner(0.25, weights=str(file)), {}),
            (vtr.Sparsifiner(0.25), {"modules": modules}),
        ):
            with vtr.apply(model, given, **more):
                outputs.append(model(images(2)))
    assert torch.equal(*outputs)
    with pytest.raises(ValueError, match="trained for another"):
        vtr.apply(vit(depth=3), vtr.Sparsifiner(0.25, weights=str(file)))


def test_what_cannot_work_is_refused() -> None:
    model = vit(depth=2, dynamic_img_size=True)
    with (
        vtr.apply(model, vtr.Sparsifiner()),
        pytest.raises(vtr.UnsupportedMethodError, match="trained modules, and these are new"),
    ):
        model(images(2))
    with (
        vtr.apply(model, vtr.Sparsifiner(untrained=True)),
        pytest.raises(ValueError, match=r"for 65 tokens and 16 channels in a head.*has 17 and 16"),
    ):
        model(images(2)[..., :32, :32])
    for options, message in (
        ({"density": 0.0}, "density must be"),
        ({"rank": 0}, "rank must be"),
        ({"coefficients": 0}, "coefficients must be"),
        ({"threshold": -1.0}, "threshold must be"),
        ({"weight": -1.0}, "weight must be"),
        ({"block": 20}, "block must be 16, 32, 64, 128 or None"),
        ({"reconstruct": 1}, "reconstruct must be"),
        ({"untrained": 1}, "untrained must be"),
        ({"backend": "cuda"}, "backend must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            vtr.Sparsifiner(**options)


def test_the_built_in_modules_find_more_attention_than_chance_does() -> None:
    model = vtr.zoo.load("digits-vit")
    x = vtr.zoo.samples("digits-vit", n=4, seed=5)[0]
    method = vtr.Sparsifiner(0.25, weights="digits-sparsifiner")
    shares = []
    for site, _ in seen(model, method, x):
        module = modules_at(site)
        rows = sparse_coefficients(module(site.q, site.k, site.index, None), 8)
        kept = chosen_keys(rows, module.basis(site.index, 0.02), 37, 1, None)
        with torch.no_grad():
            shares.append(float((site.rows(1, 145) * kept[:, :, 1:]).sum(-1).mean()))
    assert np.mean(shares) > 1.2 * 37 / 145


def modules_at(site: EncoderAttentionSite) -> Connectivity:
    assert isinstance(site.modules, ConnectivityModules)
    return site.modules.at(site.layer)
