"""Models inside of others: torch.compile, data parallelism and PEFT, given to ``vtr.apply`` as they are."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import vtr
from tests.diffusion.models import CASES
from tests.tiny import images, ours, spread, vit
from tests.vision import towers
from tests.vision.test_checkpointing import clip_tower
from tests.vision.vlm.models import FAMILIES

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module", autouse=True)
def _one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    place: Path = tmp_path_factory.mktemp("gloo") / "store"
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def _compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def llava() -> tuple[Any, dict[str, Any]]:
    model, inputs = FAMILIES["llava"](1)
    return model, {**inputs, "use_cache": False}


# name -> (the model and the arguments of a call, names of linear layers, a method)
MODELS: dict[str, tuple[Callable[[], tuple[Any, Any]], list[str], vtr.Method]] = {
    "timm": (lambda: (vit(depth=3), {"x": images()}), ["qkv", "fc1"], vtr.ToMe(r=6)),
    "transformers": (
        lambda: (towers.build("clip"), {"pixel_values": towers.pixels()}),
        ["q_proj", "v_proj", "fc2"],
        vtr.EViT(keep=0.6),
    ),
    "vlm": (llava, ["q_proj", "v_proj"], vtr.FastV(keep=2, layer=1)),
    "diffusers": (
        lambda: (CASES["wan"].build(), CASES["wan"].call()),
        ["to_q", "to_v"],
        vtr.OwnFrame(block=16),
    ),
}


def adapted(model: Any, names: list[str]) -> Any:
    torch.manual_seed(3)
    config = peft.LoraConfig(target_modules=names, r=2, init_lora_weights=False)
    return peft.get_peft_model(model, config).eval()


OUTER: dict[str, Callable[[Any, list[str]], Any]] = {
    "compiled": lambda model, _: torch.compile(model, backend="eager"),
    "ddp": lambda model, _: DistributedDataParallel(model),
    "peft": adapted,
    "all": lambda model, names: torch.compile(
        DistributedDataParallel(adapted(model, names)), backend="eager"
    ),
}


def result(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    for name in ("logits", "last_hidden_state", "sample"):
        if getattr(output, name, None) is not None:
            return getattr(output, name)
    return output[0]


@pytest.fixture
def without_compiling() -> Iterator[None]:
    """Compiled modules run as they are: what they compile to is the business of other tests."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.usefixtures("without_compiling")
@pytest.mark.parametrize("kind", OUTER)
@pytest.mark.parametrize("name", MODELS)
def test_the_outer_object_is_accepted(name: str, kind: str) -> None:
    """It computes what the model inside does with the method applied to it, and then what it did before."""
    make, layers, method = MODELS[name]
    model, inputs = make()
    twin = copy.deepcopy(model)
    outer = OUTER[kind](model, layers)
    reference = adapted(twin, layers).get_base_model() if kind in ("peft", "all") else twin
    keys = list(outer.state_dict())
    with torch.no_grad():
        dense = result(outer(**inputs))
        with vtr.apply(reference, method):
            want = result(reference(**inputs))
        assert vtr.supported(outer) == vtr.supported(model)
        with vtr.apply(outer, method) as handle:
            found = result(outer(**inputs))
            assert found.shape == want.shape
            torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)
            assert not (found.shape == dense.shape and torch.allclose(found, dense, atol=1e-4))
            assert list(outer.state_dict()) == keys
            assert handle.target is outer and handle.trace.batch
            for around in (outer, model):
                assert [h.methods for h in vtr.handles(around)] == [(method,)]
            handle.pause()
            assert torch.equal(result(outer(**inputs)), dense)
            handle.resume()
            torch.testing.assert_close(result(outer(**inputs)), found, atol=1e-5, rtol=1e-5)
        assert torch.equal(result(outer(**inputs)), dense)
    assert list(outer.state_dict()) == keys
    assert vtr.handles(outer) == [] and not any("vtr" in found for found in ours(model))


