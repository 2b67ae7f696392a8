"""timm's families: every method that is supported, on small members with random weights."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import vtr
from tests.tiny import applied, cutters, images, ours, spread, vit
from tests.vision.looks import Look, check_keys
from tests.vision.timm_models import SMALL, build, works
from vtr.core.method import Method
from vtr.core.wrapping import wrapping_of
from vtr.vision.encoders.timm_blocks import TimmBlock

CLS = {"cls-attention", "evit", "flowcut", "random", "tofe", "tome"}


NO_CLS = {"flowcut", "random", "tome"}


ENDS = {"random"}  # blocks that cannot be opened show hidden states only


# (name, options beyond SMALL, protected tokens, methods that must be among the supported ones)
FAMILIES: list[tuple[str, dict[str, Any], int, set[str]]] = [
    ("deit_tiny_patch16_224", {}, 1, CLS),
    ("deit_tiny_patch16_224", {"global_pool": "avgmax"}, 1, CLS),
    ("deit_tiny_patch16_224", {"qk_norm": True, "global_pool": "avg"}, 1, CLS),
    ("deit_tiny_distilled_patch16_224", {}, 2, CLS),
    ("deit3_small_patch16_224", {}, 1, CLS),
    ("vit_base_patch14_dinov2", {}, 1, CLS),
    ("vit_base_patch14_reg4_dinov2", {}, 5, CLS),
    ("vit_giant_patch14_reg4_dinov2", {}, 5, CLS),
    ("vit_base_patch16_clip_224", {}, 1, CLS),
    ("vit_base_patch16_siglip_224", {}, 0, NO_CLS),
    ("vit_base_patch16_siglip_gap_224", {}, 0, NO_CLS),
    ("vit_base_patch16_reg4_gap_256", {}, 4, NO_CLS),
    ("vit_so150m_patch16_reg4_map_256", {}, 4, NO_CLS),
    ("vit_base_patch14_reg1_tipsv2", {}, 2, CLS),
    ("vit_base_patch16_rpn_224", {}, 0, NO_CLS),
    ("vit_base_patch16_xp_224", {}, 1, ENDS),
    ("vit_small_patch16_18x2_224", {}, 1, ENDS),
    ("vit_dlittle_patch16_reg1_gap_256", {}, 1, ENDS),
    ("vit_dpwee_patch16_reg1_gap_256", {}, 1, ENDS),
    ("aimv2_1b_patch14_224", {}, 0, NO_CLS),
    ("beit3_base_patch16_224", {}, 1, CLS),
    ("flexivit_small", {}, 1, CLS),
    ("test_vit3", {}, 1, NO_CLS),
    ("vit_base_patch16_radio_v3", {}, 8, CLS),
    ("eva02_tiny_patch14_224", {}, 1, CLS),
    ("eva02_base_patch16_clip_224", {}, 1, CLS),
    ("eva_giant_patch14_224", {}, 1, CLS),
    ("eva02_enormous_patch14_clip_224", {}, 1, CLS),
    ("vit_small_patch16_dinov3", {}, 5, CLS),
    ("vit_small_patch16_dinov3_qkvb", {}, 5, CLS),
    ("vit_small_patch16_rope_224", {}, 1, CLS),
    ("vit_small_patch16_rope_mixed_ape_224", {}, 1, CLS),
    ("vit_betwixt_patch16_rope_reg4_gap_256", {}, 4, NO_CLS),
    ("vit_pe_core_tiny_patch16_384", {}, 1, CLS),
    ("vit_pe_lang_large_patch14_448", {}, 1, CLS),
    ("vit_base_patch16_sapiens2", {"num_kv_heads": (1, 3, 1, 3)}, 9, CLS),
    ("beit_base_patch16_224", {}, 1, CLS),
    ("beit_base_patch16_224", {"use_shared_rel_pos_bias": True, "use_rel_pos_bias": False}, 1, CLS),
    ("beitv2_base_patch16_224", {"global_pool": "token"}, 1, CLS),
    ("vit_relpos_base_patch16_224", {}, 0, NO_CLS),
    ("vit_relpos_base_patch16_cls_224", {}, 1, CLS),
    ("vit_relpos_base_patch16_rpn_224", {}, 0, NO_CLS),
    ("vit_srelpos_small_patch16_224", {}, 0, NO_CLS),
    ("naflexvit_base_patch16_gap", {}, 4, NO_CLS),
    ("naflexvit_base_patch16_map", {}, 1, NO_CLS),
    ("naflexvit_base_patch16_siglip", {}, 0, NO_CLS),
    ("naflexvit_base_patch16_radio_v3", {}, 8, CLS),
]


NAMES = [f"{name}-{'-'.join(map(str, more))}" if more else name for name, more, _, _ in FAMILIES]


@pytest.fixture(params=FAMILIES, ids=NAMES, scope="module")
def family(request: pytest.FixtureRequest) -> tuple[Any, int, set[str]]:
    name, more, prefix, methods = request.param
    return build(name, more), prefix, methods


# ---- every family, every method ------------------------------------------------------------------


# Modules of timm whose models are sequences; what the others are is refused (below).
SEQUENCES = ("beit", "deit", "eva", "naflexvit", "vision_transformer", "vision_transformer_relpos")


def form(model: Any) -> tuple[str, ...]:
    """What an adapter must know: the classes of model, block and attention."""
    block = model.blocks[0]
    return tuple(type(x).__name__ for x in (model, block, getattr(block, "attn", None)))


@pytest.mark.slow
def test_no_form_in_the_registry_is_missing_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model that timm lists in those modules is of a form that the tests below run."""
    known = {form(build(name, more)) for name, more, _, _ in FAMILIES if timm.is_model(name)}
    for name in ("trunc_normal_", "normal_", "xavier_uniform_", "zeros_", "ones_", "constant_"):
        monkeypatch.setattr(nn.init, name, lambda tensor, *args, **kwargs: tensor)
    names = [name for module in SEQUENCES for name in timm.list_models(module=module)]
    assert len(names) > 200
    for name in names:
        more = {"num_kv_heads": (1, 3, 1, 3)} if "sapiens2" in name else {}
        with torch.device("meta"):
            model = timm.create_model(name, **SMALL, **more)
        assert form(model) in known, name
        assert "random" in works(model), name


