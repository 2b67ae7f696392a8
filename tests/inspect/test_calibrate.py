"""Calibration: what a method sees, what the plan says, what is refused, and the model afterwards."""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
import sys
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch

import vtr
from tests.calibrated import ImageShare, Shares, image_share  # noqa: F401
from tests.simulated import gpu, moved
from tests.vision.vlm import models
from tests.vision.vlm.models import visual
from vtr.core import registry


@pytest.fixture(scope="module")
def llava() -> tuple[Any, dict[str, Any]]:
    return models.llava(2)


def by_hand(model: Any, batches: list[dict[str, Any]]) -> torch.Tensor:
    """Attention of the last row to visual tokens, by transformers' own maps: (layers, heads)."""
    eager = deepcopy(model)
    eager.set_attn_implementation("eager")
    found = []
    with torch.no_grad():
        for batch in batches:
            maps = eager(**batch, output_attentions=True).attentions
            here = visual(batch["input_ids"])
            found.append(torch.stack([(m[:, :, -1] * here[:, None]).sum(-1) for m in maps], 1))
    return torch.cat(found).mean(0)


def test_a_method_sees_the_attention_of_a_dense_run(llava):
    model, batch = llava
    one = models.llava(1)[1]
    plan = vtr.calibrate(model, [batch, one], ImageShare())
    torch.testing.assert_close(plan.tables[0]["share"], by_hand(model, [batch, one]))
    assert plan.methods == (ImageShare(),)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen3_vl", "internvl"])
def test_every_layer_of_a_family_is_seen(family):
    model, batch = getattr(models, family)(2)
    share = vtr.calibrate(model, [batch], ImageShare()).tables[0]["share"]
    torch.testing.assert_close(share, by_hand(model, [batch]), atol=1e-5, rtol=1e-4)


def test_the_plan_says_where_it_comes_from(llava):
    model, batch = llava
    plan = vtr.calibrate(model, iter([batch]), ImageShare(), description="noise")
    data = dict(plan.data)
    expected = hashlib.sha256()
    for name in sorted(batch):
        tensor = batch[name]
        expected.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        expected.update(tensor.numpy().tobytes())
    assert data.pop("sha256") == expected.hexdigest()
    tokens = int(visual(batch["input_ids"]).sum())
    assert data == {
        "batches": 1,
        "samples": 2,
        "images": len(batch["pixel_values"]),
        "tokens": tokens,
        "description": "noise",
    }
    assert set(plan.versions) == {"vtr", "torch", "transformers"}
    assert all(version == importlib.metadata.version(n) for n, version in plan.versions.items())
    assert plan.fingerprint is not None
    assert plan.fingerprint.model == "LlavaForConditionalGeneration"


def test_the_plan_works_after_a_file(llava, image_share, tmp_path):  # noqa: F811
    model, batch = llava
    plan = vtr.calibrate(model, [batch], {"name": "image-share", "power": 2.0})
    found = []
    for file in ("plan.json", "plan.safetensors"):
        plan.save(tmp_path / file)
        with vtr.apply(model, vtr.Plan.load(tmp_path / file)), torch.no_grad():
            found.append(model(**batch).logits)
    assert torch.equal(*found)
    # Heads scaled in front of the output projection are those columns of its weight scaled.
    scaled = deepcopy(model)
    width = scaled.model.language_model.layers[0].self_attn.head_dim
    with torch.no_grad():
        for layer, share in zip(
            scaled.model.language_model.layers, plan.tables[0]["share"], strict=True
        ):
            layer.self_attn.o_proj.weight *= (share**2).repeat_interleave(width)
        expected = scaled(**batch).logits
    here = batch["attention_mask"].bool()
    torch.testing.assert_close(found[0][here], expected[here], atol=1e-5, rtol=1e-4)


def test_a_plan_joins_other_methods(llava, image_share):  # noqa: F811
    model, batch = llava
    plan = vtr.calibrate(model, [batch], "image-share")
    with vtr.apply(model, [plan, vtr.FastV(keep=8, layer=1)]) as handle, torch.no_grad():
        model(**batch)
    assert [m.name for m in handle.methods] == ["image-share", "fastv"]
    assert handle.trace.stages[-1].tokens_out == 16  # of two images


def test_the_model_is_left_as_it_was(llava):
    model, batch = llava
    model = deepcopy(model)
    with torch.no_grad():
        before = model(**batch).logits
    model.model.language_model.layers[1].train()
    modes = [m.training for m in model.modules()]
    attributes = {n: sorted(m.__dict__) for n, m in model.named_modules()}
    vtr.calibrate(model, [batch], ImageShare())
    assert [m.training for m in model.modules()] == modes and any(modes)
    assert {n: sorted(m.__dict__) for n, m in model.named_modules()} == attributes
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, before)
    assert not vtr.handles(model)


