"""open_clip's image towers: every method that is supported, on tiny configurations."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from open_clip.coca_model import CoCa
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import vtr
from tests.tiny import applied, cutters, images, ours, spread
from tests.vision.looks import check_keys
from vtr.core.wrapping import wrapping_of
from vtr.inspect.flops import _missing_formulas
from vtr.vision.encoders.timm import TimmWrapping

TEXT: dict[str, Any] = {"context_length": 8, "vocab_size": 40, "width": 32, "heads": 2, "layers": 2}
CLS = {"cls-attention", "evit", "flowcut", "random", "tofe", "tome"}
CUSTOM = dict.fromkeys(
    ("qk_norm", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc"), True
)
POOL: dict[str, Any] = {"attn_pooler_queries": 5, "attn_pooler_heads": 2}


def vision(**more: Any) -> dict[str, Any]:
    return {"image_size": 32, "patch_size": 4, "width": 48, "layers": 4, "head_width": 12, **more}


def timm_tower(name: str, **more: Any) -> dict[str, Any]:
    return {
        "timm_model_name": name,
        "timm_pool": "",
        "timm_proj": "linear",
        "image_size": 32,
        **more,
    }


# head_width 12 makes four heads: with an even number, PyTorch's own attention takes its fused path in
# inference; with 16, three heads, it calls scaled_dot_product_attention as the opened one does.
MODELS: dict[str, Callable[[], Any]] = {
    "tok": lambda: CLIP(24, vision(), TEXT),
    "three-heads": lambda: CLIP(24, vision(head_width=16), TEXT, quick_gelu=True),
    "avg-scaled": lambda: CLIP(24, vision(pool_type="avg", ls_init_value=0.5), TEXT),
    "avg-late-norm": lambda: CustomTextCLIP(
        24,
        vision(
            pool_type="avg", final_ln_after_pool=True, no_ln_pre=True, pos_embed_type="sin_cos_2d"
        ),
        TEXT,
    ),
    "custom": lambda: CLIP(24, vision(**CUSTOM, pool_type="avg"), TEXT),
    "attn-pool": lambda: CustomTextCLIP(24, vision(attentional_pool=True, **POOL), TEXT),
    "parallel": lambda: CustomTextCLIP(48, vision(attentional_pool="parallel", **POOL), TEXT),
    "cascade": lambda: CustomTextCLIP(48, vision(attentional_pool="cascade", **POOL), TEXT),
    "coca": lambda: CoCa(
        24,
        {**TEXT, "mlp_ratio": 2},
        {**TEXT, "embed_cls": True, "output_tokens": True},
        vision(attentional_pool=True, output_tokens=True, **POOL),
    ),
}


def build(name: str) -> Any:
    return spread(MODELS[name]())


def pixels(batch: int = 2) -> Tensor:
    return images(batch, size=32)


def pooled(model: Any, x: Tensor) -> Tensor:
    return model.encode_image(x, normalize=False)


@pytest.fixture(params=MODELS, scope="module")
def family(request: pytest.FixtureRequest) -> tuple[str, Any]:
    return request.param, build(request.param)


# ---- every tower, every method -----------------------------------------------------------------


def test_every_supported_method_runs_by_the_laws(family: tuple[str, Any]) -> None:
    _, model = family
    names = [s.name for s in vtr.supported(model) if s.supported]
    assert set(names) >= CLS, vtr.supported(model)
    x, keys = pixels(), list(model.state_dict())
    with torch.no_grad():
        dense = pooled(model, x)
    for name in cutters(model):
        with applied(model, name) as handle, torch.no_grad():
            torch.manual_seed(0)
            out = pooled(model, x)
            if not handle.trace.stages:  # it found nothing to leave out
                assert name.data_dependent
                torch.testing.assert_close(out, dense)
                continue
            report = handle.report().to_dict()
            last = handle.trace.stages[-1].total
            torch.manual_seed(0)
            grids = model.visual.forward_intermediates(x)["image_intermediates"]
            assert [tuple(g.shape) for g in grids] == [(2, 48, 8, 8)] * 4, name
            torch.manual_seed(0)
            assert torch.equal(pooled(model, x), out), "one call does not change the next"
        assert out.isfinite().all() and not torch.equal(out, dense), name
        assert last.n_in == 64 and handle.trace.stages[0].grid == (8, 8)
        for row in last.kept.tolist():
            alive = [j for j in row if j >= 0]
            assert alive == sorted(set(alive)) and alive[-1] < 64
        flops = report["flops"]["encoder"]
        assert 0 < flops["reduced"] <= flops["dense"], name
        # The tokens of the fullest image of a batch count.
        assert flops["reduced"] < flops["dense"] or name.data_dependent, name
        alone = []
        for b in range(2):
            with applied(model, name), torch.no_grad():
                torch.manual_seed(0)
                alone.append(pooled(model, x[b : b + 1]))
        torch.testing.assert_close(torch.cat(alone), out, atol=1e-3, rtol=1e-3)
    assert list(model.state_dict()) == keys and ours(model) == []
    with torch.no_grad():
        assert torch.equal(pooled(model, x), dense)


def test_all_tokens_kept(family: tuple[str, Any]) -> None:
    """No bit changes where PyTorch runs the same kernel; else only the rounding of its fused path."""
    name, model = family
    x = pixels()
    for grad in (True, False):
        exact = grad or name in ("three-heads", "custom")
        with torch.set_grad_enabled(grad):
            dense = pooled(model, x)
            for method in sorted(CLS):
                with vtr.apply(model, {"name": method, "keep": 1.0}):
                    out = pooled(model, x)
                if exact or method == "random":  # which opens no attention
                    assert torch.equal(out, dense), method
                torch.testing.assert_close(out, dense, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("name", ["tok", "custom"])
def test_keys_of_equals_the_keys_of_the_call(name: str) -> None:
    model = build(name)
    check_keys(model, model.visual.transformer.resblocks, lambda: pooled(model, pixels()))


# ---- exactness -----------------------------------------------------------------------------------


def sequence(tower: Any, x: Tensor, alive: list[Tensor] | None = None) -> Tensor:
    """The tower's sequence, block by block; keys not in ``alive[i]`` (B, T) are masked in block i."""
    h = tower._embeds(x)
    for i, block in enumerate(tower.transformer.resblocks):
        mask = None
        if alive is not None:
            batch, tokens = alive[i].shape
            mask = torch.zeros(batch, 4, tokens, tokens, dtype=h.dtype)
            mask = mask.masked_fill(~alive[i][:, None, None, :], -float("inf")).flatten(0, 1)
        h = block(h, attn_mask=mask)
    return h


