"""The site ``attention`` of encoders: what a method is given is what the block computes, and what it returns is used."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import open_clip
import pytest
import torch
from torch import Tensor

import vtr
from tests.tiny import images, spread, vit
from tests.vision import timm_models, towers
from tests.vision.test_signals_of_masked_attention import CASES, attention_maps
from vtr.core.encoder_attention import EncoderAttentionSite
from vtr.core.method import Method, Stage
from vtr.core.site import ModelInfo
from vtr.kernels import BlockMask
from vtr.methods.base import AttentionMethod, EncoderAttentionMethod, LanguageAttentionMethod

SITES: dict[int, EncoderAttentionSite] = {}


@dataclass(frozen=True, kw_only=True)
class Look(EncoderAttentionMethod):
    """Leaves attention as it is."""

    name: ClassVar[str] = "look"
    paper: ClassVar[str] = "a test"

    def attend(self, site: EncoderAttentionSite) -> Tensor:
        SITES[site.layer] = site
        return self.compute(site)

    def compute(self, site: EncoderAttentionSite) -> Tensor:
        return site.dense()


@dataclass(frozen=True, kw_only=True)
class Rows(Look):
    """Computes the same from rows of attention."""

    def compute(self, site: EncoderAttentionSite) -> Tensor:
        rows = [site.rows(a, b) for a, b in site.each_rows()]
        return (torch.cat(rows, 2) @ site.v.float()).to(site.v.dtype)


@dataclass(frozen=True, kw_only=True)
class AllPairs(Look):
    """Masks nothing."""

    def compute(self, site: EncoderAttentionSite) -> Tensor:
        return site.masked(torch.ones(1, 1, site.tokens, site.tokens, dtype=torch.bool), 1.0)


def pairs(tokens: int) -> Tensor:
    """(T, T) bool, about a half of the pairs; every token sees itself."""
    some = torch.rand(tokens, tokens, generator=torch.Generator().manual_seed(2)) < 0.5
    return some | torch.eye(tokens, dtype=torch.bool)


@dataclass(frozen=True, kw_only=True)
class Half(Look):
    """Masks half of the pairs."""

    def compute(self, site: EncoderAttentionSite) -> Tensor:
        return site.masked(pairs(site.tokens).expand(1, 1, -1, -1), 0.5)


@dataclass(frozen=True, kw_only=True)
class FirstHead(Look):
    """Leaves the first head alone."""

    def compute(self, site: EncoderAttentionSite) -> Tensor:
        out = torch.zeros_like(site.q)
        out[:, :1] = site.heads(torch.tensor([0]))
        return out


def clip_tower() -> Any:
    return spread(
        open_clip.transformer.VisionTransformer(
            image_size=64, patch_size=8, width=48, layers=4, heads=3, mlp_ratio=2.0
        )
    )


def eva() -> Any:
    return timm_models.build("eva02_tiny_patch14_224", {"img_size": 64, "patch_size": 8})


ENCODERS: dict[str, Callable[[], Any]] = {
    "timm": lambda: vit(depth=4),
    "eva": eva,
    "open-clip": clip_tower,
    **{name: (lambda name=name: towers.build(name)) for name in ("clip", "dinov2", "internvl")},
}


def run(model: Any, method: Any, size: int = 64) -> Tensor:
    from vtr.testing.kinds import result

    x = images(2)[..., :size, :size]
    with torch.no_grad():
        if method is None:
            return result(model(x))
        with vtr.apply(model, method):
            return result(model(x))


@pytest.mark.parametrize("name", ENCODERS)
def test_dense_is_the_model_bit_by_bit(name: str) -> None:
    model = ENCODERS[name]()
    size = 32 if name in ("clip", "dinov2", "internvl") else 64
    SITES.clear()
    assert torch.equal(run(model, Look(), size), run(model, None, size))
    assert sorted(SITES) == list(range(4))
    site = SITES[2]
    prefix = site.info.prefix
    assert (site.prefix, site.layers, site.tokens) == (prefix, 4, prefix + 64)
    assert site.q.shape == site.k.shape == site.v.shape == (2, 3, prefix + 64, 16)
    assert site.grid == (8, 8) and site.hidden.shape == (2, prefix + 64, 48)
    assert site.index.tolist() == [list(range(prefix + 64))] * 2
    assert site.valid is None and not site.training
    model.eval()
    for method in (Rows(), AllPairs()):
        torch.testing.assert_close(
            run(model, method, size), run(model, None, size), atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize("name", CASES)
def test_rows_are_those_of_the_block_with_its_mask_and_positions(name: str) -> None:
    model, call = CASES[name]()
    outputs = []
    with torch.no_grad():
        for method in (Look(), Rows()):
            with vtr.apply(model, [vtr.Random(keep=40, layers=(0,), seed=3), method]):
                out = call(images())
            outputs.append(out if isinstance(out, Tensor) else out.last_hidden_state)
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-4)
    assert SITES[0].bias is not None and SITES[3].tokens == SITES[3].prefix + 40


@pytest.mark.parametrize("other", [vtr.ToMe(r=6), vtr.ToFe(keep=0.5, trained=True, adaptive=True)])
def test_merged_and_padded_tokens_weigh_as_they_do_in_the_block(other: Method) -> None:
    SITES.clear()
    model, given = vit(depth=4), {}
    if other.learned:
        modules = vtr.apply(model, other).modules[0]
        vtr.handles(model)[0].remove()
        for parameter in modules.parameters():
            parameter.data.normal_(
                std=0.5, generator=torch.Generator().manual_seed(parameter.numel())
            )
        given = {"modules": modules}
    with torch.no_grad():
        with vtr.apply(model, other, **given) as handle:
            native = model(images(2))
            padded = handle.trace.stages[0].map.has_padding
        with vtr.apply(model, [other, Rows()], **given):
            found = model(images(2))
    assert padded == bool(given)
    assert any(site.bias is not None for site in SITES.values())
    assert any(site.valid is not None for site in SITES.values()) == padded
    torch.testing.assert_close(found, native, atol=1e-5, rtol=1e-4)


def test_a_mask_leaves_pairs_out_of_the_softmax() -> None:
    """Against float64, from the logits of the unwrapped block."""
    model = timm_models.build("beit_base_patch16_224")
    with attention_maps() as caught, torch.no_grad():
        model.forward_features(images(2))
    with vtr.apply(model, Half()) as handle, torch.no_grad():
        model.forward_features(images(2))
        flops = handle.report().flops["encoder"]
    site = SITES[0]
    logits = caught[0].double().masked_fill(~pairs(65), -float("inf"))
    wanted = logits.softmax(-1) @ site.v.double()
    with torch.no_grad():
        found = Half().compute(site)
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-4)
    # 4 blocks, two products of 65 x 65 pairs and 48 channels, of which half is counted
    assert flops[0] - flops[1] == 4 * 4 * 65 * 65 * 48 // 2
    assert handle.trace.summary().splitlines()[0] == "attention[0]: 50.0 % of 65 tokens' pairs"


def test_heads_can_be_left_out() -> None:
    model = timm_models.build("beit_base_patch16_224")
    native = run(model, Look())
    full = SITES[0].dense()
    with vtr.apply(model, FirstHead()) as handle, torch.no_grad():
        model(images(2))
        flops = handle.report().flops["encoder"]
    with torch.no_grad():
        torch.testing.assert_close(FirstHead().compute(SITES[0])[:, 0], full[:, 0])
    assert flops[0] - flops[1] == round(4 * 4 * 65 * 65 * 48 * 2 / 3)
    torch.testing.assert_close(run(model, None), native)


@dataclass(frozen=True, kw_only=True)
class FirstBlock(Look):
    """Attends to the first 16 keys."""

    def compute(self, site: EncoderAttentionSite) -> Tensor:
        blocks = -(-site.tokens // 16)
        live = torch.zeros(blocks, blocks, dtype=torch.bool)
        live[:, 0] = True
        tokens = site.tokens
        return site.sparse(BlockMask.from_blocks(live, q_len=tokens, k_len=tokens, block=16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_block_sparse_kernel_computes_the_blocks_of_a_mask(dtype: torch.dtype) -> None:
    model = vit().to(dtype)
    with vtr.apply(model, FirstBlock()) as handle, torch.no_grad():
        model(images(2).to(dtype))
        share = float(handle.trace.notes["attention"][0]["density"])
    site = SITES[0]
    q, k, v = (x.double() for x in (site.q, site.k[:, :, :16], site.v[:, :, :16]))
    wanted = (q @ k.transpose(-2, -1) * site.scale).softmax(-1) @ v
    with torch.no_grad():
        found = FirstBlock().compute(site).double()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found, wanted, atol=tolerance, rtol=tolerance)
    assert share == pytest.approx(16 / 65)


def test_the_kernel_refuses_what_it_lacks() -> None:
    beit = timm_models.build("beit_base_patch16_224")
    with pytest.raises(vtr.UnsupportedMethodError, match=r"adds a bias to its logits.*block=None"):
        run(beit, FirstBlock())
    dropping = vit(attn_drop_rate=0.1).train()
    with pytest.raises(vtr.UnsupportedMethodError, match="drops attention weights in training"):
        run(dropping, FirstBlock())
    run(vit(), Look())
    with pytest.raises(ValueError, match="mask is for 16 x 16 tokens, encoder block 0 has 65"):
        SITES[0].sparse(BlockMask.from_dense(torch.ones(16, 16, dtype=torch.bool), block=16))


def test_a_policy_of_training_is_refused_beside_a_mask() -> None:
    model = vit().train()
    methods = [vtr.ToFe(keep=0.5, layers=(1,), trained=True), Half(dense_layers=1)]
    with pytest.raises(vtr.UnsupportedMethodError, match="policy for training"):
        run(model, methods)
    run(model, [methods[0], Look()])


@dataclass(frozen=True, kw_only=True)
class Wrong(Look):
    def compute(self, site: EncoderAttentionSite) -> Tensor:
        return site.dense()[:, :, 1:]


@dataclass(frozen=True, kw_only=True)
class Nothing(EncoderAttentionMethod):
    name: ClassVar[str] = "nothing"
    paper: ClassVar[str] = "a test"


@dataclass(frozen=True, kw_only=True)
class Diffusion(AttentionMethod):
    name: ClassVar[str] = "of-diffusion"
    paper: ClassVar[str] = "a test"

    def attend(self, site: Any) -> Tensor:
        return site.dense()  # type: ignore[no-any-return]


@dataclass(frozen=True, kw_only=True)
class AnyAttention(Diffusion):
    needs: ClassVar = {"attention": frozenset({"qkv"})}


@dataclass(frozen=True, kw_only=True)
class Language(LanguageAttentionMethod):
    name: ClassVar[str] = "of-language"
    paper: ClassVar[str] = "a test"

    def attend(self, site: Any) -> Tensor:
        return site.dense()  # type: ignore[no-any-return]


def test_methods_of_other_models_are_refused_with_the_reason() -> None:
    model = vit()
    for method, reason in (
        (
            Diffusion(),
            r"needs denoising at the site 'attention'.*\(it is no diffusion transformer\)",
        ),
        (Language(), r"needs prompt at the site 'attention'.*\(it is no language model\)"),
        (AnyAttention(), "computes the attention of other models.*EncoderAttentionMethod"),
        (vtr.SALE(), "it is no language model"),
        (vtr.OwnFrame(0), "it is no diffusion transformer"),
    ):
        with pytest.raises(vtr.UnsupportedMethodError, match=reason):
            vtr.apply(model, method)
    with pytest.raises(TypeError, match=r"Nothing must define attend\(site\)"):
        vtr.apply(model, Nothing())
    with pytest.raises(RuntimeError, match=r"look: attend\(\) returned .*block 0 is"):
        run(model, Wrong())
    with pytest.raises(ValueError, match="both reduce at attention"):
        vtr.apply(model, [Look(), Half()])
    with pytest.raises(ValueError, match="dense_layers=4 leaves nothing to do"):
        vtr.apply(vit(depth=4), Look(dense_layers=4))
    run(model, Look(dense_layers=(0, 2)))


def test_methods_of_encoders_are_refused_by_other_models() -> None:
    from tests.diffusion.models import CASES as GENERATORS
    from tests.vision.vlm import models

    for model in (models.llava(1)[0], GENERATORS["wan"].build()):
        with pytest.raises(
            vtr.UnsupportedMethodError, match=r"needs patches .*not that of a vision encoder\)"
        ):
            vtr.apply(model, Look())


def test_blocks_that_are_run_whole_have_no_such_site() -> None:
    model = timm_models.build("vit_base_patch16_xp_224")
    with pytest.raises(vtr.UnsupportedMethodError, match="its blocks are run whole"):
        vtr.apply(model, Look())


def test_tokens_that_are_left_have_their_places_and_memory_is_shared() -> None:
    model = vit(depth=4)
    with vtr.apply(model, [vtr.Random(keep=9, layers=(1,), seed=0), Look()]) as handle:
        run_out = model(images(2))
        kept = handle.trace.kept
    assert kept is not None and run_out.shape[0] == 2
    site = SITES[3]
    assert torch.equal(site.index[:, 1:], kept + 1) and bool((site.index[:, 0] == 0).all())
    assert site.map.n_in == 64 and site.tokens == 10
    assert SITES[0].memory is SITES[3].memory


def test_it_is_copied_checkpointed_and_trained() -> None:
    x = images(2)
    gradients = []
    for checkpointing in (False, True):
        model = vit()
        model.set_grad_checkpointing(checkpointing)
        model.train()
        with vtr.apply(model, Half()):
            model(x).square().sum().backward()
        gradients.append(model.blocks[0].attn.qkv.weight.grad)
    assert torch.equal(*gradients) and bool(gradients[0].any())
    model = vit()
    with vtr.apply(model, Half()), torch.no_grad():
        assert torch.equal(copy.deepcopy(model)(x), model(x))


def test_a_runner_that_passes_a_method_by_is_found() -> None:
    model = vit(depth=2)
    with vtr.apply(model, Half()) as handle:
        runner = handle._wrapping.session.runners[0]
        plain = runner.attend
        runner.attend = lambda x, probe, kwargs: plain(x, None, kwargs)
        with pytest.raises(RuntimeError, match="block 0 of timm VisionTransformer did not give"):
            model(images(2))


def test_stages_are_those_of_the_layers() -> None:
    info = ModelInfo("a model", {"encoder": 3, "attention": 3}, {})
    assert Look(dense_layers=1).stages(info) == (Stage("attention", 1), Stage("attention", 2))
