"""What methods for video look at: attention received in a language model, a tower's pooling head."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import vtr
from tests.vision.vlm import models
from tests.vision.vlm.models import Inputs, visual
from tests.vision.vlm.videos import VIDEOS, frames, transformers


@dataclasses.dataclass(frozen=True)
class Look(vtr.TokenMethod):
    """Calls a function at a decoder site."""

    name: ClassVar[str] = "look"
    sites: ClassVar[tuple[str, ...]] = ("decoder",)

    layer: int = 1
    place: str = "end"

    def stages(self, info: Any) -> tuple[vtr.Stage, ...]:
        return (vtr.Stage("decoder", self.layer, self.place, cuts=False),)

    def reduce(self, site: Any) -> None:
        site.notes["received"] = site.attention_received(chunk=5)
        site.notes["valid"] = site.valid


@pytest.mark.parametrize("name", ["llava_next_video", "qwen2_5_vl_video", "llava_onevision_mixed"])
@pytest.mark.parametrize("place", ["start", "middle", "end"])
def test_attention_received_is_the_column_mean_of_eager_attention(name: str, place: str) -> None:
    model, inputs = VIDEOS[name](2)
    model.set_attn_implementation("eager")
    weights: list[Tensor] = []
    layer = model.model.language_model.layers[1]
    hook = layer.self_attn.register_forward_hook(lambda m, a, out: weights.append(out[1]))
    with torch.no_grad(), vtr.apply(model, Look(place=place)) as handle:
        model(**inputs)
    hook.remove()
    got, valid = handle.trace.notes["received"], handle.trace.notes["valid"]
    for b in range(2):
        live = inputs["attention_mask"][b].bool()
        columns = (visual(inputs["input_ids"][b]) & live).nonzero()[:, 0]
        want = weights[0][b][:, live].mean((0, 1))[columns]
        mine = got[b] if valid is None else got[b][valid[b]]
        torch.testing.assert_close(mine, want)


def onevision(head: bool) -> tuple[Any, Inputs]:
    _, inputs = VIDEOS["llava_onevision_video"](1)
    config = models.llava_onevision(1)[0].config
    vision = models.siglip()
    vision.vision_use_head = head
    config.vision_config = vision
    model = models.build(transformers.LlavaOnevisionForConditionalGeneration, config)
    return model, {**inputs, "pixel_values_videos": frames(1, 3)}


def test_fastvid_scores_by_the_pooling_head_where_there_is_one() -> None:
    model, inputs = onevision(True)
    assert type(model.model.vision_tower).__name__ == "SiglipVisionModel"
    method = vtr.FastVID(keep=0.5, contextual=0.0, segments=1, threshold=-1.0)
    with torch.no_grad(), vtr.apply(model, method) as handle:
        assert "pooling" in handle._wrapping.info.signals["encoder"]
        model(**inputs)
    tower = model.model.vision_tower
    with torch.no_grad():
        pixels = inputs["pixel_values_videos"][0]
        states = tower(pixels, output_hidden_states=True).hidden_states
        index = model.config.vision_feature_layer
        x = tower.post_layernorm(states[index])
        probe = tower.head.probe.expand(3, -1, -1)
        score = tower.head.attention(probe, x, x)[1][:, 0]  # (3, 16), mean over heads
        pooled = torch.nn.functional.interpolate(score.view(3, 1, 4, 4), (2, 2), mode="bilinear")
    want = [4 * f + int(i) for f in range(3) for i in pooled[f].flatten().topk(2).indices.sort()[0]]
    kept = handle.trace.stages[0].total.kept[0].tolist()
    assert kept == [*want, 12], "and the newline"


def test_fastvid_falls_back_to_attention_received_and_knows_it() -> None:
    model, inputs = onevision(False)
    with torch.no_grad(), vtr.apply(model, vtr.FastVID(keep=0.5)) as handle:
        model(**inputs)
        info = handle._wrapping.info
    assert "pooling" not in info.signals["encoder"] and not info.has_cls
    assert vtr.FastVID().requirements(info)["encoder"] == {"attention_received"}
    assert handle.trace.stages[0].tokens_out == 7


def test_global_features_of_frames_reach_the_prompt() -> None:
    """Frames whose pooled features differ are cut apart; alike ones are one segment."""
    model, inputs = onevision(True)
    clip = inputs["pixel_values_videos"]
    seen: list[Tensor] = []
    keep = vtr.FastVID.compress

    def spy(self: Any, x: Tensor, score: Tensor, features: Tensor) -> Any:
        seen.append(features)
        return keep(self, x, score, features)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(vtr.FastVID, "compress", spy)
        with vtr.apply(model, vtr.FastVID(keep=0.5)):
            model(**inputs)
        tower = model.model.vision_tower
        states = tower(clip[0], output_hidden_states=True).hidden_states
        want = tower.head(tower.post_layernorm(states[model.config.vision_feature_layer]))
    torch.testing.assert_close(seen[0], want)