def test_a_model_that_was_compiled_before() -> None:
    """What had been compiled without the method is not run on."""
    model, x = vit(depth=2), images()
    outer = torch.compile(model, backend="eager")
    with torch.no_grad():
        dense = outer(x)
        with vtr.apply(outer, vtr.ToMe(r=6)) as handle:
            assert torch.equal(outer(x), model(x)) and handle.trace.stages
            assert not torch.equal(outer(x), dense)
        assert torch.equal(outer(x), dense)


def test_gradients_through_the_outer_object() -> None:
    """DDP gathers the gradients of adapters in a model that merges tokens."""
    grads = []
    for parallel in (False, True):
        model = adapted(vit(depth=3), ["qkv"]).train()
        outer = DistributedDataParallel(model) if parallel else model
        with vtr.apply(outer, vtr.ToMe(r=6)):
            outer(images()).square().sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    assert torch.equal(*grads) and bool(grads[0].any())


@pytest.mark.parametrize("name", ["timm", "transformers", "open_clip"])
def test_sharded_models(name: str) -> None:
    """``fully_shard`` gives every module a class of its own; blocks are opened as before."""
    make: Callable[[], Any] = {
        "timm": lambda: vit(depth=3),
        "transformers": lambda: towers.build("clip"),
        "open_clip": lambda: clip_tower().visual,
    }[name]
    x = images(2, size=32 if name == "transformers" else 64)
    model, plain = make(), make()
    mesh = init_device_mesh("cpu", (1,))
    path = {"timm": "blocks", "transformers": "encoder.layers"}.get(name, "transformer.resblocks")
    for block in model.get_submodule(path):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    keys = list(model.state_dict())
    assert [s.supported for s in vtr.supported(model)] == [
        s.supported for s in vtr.supported(plain)
    ]
    dense = result(model(x))
    for method in ("evit", vtr.ToMe(r=6)):
        with vtr.apply(plain, method):
            want = result(plain(x))
        with vtr.apply(model, method):
            found = result(model(x))
            torch.testing.assert_close(found, want)
            found.sum().backward()
        assert torch.equal(result(model(x)), dense) and list(model.state_dict()) == keys


@pytest.mark.usefixtures("without_compiling")
def test_a_profile_of_the_model_inside() -> None:
    outer = torch.compile(DistributedDataParallel(vit(depth=2)), backend="eager")
    found = vtr.profile(outer, images(), "evit", repeats=1)
    assert found.model == "VisionTransformer"
    assert found.rows[1].flops < found.rows[0].flops


def test_tuners_and_other_kinds_of_adapters() -> None:
    for config in (
        peft.LNTuningConfig(target_modules=["norm1"]),
        peft.IA3Config(target_modules=["qkv"], feedforward_modules=[]),
    ):
        outer = peft.get_peft_model(vit(depth=2), config)
        with vtr.apply(outer.base_model, "tome") as handle, torch.no_grad():
            outer(images())
            assert handle.trace.stages
    mixed = peft.PeftMixedModel(vit(depth=2), peft.LoraConfig(target_modules=["qkv"]))
    with vtr.apply(mixed, "tome") as handle, torch.no_grad():
        mixed(images())
        assert handle.trace.stages


def test_an_outer_object_around_something_else() -> None:
    for outer in (
        torch.compile(nn.Linear(2, 2)),
        DistributedDataParallel(nn.Linear(2, 2)),
        peft.get_peft_model(nn.Sequential(nn.Linear(2, 2)), peft.LoraConfig(target_modules=["0"])),
    ):
        with pytest.raises(vtr.UnsupportedModelError, match="no adapter for"):
            vtr.apply(outer, "evit")
    holder = nn.ModuleDict({"tower": DistributedDataParallel(spread(vit(depth=2)))})
    with pytest.raises(vtr.UnsupportedModelError, match=r"Its part tower"):
        vtr.apply(holder, "evit")