@pytest.mark.compat
@pytest.mark.parametrize("name", ["tok", "avg-scaled", "custom"])
def test_pruning_equals_masking(name: str) -> None:
    model = build(name).double()
    tower, x = model.visual, pixels().double()
    with vtr.apply(model, vtr.CLSAttention(keep=20, layers=(1,))) as handle, torch.no_grad():
        short = sequence(tower, x)
        answer = pooled(model, x)
    whole = handle.trace.stages[-1].total.with_prefix(1)
    assert short.shape[1] == 21
    everything = torch.ones(2, 65, dtype=torch.bool)
    alive = [everything, everything, whole.source >= 0, whole.source >= 0]
    with torch.no_grad():
        full = sequence(tower, x, alive)
        torch.testing.assert_close(short, whole.gather(full), atol=1e-9, rtol=1e-9)
        if name == "tok":
            want = tower.ln_post(full[:, 0]) @ tower.proj
            torch.testing.assert_close(answer, want, atol=1e-9, rtol=1e-9)
            # The choice itself: the class token's row of PyTorch's own attention map.
            block = tower.transformer.resblocks[1]
            h = block.ln_1(tower.transformer.resblocks[0](tower._embeds(x)))
            _, maps = block.attn(h, h, h, need_weights=True, average_attn_weights=True)
            top = maps[:, 0, 1:].topk(20, 1).indices.sort(1).values
            assert torch.equal(top, handle.trace.stages[-1].total.kept)


