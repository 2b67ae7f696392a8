"""transformers' video encoders: every method that is supported, over space-time tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import vtr
from tests.tiny import applied, cutters, ours, spread
from tests.vision.looks import check_keys
from vtr.core.method import Method
from vtr.inspect.flops import _missing_formulas
from vtr.video.encoders import TOWERS

SIZE: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "num_labels": 5,
}
CLIP: dict[str, Any] = {**SIZE, "image_size": 16, "intermediate_size": 96, "num_frames": 8}
N, GRID = 64, (4, 4, 4)
CLS = {"cls-attention", "evit", "flowcut", "random", "tofe", "tome"}
NO_CLS = {"flowcut", "random", "tome"}


def mae(**more: Any) -> hf.VideoMAEConfig:
    return hf.VideoMAEConfig(**CLIP, patch_size=4, tubelet_size=2, **more)


def vivit() -> hf.VivitConfig:
    return hf.VivitConfig(**CLIP, tubelet_size=[2, 4, 4])


def jepa() -> hf.VJEPA2Config:
    return hf.VJEPA2Config(
        **SIZE,
        crop_size=16,
        patch_size=4,
        frames_per_clip=8,
        tubelet_size=2,
        mlp_ratio=2,
        num_pooler_layers=1,
        pred_hidden_size=24,
        pred_num_attention_heads=2,
        pred_num_hidden_layers=2,
        pred_num_mask_tokens=2,
    )


MODELS: dict[str, tuple[Callable[[], Any], int, set[str]]] = {
    "videomae": (lambda: hf.VideoMAEModel(mae()), 0, NO_CLS),
    "videomae-classes": (lambda: hf.VideoMAEForVideoClassification(mae()), 0, NO_CLS),
    "videomae-first": (
        lambda: hf.VideoMAEForVideoClassification(mae(use_mean_pooling=False)),
        0,
        NO_CLS,
    ),
    "vivit": (lambda: hf.VivitModel(vivit()), 1, CLS),
    "vivit-classes": (lambda: hf.VivitForVideoClassification(vivit()), 1, CLS),
    "vjepa2": (lambda: hf.VJEPA2Model(jepa()), 0, NO_CLS),
    "vjepa2-classes": (lambda: hf.VJEPA2ForVideoClassification(jepa()), 0, NO_CLS),
}


def build(name: str) -> Any:
    return spread(MODELS[name][0]())


def clips(batch: int = 2, size: int = 16) -> Tensor:
    return torch.randn(batch, 8, 3, size, size, generator=torch.Generator().manual_seed(0))


def run(model: Any, x: Tensor, **more: Any) -> Any:
    """A call whose output has the tokens that are left where that is possible."""
    if isinstance(model, hf.VJEPA2Model):
        more = {"skip_predictor": True, **more}
    return model(x, **more)


def result(output: Any) -> Tensor:
    for name in ("logits", "pooler_output"):
        if getattr(output, name, None) is not None:
            return getattr(output, name)
    return output.last_hidden_state[:, 0]


def tower_of(model: Any) -> Any:
    return next(m for m in model.modules() if type(m).__name__ in TOWERS)


def layers_of(model: Any) -> Any:
    tower = tower_of(model)
    return tower.get_submodule(TOWERS[type(tower).__name__][0])


def core_of(layer: Any) -> Any:
    return getattr(layer.attention, "attention", layer.attention)


@pytest.fixture(params=MODELS, scope="module")
def family(request: pytest.FixtureRequest) -> tuple[str, Any, int, set[str]]:
    _, prefix, methods = MODELS[request.param]
    return request.param, build(request.param), prefix, methods


# ---- every encoder, every method ---------------------------------------------------------------


def test_every_supported_method_runs_by_the_laws(family: tuple[str, Any, int, set[str]]) -> None:
    kind, model, prefix, expected = family
    names = [s.name for s in vtr.supported(model) if s.supported]
    assert expected <= set(names), vtr.supported(model)
    for entry in vtr.supported(model):
        assert entry.supported or entry.reason
    x, keys = clips(), list(model.state_dict())
    with torch.no_grad():
        dense = result(run(model, x))
    for name in cutters(model):
        with applied(model, name) as handle, torch.no_grad():
            torch.manual_seed(0)
            out = result(run(model, x))
            torch.manual_seed(0)
            sequence = run(tower_of(model), x).last_hidden_state
            report = handle.report().to_dict()
        assert out.isfinite().all() and not torch.equal(out, dense), name
        total = None
        for record in handle.trace.stages:
            assert record.grid == GRID
            assert record.tokens_in == (N if total is None else total.n_out) or record.map.n_in == N
            assert record.tokens_out == record.map.n_out == record.total.n_out
            total = record.total
            for row in total.kept.tolist():
                alive = [j for j in row if j >= 0]
                assert alive == sorted(set(alive)) and alive[0] >= 0 and alive[-1] < N
        assert total is not None and total.n_in == N
        if name.name == "tome":
            assert torch.equal(total.size.sum(1), torch.full((2,), float(N)))
        full = kind == "videomae-first"
        assert sequence.shape[1] == (N if full else total.n_out + prefix)
        flops = report["flops"]["encoder"]
        assert 0 < flops["reduced"] <= flops["dense"], name
        # The tokens of the fullest image of a batch count.
        assert flops["reduced"] < flops["dense"] or name.data_dependent, name
        alone = []
        for b in range(2):
            with applied(model, name), torch.no_grad():
                torch.manual_seed(0)
                alone.append(result(run(model, x[b : b + 1])))
        torch.testing.assert_close(torch.cat(alone), out, atol=1e-3, rtol=1e-3)
        assert ours(model) == []
    assert list(model.state_dict()) == keys
    with torch.no_grad():
        assert torch.equal(result(run(model, x)), dense)


def test_all_tokens_kept_changes_no_bit(family: tuple[str, Any, int, set[str]]) -> None:
    _, model, _, methods = family
    x = clips()
    with torch.no_grad():
        dense = model(x)
        for name in sorted(methods):
            with vtr.apply(model, {"name": name, "keep": 1.0}):
                out = model(x)
                assert torch.equal(result(out), result(dense)), name
                if hasattr(dense, "last_hidden_state"):
                    assert torch.equal(out.last_hidden_state, dense.last_hidden_state), name


def test_keys_of_equals_the_keys_of_the_call(family: tuple[str, Any, int, set[str]]) -> None:
    _, model, _, _ = family
    with torch.no_grad():
        dense = result(run(model, clips()))
    opened = check_keys(model, layers_of(model), lambda: result(run(model, clips())))
    torch.testing.assert_close(opened, dense, atol=1e-4, rtol=1e-4)


# ---- exactness -----------------------------------------------------------------------------------

ALIVE: dict[int, Tensor] = {}  # id of an attention module -> (B, T) keys that it may see


def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> Any:
    """SDPA under a mask that the module itself would not take."""
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=ALIVE[id(module)][:, None, None, :], scale=options["scaling"]
    )
    return out.transpose(1, 2), None


@contextmanager
def masked(model: Any, after: int, alive: Tensor) -> Iterator[None]:
    """The unwrapped model with the keys that are not ``alive`` (B, T) masked in layers > after."""
    hf.AttentionInterface.register("vtr_test_masked", attend)
    cores = [core_of(layer) for layer in layers_of(model)[after + 1 :]]
    before = cores[0].config
    for core in cores:
        core.config = copy.copy(before)
        core.config._attn_implementation_internal = "vtr_test_masked"
        ALIVE[id(core)] = alive
    try:
        yield
    finally:
        for core in cores:
            core.config = before
        ALIVE.clear()


def test_pruning_equals_masking(family: tuple[str, Any, int, set[str]]) -> None:
    """Physically short equals the full sequence with the others masked, in float64."""
    name, model, prefix, methods = family
    model = copy.deepcopy(model).double()
    x = clips().double()
    method: Method = vtr.Random(keep=20, layers=(1,), seed=3)
    if "cls-attention" in methods:
        method = vtr.CLSAttention(keep=20, layers=(1,))
    with vtr.apply(model, method) as handle, torch.no_grad():
        short = run(tower_of(model), x).last_hidden_state
        answer = result(run(model, x))
    record = handle.trace.stages[-1]
    assert record.tokens_out == 20 and record.layer == 1
    whole = record.total.with_prefix(prefix)
    with torch.no_grad(), masked(model, 1, whole.source >= 0):
        full = run(tower_of(model), x).last_hidden_state
        reference = result(run(model, x))
    expected = whole.gather(full)
    if name == "videomae-first":  # restored: the tokens that lived are where they were
        short = whole.gather(short)
    torch.testing.assert_close(short, expected, atol=1e-9, rtol=1e-9)
    if prefix:
        torch.testing.assert_close(answer, reference, atol=1e-9, rtol=1e-9)
    if name == "videomae-classes":
        head = model.classifier(model.fc_norm(expected.mean(1)))
        torch.testing.assert_close(answer, head, atol=1e-9, rtol=1e-9)
    if name == "vjepa2-classes":
        head = model.classifier(model.pooler(expected))
        torch.testing.assert_close(answer, head, atol=1e-9, rtol=1e-9)


def twins() -> Tensor:
    """Clips whose tubes 4i and 4i + 1 are equal, all others different: 16 pairs."""
    tubes = torch.randn(2, N, 2, 3, 4, 4)
    tubes[:, 1::4] = tubes[:, 0::4]
    shaped = tubes.reshape(2, 4, 4, 4, 2, 3, 4, 4)  # batch, grid, frames, channels, rows, columns
    return shaped.permute(0, 1, 4, 5, 2, 6, 3, 7).reshape(2, 8, 3, 16, 16)


def level_positions(model: Any) -> None:
    """Give all tubes one position, so that equal tubes are equal tokens."""
    for module in model.modules():
        table = getattr(module, "position_embeddings", None)
        if isinstance(table, Tensor):
            table.data[:, -N:] = table.data[:, -N:].mean(1, keepdim=True)
        if hasattr(module, "get_position_ids"):
            module.d_dim = module.h_dim = module.w_dim = 0  # nothing is rotated


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", [n for n in MODELS if n != "videomae-first"])
def test_merging_equal_tokens_changes_nothing(name: str, implementation: str) -> None:
    """Sizes in attention and pooling: 16 merged pairs count like the 32 tokens they were."""
    model, x = build(name).double(), twins().double()
    level_positions(model)
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        dense = run(model, x)
        with vtr.apply(model, vtr.ToMe(r=(16, 0, 0, 0))) as handle:
            if name == "vjepa2-classes" and implementation == "eager":
                with pytest.raises(vtr.UnsupportedMethodError, match="'sdpa'"):
                    run(model, x)
                return
            short = run(model, x)
        assert handle.trace.stages[-1].tokens_out == 48
        assert set(handle.trace.stages[-1].total.size.unique().tolist()) == {1.0, 2.0}
        with vtr.apply(model, vtr.ToMe(r=(16, 0, 0, 0), prop_attn=False)):
            wrong = run(model, x)
        with vtr.apply(model, vtr.ToMe(r=(16, 0, 0, 0)), output="restored"):
            restored = run(model, x)
    torch.testing.assert_close(result(short), result(dense), atol=1e-6, rtol=1e-6)
    assert (result(wrong) - result(dense)).abs().max() > 1e-3
    if hasattr(dense, "last_hidden_state"):
        torch.testing.assert_close(
            restored.last_hidden_state, dense.last_hidden_state, atol=1e-6, rtol=1e-6
        )


# ---- what needs the whole grid ------------------------------------------------------------------


def test_the_predictor_gets_the_whole_grid() -> None:
    model, x = build("vjepa2"), clips()
    with torch.no_grad():
        with vtr.apply(model, vtr.ToMe(r=8)) as handle:
            reduced = model(x, skip_predictor=True)
            whole = model(x)
            by_position = model(x, None, None, True)
            rows = [torch.tensor([[0, 5, 63], [1, 2, 3]])]
            picked = model(x, rows, rows, skip_predictor=True)
        last = handle.trace.stages[-1].total
        assert reduced.last_hidden_state.shape[1] == last.n_out == 32
        assert by_position.last_hidden_state.shape[1] == 32
        assert whole.last_hidden_state.shape[1] == N
        assert whole.predictor_output.last_hidden_state.shape[1] == N
        assert picked.masked_hidden_state.shape[1] == 3
        again = model.predictor(whole.last_hidden_state, *[[torch.arange(N).repeat(2, 1)]] * 2)
    assert torch.equal(again.last_hidden_state, whole.predictor_output.last_hidden_state)
    slots = last.restore(reduced.last_hidden_state)
    torch.testing.assert_close(slots, whole.last_hidden_state, atol=1e-5, rtol=1e-5)


def test_hidden_states_and_attentions() -> None:
    for name in ("videomae", "vivit", "vjepa2"):
        model, x = build(name), clips()
        model.set_attn_implementation("eager")
        prefix = MODELS[name][1]
        with torch.no_grad(), vtr.apply(model, vtr.Random(keep=20, layers=(1,), seed=0)) as handle:
            out = run(model, x, output_hidden_states=True, output_attentions=True)
            lengths = [h.shape[1] - prefix for h in out.hidden_states]
            maps = [a.shape[-1] - prefix for a in out.attentions]
            assert lengths[:2] == [N, N] and set(lengths[2:]) == {20}, name
            assert maps == [N, N, 20, 20]
            handle.remove()
        with (
            torch.no_grad(),
            vtr.apply(model, vtr.Random(keep=20, layers=(1,), seed=0), output="restored"),
        ):
            out = run(model, x, output_hidden_states=True)
            assert {h.shape[1] - prefix for h in out.hidden_states} == {N}


def test_grids_of_other_inputs() -> None:
    model = build("vjepa2")
    with torch.no_grad(), vtr.apply(model, vtr.Random(keep=0.5)) as handle:
        run(model, clips(size=24))
        assert handle.trace.stages[-1].grid == (4, 6, 6)
        run(model, clips()[:, :1])
        assert handle.trace.stages[-1].grid == (1, 4, 4)
    model = build("videomae")
    keep = torch.zeros(2, N, dtype=torch.bool)
    keep[:, ::2] = True
    with torch.no_grad(), vtr.apply(model, vtr.Random(keep=0.5)) as handle:
        run(model, clips(), bool_masked_pos=keep)
        assert handle.trace.stages[-1].total.n_in == N // 2
        assert handle.trace.stages[-1].grid is None


def test_tofe_freezes_and_brings_back() -> None:
    """By class attention on ViViT; learned on encoders without a class token."""
    x = clips()
    for name, method in (
        ("vivit-classes", vtr.ToFe(keep=0.4)),
        ("videomae-classes", vtr.ToFe(keep=0.4, trained=True)),
        ("vjepa2-classes", vtr.ToFe(keep=0.4, trained=True)),
    ):
        model = build(name)
        with vtr.apply(model, method) as handle, torch.no_grad():
            out = result(run(model, x))
        assert out.isfinite().all()
        frozen = [s.total.frozen for s in handle.trace.stages if s.total.frozen is not None]
        assert frozen and int(frozen[0].sum(1)[0]) == N - round(0.4 * N)
        assert handle.trace.stages[-1].tokens_out == N
    with pytest.raises(vtr.UnsupportedMethodError, match="no class token"):
        vtr.apply(build("videomae"), "tofe")


# ---- how it runs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["videomae-classes", "vivit-classes", "vjepa2-classes"])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    model = build(name).to(dtype)
    for method in ("tome", "flowcut", "random"):
        with vtr.apply(model, method), torch.no_grad():
            out = result(run(model, clips().to(dtype)))
        assert out.dtype == dtype and out.isfinite().all()


def test_training_and_copies() -> None:
    for name in ("videomae-classes", "vivit-classes", "vjepa2-classes"):
        model, x = build(name), clips().requires_grad_(True)
        with vtr.apply(model, vtr.ToMe(r=6)):
            run(model, x).logits.sum().backward()
            assert x.grad is not None and x.grad.abs().sum() > 0
            twin = copy.deepcopy(model)
        with torch.no_grad():
            short, dense = result(run(twin, clips())), result(run(model, clips()))
        assert not torch.equal(short, dense)
        vtr.handles(twin)[0].remove()
        with torch.no_grad():
            assert torch.equal(result(run(twin, clips())), dense)


def test_reported_flops_are_those_of_the_operators(family: tuple[str, Any, int, set[str]]) -> None:
    _, model, _, _ = family
    tower = tower_of(model)
    path = TOWERS[type(tower).__name__][0]
    with vtr.apply(model, vtr.Random(keep=0.3, layers=(1,), seed=0)) as handle:
        with (
            FlopCounterMode(display=False, custom_mapping=_missing_formulas()) as counted,
            torch.no_grad(),
        ):
            run(tower, clips(1))
        reported = handle.report().flops["encoder"][1]
    layers = [
        sum(operators.values())
        for module, operators in counted.get_flop_counts().items()
        if module.rpartition(".")[0].endswith(path) and module.rpartition(".")[2].isdigit()
    ]
    assert len(layers) == 4 and sum(layers) == reported


def test_pictures_show_frames() -> None:
    model = build("vivit")
    with vtr.apply(model, vtr.EViT(keep=0.5)) as handle, torch.no_grad():
        run(model, clips(1))
    assert handle.trace.stages[-1].grid == GRID
    video = (clips(1)[0].permute(0, 2, 3, 1).clamp(-2, 2) * 60 + 127).byte().numpy()
    assert vtr.draw(handle, video).size[0] > 16


def test_others_are_refused_with_the_reason() -> None:
    pretraining = hf.VideoMAEForPreTraining(
        hf.VideoMAEConfig(
            **CLIP,
            patch_size=4,
            decoder_hidden_size=24,
            decoder_num_attention_heads=2,
            decoder_num_hidden_layers=1,
        )
    )
    with pytest.raises(vtr.UnsupportedModelError, match="drops patches itself"):
        vtr.apply(pretraining, "tome")
    with pytest.raises(ValueError, match="output must be"):
        vtr.apply(build("videomae"), "tome", output="full")
    with pytest.raises(vtr.UnsupportedMethodError, match="no class token"):
        vtr.apply(build("vjepa2"), "evit")
    model = build("vivit")

    class Mine(type(model.layers[0])):  # type: ignore[misc]
        pass

    model.layers[2].__class__ = Mine
    with pytest.raises(vtr.UnsupportedModelError, match=r"a layer of VivitModel is a .*Mine"):
        vtr.apply(model, "tome")
