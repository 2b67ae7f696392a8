"""The Wan pipeline from end to end: apply and remove on it, errors, what goes on working."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import vtr
from tests.diffusion import pipes
from tests.diffusion.models import CASES, Fixed, eager
from vtr.kernels import BlockMask


def test_the_pipeline_and_its_transformer_are_one_target() -> None:
    pipe = pipes.make("wan")
    dense = pipes.call(pipe, "wan", 3)
    with eager(pipe.transformer, CASES["wan"].attention, 0.4):
        want = pipes.call(pipe, "wan", 3)
    handle = vtr.apply(pipe, Fixed())
    assert torch.allclose(pipes.call(pipe, "wan", 3), want, atol=1e-5)
    assert not torch.allclose(want, dense, atol=1e-3)
    with pytest.raises(ValueError, match="both reduce at attention"):
        vtr.apply(pipe.transformer, Fixed())
    (same,) = vtr.handles(pipe.transformer)
    same.remove()
    assert handle.removed
    assert torch.equal(pipes.call(pipe, "wan", 3), dense)


def test_two_experts_are_wrapped_together() -> None:
    pipe = pipes.make("wan2.2")
    dense = pipes.call(pipe, "wan2.2", 6)
    handle = vtr.apply(pipe, Fixed())
    sparse = pipes.call(pipe, "wan2.2", 6)
    models = (pipe.transformer, pipe.transformer_2)
    with pytest.raises(vtr.UnsupportedModelError, match="give all methods to one of them"):
        vtr.apply(models[1], Fixed())
    twin = copy.deepcopy(pipe)
    handle.remove()
    assert torch.equal(pipes.call(pipe, "wan2.2", 6), dense)
    assert torch.equal(pipes.call(twin, "wan2.2", 6), sparse)
    outs = []
    for model in models:
        with vtr.apply(model, Fixed()):
            outs.append(pipes.call(pipe, "wan2.2", 6))
    assert not torch.equal(outs[0], outs[1])
    assert not any(torch.equal(out, sparse) for out in outs)
    with (
        vtr.apply(models[0], Fixed()),
        pytest.raises(vtr.UnsupportedModelError, match="give all methods"),
    ):
        vtr.apply(pipe, Fixed())


def test_the_report_counts_the_run() -> None:
    pipe = pipes.make("wan")
    with vtr.apply(pipe, Fixed(dense_steps=1, density=0.05)) as handle:
        with pytest.raises(RuntimeError, match="has not been called"):
            handle.report()
        pipes.call(pipe, "wan", 4)
        flops = handle.report().to_dict()["flops"]
    one = 4 * 24 * 45**2 * 3
    assert flops["attention, last call"]["dense"] == one
    assert flops["attention, this run"]["dense"] == 8 * one, "4 steps of 2 branches"
    run = flops["attention, this run"]["reduced"]
    assert run == 2 * one + 6 * flops["attention, last call"]["reduced"]
    assert handle.trace.summary().startswith("attention[0]: 100.0 % of 45 tokens")


def test_a_mask_of_the_wrong_size_is_refused() -> None:
    class Wrong(Fixed):
        def attend(self, site: Any) -> torch.Tensor:
            blocks = torch.ones(2, 2, dtype=torch.bool)
            return site.sparse(BlockMask.from_blocks(blocks, q_len=32, k_len=32, block=16))

    model, case = CASES["wan"].build(), CASES["wan"]
    with (
        vtr.apply(model, Wrong()),
        pytest.raises(ValueError, match=r"32 x 32 tokens.*has 45: 3 x 3 x 5"),
    ):
        model(**case.call())


def test_a_method_that_changes_shape_or_dtype_is_refused() -> None:
    class Wrong(Fixed):
        def attend(self, site: Any) -> torch.Tensor:
            return site.dense()[:, :, :-1]

    with (
        vtr.apply(model := CASES["wan"].build(), Wrong()),
        pytest.raises(RuntimeError, match=r"attend\(\) returned"),
    ):
        model(**CASES["wan"].call())


def modular() -> Any:
    """The denoising part of diffusers' modular pipeline for Wan, without components."""
    from diffusers.modular_pipelines.wan.modular_blocks_wan import WanBlocks

    return WanBlocks().sub_blocks["denoise"].init_pipeline()