def test_every_supported_method_runs_by_the_laws(family: tuple[Any, int, set[str]]) -> None:
    model, prefix, expected = family
    names = works(model)
    assert expected <= set(names), vtr.supported(model)
    assert model.num_prefix_tokens == prefix
    x = images()
    with torch.no_grad():
        dense, features = model(x), model.forward_features(x)
    keys = list(model.state_dict())
    for name in cutters(model):
        with applied(model, name) as handle, torch.no_grad():
            torch.manual_seed(0)
            out = model(x)
            torch.manual_seed(0)
            short = model.forward_features(x)
            report = handle.report().to_dict()
        assert out.shape == dense.shape and out.isfinite().all(), name
        assert not torch.equal(out, dense), name
        last = handle.trace.stages[-1].total
        assert short.shape[1] == last.n_out + prefix, name
        assert last.n_in == 64 and features.shape[1] == 64 + prefix
        for b in range(2):
            kept = last.kept[b][last.kept[b] >= 0].tolist()
            assert kept == sorted(set(kept)) and kept[-1] < 64
        flops = report["flops"]["encoder"]
        assert 0 < flops["reduced"] <= flops["dense"], name
        # The tokens of the fullest image of a batch count.
        assert flops["reduced"] < flops["dense"] or name.data_dependent, name
        alone = []
        for b in range(2):
            with applied(model, name), torch.no_grad():
                torch.manual_seed(0)
                alone.append(model(x[b : b + 1]))
        torch.testing.assert_close(torch.cat(alone), out, atol=1e-3, rtol=1e-3)
    assert list(model.state_dict()) == keys and ours(model) == []
    with torch.no_grad():
        assert torch.equal(model(x), dense)


def test_the_opened_attention_equals_the_native_one(family: tuple[Any, int, set[str]]) -> None:
    model, _, expected = family
    if expected == ENDS:
        with pytest.raises(vtr.UnsupportedMethodError, match="look needs keys"):
            vtr.apply(model, Look())
        return
    x = images()
    with torch.no_grad():
        dense = model(x)
        with vtr.apply(model, Look()):
            torch.testing.assert_close(model(x), dense, atol=1e-5, rtol=1e-5)
            for block in model.blocks:
                block.attn.fused_attn = False
            try:
                torch.testing.assert_close(model(x), dense, atol=2e-4, rtol=2e-4)
            finally:
                for block in model.blocks:
                    block.attn.fused_attn = True


