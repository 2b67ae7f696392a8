"""What users do with pipelines goes on working under a sparse method: compilation, offloading, LoRA,
caches, fused projections, attention backends, saving."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import vtr
from tests.diffusion import pipes
from tests.diffusion.models import CASES, Fixed, eager
from vtr.diffusion.processor import SiteProcessor

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def pipe() -> Any:
    return pipes.make("wan")


def reference(pipe: Any, steps: int = 3) -> torch.Tensor:
    with eager(pipe.transformer, CASES["wan"].attention, 0.4):
        return pipes.call(pipe, "wan", steps)


@pytest.mark.parametrize("before", [True, False])
def test_compiled_transformer(pipe: Any, before: bool) -> None:
    del pipe.transformer.blocks[1:]
    with eager(pipe.transformer, ("blocks.0.attn1",), 0.4):
        want = pipes.call(pipe, "wan", 3)
    dense = pipes.call(pipe, "wan", 3)
    torch._dynamo.reset()
    handle = None if before else vtr.apply(pipe, Fixed())
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    handle = handle or vtr.apply(pipe, Fixed())
    assert torch.allclose(pipes.call(pipe, "wan", 3), want, atol=1e-5)
    assert torch.equal(pipes.call(pipe, "wan", 3), pipes.call(pipe, "wan", 3))
    handle.pause()
    assert torch.allclose(pipes.call(pipe, "wan", 3), dense, atol=1e-5)
    handle.resume()
    assert torch.allclose(pipes.call(pipe, "wan", 3), want, atol=1e-5)
    handle.remove()
    with vtr.apply(pipe.transformer, Fixed(dense_steps=2)):
        assert not torch.allclose(pipes.call(pipe, "wan", 3), want, atol=1e-5)
    assert torch.allclose(pipes.call(pipe, "wan", 3), dense, atol=1e-5)


def test_a_compiled_transformer_is_one_graph() -> None:
    from torch._dynamo.testing import CompileCounter

    case, model = CASES["wan"], CASES["wan"].build()
    del model.blocks[2:]
    torch._dynamo.reset()
    counter = CompileCounter()
    with torch.no_grad(), vtr.apply(model, Fixed(dense_steps=1)) as handle:
        compiled = torch.compile(model, backend=counter)
        for time, density in ((900.0, 1.0), (500.0, None), (100.0, None)):
            compiled(**case.call(time=time))
            assert density in (None, handle.trace.notes["attention"][0]["density"])
    assert counter.frame_count == 1, "steps and layers do not split or repeat the graph"


def test_blocks_compiled_one_by_one_share_their_graph() -> None:
    """Regional compilation of more layers than a compiler would compile again and again."""
    case, model = CASES["wan"], CASES["wan"].build()
    for _ in range(7):
        model.blocks.append(copy.deepcopy(model.blocks[0]))
    torch._dynamo.reset()
    with torch.no_grad(), vtr.apply(model, Fixed()):
        want = model(**case.call())[0]
        model.compile_repeated_blocks(backend="eager", fullgraph=True)
        assert torch.allclose(model(**case.call())[0], want, atol=1e-6)


@pytest.mark.parametrize("name", ["mochi", "hunyuan-video"])
def test_blocks_are_compiled_whole_before_and_after_apply(name: str) -> None:
    case, found = CASES[name], []
    for moment in ("never", "before", "after"):
        model = case.build()
        blocks = model.transformer_blocks
        if moment == "before":
            [block.compile(backend="eager", fullgraph=True) for block in blocks]
        with torch.no_grad(), vtr.apply(model, Fixed()):
            if moment == "after":
                [block.compile(backend="eager", fullgraph=True) for block in blocks]
            found.append(model(**case.call())[0])
    assert torch.allclose(found[1], found[0], atol=1e-5)
    assert torch.allclose(found[2], found[0], atol=1e-5)


def test_gradients_of_a_compiled_transformer() -> None:
    case = CASES["wan"]
    grads = []
    for compiled in (False, True):
        model = case.build().train()
        del model.blocks[1:]
        torch._dynamo.reset()
        with vtr.apply(model, Fixed()):
            run = torch.compile(model, backend="eager") if compiled else model
            run(**case.call())[0].square().mean().backward()
        grads.append(model.blocks[0].attn1.to_q.weight.grad)
    assert torch.allclose(*grads, atol=1e-6) and bool(grads[0].any())


def test_lora_of_peft(pipe: Any) -> None:
    peft = pytest.importorskip("peft")
    handle = vtr.apply(pipe, Fixed())
    plain = pipes.call(pipe, "wan", 3)
    config = peft.LoraConfig(
        r=2, lora_alpha=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"],
        init_lora_weights=False,
    )  # fmt: skip
    pipe.transformer.add_adapter(config)
    sparse = pipes.call(pipe, "wan", 3)
    assert not torch.allclose(sparse, plain, atol=1e-3)
    assert torch.allclose(sparse, reference(pipe), atol=1e-4)
    pipe.transformer.disable_adapters()
    assert torch.allclose(pipes.call(pipe, "wan", 3), plain, atol=1e-5)
    handle.remove()


def test_first_block_cache(pipe: Any) -> None:
    from diffusers import FirstBlockCacheConfig

    config = FirstBlockCacheConfig(threshold=0.3)
    uncached = reference(pipe, 6)
    pipe.transformer.enable_cache(config)
    want = reference(pipe, 6)
    assert not torch.allclose(want, uncached, atol=1e-4), "the cache skips blocks"
    with vtr.apply(pipe, Fixed()) as handle:
        assert torch.allclose(pipes.call(pipe, "wan", 6), want, atol=1e-5)
        run = handle.report().to_dict()["flops"]["attention, this run"]["dense"]
        assert 12 * 4 * 24 * 45**2 <= run < 36 * 4 * 24 * 45**2, "skipped layers are not counted"
    pipe.transformer.disable_cache()
    with vtr.apply(pipe, Fixed()) as handle:  # in the other order
        pipe.transformer.enable_cache(config)
        assert torch.allclose(pipes.call(pipe, "wan", 6), want, atol=1e-5)
        pipe.transformer.disable_cache()
        assert torch.allclose(pipes.call(pipe, "wan", 6), uncached, atol=1e-5)


def test_steps_are_right_where_a_cache_skips_layers(pipe: Any) -> None:
    from diffusers import FirstBlockCacheConfig

    seen = []

    class Look(Fixed):
        def attend(self, site: Any) -> torch.Tensor:
            seen.append((site.layer, site.step))
            return super().attend(site)

    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.3))
    with vtr.apply(pipe, Look(dense_steps=2)):
        pipes.call(pipe, "wan", 6)
    assert sorted({s for layer, s in seen if layer == 0}) == [2, 3, 4, 5]
    assert len([s for layer, s in seen if layer == 2]) < 8


@pytest.mark.parametrize("name", ["broadcast", "taylor", "mag"])
def test_other_caches(pipe: Any, name: str) -> None:
    """A sparse method under a cache is that cache around sparse attention."""
    import diffusers

    config: Any = {
        "broadcast": lambda: diffusers.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 2000),
            spatial_attention_block_identifiers=["blocks.*attn1"],
            current_timestep_callback=lambda: pipe.current_timestep,
        ),
        "taylor": lambda: diffusers.TaylorSeerCacheConfig(
            cache_interval=2, disable_cache_before_step=2, taylor_factors_dtype=torch.float32,
            cache_identifiers=[r"blocks\.\d+\.attn1"],
        ),
        "mag": lambda: diffusers.MagCacheConfig(
            threshold=0.5, num_inference_steps=6, retention_ratio=0.2, mag_ratios=[1.0] * 6
        ),
    }[name]()  # fmt: skip
    uncached = reference(pipe, 6)
    pipe.transformer.enable_cache(config)
    want = reference(pipe, 6)
    assert not torch.allclose(want, uncached, atol=1e-4), "the cache skips something"
    with vtr.apply(pipe, Fixed()):
        assert torch.allclose(pipes.call(pipe, "wan", 6), want, atol=1e-5)


def test_cpu_offload(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hooks that accelerate puts on modules, with the CPU as the device to go to."""
    pytest.importorskip("accelerate")
    for order in ("before", "after"):
        pipe = pipes.make("wan")
        want = reference(pipe)
        if order == "before":
            pipe.enable_model_cpu_offload(device="cpu")
        with vtr.apply(pipe, Fixed()):
            if order == "after":
                pipe.enable_model_cpu_offload(device="cpu")
            assert torch.allclose(pipes.call(pipe, "wan", 3), want, atol=1e-5)
        assert "_vtr_wrapping" not in pipe.transformer.__dict__


