"""TopKSparse and SLA against the paper's formulas, in loops over heads, blocks and tokens in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import vtr
from tests.methods.sites import TOLERANCE, Run, tensors, visible
from vtr.core.calibration import Fingerprint
from vtr.core.module_files import FILE, ModuleFile
from vtr.core.site import ModelInfo
from vtr.methods import SLA, TopKSparse
from vtr.methods.common.learned import LayerModules

GRID = (3, 5, 5)  # 75 tokens: four blocks of 16 and one of 11
FEATURES = {
    "softmax": lambda x: torch.exp(x - x.max()) / torch.exp(x - x.max()).sum(),
    "elu": lambda x: torch.where(x > 0, x + 1, x.exp()),
    "relu": lambda x: x.clamp(min=0),
}


def blocks(n, side):
    return [range(i, min(i + side, n)) for i in range(0, n, side)]


def by_formula(q, k, v, method, proj=None, *, text=0, first=0, seen=None):
    """One sample and head, token by token: q, k, v (S, D) with text before or behind the grid.

    ``proj`` is (weight, bias) of the learned layer, or None for TopKSparse.
    """
    q, k, v = q.double(), k.double(), v.double()
    n = q.shape[0] - text
    grid = list(range(first, first + n))
    words = [j for j in range(q.shape[0]) if j not in grid and bool(seen[j])]
    rows, columns = blocks(n, method.sides[0]), blocks(n, method.sides[1])
    centre = sum(k[grid[j]] for j in range(n)) / n
    out = torch.zeros_like(q)
    phi = FEATURES[getattr(method, "feature", "softmax")]
    seen_by_phi = torch.stack([phi(key) for key in k])
    for row in rows:
        mean_q = sum(q[grid[i]] for i in row) / len(row)
        scores = [
            float(mean_q @ (sum(k[grid[j]] - centre for j in column) / len(column)))
            for column in columns
        ]
        falling = sorted(range(len(columns)), key=lambda c: -scores[c])
        number = max(1, int(method.density * len(columns) + 1e-9))
        critical = falling[:number]
        low = 0
        if isinstance(method, SLA) and method.keys == "marginal":
            low = min(int(method.negligible * len(columns)), len(columns) - number)
        marginal = falling[number : len(columns) - low]
        keys = [grid[j] for c in critical for j in columns[c]] + words
        others = [grid[j] for c in marginal for j in columns[c]]
        if isinstance(method, SLA) and method.keys == "all":
            others = grid + words
        for i in row:
            i = grid[i]
            out[i] = torch.softmax(k[keys] @ q[i] * q.shape[1] ** -0.5, 0) @ v[keys]
            if proj is None:
                continue
            weights = seen_by_phi[others] @ phi(q[i])
            total = weights.sum() + (1e-5 if method.keys == "all" else 0)
            linear = weights / total @ v[others] if others else 0 * v[0]
            out[i] += proj[0].double() @ linear + proj[1].double()
    everything = grid + words
    for i in range(q.shape[0]):
        if i not in grid:
            weights = torch.softmax(k[everything] @ q[i] * q.shape[1] ** -0.5, 0)
            out[i] = weights @ v[everything]
    return out


def info(dim=16, layers=4):
    return ModelInfo("tiny", {"attention": layers}, {}, heads=2, head_dim=dim)


def trained(method, seed=0):
    """The modules of four layers with random numbers."""
    modules = method.build(info())
    torch.manual_seed(seed)
    for parameter in modules.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return modules


def run(method, qkv, modules=None, **facts):
    site = Run(method, GRID, **facts).site(qkv)
    site.modules = modules
    return method.attend(site), site


def compare(method, modules=None, *, text=0, text_first=False, padded=False, key_heads=None, dtype=torch.float32):  # fmt: skip
    qkv = tensors(GRID, text, key_heads=key_heads, dtype=dtype)
    valid = None
    if padded:
        valid = torch.ones(2, text, dtype=torch.bool)
        valid[0, 3:] = False
        valid[1, 0] = False
    out, site = run(method, qkv, modules, text_first=text_first, text_valid=valid)
    assert out.dtype == dtype
    proj = None
    if modules is not None:
        proj = modules.at(0).weight.detach(), modules.at(0).bias.detach()
    seen = visible(GRID, text, text_first, valid, 2)
    group = 2 // (key_heads or 2)
    for b in range(2):
        for h in range(2):
            wanted = by_formula(
                qkv[0][b, h], qkv[1][b, h // group], qkv[2][b, h // group], method, proj,
                text=text, first=text if text_first else 0, seen=seen[b],
            )  # fmt: skip
            rows = seen[b]
            torch.testing.assert_close(
                out[b, h][rows].double(), wanted[rows], atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
            )
    return site


CASES = {
    "grid alone": {},
    "text last": {"text": 9},
    "text first": {"text": 9, "text_first": True},
    "padded text": {"text": 9, "padded": True},
    "padded text first": {"text": 9, "padded": True, "text_first": True},
    "grouped heads": {"key_heads": 1},
    "bfloat16": {"dtype": torch.bfloat16},
}


@pytest.mark.parametrize("case", CASES)
def test_the_best_blocks_by_means(case):
    # Rounded inputs may tie in the choice; the loop then chooses from the same rounded numbers.
    compare(TopKSparse(0.5, block=16), **CASES[case])


def test_query_blocks_of_another_side():
    compare(TopKSparse(0.5, block=16, query_block=32))
    method = SLA(0.4, block=16, query_block=32, untrained=True)
    compare(method, trained(method))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("keys", ["marginal", "all"])
def test_linear_attention_of_the_others(case, keys):
    method = SLA(0.4, block=16, keys=keys, negligible=0.25)
    compare(method, trained(method), **CASES[case])


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("keys", ["marginal", "all"])
def test_feature_maps(feature, keys):
    method = SLA(0.4, block=16, keys=keys, feature=feature, negligible=0.0)
    compare(method, trained(method))


@pytest.mark.parametrize("density", [0.01, 0.1, 0.2, 0.39, 0.4, 0.99])
def test_the_number_of_blocks_is_rounded_down_and_at_least_one(density):
    method, grid = TopKSparse(density, block=16), (2, 4, 10)  # five blocks
    site = Run(method, grid).site(tensors(grid))
    method.attend(site)
    assert float(site.notes["density"]) == pytest.approx(max(1, int(density * 5 + 1e-9)) / 5)


# ---- the learned part -----------------------------------------------------------------------------


@pytest.mark.parametrize("keys", ["marginal", "all"])
def test_untrained_sla_is_the_mask_alone(keys):
    qkv = tensors(GRID)
    method = SLA(0.4, block=16, keys=keys, untrained=True)
    found, _ = run(method, qkv, method.build(info()))
    assert torch.equal(found, run(TopKSparse(0.4, block=16), qkv)[0])


def test_without_marginal_blocks_the_linear_part_is_zero():
    method = SLA(0.8, block=16, negligible=0.2)
    modules = trained(method)
    torch.nn.init.zeros_(modules.at(0).bias)
    qkv = tensors(GRID)
    found, _ = run(method, qkv, modules)
    assert torch.equal(found, run(TopKSparse(0.8, block=16), qkv)[0])
    everything = dataclasses.replace(method, density=1.0)
    dense, site = run(everything, qkv, modules)
    torch.testing.assert_close(dense, site.dense(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("keys", ["marginal", "all"])
def test_gradients_of_q_k_v_and_the_projection_in_float64(keys):
    method = SLA(0.4, block=16, keys=keys, backend="reference")
    modules = trained(method).double()
    grid = (1, 4, 12)  # three blocks
    q, k, v = (t.double().requires_grad_() for t in tensors(grid, batch=1, heads=1, dim=16))
    weight = modules.at(0).weight

    def out(q, k, v, weight):
        site = Run(method, grid).site([q, k, v])
        site.modules = modules
        return method.attend(site).square().sum()

    found = torch.autograd.grad(out(q, k, v, weight), [q, k, v, weight])
    g = torch.Generator().manual_seed(0)
    for tensor, gradient in zip((q, k, v, weight), found, strict=True):
        assert gradient.abs().max() > 0
        way = torch.randn(tensor.shape, generator=g, dtype=torch.float64)
        with torch.no_grad():
            tensor += 1e-6 * way
            more = out(q, k, v, weight)
            tensor -= 2e-6 * way
            less = out(q, k, v, weight)
            tensor += 1e-6 * way
        assert float((more - less) / 2e-6) == pytest.approx(float((gradient * way).sum()), rel=1e-4)


def test_new_modules_compute_in_training_alone():
    method, qkv = SLA(0.4, block=16), tensors(GRID)
    site = Run(method, GRID).site(qkv, training=True)
    site.modules = method.build(info())
    method.attend(site)
    with pytest.raises(vtr.UnsupportedMethodError, match="modules that are trained with the model"):
        run(method, qkv, method.build(info()))
    run(method, qkv, trained(method))


# ---- files ----------------------------------------------------------------------------------------

MODEL = Fingerprint("Tiny", {"hidden_size": 32}, "blocks.3.attn.to_q.weight", (32, 32), "ab")


def written(path, method, modules):
    options = {k: v for k, v in method.to_dict().items() if k != "weights"}
    ModuleFile(modules.state_dict(), options, MODEL).write(path / FILE)
    return str(path)


def test_modules_are_loaded_from_a_folder_and_from_its_file(tmp_path):
    method = SLA(0.4, block=16, dense_layers=(1,))
    modules = trained(method)
    assert sorted(modules.layers) == ["0", "2", "3"]
    folder = written(tmp_path, method, modules)
    for weights in (folder, f"{folder}/{FILE}"):
        loaded = dataclasses.replace(method, weights=weights)
        built = loaded.build(info())
        assert isinstance(built, LayerModules) and built.trained
        for name, tensor in modules.state_dict().items():
            assert torch.equal(built.state_dict()[name], tensor)
        assert loaded.origin() == MODEL
    file = ModuleFile.read(folder)
    assert vtr.create(**file.method) == method and not file.lora


def test_files_of_others_are_refused(tmp_path):
    method = SLA(0.4, block=16)
    folder = written(tmp_path, method, trained(method))
    with pytest.raises(ValueError, match="other layers or another head dim"):
        SLA(weights=folder).build(info(dim=32))
    with pytest.raises(ValueError, match="other layers or another head dim"):
        SLA(weights=folder).build(info(layers=5))
    ModuleFile({}, TopKSparse().to_dict(), MODEL).write(tmp_path / FILE)
    with pytest.raises(ValueError, match="was trained for topk-sparse, not for sla"):
        SLA(weights=folder).build(info())
    with pytest.raises(ValueError, match="there is no"):
        SLA(weights=str(tmp_path / "nothing")).build(info())
    plain = tmp_path / "plain.safetensors"
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, plain)
    with pytest.raises(ValueError, match="holds no modules of vtr"):
        SLA(weights=str(plain)).build(info())
    plain.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is no safetensors file"):
        SLA(weights=str(plain)).build(info())


def test_a_pipeline_with_two_transformers_is_refused():
    two = dataclasses.replace(info(), experts=2)
    with pytest.raises(vtr.UnsupportedMethodError, match="to each transformer apart"):
        SLA(untrained=True).build(two)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0}, r"density must be in \(0, 1\]"),
        ({"query_block": 48}, "query_block must be 16, 32, 64 or 128"),
        ({"keys": "some"}, "keys must be one of marginal, all"),
        ({"feature": "gelu"}, "feature must be one of softmax, elu, relu"),
        ({"negligible": 1.5}, "negligible must be a number from 0 to 1"),
        ({"weights": 3}, "weights must be the path"),
        ({"untrained": 1}, "untrained must be True or False"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        SLA(**options)