def twins() -> Tensor:
    """Images whose patches 4i and 4i + 1 are equal, all others different: 16 pairs."""
    patches = torch.randn(2, 64, 3, 4, 4)
    patches[:, 1::4] = patches[:, 0::4]
    return patches.reshape(2, 8, 8, 3, 4, 4).permute(0, 3, 1, 4, 2, 5).reshape(2, 3, 32, 32)


def test_merging_equal_tokens_changes_nothing(family: tuple[str, Any]) -> None:
    """Sizes in attention and pooling: 16 merged pairs count like the 32 tokens they were."""
    _, model = family
    model, x = copy.deepcopy(model).double(), twins().double()
    with torch.no_grad():
        place = model.visual.positional_embedding
        place[1:] = place[1:].mean(0, keepdim=True)
        dense = pooled(model, x)
        with vtr.apply(model, vtr.ToMe(r=(16, 0, 0, 0))) as handle:
            short = pooled(model, x)
        assert handle.trace.stages[-1].tokens_out == 48
        with vtr.apply(model, vtr.ToMe(r=(16, 0, 0, 0), prop_attn=False)):
            wrong = pooled(model, x)
        with vtr.apply(model, vtr.ToMe(r=(16, 0, 0, 0)), output="restored"):
            restored = pooled(model, x)
    # Sizes enter as float32 logarithms, which bounds the agreement of float64 models.
    torch.testing.assert_close(short, dense, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(restored, dense, atol=1e-6, rtol=1e-6)
    assert (wrong - dense).abs().max() > 5e-4


@pytest.mark.parametrize("name", ["avg-scaled", "avg-late-norm"])
def test_average_pooling_weighs_merged_tokens(name: str) -> None:
    model, x = build(name), pixels()
    tower = model.visual
    with vtr.apply(model, vtr.ToMe(r=12)) as handle, torch.no_grad():
        out = pooled(model, x)
        short = sequence(tower, x)
        size = handle.trace.stages[-1].total.size[..., None]
        late = tower.final_ln_after_pool
        tokens = (short if late else tower.ln_post(short))[:, 1:]
        mean = (tokens * size).sum(1) / 64
        want = (tower.ln_post(mean) if late else mean) @ tower.proj
        plain = tokens.mean(1)
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)
    assert (plain - mean).abs().max() > 1e-3


# ---- outputs -----------------------------------------------------------------------------------------


def test_tokens_are_returned_reduced_or_restored() -> None:
    model, x = spread(CLIP(24, vision(output_tokens=True), TEXT)), pixels()
    with torch.no_grad():
        with vtr.apply(model, vtr.EViT(keep=0.5, layers=(1,))) as handle:
            _, tokens = model.visual(x)
            kept = handle.trace.stages[-1].total
        with vtr.apply(model, vtr.EViT(keep=0.5, layers=(1,)), output="restored"):
            _, full = model.visual(x)
    assert tokens.shape == (2, 33, 48) and full.shape == (2, 64, 48)
    torch.testing.assert_close(kept.gather(full), tokens)


def test_dropped_tokens_keep_the_last_value_they_had() -> None:
    model, x = build("tok"), pixels()
    with torch.no_grad():
        dense = model.visual.forward_intermediates(x, output_fmt="NLC")["image_intermediates"]
        with vtr.apply(model, vtr.Random(keep=0.5, layers=(1,), seed=1)) as handle:
            mine = model.visual.forward_intermediates(x, output_fmt="NLC")["image_intermediates"]
    assert torch.equal(mine[0], dense[0]), "nothing is changed before the cut"
    gone = handle.trace.stages[0].map.source < 0
    assert torch.equal(mine[2][gone], mine[1][gone]) and torch.equal(mine[3][gone], mine[1][gone])
    assert not torch.equal(mine[3][~gone], mine[1][~gone])


