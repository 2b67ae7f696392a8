"""Perturbed-attention guidance (PAG): pipelines whose processors cut the batch into parts, of which
one has no attention map."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vtr
from tests.diffusion import pipes
from tests.diffusion.models import CASES, replaced
from tests.diffusion.test_session import Watch

METHODS = [
    vtr.ToMeSD(0.5),
    vtr.NeighborhoodAttention(0.3, block=16),
    vtr.RectifiedSparse(0.5, block=16),
    vtr.Rettention(0.3, refresh=2, block=16),
]
PIPELINES = {
    "hunyuan-dit": ("HunyuanDiTPAGPipeline", "blocks.1"),
    "pixart-sigma": ("PixArtSigmaPAGPipeline", "blocks.1"),
    "sd3": ("StableDiffusion3PAGPipeline", "blocks.1"),
}


def pipeline(name: str) -> Any:
    import diffusers

    kind, layers = PIPELINES[name]
    options = {"requires_safety_checker": False} if name == "hunyuan-dit" else {}
    parts = {k: v for k, v in pipes.make(name).components.items() if "image_encoder" not in k}
    parts.pop("feature_extractor" if name == "sd3" else "", None)
    made = getattr(diffusers, kind)(**parts, pag_applied_layers=layers, **options)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines_with_perturbed_guidance(name: str, method: Any, guidance: float) -> None:
    pipe, given = pipeline(name), {"guidance_scale": guidance, "pag_scale": 3.0}
    if name == "sd3" and method.sites == ("attention",):
        # Its perturbed part is a mask of the layer's own, which is refused by name.
        with (
            vtr.apply(pipe, method),
            pytest.raises(RuntimeError, match="name this layer in dense_layers"),
        ):
            pipes.call(pipe, name, 3, **given)
        pipe, method = pipeline(name), method.replace(dense_layers=(2,))
    dense = pipes.call(pipe, name, 3, **given)
    assert not torch.equal(dense, pipes.call(pipe, name, 3, guidance_scale=guidance, pag_scale=0.0))
    with vtr.apply(pipe, method):
        found = pipes.call(pipe, name, 3, **given)
        again = pipes.call(pipe, name, 3, **given)
    assert torch.isfinite(found).all() and torch.equal(found, again)
    assert torch.equal(pipes.call(pipe, name, 3, **given), dense), "removed without a trace"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PIPELINES)
def test_steps_are_counted(name: str) -> None:
    pipe, method = pipeline(name), Watch(dense_layers=(2,) if name == "sd3" else 0)
    with vtr.apply(pipe, method):
        pipes.call(pipe, name, 4)
    assert [s[:4] for s in method.seen if s[4] == 0] == [(0, step, 4, "0") for step in range(4)]


@pytest.mark.parametrize("parts", [2, 3])
@torch.no_grad()
def test_merging_in_each_part_of_the_batch(parts: int) -> None:
    """The parts with attention are what they are without PAG; the perturbed one is what attention
    under the identity makes of the same merged tokens."""
    from diffusers.models import attention_processor

    case, model = CASES["hunyuan-dit"], CASES["hunyuan-dit"].build()
    given, layer = case.call(batch=2 * parts), case.attention[-1]
    plain = torch.nn.functional.scaled_dot_product_attention

    def perturbed(name: str, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        # Sample by sample, as rotary factors want it; the last two are the perturbed ones.
        calls.append(name)
        return v if len(calls) > 2 * (parts - 1) else plain(q, k, v)

    calls: list[str] = []
    with vtr.apply(model, vtr.ToMeSD(0.5)) as handle:
        with replaced(model, (layer,), perturbed):
            want = model(**given)[0]
        kinds = {2: "PAGHunyuanAttnProcessor2_0", 3: "PAGCFGHunyuanAttnProcessor2_0"}
        module = model.get_submodule(layer)
        module.processor = getattr(attention_processor, kinds[parts])()
        found = model(**given)[0]
        assert [s.tokens_out for s in handle.trace.stages] == [18, 18]
    assert len(calls) == 2 * parts
    torch.testing.assert_close(found, want, atol=2e-5, rtol=2e-5)