def test_an_error_in_a_batch_leaves_the_model_as_it_was(llava):
    model, batch = llava
    model = deepcopy(model).train()
    with pytest.raises(ValueError, match="batch 1 has no image"):
        vtr.calibrate(model, [batch, text_only()], ImageShare())
    assert not vtr.handles(model)
    assert all(m.training for m in model.modules())


def test_inputs_get_the_dtype_of_the_model(llava):
    model, batch = llava
    small = deepcopy(model).to(torch.bfloat16)
    share = vtr.calibrate(small, [{**batch, "labels": batch["input_ids"]}], ImageShare())
    exact = vtr.calibrate(model, [batch], ImageShare())
    torch.testing.assert_close(
        share.tables[0]["share"], exact.tables[0]["share"], atol=0.02, rtol=0.1
    )
    with vtr.apply(model, share):  # the same model in another dtype
        pass


def test_a_plan_follows_the_model_to_another_device(llava):
    model, batch = llava
    model = deepcopy(model)
    here = vtr.calibrate(model, [batch], ImageShare())
    with vtr.apply(model, here), torch.no_grad():
        wanted = model(**batch).logits
        with gpu():
            try:
                model.to("cuda")
                torch.testing.assert_close(
                    model(**moved(batch)).logits.cpu(), wanted, atol=1e-4, rtol=1e-4
                )
            finally:
                model.to("cpu")
    with gpu():
        try:
            model.to("cuda")
            there = vtr.calibrate(model, [batch], ImageShare())  # inputs are moved
            with vtr.apply(model, here):
                pass
        finally:
            model.to("cpu")
    assert there.fingerprint == here.fingerprint and there.data == here.data
    assert not there.tables[0]["share"].is_cuda
    torch.testing.assert_close(there.tables[0], here.tables[0])


def test_a_bare_model_without_its_head(llava):
    model, batch = llava
    plan = vtr.calibrate(model.model, [batch], ImageShare())
    torch.testing.assert_close(plan.tables[0]["share"], by_hand(model, [batch]))


# ---- what is refused ----------------------------------------------------------------------------


def text_only() -> dict[str, Any]:
    ids = torch.arange(5, 25).view(2, 10)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        ([], "at least one batch of the model's inputs, got none"),
        ([text_only()], "batch 0 has no image or video"),
        (text_only(), r"write \[batch\] for a single one"),
        ([torch.ones(1)], "batch 0 must be a mapping .* got Tensor"),
        ([{"pixel_values": torch.ones(1)}], "input_ids.* got the keys pixel_values"),
        (5, "another iterable of batches, got int"),
    ],
)
def test_bad_batches_are_named(llava, batches, words):
    with pytest.raises(ValueError, match=words):
        vtr.calibrate(llava[0], batches, ImageShare())
    assert not vtr.handles(llava[0])


def test_a_sample_without_an_image_is_named(llava):
    model, batch = llava
    ids = batch["input_ids"].clone()
    ids[0] = torch.where(visual(ids[:1])[0], 7, ids[0])
    less = {**batch, "input_ids": ids, "pixel_values": batch["pixel_values"][1:]}
    with pytest.raises(ValueError, match="sample 0 of batch 0 has no image or video"):
        vtr.calibrate(model, [less], ImageShare())


def test_methods_without_calibration_are_refused(llava, image_share):  # noqa: F811
    model, batch = llava
    with pytest.raises(
        vtr.UnsupportedMethodError, match=r"fastv needs no calibration.*image-share"
    ):
        vtr.calibrate(model, [batch], "fastv")
    with pytest.raises(ValueError, match="one vtr method, its name or a dict"):
        vtr.calibrate(model, [batch], [ImageShare()])  # type: ignore[arg-type]


def test_models_without_language_attention_are_refused():
    from transformers import CLIPVisionModel

    tower = CLIPVisionModel(models.clip()).eval()
    with pytest.raises(
        vtr.UnsupportedMethodError,
        match="image-share needs prompt at the site 'attention', which transformers CLIPVisionModel",
    ):
        vtr.calibrate(tower, [text_only()], ImageShare())
    with pytest.raises(vtr.UnsupportedModelError, match="no adapter"):
        vtr.calibrate(torch.nn.Linear(2, 2), [text_only()], ImageShare())


def test_generators_are_refused():
    pytest.importorskip("diffusers")
    from vtr.testing.models.diffusion import CASES

    with pytest.raises(vtr.UnsupportedMethodError, match="image-share needs prompt"):
        vtr.calibrate(CASES["pixart"].build(), [text_only()], ImageShare())


def test_a_wrapped_model_is_refused(llava):
    model, batch = llava
    with vtr.apply(model, "fastv"), pytest.raises(ValueError, match="wrapped already"):
        vtr.calibrate(model, [batch], ImageShare())