def test_fused_projections_are_taken_up() -> None:
    pipe = pipes.make("cogvideox")
    dense = pipes.call(pipe, "cogvideox", 2)
    handle = vtr.apply(pipe, Fixed())
    sparse = pipes.call(pipe, "cogvideox", 2)
    pipe.transformer.fuse_qkv_projections()
    assert torch.allclose(pipes.call(pipe, "cogvideox", 2), sparse, atol=1e-5)
    handle.remove()
    attention = pipe.transformer.transformer_blocks[0].attn1
    assert type(attention.processor).__name__ == "FusedCogVideoXAttnProcessor2_0"
    assert torch.allclose(pipes.call(pipe, "cogvideox", 2), dense, atol=1e-5)
    pipe.transformer.unfuse_qkv_projections()  # puts back what it had kept: ours
    assert torch.allclose(pipes.call(pipe, "cogvideox", 2), dense, atol=1e-5)
    with vtr.apply(pipe, Fixed()):
        assert torch.allclose(pipes.call(pipe, "cogvideox", 2), sparse, atol=1e-5)
    assert not isinstance(attention.processor, SiteProcessor)


def test_a_processor_set_after_apply_is_taken_up(pipe: Any) -> None:
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    handle = vtr.apply(pipe, Fixed())
    sparse = pipes.call(pipe, "wan", 2)
    mine = WanAttnProcessor()
    pipe.transformer.set_attn_processor(mine)
    assert torch.equal(pipes.call(pipe, "wan", 2), sparse)
    handle.remove()
    assert pipe.transformer.blocks[0].attn1.processor is mine