@pytest.mark.compat
@pytest.mark.parametrize("name", ["tok", "avg-late-norm", "coca"])
def test_the_text_tower_is_untouched(name: str) -> None:
    model = build(name)
    ids = torch.randint(1, 39, (2, 8))
    encode = model.encode_text
    with torch.no_grad():
        text = encode(ids[:, :7] if name == "coca" else ids)
        with vtr.apply(model, vtr.ToMe(r=8)):
            assert torch.equal(encode(ids[:, :7] if name == "coca" else ids), text)
            assert ours(model.visual) != []
            assert all(found.startswith("visual.") for found in ours(model))


# ---- how it runs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["tok", "custom", "attn-pool"])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    model = build(name).to(dtype)
    for method in ("evit", "tome", "tofe"):
        with vtr.apply(model, method), torch.no_grad():
            out = pooled(model, pixels().to(dtype))
        assert out.dtype == dtype and out.isfinite().all()


def test_blocks_that_hold_tokens_first() -> None:
    """A transformer with batch_first=False computes the same, wrapped too."""
    model, x = build("tok"), pixels()
    other = copy.deepcopy(model)
    other.visual.transformer.batch_first = False
    for block in other.visual.transformer.resblocks:
        block.attn.batch_first = False
    for method in (vtr.ToMe(r=6), vtr.EViT(keep=0.5), vtr.Random(keep=9, layers=(1,), seed=1)):
        with vtr.apply(model, method), vtr.apply(other, method), torch.no_grad():
            torch.testing.assert_close(pooled(other, x), pooled(model, x), atol=1e-5, rtol=1e-5)
            theirs = other.visual.forward_intermediates(x)["image_intermediates"][3]
            mine = model.visual.forward_intermediates(x)["image_intermediates"][3]
            torch.testing.assert_close(theirs, mine, atol=1e-5, rtol=1e-5)
    assert ours(other) == []


@pytest.mark.parametrize("name", ["tok", "custom", "tokens-first"])
def test_hooks_on_the_attention_fire_where_a_method_looks_inside(name: str) -> None:
    model, x = build("tok" if name == "tokens-first" else name), pixels()
    blocks = model.visual.transformer.resblocks
    if name == "tokens-first":
        model.visual.transformer.batch_first = False
        for block in blocks:
            block.attn.batch_first = False
    seen: list[Tensor] = []
    for block in blocks:
        block.attn.register_forward_hook(
            lambda m, a, y: seen.append(y[0] if isinstance(y, tuple) else y)
        )
    with torch.no_grad():
        pooled(model, x)
        dense = list(seen)
        seen.clear()
        with vtr.apply(model, vtr.EViT(keep=0.5, layers=(1,), fuse=False)):
            pooled(model, x)
    axis = 0 if name == "tokens-first" else 1
    assert [y.shape[axis] for y in seen] == [65, 65, 33, 33]
    for i in range(2):
        torch.testing.assert_close(seen[i], dense[i], atol=1e-5, rtol=1e-4)


def test_compiles_trains_and_copies() -> None:
    model, x = build("tok"), pixels()
    torch._dynamo.reset()
    with vtr.apply(model, vtr.ToMe(r=6)) as handle:
        with torch.no_grad():
            eager = pooled(model, x)
            compiled = torch.compile(model.visual, backend="eager", fullgraph=True)
            torch.testing.assert_close(compiled(x), eager, atol=1e-5, rtol=1e-5)
        model.train()
        x.requires_grad_(True)
        pooled(model, x).sum().backward()
        assert x.grad is not None and x.grad.abs().sum() > 0
        model.eval()
        twin = copy.deepcopy(model)
        handle.remove()
    torch._dynamo.reset()
    with torch.no_grad():
        dense = pooled(model, x)
        torch.testing.assert_close(pooled(twin, x), eager, atol=1e-5, rtol=1e-5)
        for mine in vtr.api.handles(twin):
            mine.remove()
        assert torch.equal(pooled(twin, x), dense) and ours(twin) == []