def test_intermediates_are_full_grids(family: tuple[Any, int, set[str]]) -> None:
    model, prefix, _ = family
    x = images()
    for name in cutters(model):
        with applied(model, name) as handle, torch.no_grad():
            torch.manual_seed(0)
            last, grids = model.forward_intermediates(x, norm=False)
            assert last.shape[1] == 64 + prefix
            assert [tuple(g.shape) for g in grids] == [(2, 48, 8, 8)] * 4, name
            total = handle.trace.stages[-1].total
            sequences = model.forward_intermediates(
                x, output_fmt="NLC", intermediates_only=True, norm=False
            )
            assert all(s.shape == (2, 64, 48) for s in sequences)
            torch.manual_seed(0)
            reduced = model(x)
        with applied(model, name), torch.no_grad():
            torch.manual_seed(0)
            assert torch.equal(model(x), reduced), "one call does not change the next"
        # Members of a slot carry its value in the last grid.
        flat = grids[-1].flatten(2).transpose(1, 2)
        for b in range(2):
            for j, slot in enumerate(total.source[b].tolist()):
                if slot >= 0:
                    assert torch.equal(flat[b, j], flat[b, total.kept[b, slot]])


def test_dropped_tokens_keep_the_last_value_they_had() -> None:
    model, x = vit(), images()
    with torch.no_grad():
        _, dense = model.forward_intermediates(x, norm=False, output_fmt="NLC")
        with vtr.apply(model, vtr.Random(keep=0.5, layers=(2,), seed=1)) as handle:
            _, mine = model.forward_intermediates(x, norm=False, output_fmt="NLC")
    for i in range(2):
        assert torch.equal(mine[i], dense[i]), "nothing is changed before the cut"
    gone = handle.trace.stages[0].map.source < 0
    assert all(torch.equal(mine[i][gone], mine[2][gone]) for i in (3, 4, 5))
    assert not torch.equal(mine[5][~gone], mine[2][~gone])
    # What they had: the sum of block 2's input and its attention branch.
    block = model.blocks[2]
    with torch.no_grad():
        caught: list[Tensor] = []
        hook = block.register_forward_pre_hook(lambda m, a: caught.append(a[0]))
        model(x)
        hook.remove()
        half = caught[0] + block.attn(block.norm1(caught[0]))
    torch.testing.assert_close(mine[2][gone], half[:, 1:][gone], atol=1e-5, rtol=1e-5)


@pytest.mark.compat
@pytest.mark.parametrize(
    "name", ["deit_tiny_patch16_224", "vit_small_patch16_dinov3", "beit_base_patch16_224"]
)
def test_features_only_and_intermediate_layers(name: str) -> None:
    x = images()
    wrapper = spread(
        timm.create_model(
            name, features_only=True, **{k: v for k, v in SMALL.items() if k != "num_classes"}
        )
    )
    with vtr.apply(wrapper, vtr.EViT(keep=0.5, layers=(0, 1))) as handle, torch.no_grad():
        grids = wrapper(x)
        assert all(tuple(g.shape) == (2, 48, 8, 8) for g in grids)
        assert handle.trace.stages
    model = build(name)
    if hasattr(model, "get_intermediate_layers"):
        with vtr.apply(model, vtr.ToMe(r=6)), torch.no_grad():
            layers = model.get_intermediate_layers(x, n=3, reshape=True)
        assert [tuple(g.shape) for g in layers] == [(2, 48, 8, 8)] * 3


@pytest.mark.compat
def test_output_restored() -> None:
    model, x = vit(global_pool="avg"), images()
    with vtr.apply(model, vtr.ToMe(r=6)) as handle, torch.no_grad():
        short, pooled = model.forward_features(x), model(x)
        total = handle.trace.stages[-1].total
    with vtr.apply(model, vtr.ToMe(r=6), output="restored"), torch.no_grad():
        full = model.forward_features(x)
        assert full.shape == (2, 65, 48)
        torch.testing.assert_close(full, total.with_prefix(1).restore(short))
        torch.testing.assert_close(model(x), pooled, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="output must be 'reduced' or 'restored', got 'full'"):
        vtr.apply(model, vtr.ToMe(r=6), output="full")


# ---- what is refused -----------------------------------------------------------------------------


REFUSED = [
    ("hiera_tiny_224", {}, "mask units"),
    ("cait_xxs24_224", {"depth": 1}, "class token enters only after the trunk"),
    ("xcit_nano_12_p16_224", {"depth": 1}, "convolution over the full grid"),
    ("convit_tiny", {"depth": 1}, "positional attention"),
    ("tnt_s_patch16_224", {"depth": 1}, "inner pixel tokens"),
    ("volo_d1_224", {}, "outlook attention"),
    ("resnet18", {}, "no adapter for timm.models.resnet.ResNet"),
]