def test_attention_backends_reach_the_processor(pipe: Any) -> None:
    with vtr.apply(pipe, Fixed(dense_steps=1)):
        sparse = pipes.call(pipe, "wan", 2)
        pipe.transformer.set_attention_backend("_native_math")
        processor = pipe.transformer.blocks[0].attn1.processor
        assert processor._attention_backend.value == "_native_math"
        assert torch.allclose(pipes.call(pipe, "wan", 2), sparse, atol=1e-5)
    assert pipe.transformer.blocks[0].attn1.processor._attention_backend.value == "_native_math"


def test_saving_and_loading(pipe: Any, tmp_path: Path) -> None:
    from diffusers import WanTransformer3DModel

    with vtr.apply(pipe, Fixed()):
        sparse = pipes.call(pipe, "wan", 2)
        pipe.transformer.save_pretrained(tmp_path)
    pipe.transformer = WanTransformer3DModel.from_pretrained(tmp_path)
    with vtr.apply(pipe, Fixed()):
        assert torch.equal(pipes.call(pipe, "wan", 2), sparse)


def test_a_wrapped_model_can_be_pickled(pipe: Any) -> None:
    with vtr.apply(pipe, Fixed()):
        sparse = pipes.call(pipe, "wan", 2)
        sent = pickle.dumps(pipe.transformer)  # as to a worker process
    pipe.transformer = pickle.loads(sent)
    assert torch.equal(pipes.call(pipe, "wan", 2), sparse)
    (handle,) = vtr.handles(pipe)
    handle.remove()
    assert not torch.allclose(pipes.call(pipe, "wan", 2), sparse, atol=1e-4)


@pytest.mark.parametrize(
    "method",
    [vtr.RandomSparse(block=16), vtr.SlidingTile(block=16), vtr.RectifiedSparse(block=16),
     vtr.OwnFrame(block=16), vtr.ToMeSD()],
    ids=lambda m: m.name,
)  # fmt: skip
@pytest.mark.parametrize("name", ["wan", "hunyuan-video", "qwen-image"])
def test_training_after_inference_mode(name: str, method: Any) -> None:
    """What was kept from a validation (masks, orders, padding) can be saved for a backward pass."""
    case, grads = CASES[name], []
    for validate in (False, True):
        model = case.build()
        with vtr.apply(model, method):
            if validate:
                with torch.inference_mode():
                    model(**case.call())
            model.train()
            model(**case.call())[0].square().mean().backward()
        grads.append(
            torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        )
    assert torch.equal(*grads)


def test_gradient_checkpointing() -> None:
    case, grads = CASES["wan"], []
    for checkpointing in (False, True):
        model = case.build().train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        with vtr.apply(model, Fixed()):
            model(**case.call())[0].square().mean().backward()
        grads.append(model.blocks[0].attn1.to_q.weight.grad)
    assert torch.allclose(*grads, atol=1e-7)