def test_a_modular_pipeline() -> None:
    """Its guider calls the transformer once per condition, without names."""
    from diffusers import ClassifierFreeGuidance, FlowMatchEulerDiscreteScheduler
    from diffusers import WanTransformer3DModel as Wan

    seen = []

    class Watch(Fixed):
        def attend(self, site: Any) -> torch.Tensor:
            seen.append((site.run, site.step, site.steps, site.branch))
            return super().attend(site)

    pipe = modular()
    config = {**CASES["wan"].build().config, "in_channels": 16, "out_channels": 16}
    pipe.update_components(
        transformer=Wan.from_config(config).eval(), scheduler=FlowMatchEulerDiscreteScheduler(),
        guider=ClassifierFreeGuidance(guidance_scale=3.0),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    text = {f"{n}prompt_embeds": torch.randn(1, 7, 16) for n in ("", "negative_")}
    with vtr.apply(pipe, Watch()):
        for steps in (3, 2):
            pipe(**text, height=48, width=80, num_frames=9, num_inference_steps=steps)
    want = [(r, s, n, b) for r, n in ((0, 3), (1, 2)) for s in range(n) for b in "01"]
    assert list(dict.fromkeys(seen)) == want


def test_quantised_projections_do_not_hide_the_head_dim() -> None:
    model = CASES["wan"].build()
    for block in model.blocks:
        weight = block.attn1.to_q.weight
        block.attn1.to_q.weight = torch.nn.Parameter(weight.detach().view(-1, 1))  # as 4 bits are
    with vtr.apply(model, Fixed()) as handle:
        assert handle._wrapping.info.head_dim == 12


def test_unknown_objects_are_refused_with_a_reason() -> None:
    from diffusers import AutoencoderKL, DDPMPipeline, DDPMScheduler, UNet2DModel, WanPipeline

    unet = UNet2DModel(
        block_out_channels=(8,), norm_num_groups=4, down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",), sample_size=8,
    )  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    for target, message in (
        (
            DDPMPipeline(unet=unet, scheduler=DDPMScheduler()),
            "no transformer blocks: its attention is a layer",
        ),
        (vae, "AutoencoderKL is not supported.*Supported families: Wan"),
        (WanPipeline(None, None, None, None), "it has no transformer"),
        (modular(), r"no transformer yet: load_components\(\)"),
    ):
        with pytest.raises(vtr.UnsupportedModelError, match=message):
            vtr.apply(target, Fixed())


def test_other_methods_are_refused_and_these_elsewhere() -> None:
    model = CASES["wan"].build()
    with pytest.raises(vtr.UnsupportedMethodError, match=r"Methods that work on it: .*radial"):
        vtr.apply(model, vtr.EViT(keep=0.5))
    from tests.tiny import vit

    with pytest.raises(
        vtr.UnsupportedMethodError, match=r"radial needs frames at the site 'attention'"
    ):
        vtr.apply(vit(depth=2), vtr.RadialAttention())
    names = {s.name for s in vtr.supported(model) if s.supported}
    assert {"radial", "rettention", "tomesd"} <= names and "evit" not in names


def test_blocks_that_were_replaced_are_refused() -> None:
    model = CASES["wan"].build()
    model.blocks = torch.nn.ModuleList([torch.nn.Identity()])  # as some caches do
    with pytest.raises(vtr.UnsupportedModelError, match=r"hold no attention \(attn1\)"):
        vtr.apply(model, Fixed())


def test_another_attention_processor_is_refused() -> None:
    from diffusers.models.attention_processor import AttnProcessor

    model = CASES["pixart"].build()
    model.set_attn_processor(AttnProcessor())
    with pytest.raises(vtr.UnsupportedModelError, match="AttnProcessor computes attention neither"):
        vtr.apply(model, Fixed())


@pytest.mark.parametrize(("name", "shape"), [("wan", (2, 4, 3, 7, 10)), ("sd3", (2, 4, 10, 13)),
                                             ("cogvideox-1.5", (2, 3, 4, 6, 10))])  # fmt: skip
def test_latents_that_do_not_divide_into_patches_are_refused(
    name: str, shape: tuple[int, ...]
) -> None:
    model, given = CASES[name].build(), CASES[name].call()
    with vtr.apply(model, Fixed()), pytest.raises(ValueError, match="do not divide into patches"):
        model(**{**given, "hidden_states": torch.randn(shape)})


def test_tokens_of_other_things_in_the_sequence_are_refused() -> None:
    model, given = CASES["ltx"].build(), CASES["ltx"].call()
    with vtr.apply(model, Fixed()):
        with pytest.raises(RuntimeError, match="without num_frames"):
            model(**{**given, "num_frames": None})
        with pytest.raises(RuntimeError, match=r"has 45 tokens, and the grid is 2 x 3 x 5 = 30"):
            model(**{**given, "num_frames": 2, "video_coords": torch.rand(2, 3, 45)})
    model, given = CASES["flux"].build(), CASES["flux"].call()
    ids = given["img_ids"].flip(0)  # from the last row to the first
    with vtr.apply(model, Fixed()), pytest.raises(RuntimeError, match="no height x width grid"):
        model(**{**given, "img_ids": ids})


@torch.no_grad()
def test_a_reference_image_of_the_same_size_is_a_frame() -> None:
    model, given = CASES["flux"].build(), CASES["flux"].call()
    other = given["img_ids"].clone()
    other[:, 0] = 1
    given["img_ids"] = torch.cat([given["img_ids"], other])
    given["hidden_states"] = torch.randn(2, 70, 8)
    grids = []

    class Look(Fixed):
        def attend(self, site: Any) -> torch.Tensor:
            grids.append((site.grid, site.text))
            return super().attend(site)

    with vtr.apply(model, Look()):
        model(**given)
    assert grids == [((2, 5, 7), 6)] * 3


def test_two_models_side_by_side_do_not_touch_each_other() -> None:
    case = CASES["wan"]
    one, two = case.build(), case.build()
    with torch.no_grad():
        want = two(**case.call())[0]
        with vtr.apply(one, Fixed()):
            sparse = one(**case.call())[0]
            assert torch.equal(two(**case.call())[0], want)
    assert not torch.equal(sparse, want)


def test_threads_do_not_see_each_other() -> None:
    """One model is sparse, another of the same class dense, at the same time."""
    case = CASES["wan"]
    models = [case.build() for _ in range(2)]
    given = case.call()
    barrier = threading.Barrier(2)

    class Meet(Fixed):
        def attend(self, site: Any) -> torch.Tensor:
            if site.layer == 0:
                barrier.wait(30)  # the other model is inside its attention now
                barrier.wait(30)
            return super().attend(site)

    def meet(module: Any, args: Any) -> None:
        barrier.wait(30)
        barrier.wait(30)

    def run(model: Any) -> torch.Tensor:
        with torch.no_grad():
            out: torch.Tensor = model(**given)[0]
        return out

    want = run(models[1])
    with vtr.apply(models[0], Fixed()):
        sparse = run(models[0])
    models[1].blocks[0].attn1.register_forward_pre_hook(meet)
    with vtr.apply(models[0], Meet()), ThreadPoolExecutor(2) as pool:
        got = list(pool.map(run, models))
    assert torch.equal(got[0], sparse) and torch.equal(got[1], want)


def test_the_mask_of_a_padded_text_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from vtr.diffusion import site

    made = []
    plain = site.without_keys
    monkeypatch.setattr(site, "without_keys", lambda *a: made.append(a) or plain(*a))
    case, model = CASES["hunyuan-video"], CASES["hunyuan-video"].build()
    one, other = case.call(time=900.0), case.call(time=900.0)
    other["encoder_attention_mask"] = torch.ones(2, 7, dtype=torch.long)
    other["encoder_attention_mask"][:, -1] = 0
    with torch.no_grad(), vtr.apply(model, Fixed()):
        for time in (900.0, 500.0, 100.0):
            for given in (one, other):  # two branches with texts of their own
                given["encoder_attention_mask"] = given["encoder_attention_mask"].clone()
                model(**{**given, "timestep": torch.full((2,), time)})
    assert len(made) == 2


def test_attention_alone_is_dense() -> None:
    """A block called by itself, outside a call of the transformer, has no grid."""
    model = CASES["wan"].build()
    with torch.no_grad(), vtr.apply(model, Fixed()):
        x = torch.randn(1, 45, 24)
        out = model.blocks[0].attn1(x, None, None, None)
        assert out.shape == x.shape


def test_two_methods_on_different_layers() -> None:
    case, model = CASES["wan"], CASES["wan"].build()
    with torch.no_grad():
        with vtr.apply(
            model, [Fixed(dense_layers=(1, 2)), vtr.RadialAttention(dense_layers=1, block=16)]
        ):
            both = model(**case.call())[0]
        with eager(model, case.attention[:1], 0.4):
            want = model(**case.call())[0]
    assert torch.allclose(both, want, atol=2e-6), "45 tokens are within the radial mask"