def test_a_model_without_numbers_is_refused(llava):
    model, batch = llava
    bones = deepcopy(model).to("meta")
    with pytest.raises(vtr.UnsupportedModelError, match=r"q_proj\.weight is on the meta device"):
        vtr.calibrate(bones, [batch], ImageShare())


@pytest.mark.parametrize(
    ("table", "kind", "words"),
    [
        ({}, TypeError, "image-share: finish.. of its calibrator must return names and tensors"),
        ({"share": torch.tensor([1.0, torch.nan])}, ValueError, "the data gave NaN for 'share'"),
        ({"share": 5}, TypeError, "names and tensors, got {'share': 5}"),
    ],
)
def test_a_bad_table_is_named(llava, monkeypatch, table, kind, words):
    monkeypatch.setattr(Shares, "finish", lambda self: table)
    with pytest.raises(kind, match=words):
        vtr.calibrate(llava[0], [llava[1]], ImageShare())


# ---- plans are for one model --------------------------------------------------------------------


def test_a_calibrated_method_needs_its_plan(llava):
    with pytest.raises(
        vtr.UnsupportedMethodError,
        match=r"image-share needs numbers .* vtr\.calibrate\(model, batches, ImageShare\(.*\)\)",
    ):
        vtr.apply(llava[0], ImageShare())
    assert not vtr.handles(llava[0])


@dataclass(frozen=True, kw_only=True)
class Optional(ImageShare):
    """Works without a table too."""

    name: ClassVar[str] = "optional"

    def needs_table(self, info: vtr.ModelInfo) -> bool:
        return self.power > 1

    def attend(self, site: Any) -> torch.Tensor:
        return super().attend(site) if site.table else site.dense()


def test_a_method_may_do_without_its_table(llava):
    model, batch = llava
    with torch.no_grad():
        dense = model(**batch).logits
        with vtr.apply(model, Optional()):
            torch.testing.assert_close(model(**batch).logits, dense)
    with pytest.raises(vtr.UnsupportedMethodError, match="optional needs numbers"):
        vtr.apply(model, Optional(power=2.0))


def other_class(model: Any) -> Any:
    return model.model


def other_size(model: Any) -> Any:
    from transformers import LlavaConfig

    config = LlavaConfig.from_dict(model.config.to_dict())
    config.text_config.intermediate_size = 128
    return models.build(type(model), config)


def other_weight(model: Any) -> Any:
    changed = deepcopy(model)
    with torch.no_grad():
        changed.model.language_model.layers[-1].self_attn.q_proj.weight[3, 5] *= -1
    return changed


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (other_class, "class LlavaForConditionalGeneration, and this model is a LlavaModel"),
        (other_size, "text_config.intermediate_size is 96, and this model's is 128"),
        (other_weight, r"layers\.3\.self_attn\.q_proj\.weight has other numbers"),
    ],
)
def test_a_plan_for_another_model_is_refused(llava, changed, words):
    model, batch = llava
    plan = vtr.calibrate(model, [batch], ImageShare())
    other = changed(model)
    with pytest.raises(vtr.UnsupportedModelError, match=words):
        vtr.apply(other, plan)
    with pytest.raises(vtr.UnsupportedModelError, match=words):
        vtr.apply(other, (p for p in ["fastv", plan]))
    assert not vtr.handles(other)
    with vtr.apply(model, plan):
        pass


def test_a_checkpoint_without_weights_is_compared_by_its_sizes(llava):
    """`vtr eval` tries methods on a model without weights before it loads one."""
    model, batch = llava
    plan = vtr.calibrate(model, [batch], ImageShare())
    with vtr.apply(deepcopy(model).to("meta"), plan):
        pass
    with pytest.raises(vtr.UnsupportedModelError, match="intermediate_size"):
        vtr.apply(other_size(model).to("meta"), plan)


def test_the_bar_is_on_the_standard_error(llava, capsys):
    vtr.calibrate(llava[0], [llava[1]], ImageShare(), progress=True)
    assert capsys.readouterr().out == ""


def test_the_example_of_the_page_works(llava, monkeypatch, tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "calibration.md").read_text(encoding="utf-8")
    use, _encoder, _pipeline, own = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    registry.registry()
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    monkeypatch.setitem(sys.modules, "page", ModuleType("page"))
    names: dict[str, Any] = {"__name__": "page"}
    exec(compile(own, "docs/calibration.md", "exec", dont_inherit=True), names)
    model, batch = llava
    monkeypatch.chdir(tmp_path)
    model.generation_config.max_new_tokens = 2
    names |= {"model": model, "batches": [batch], "inputs": batch}
    exec(use.replace("vtr.SALE()", "ImageHeads(least=0.5)"), names)
    torch.testing.assert_close(names["plan"].tables[0]["share"], by_hand(model, [batch]))