@pytest.mark.parametrize(("name", "more", "reason"), REFUSED, ids=[r[0] for r in REFUSED])
def test_other_families_are_refused_with_the_reason(
    name: str, more: dict[str, Any], reason: str
) -> None:
    try:
        model = timm.create_model(name, **more)
    except TypeError:
        model = timm.create_model(name)
    for call in (lambda: vtr.apply(model, "tome"), lambda: vtr.supported(model)):
        with pytest.raises(vtr.UnsupportedModelError, match=reason) as error:
            call()
        assert "timm VisionTransformer" in str(error.value)
    assert ours(model) == []


def test_methods_that_need_a_class_token_are_refused_without_one() -> None:
    model = build("vit_base_patch16_siglip_gap_224")
    with pytest.raises(vtr.UnsupportedMethodError, match="no class token") as error:
        vtr.apply(model, vtr.EViT())
    assert "Methods that work on it: " in str(error.value) and "tome" in str(error.value)
    reasons = {s.name: s.reason for s in vtr.supported(model)}
    assert "cls_attention" in reasons["evit"] and reasons["tome"] == ""


# ---- details -------------------------------------------------------------------------------------


def test_keys_of_equals_the_keys_of_the_call(family: tuple[Any, int, set[str]]) -> None:
    """Keys made from features alone are those that the block's own attention has."""
    model, _, expected = family
    if expected != ENDS:
        check_keys(model, model.blocks, lambda: model(images()))


@pytest.mark.parametrize(
    "name",
    ["vit_small_patch16_dinov3", "vit_small_patch16_rope_mixed_224", "beit_base_patch16_224"],
)
@pytest.mark.parametrize("method", [vtr.EViT(keep=0.5), vtr.ToMe(r=6)], ids=["evit", "tome"])
def test_rope_and_bias_families_compile_to_one_graph(name: str, method: Method) -> None:
    model, x = build(name, {"depth": 2} if "mixed" not in name else None), images()
    if isinstance(method, vtr.EViT):
        method = vtr.EViT(keep=0.5, layers=(0,))
    torch._dynamo.reset()
    with vtr.apply(model, method), torch.no_grad():
        eager = model(x)
        torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), eager)
    torch._dynamo.reset()


def test_a_model_of_a_subclass_and_other_sizes() -> None:
    model = spread(
        timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, **{**SMALL, "depth": 2})
    )
    x = torch.randn(1, 3, 48, 80)
    with vtr.apply(model, vtr.EViT(keep=0.5, layers=(0,))) as handle, torch.no_grad():
        model(x)
    assert handle.trace.stages[0].tokens_in == 60 and handle.trace.stages[0].tokens_out == 31


@pytest.mark.compat
def test_blocks_are_opened_where_they_can_be() -> None:
    with vtr.apply(build("deit3_small_patch16_224"), "random") as handle:
        wrapping: Any = wrapping_of(handle.target)
        assert all(isinstance(r, TimmBlock) for r in wrapping.session.runners)


def test_reported_flops_are_those_of_the_operators() -> None:
    """The count by shapes against torch's counter on the real operators."""
    from torch.utils.flop_counter import FlopCounterMode

    from vtr.inspect.flops import _missing_formulas

    model, x = vit(), images(1)
    plain: nn.Module = model.patch_embed
    for method in (vtr.EViT(keep=0.5), vtr.CLSAttention(keep=0.3, layers=(2,))):
        with vtr.apply(model, method) as handle, torch.no_grad():
            with FlopCounterMode(display=False, custom_mapping=_missing_formulas()) as counted:
                model(x)
            with FlopCounterMode(display=False, custom_mapping=_missing_formulas()) as rest:
                plain(x)
                model.head(torch.zeros(1, 48))
            reported = handle.report().flops["encoder"][1]
        blocks = counted.get_total_flops() - rest.get_total_flops()
        # The class attention row itself is the method's own: well under a hundredth.
        assert reported <= blocks <= 1.01 * reported


def test_a_batch_without_images() -> None:
    model, x = vit(), images(0)
    for method in (vtr.EViT(keep=0.5), vtr.ToMe(keep=0.5), vtr.FlowCut(keep=0.5), vtr.ToFe()):
        with vtr.apply(model, method), torch.no_grad():
            assert model(x).shape == (0, 10)


def test_a_block_in_two_places_is_refused() -> None:
    model = vit()
    model.blocks[3] = model.blocks[2]
    with pytest.raises(vtr.UnsupportedModelError, match="is used at several depths"):
        vtr.apply(model, "evit")
    assert ours(model) == []
