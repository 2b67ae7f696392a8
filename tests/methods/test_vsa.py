"""VSA against its definition token by token, and its gates."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

import vtr
from tests.diffusion.models import CASES
from tests.methods.sites import TOLERANCE, Run, attention, tensors, visible
from vtr.core.module_files import ModuleFile
from vtr.core.registry import create
from vtr.diffusion.adapter import wrap
from vtr.methods.common.learned import LayerModules

SMALL = {"tile": (1, 2, 4), "block": 16}
GRID = (3, 5, 6)  # the tiles at two ends are cut off


def tiles_of(grid, tile):
    """The raster indices of the tokens of each tile."""
    _, height, width = grid
    found = []
    starts = [range(0, n, t) for n, t in zip(grid, tile, strict=True)]
    for corner in itertools.product(*starts):
        ends = [min(c + t, n) for c, t, n in zip(corner, tile, grid, strict=True)]
        places = itertools.product(*(range(c, e) for c, e in zip(corner, ends, strict=True)))
        found.append([(f * height + h) * width + w for f, h, w in places])
    return found


def brute_force(q, k, v, scale, grid, tile, number, gate, text=0):
    """One head: q, k, v (N + T, D), text last, and gate (N, D) or None: the rows of the grid."""
    q, k, v = (x.double() for x in (q, k, v))
    tiles, tokens = tiles_of(grid, tile), math.prod(grid)
    mean = [[x[part].sum(0) / len(part) for part in tiles] for x in (q, k, v)]
    out = torch.zeros(tokens, q.shape[1], dtype=torch.float64)
    for a, rows in enumerate(tiles):
        score = [scale * float(mean[0][a] @ key) for key in mean[1]]
        best = sorted(range(len(tiles)), key=lambda b: -score[b])[:number]
        keys = [j for b in best for j in tiles[b]] + list(range(tokens, tokens + text))
        total = sum(math.exp(s) for s in score)
        coarse = sum(math.exp(s) / total * value for s, value in zip(score, mean[2], strict=True))
        for i in rows:
            out[i] = torch.softmax(scale * k[keys] @ q[i], 0) @ v[keys]
            if gate is not None:
                out[i] += gate[i].double() * coarse
    return out


def zero_gates(dim, layers=4):
    gates = LayerModules({layer: nn.Linear(dim, dim) for layer in range(layers)})
    for parameter in gates.parameters():
        nn.init.zeros_(parameter)
    return gates


def gates_for(dim, layers=4, seed=0):
    gates = zero_gates(dim, layers)
    torch.manual_seed(seed)
    for parameter in gates.parameters():
        nn.init.normal_(parameter, std=0.3)
    return gates


def site_of(method, grid, qkv, modules=None, hidden=None, training=False, **run):
    site = Run(method, grid, **run).site(qkv, training=training)
    site.modules, site.hidden = modules, hidden
    return site


@pytest.mark.parametrize("tile", [(1, 2, 4), (2, 2, 4), (3, 4, 4), (2, 5, 6)])
@pytest.mark.parametrize("gate", [True, False, None])
def test_equals_the_definition_token_by_token(tile, gate):
    """Tiles of half a block, one block, three blocks and some, the whole grid but for its end."""
    method = vtr.VSA(0.3, tile=tile, block=16, gate=gate)
    qkv = tensors(GRID, heads=4, key_heads=2, dim=8)
    hidden, gates = torch.randn(2, 90, 32), gates_for(32)
    found = method.attend(site_of(method, GRID, qkv, gates, hidden, layer=2))
    weight = gates.at(2)
    factor = (hidden @ weight.weight.T + weight.bias).view(2, 90, 4, 8)
    number = math.ceil(0.3 * len(tiles_of(GRID, tile)))
    for b, h in itertools.product(range(2), range(4)):
        q, k, v = qkv[0][b, h], qkv[1][b, h // 2], qkv[2][b, h // 2]
        own = {True: factor[b, :, h], False: torch.ones(90, 8), None: None}[gate]
        expected = brute_force(q, k, v, 8**-0.5, GRID, tile, number, own)
        torch.testing.assert_close(found[b, h].double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("text_first", [False, True])
def test_text_is_dense_and_has_no_part_in_the_coarse_attention(text_first):
    method = vtr.VSA(0.3, gate=True, **SMALL)
    qkv = tensors(GRID, 7, dim=8)
    valid = torch.tensor([[True] * 7, [True] * 3 + [False] * 4])
    hidden, gates = torch.randn(2, 90, 16), gates_for(16)
    run = {"text_first": text_first, "text_valid": valid}
    found = method.attend(site_of(method, GRID, qkv, gates, hidden, **run))
    first = 7 if text_first else 0
    words = slice(0, 7) if text_first else slice(90, 97)
    factor = gates.at(0)(hidden).view(2, 90, 2, 8)
    number = math.ceil(0.3 * 18)
    for b, h in itertools.product(range(2), range(2)):
        grid, text = ([t[b, h, part] for t in qkv] for part in (slice(first, first + 90), words))
        seen = [torch.cat([g, t[valid[b]]]) for g, t in zip(grid, text, strict=True)]
        expected = brute_force(
            *seen, 8**-0.5, GRID, SMALL["tile"], number, factor[b, :, h], int(valid[b].sum())
        )
        torch.testing.assert_close(
            found[b, h, first : first + 90].double(), expected, atol=1e-5, rtol=1e-5
        )
    dense, _ = attention(*qkv, visible(GRID, 7, text_first, valid, 2)[:, None, None], 8**-0.5)
    torch.testing.assert_close(
        found[:, :, words].double(), dense[:, :, words], atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("density", "tiles", "kept"),
    [(0.1, 18, 2), (0.1, 20, 2), (0.1, 30, 3), (0.01, 18, 1), (1.0, 18, 18), (0.5, 3, 2)],
)
def test_the_number_of_tiles(density, tiles, kept):
    """max(1, min(ceil((1 - s) n), n)); a share that is a whole number of tiles is that number."""
    method = vtr.VSA(density, gate=None, tile=(1, 4, 4), block=16)
    grid = (tiles, 4, 4)
    site = site_of(method, grid, tensors(grid, batch=1, heads=1))
    live = method.chosen(method.view(site)).live
    assert (live.sum(-1) == kept).all()


def test_all_tiles_without_a_gate_are_dense_attention():
    method = vtr.VSA(1.0, gate=None, **SMALL)
    qkv = tensors(GRID, 5)
    out = Run(method, GRID)(qkv)
    expected, _ = attention(*qkv, torch.ones(95, dtype=torch.bool), 0.25)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


def test_zero_gates_in_training_are_the_bare_tiles():
    qkv, hidden = tensors(GRID, dim=8), torch.randn(2, 90, 16)
    method = vtr.VSA(0.3, **SMALL)
    site = site_of(method, GRID, qkv, zero_gates(16), hidden, training=True)
    assert torch.equal(method.attend(site), Run(vtr.VSA(0.3, gate=None, **SMALL), GRID)(qkv))


def test_untrained_gates_are_an_error_outside_training():
    qkv, hidden = tensors(GRID, dim=8), torch.randn(2, 90, 16)
    method, gates = vtr.VSA(0.3, **SMALL), zero_gates(16)
    site = site_of(method, GRID, qkv, gates, hidden)
    with pytest.raises(
        vtr.UnsupportedMethodError, match="vsa computes with modules that are trained"
    ):
        method.attend(site)
    assert torch.equal(
        method.replace(untrained=True).attend(site), Run(method.replace(gate=None), GRID)(qkv)
    )
    gates.at(3).bias.data[0] = 1.0
    method.attend(site)


def test_each_layer_has_a_gate():
    qkv, hidden = tensors(GRID, dim=8), torch.randn(2, 90, 16)
    method, gates = vtr.VSA(0.3, **SMALL), gates_for(16)
    bare = Run(vtr.VSA(0.3, gate=None, **SMALL), GRID)(qkv)
    plain = Run(vtr.VSA(0.3, gate=False, **SMALL), GRID)(qkv) - bare
    for layer in range(4):
        site = site_of(method, GRID, qkv, gates, hidden, layer=layer)
        factor = gates.at(layer)(hidden).view(2, 90, 2, 8).transpose(1, 2)
        torch.testing.assert_close(method.attend(site) - bare, factor * plain, atol=1e-5, rtol=1e-4)


def test_gradients_reach_everything_that_learns():
    method, gates = vtr.VSA(0.4, tile=(1, 2, 2), block=16), gates_for(4, 1).double()
    grid = (1, 3, 5)
    q, k, v = (t.double().requires_grad_() for t in tensors(grid, batch=1, dim=2))
    hidden = torch.randn(1, 15, 4, dtype=torch.float64, requires_grad=True)
    weight, bias = gates.at(0).weight, gates.at(0).bias

    def call(q, k, v, hidden, weight, bias):
        layer = nn.Linear(4, 4).double()
        del layer.weight, layer.bias
        layer.weight, layer.bias = weight, bias
        gates.layers["0"] = layer
        return method.attend(site_of(method, grid, (q, k, v), gates, hidden, training=True))

    assert torch.autograd.gradcheck(call, (q, k, v, hidden, weight, bias), fast_mode=True)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("gate", [True, False])
def test_low_precision(dtype, gate):
    """With all tiles nothing is left to choose."""
    method, gates = vtr.VSA(1.0, gate=gate, **SMALL), gates_for(32)
    qkv, hidden = tensors(GRID, dtype=dtype), torch.randn(2, 90, 32).to(dtype)
    gates.requires_grad_(False)
    found = method.attend(site_of(method, GRID, qkv, gates, hidden))
    exact = method.attend(site_of(method, GRID, [t.float() for t in qkv], gates, hidden.float()))
    assert found.dtype == dtype
    limit = TOLERANCE[dtype] * max(1.0, float(exact.abs().max()))
    torch.testing.assert_close(found.float(), exact, atol=limit, rtol=0)


# ---- gates --------------------------------------------------------------------------------------


def released(layers=3, dim=8, prefix="", inner="", bias=True):
    g = torch.Generator().manual_seed(1)
    state = {f"{prefix}blocks.0.to_q.weight": torch.zeros(2, 2)}
    for n in range(layers):
        name = f"{prefix}blocks.{n}.{inner}to_gate_compress"
        state[f"{name}.weight"] = torch.randn(dim, dim, generator=g)
        if bias:
            state[f"{name}.bias"] = torch.randn(dim, generator=g)
    return state


@pytest.mark.parametrize(
    "names", [{}, {"prefix": "transformer."}, {"prefix": "transformer_", "inner": "attn1."}]
)
def test_gates_of_released_models(names):
    state = released(12, **names)
    gates = vtr.VSA().from_fastvideo(state)
    assert len(gates.layers) == 12
    for name, value in state.items():
        if "to_gate_compress" in name:
            number = int(name.split("blocks.")[1].split(".")[0])
            assert torch.equal(getattr(gates.at(number), name.rpartition(".")[2]), value)


def test_gates_without_a_bias_and_of_dense_layers():
    state = released(4, bias=False)
    del state["blocks.2.to_gate_compress.weight"]
    gates = vtr.VSA(dense_layers=(0, 2)).from_fastvideo(state)
    assert sorted(gates.layers) == ["1", "3"]
    assert torch.equal(gates.at(3).weight, state["blocks.3.to_gate_compress.weight"])
    assert not gates.at(1).bias.any()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: s.clear(), "found those of none"),
        (lambda s: s.pop("blocks.1.to_gate_compress.weight"), "for every block N"),
        (lambda s: s.update({"blocks.1.to_gate_compress.weight": torch.zeros(4, 4)}), "one size"),
        (lambda s: s.update({n: s[n][0] for n in list(s) if "compress" in n}), "one size"),
    ],
)
def test_state_dicts_without_gates(change, match):
    state = released()
    change(state)
    with pytest.raises(ValueError, match=match):
        vtr.VSA().from_fastvideo(state)


# ---- in a model ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["wan", "hunyuan-video"])
def test_gates_are_trained_with_a_model(name, tmp_path):
    case = CASES[name]
    model, given = case.build().train(), case.call()
    method = vtr.VSA(0.3, **SMALL)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with vtr.apply(model, method) as handle:
        assert torch.equal(torch.rand(3), expected), "no random numbers are drawn"
        gates = handle.modules[0]
        optimiser = torch.optim.SGD(gates.parameters(), lr=1.0)
        before = model(**given)[0].square().mean()
        before.backward()
        assert len(gates.layers) == len(case.attention)
        for layer in gates.layers.values():
            grads = [p.grad.abs().sum() for p in layer.parameters()]
            assert all(g > 0 for g in grads)
        optimiser.step()
        assert model(**given)[0].square().mean() < before
    model.eval()
    with torch.no_grad():
        with (
            vtr.apply(model, method),
            pytest.raises(vtr.UnsupportedMethodError, match="these are new"),
        ):
            model(**given)
        with vtr.apply(model, method, modules=gates):
            found = model(**given)[0]
        with vtr.apply(model, method.replace(gate=None)):
            assert not torch.allclose(model(**given)[0], found, atol=1e-4)
        path = tmp_path / "modules.safetensors"
        ModuleFile(gates.state_dict(), method.to_dict(), wrap(model).fingerprint()).write(path)
        with vtr.apply(model, method.replace(weights=str(tmp_path))):
            assert torch.equal(model(**given)[0], found)


def test_released_gates_in_a_model():
    case = CASES["wan"]
    model, given = case.build(), case.call()
    state = released(3, 24)
    method = vtr.VSA(0.3, **SMALL)
    with torch.no_grad():
        with vtr.apply(model, method, modules=method.from_fastvideo(state)):
            found = model(**given)[0]
        with vtr.apply(model, method.replace(gate=None)):
            assert not torch.allclose(model(**given)[0], found, atol=1e-4)
    with pytest.raises(ValueError, match="modules= must be what"):
        vtr.apply(model, method, modules=method.from_fastvideo(released(3, 16)))


# ---- options ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"density": 0.0}, "density must be in"),
        ({"tile": (4, 4)}, "tile must be positive ints"),
        ({"tile": (0, 4, 4)}, "tile must be positive ints"),
        ({"gate": 0.5}, "gate must be True, False or None"),
        ({"gate": False, "untrained": True}, "are for learned gates"),
        ({"gate": None, "weights": "gates.safetensors"}, "are for learned gates"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(ValueError, match=match):
        vtr.VSA(**options)


def test_is_written_and_read():
    method = vtr.VSA(0.2, tile=(4, 8, 8), gate=False)
    assert create(**method.to_dict()) == method
    assert vtr.VSA().learned and not method.learned and not vtr.VSA(gate=None).learned


def test_the_authors_settings():
    found = {name: vtr.VSA.preset(name) for name in vtr.VSA.PRESETS}
    assert {method.density for method in found.values()} == {0.1, 0.2}
    assert all(
        (method.tile, method.block, method.gate) == ((4, 4, 4), 64, True)
        for method in found.values()
    )
