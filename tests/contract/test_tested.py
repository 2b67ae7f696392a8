"""The tested ranges: in one place, the same as in pyproject.toml, and said when a model is refused."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import vtr
from vtr.compat import tested
from vtr.compat.tested import TESTED, Library, advice, blaming, explain, numbers

pytestmark = pytest.mark.contract
PROJECT = Path(__file__).parents[2] / "pyproject.toml"
Pretend = Callable[[str, str], None]


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Pretend:
    """Pretends that another version of a package is installed."""
    real = tested.installed

    def go(package: str, version: str) -> None:
        monkeypatch.setattr(tested, "installed", lambda p: version if p == package else real(p))

    return go


def requirements() -> Iterator[tuple[str, str]]:
    """(name, bounds) of every requirement of the project and its extras."""
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    for line in (line for group in groups for line in group):
        found = re.match(r"([\w-]+)(?:\[[^]]*\])?([^;]*)", line)
        assert found is not None
        yield found[1], found[2].strip()


def test_bounds_of_the_project_are_the_tested_ranges() -> None:
    seen = set()
    for name, bounds in requirements():
        one = next((t for t in TESTED.values() if t.name == name), None)
        if one is None:
            continue
        seen.add(name)
        parts = dict(re.findall(r"(>=|<|==)\s*([\d.]+(?:b\d+)?)", bounds))
        if one.lowest == one.newest:
            assert parts == {"==": one.lowest}, f"{name}{bounds} is not {one.requirement}"
            continue
        got = numbers(parts.get(">=", "")), numbers(parts.get("<", ""))
        wanted = numbers(one.lowest), numbers(one.below)
        assert got == wanted, f"{name}{bounds} in pyproject.toml is not {one.requirement}"
    # triton comes with torch.
    assert seen == {t.name for t in TESTED.values()} - {"triton"}


def test_extras_install_what_they_are_named_for() -> None:
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    for one in TESTED.values():
        if one.extra:
            lines = project["optional-dependencies"][one.extra]
            assert any(re.match(rf"{one.name}\b", line) for line in lines), one


@pytest.mark.parametrize(
    ("version", "place"),
    [
        ("5.16.9", "older"),
        ("5.17", "tested"),
        ("5.17.0", "tested"),
        ("5.24.0", "tested"),
        ("5.24.3", "tested"),
        ("5.25.0.dev0", "newer"),  # it has the names of the next release
        ("5.25.0", "newer"),
        ("5.100", "newer"),
        ("6", "newer"),
    ],
)
def test_versions_are_placed(version: str, place: str) -> None:
    assert TESTED["transformers"].place(version) == place


def test_versions_with_other_parts() -> None:
    torch_ = TESTED["torch"]
    assert torch_.place("2.15.0+cu130") == torch_.place("2.11.0rc1") == "tested"
    assert TESTED["diffusers"].place("0.42.2") == "tested"  # mends, and changes nothing else
    assert TESTED["timm"].place("1.0.32") == "newer"
    assert numbers("1.0.0") == (1,) and numbers("unknown") == ()


def test_ranges_are_written_for_pip_and_for_people() -> None:
    one = Library("timm", "timm", "1.0.24", "1.0.31", "1.0.32")
    assert (one.versions, one.requirement) == ("1.0.24 to 1.0.31", "timm>=1.0.24,<1.0.32")
    one = TESTED["lmms_eval"]
    assert (one.versions, one.requirement) == ("0.7.3", "lmms-eval==0.7.3")


def test_problems_are_put_down_to_versions_that_were_not_tested(pretend: Pretend) -> None:
    problem = "LlamaDecoderLayer takes no cache or past_key_values"
    pretend("transformers", "5.25.0")
    assert explain("transformers", problem) == (
        "vtr was tested with transformers 5.17 to 5.24; 5.25.0 is installed and LlamaDecoderLayer "
        "takes no cache or past_key_values; install transformers>=5.17,<5.25 or upgrade vtr"
    )
    pretend("transformers", "5.3")
    assert explain("transformers", problem).endswith("; install transformers>=5.17,<5.25")
    pretend("transformers", "5.20.1")
    assert explain("transformers", problem) == problem
    assert explain("something else", problem) == problem
    assert advice("something else") == ""


def test_parts_that_are_not_found_are_put_down_to_the_version(pretend: Pretend) -> None:
    pretend("timm", "1.1.0")
    with (
        pytest.raises(vtr.UnsupportedModelError, match=r"timm 1\.0\.24 to 1\.0\.31; 1\.1\.0 is"),
        blaming("timm"),
    ):
        raise AttributeError("no blocks")
    with pytest.raises(ValueError), blaming("timm"):  # a mistake of the caller
        raise ValueError
    with pytest.raises(vtr.UnsupportedMethodError), blaming("timm"):
        raise vtr.UnsupportedMethodError("said already")
    pretend("timm", "1.0.30")
    with pytest.raises(AttributeError), blaming("timm"):
        raise AttributeError("no blocks")


# ---- models that are refused ----------------------------------------------------------------


@pytest.fixture
def llava() -> Any:
    pytest.importorskip("transformers")
    from tests.vision.vlm import models

    return models.llava(1)[0]


def _without_cache(self: Any, hidden_states: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
    """A layer of a version that calls its cache by another name."""
    return hidden_states


@pytest.mark.parametrize(("version", "says"), [("5.25.0", True), ("5.24.0", False)])
def test_layers_with_other_arguments(
    llava: Any, monkeypatch: pytest.MonkeyPatch, pretend: Pretend, version: str, says: bool
) -> None:
    pretend("transformers", version)
    layer = type(llava.model.language_model.layers[0])
    monkeypatch.setattr(layer, "forward", _without_cache)
    with pytest.raises(vtr.UnsupportedMethodError) as error:
        vtr.apply(llava, vtr.Random(keep=4, site="prompt"))
    message = str(error.value)
    assert "LlamaDecoderLayer takes no " in message and "cache or past_key_values" in message
    assert (
        "tested with transformers 5.17 to 5.24; 5.25.0 is installed and Llama" in message
    ) == says
    assert ("install transformers>=5.17,<5.25 or upgrade vtr" in message) == says
    assert ("5.17" in message) == says


def test_masks_that_are_made_otherwise(
    llava: Any, monkeypatch: pytest.MonkeyPatch, pretend: Pretend
) -> None:
    from transformers import masking_utils

    pretend("transformers", "5.25.0")
    monkeypatch.setattr(masking_utils, "create_causal_mask", lambda config, inputs: None)
    with pytest.raises(
        vtr.UnsupportedMethodError, match=r"create_causal_mask takes no layer_idx.*; in"
    ):
        vtr.apply(llava, vtr.Random(keep=4, site="prompt"))
    monkeypatch.delattr(masking_utils, "create_causal_mask")
    with pytest.raises(
        vtr.UnsupportedMethodError, match=r"masking_utils has no create_causal_mask"
    ):
        vtr.apply(llava, vtr.Random(keep=4, site="prompt"))


@pytest.mark.parametrize("name", ["_get_candidate_generator", "_valid_auto_compile_criteria"])
def test_generate_that_asks_for_other_names(
    llava: Any, monkeypatch: pytest.MonkeyPatch, pretend: Pretend, name: str
) -> None:
    """Without them answers would be wrong, and nothing would say so."""
    from transformers import GenerationMixin

    pretend("transformers", "5.25.0")
    monkeypatch.delattr(GenerationMixin, name)
    with pytest.raises(vtr.UnsupportedModelError, match=rf"5\.25\.0 is installed and .* no {name}"):
        vtr.apply(llava, vtr.Random(keep=4, site="prompt"))
    assert vtr.handles(llava) == []


def test_features_that_are_added_by_another_name(
    monkeypatch: pytest.MonkeyPatch, pretend: Pretend
) -> None:
    pytest.importorskip("transformers")
    from tests.vision.vlm import models

    model, _ = models.qwen3_vl(1)
    pretend("transformers", "5.25.0")
    monkeypatch.delattr(type(model.model.language_model), "_deepstack_process")
    with pytest.raises(
        vtr.UnsupportedModelError, match=r"and Qwen3VLTextModel has no _deepstack_pr"
    ):
        vtr.apply(model, vtr.Random(keep=4, site="prompt"))


def test_attention_that_is_laid_out_otherwise(llava: Any, pretend: Pretend) -> None:
    pretend("transformers", "5.25.0")
    for layer in llava.model.language_model.layers:
        layer.self_attn.value_projection = layer.self_attn.__dict__["_modules"].pop("v_proj")
    with pytest.raises(vtr.UnsupportedMethodError, match=r"tested with .* has no v_proj; install"):
        vtr.apply(llava, vtr.FastV(keep=4, layer=2))


def test_towers_that_are_laid_out_otherwise(pretend: Pretend) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16}
    tower = transformers.ViTModel(transformers.ViTConfig(**sizes, patch_size=4))
    pretend("transformers", "5.25.0")
    layer = tower.layers[0]
    layer.norm_before = layer._modules.pop("layernorm_before")
    with pytest.raises(
        vtr.UnsupportedModelError, match="and ViTLayer has no layernorm_before; ins"
    ):
        vtr.apply(tower, "evit")
    layer.layernorm_before = layer._modules.pop("norm_before")
    vtr.apply(tower, "evit").remove()

    class ViTBlock(type(layer)):  # type: ignore[misc]
        """What a later version may call it."""

    ViTBlock.__module__ = "transformers.models.vit.modeling_vit"
    layer.__class__ = ViTBlock
    with pytest.raises(
        vtr.UnsupportedModelError, match=r"5\.25\.0 is installed and a layer of ViTModel"
    ):
        vtr.apply(tower, "evit")
    tower.blocks = tower._modules.pop("layers")
    with pytest.raises(
        vtr.UnsupportedModelError, match=r"5\.25\.0 is installed and ViTModel has no lay"
    ):
        vtr.apply(tower, "evit")
    pretend("transformers", "5.24.0")
    with pytest.raises(vtr.UnsupportedModelError) as error:
        vtr.apply(tower, "evit")
    assert str(error.value) == "ViTModel has no layers"


def test_timm_models_that_are_laid_out_otherwise(pretend: Pretend) -> None:
    timm = pytest.importorskip("timm")
    from tests.vision.timm_models import SMALL

    model = timm.create_model("deit_tiny_patch16_224", **SMALL)
    model.layers = model._modules.pop("blocks")
    pretend("timm", "1.1.0")
    with pytest.raises(
        vtr.UnsupportedModelError, match=r"1\.1\.0 is installed and this failed: Attr"
    ):
        vtr.apply(model, "evit")
    pretend("timm", "1.0.31")
    with pytest.raises(AttributeError):
        vtr.apply(model, "evit")


def test_modules_of_a_library_that_are_gone(
    monkeypatch: pytest.MonkeyPatch, pretend: Pretend
) -> None:
    pytest.importorskip("timm")
    from vtr.compat.contract import required

    with pytest.raises(vtr.UnsupportedModelError) as error:
        required("timm.models.eva:EvaBlockOfTomorrow")
    wanted = "timm.models.eva has no EvaBlockOfTomorrow, which vtr needs for models of timm"
    assert str(error.value) == wanted
    pretend("timm", "1.1.0")
    with pytest.raises(
        vtr.UnsupportedModelError, match=f"1.1.0 is installed and {wanted}; install"
    ):
        required("timm.models.eva:EvaBlockOfTomorrow")


def test_open_clip_blocks_of_another_class(pretend: Pretend) -> None:
    pytest.importorskip("open_clip")
    from open_clip.model import CLIP
    from open_clip.transformer import ResidualAttentionBlock

    vision = {"image_size": 32, "patch_size": 8, "width": 48, "layers": 1, "head_width": 12}
    text = {"context_length": 8, "vocab_size": 40, "width": 32, "heads": 2, "layers": 1}
    tower = CLIP(24, vision, text).visual

    class Block(ResidualAttentionBlock):
        """What a later version may put there."""

    Block.__module__ = "open_clip.transformer"
    tower.transformer.resblocks[0].__class__ = Block
    pretend("open_clip", "3.9.0")
    with pytest.raises(
        vtr.UnsupportedModelError, match=r"with open_clip_torch 3\.2 to 3\.3; 3\.9\.0"
    ):
        vtr.apply(tower, "evit")
    Block.__module__ = "mine"  # the user's own: no version is to blame
    with pytest.raises(vtr.UnsupportedModelError, match=r"^a block of this open_clip tower"):
        vtr.apply(tower, "evit")


def test_processors_that_compute_attention_otherwise(
    monkeypatch: pytest.MonkeyPatch, pretend: Pretend
) -> None:
    pytest.importorskip("diffusers")
    from tests.diffusion.models import CASES

    model = CASES["pixart"].build()
    processor = type(model.transformer_blocks[0].attn1.processor)
    monkeypatch.setattr(processor, "__call__", lambda self, attn, hidden_states: hidden_states)
    pretend("diffusers", "0.43.0")
    with pytest.raises(
        vtr.UnsupportedModelError, match=r"0\.43\.0 is installed and the attention pro"
    ):
        vtr.apply(model, vtr.RandomSparse(density=0.5))
    pretend("diffusers", "0.42.0")
    with pytest.raises(vtr.UnsupportedModelError, match=r"^the attention processor"):
        vtr.apply(model, vtr.RandomSparse(density=0.5))


def test_classes_that_have_another_name(pretend: Pretend) -> None:
    pytest.importorskip("timm")
    model = torch.nn.Linear(2, 2)
    cls = type("VisionTransformer2", (torch.nn.Linear,), {})
    cls.__module__ = "timm.models.vision_transformer2"
    model.__class__ = cls
    pretend("timm", "1.1.0")
    with pytest.raises(
        vtr.UnsupportedModelError, match=r"no adapter .* 1\.1\.0 is installed; install"
    ):
        vtr.apply(model, "evit")
    pretend("timm", "1.0.31")
    with pytest.raises(vtr.UnsupportedModelError) as error:
        vtr.apply(model, "evit")
    assert "tested" not in str(error.value)
