"""One graph of a wrapped encoder: it is right for other images and batches, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.models._features_fx import create_feature_extractor as timm_extractor
from torch import Tensor
from torch.export import Dim, export
from torchvision.models.feature_extraction import create_feature_extractor

import vtr
from tests.tiny import images, ours, spread, vit
from tests.vision import towers
from tests.vision.test_checkpointing import clip_tower
from vtr.core.method import Method

pytestmark = pytest.mark.filterwarnings("ignore")

METHODS: dict[str, Method] = {
    "evit": vtr.EViT(keep=0.6, layers=(1,)),
    "evit-drop": vtr.EViT(keep=0.6, layers=(1,), fuse=False),
    "tome": vtr.ToMe(r=6),
    "cls-attention": vtr.CLSAttention(keep=0.5, layers=(1,)),
    "random": vtr.Random(keep=0.5, layers=(1,), seed=0),
    "tofe": vtr.ToFe(keep=0.5, layers=(1, 2)),
    "tofe-trained": vtr.ToFe(keep=0.5, layers=(1, 2), trained=True),
}
VARYING: dict[str, Method] = {
    "flowcut": vtr.FlowCut(keep=0.4),
    "tofe-adaptive": vtr.ToFe(layers=(1, 2), trained=True, adaptive=True),
}
# name -> (encoder, size of its images)
MODELS: dict[str, tuple[Callable[[], Any], int]] = {
    "timm": (lambda: vit(depth=3, global_pool="avg"), 64),
    "transformers": (lambda: towers.build("clip"), 32),
    "open_clip": (lambda: clip_tower(layers=3).visual, 64),
}


def result(output: Any) -> Tensor:
    if isinstance(output, dict):
        output = output["last_hidden_state"]
    return output if isinstance(output, Tensor) else output[0]


def same(graph: Any, model: Any, size: int, batches: tuple[int, ...]) -> None:
    for batch in batches:
        x = images(batch, seed=batch + 5, size=size)
        torch.testing.assert_close(result(graph(x)), result(model(x)), atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("without_gradients")
@pytest.mark.parametrize(
    "name, kind",
    [*((name, "timm") for name in METHODS), ("tome", "transformers"), ("evit", "open_clip")],
)
def test_export_with_a_dynamic_batch(name: str, kind: str) -> None:
    make, size = MODELS[kind]
    model = make()
    x = images(2, size=size)
    with vtr.apply(model, METHODS[name]) as handle:
        spread(handle.modules)
        program = export(model, (x,), dynamic_shapes=({0: Dim("batch")},), strict=False)
        same(program.module(), model, size, (2, 5))
        want = result(model(x))
    torch.testing.assert_close(result(program.module()(x)), want)  # also without the handle
    assert ours(model) == []


@pytest.mark.usefixtures("without_gradients")
def test_strict_export() -> None:
    model = vit(depth=2)
    with vtr.apply(model, vtr.ToMe(r=6)):
        program = export(model, (images(),), dynamic_shapes=({0: Dim("batch")},), strict=True)
        same(program.module(), model, 64, (2, 40))  # more scores than one tile holds


@pytest.mark.usefixtures("without_gradients")
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", METHODS)
def test_jit_trace(name: str, kind: str) -> None:
    make, size = MODELS[kind]
    model = make()
    with vtr.apply(model, METHODS[name]) as handle:
        spread(handle.modules).requires_grad_(False)
        graph = torch.jit.trace(model, images(2, size=size), strict=False)
        same(graph, model, size, (2, 1, 40) if name == "tome" else (2, 1, 3))


@pytest.mark.usefixtures("without_gradients")
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", VARYING)
def test_numbers_that_depend_on_the_image_are_refused(name: str, kind: str) -> None:
    make, size = MODELS[kind]
    model, x = make(), images(2, size=size)
    with vtr.apply(model, VARYING[name]):
        with pytest.raises(vtr.UnsupportedMethodError, match=r"graph of torch\.export"):
            export(model, (x,), strict=False)
        with pytest.raises(vtr.UnsupportedMethodError, match=r"graph of torch\.jit\.trace"):
            torch.jit.trace(model, x, strict=False)
        model(x)
    with vtr.apply(model, VARYING[name]), pytest.raises(RuntimeError, match="cannot hold"):
        export(model, (x,), strict=True)


def test_modules_with_gradients_are_refused_by_jit_trace() -> None:
    model = vit(depth=3)
    with (
        vtr.apply(model, METHODS["tofe-trained"]),
        pytest.raises(vtr.UnsupportedMethodError, match=r"handle\.modules\.requires_grad_"),
    ):
        torch.jit.trace(model, images())


@pytest.mark.parametrize("method", ["evit", "tome", "flowcut", "random", "tofe", "cls-attention"])
@pytest.mark.parametrize("kind", ["timm", "timm-rope", "open_clip"])
def test_torch_fx_is_refused(kind: str, method: str) -> None:
    """Also by way of the feature extractions that are built on it."""
    rope = {"img_size": 64, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
    model = (
        timm.create_model("vit_small_patch16_rope_224", **rope)
        if kind == "timm-rope"
        else MODELS[kind][0]()
    ).eval()
    trace = torch.fx.symbolic_trace(model)
    names = [node.name for node in trace.graph.nodes if node.op == "call_module"]
    with vtr.apply(model, method):
        for make in (
            torch.fx.symbolic_trace,
            lambda m: create_feature_extractor(m, names[-1:]),
            lambda m: timm_extractor(m, names[-1:]),
        ):
            with pytest.raises(vtr.UnsupportedModelError, match=r"torch\.fx cannot trace"):
                make(model)
        with pytest.raises(vtr.UnsupportedModelError, match=r"torch\.jit\.script cannot compile"):
            torch.jit.script(model)
    assert ours(model) == []
    torch.fx.symbolic_trace(model)


def test_patched_functions_have_no_name() -> None:
    """As any object without one: what asks politely is not told of torch.jit.script."""
    model = vit(depth=2)
    with vtr.apply(model, "tome"):
        assert getattr(model.blocks[0].forward, "__name__", None) is None
        assert not hasattr(model.blocks[0].forward, "__wrapped__")