@pytest.mark.parametrize("name", ["tok", "custom"])
def test_reported_flops_are_those_of_the_operators(name: str) -> None:
    model = build(name)
    # With gradients, as PyTorch's fused attention of inference is one operator that is not counted.
    with vtr.apply(model, vtr.Random(keep=0.3, layers=(1,), seed=0)) as handle:
        with FlopCounterMode(display=False, custom_mapping=_missing_formulas()) as counted:
            pooled(model, pixels(1))
        reported = handle.report().flops["encoder"][1]
    blocks = [
        sum(operators.values())
        for module, operators in counted.get_flop_counts().items()
        if module.rpartition(".")[2].isdigit() and module.split(".")[-2] == "resblocks"
    ]
    assert len(blocks) == 4 and sum(blocks) == reported


# ---- other towers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "pool", "prefix", "methods"),
    [
        ("test_vit", "avg", 1, CLS),
        ("test_vit3", "", 1, {"flowcut", "random", "tome"}),  # a learned probe pools
        ("test_vit4", "avg", 1, {"flowcut", "random", "tome"}),  # a register, no class token
        ("test_vit_relpos", "avg", 0, {"flowcut", "random", "tome"}),
    ],
)
def test_a_timm_trunk_is_wrapped_by_the_timm_adapter(
    name: str, pool: str, prefix: int, methods: set[str]
) -> None:
    timm = pytest.importorskip("timm")
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    tower = timm_tower(name, timm_pool=pool, image_size=160)
    model = spread(CustomTextCLIP(24, tower, TEXT))
    x = images(2, size=160)
    supported = {s.name for s in vtr.supported(model) if s.supported}
    assert methods <= supported
    with torch.no_grad():
        dense = pooled(model, x)
        for method in cutters(model):
            with applied(model, method) as handle:
                torch.manual_seed(0)
                trunk = model.visual.trunk
                assert isinstance(wrapping_of(trunk), TimmWrapping)
                out = pooled(model, x)
                last = handle.trace.stages[-1]
                assert last.total.n_in == 100
                assert min(stage.tokens_out for stage in handle.trace.stages) < 100
                torch.manual_seed(0)
                assert trunk.forward_features(x).shape[1] == last.tokens_out + prefix
                assert all(found.startswith("visual.trunk.") for found in ours(model))
            assert out.shape == dense.shape and not torch.equal(out, dense), method
        assert torch.equal(pooled(model, x), dense)


def test_other_towers_are_refused_with_the_reason() -> None:
    resnet = CLIP(24, {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32}, TEXT)
    with pytest.raises(
        vtr.UnsupportedModelError, match="ModifiedResNet is not supported: it is not a seq"
    ):
        vtr.apply(resnet, "tome")
    conv = CustomTextCLIP(24, timm_tower("test_convnext", timm_pool="avg"), TEXT)
    with pytest.raises(vtr.UnsupportedModelError, match="trunk ConvNeXt is not supported"):
        vtr.supported(conv)
    cosine = CLIP(24, vision(scaled_cosine_attn=True), TEXT)
    with pytest.raises(vtr.UnsupportedModelError, match="scaled cosine attention"):
        vtr.apply(cosine, "tome")
    changed = build("tok")

    class Mine(ResidualAttentionBlock):
        pass

    changed.visual.transformer.resblocks[2].__class__ = Mine
    with pytest.raises(vtr.UnsupportedModelError, match="Mine, is not supported"):
        vtr.apply(changed, "tome")
    with pytest.raises(vtr.UnsupportedModelError, match="open_clip VisionTransformer"):
        vtr.apply(changed.visual.transformer, "tome")


def test_a_tower_alone_and_its_model_share_one_wrapping() -> None:
    model = build("tok")
    with (
        vtr.apply(model, vtr.EViT(keep=0.5, layers=(1,))),
        vtr.apply(model.visual, vtr.Random(keep=5, layers=(2,))) as second,
    ):
        with torch.no_grad():
            pooled(model, pixels())
        assert [s.method for s in second.trace.stages] == ["evit", "random"]
    assert ours(model) == []
