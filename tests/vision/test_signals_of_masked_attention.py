"""What methods see of an attention that adds a mask or relative positions is what the block computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vtr
from tests.tiny import images, spread, vit
from tests.vision import timm_models, towers
from vtr.core.method import Method, Reduction
from vtr.core.site import ModelInfo, Site
from vtr.methods.flowcut import flow_scores

SEEN: dict[int, tuple[Tensor, Tensor, Tensor]] = {}


@dataclass(frozen=True)
class Look(vtr.Random):
    """Random cuts, behind which it looks at the attention."""

    needs: ClassVar = {"encoder": frozenset({"queries", "keys", "values"})}

    def requirements(self, info: ModelInfo) -> dict[str, frozenset[str]]:
        return dict(self.needs)

    def reduce(self, site: Site) -> Reduction | None:
        row = site.cls_attention() if site.info.has_cls else torch.zeros(0)
        SEEN[site.layer] = row, site.attention_received(chunk=7), flow_scores(site)[0]
        return super().reduce(site)


@contextmanager
def attention_maps() -> Iterator[list[Tensor]]:
    """The logits (B, H, T, T) of every attention that runs."""
    functions: Any = F
    native, caught = functions.scaled_dot_product_attention, []

    def attend(
        q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, *more: Any, **options: Any
    ) -> Tensor:
        logits = q @ k.transpose(-2, -1) * (options.get("scale") or q.shape[-1] ** -0.5)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            logits = logits.masked_fill(~attn_mask, -float("inf"))
        elif attn_mask is not None:
            logits = logits + attn_mask
        caught.append(logits)
        return native(q, k, v, attn_mask, *more, **options)

    functions.scaled_dot_product_attention = attend
    try:
        yield caught
    finally:
        functions.scaled_dot_product_attention = native


def holes(prefix: int = 1) -> Tensor:
    """(65, 65) bool, a mask of each query's own; every token sees itself and the class token."""
    seen = torch.rand(64 + prefix, 64 + prefix, generator=torch.Generator().manual_seed(1)) < 0.7
    seen[:, :prefix] = True
    return seen | torch.eye(64 + prefix, dtype=torch.bool)


def additive(seen: Tensor) -> Tensor:
    return torch.zeros(seen.shape).masked_fill(~seen, -float("inf"))


def timm_model(name: str, **more: Any) -> Callable[[], tuple[Any, Any]]:
    def make() -> tuple[Any, Any]:
        model = timm_models.build(name, more)
        return model, model.forward_features

    return make


def masked_vit(mask: Tensor) -> Callable[[], tuple[Any, Any]]:
    def make() -> tuple[Any, Any]:
        model = vit(depth=4)
        return model, lambda x: model.forward_features(x, attn_mask=mask)

    return make


def padded_vit() -> tuple[Any, Any]:
    model = towers.build("vit")
    mask = torch.ones(2, 65, dtype=torch.long)
    mask[0, 40:], mask[1, 10:20] = 0, 0
    return model, lambda x: model(x[..., :32, :32], attention_mask=mask)


def masked_clip() -> tuple[Any, Any]:
    tower: Any = spread(
        open_clip.transformer.VisionTransformer(
            image_size=64, patch_size=8, width=48, layers=4, heads=3, mlp_ratio=2.0
        )
    )
    hidden = ~holes()

    def call(x: Tensor) -> Any:
        hooks = [
            block.register_forward_pre_hook(
                lambda m, a, k: (a, {**k, "attn_mask": GIVEN[0]}), with_kwargs=True
            )
            for block in tower.transformer.resblocks
        ]
        GIVEN[0] = hidden
        out = tower(x)
        for hook in hooks:
            hook.remove()
        return out

    return tower, call


GIVEN: list[Any] = [None]

CASES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "beit": timm_model("beit_base_patch16_224"),
    "beit-shared": timm_model(
        "beit_base_patch16_224", use_shared_rel_pos_bias=True, use_rel_pos_bias=False
    ),
    "relpos-cls": timm_model("vit_relpos_base_patch16_cls_224"),
    "relpos-shared": timm_model("vit_srelpos_small_patch16_224"),
    "bool": masked_vit(holes()),
    "additive": masked_vit(additive(holes())[None, None].expand(2, 1, -1, -1)),
    "keys": masked_vit(holes()[None, None, :1]),
    "transformers": padded_vit,
    "open-clip": masked_clip,
}


@pytest.mark.parametrize("name", CASES)
def test_signals_are_those_of_the_attention(name: str) -> None:
    model, call = CASES[name]()
    SEEN.clear()
    with vtr.apply(model, Look(keep=(40, 11), layers=(0, 2), seed=3)) as handle:
        p, has_cls = handle._wrapping.info.prefix, handle._wrapping.info.has_cls
        with attention_maps() as caught, torch.no_grad():
            call(images())
    for layer in (0, 2):
        logits = caught[layer]
        attention = logits.softmax(-1)
        row, received, inflow = SEEN[layer]
        rows = attention[:, :, p:, p:].mean(1)
        assert received.shape[1] == (64, 40)[layer // 2]
        torch.testing.assert_close(received, rows.mean(1), atol=1e-6, rtol=1e-4)
        first = attention[:, :, 0] if has_cls else logits[:, :, p:].mean(2).softmax(-1)
        first = first[..., p:].mean(1)
        if has_cls:
            torch.testing.assert_close(row, first, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(inflow, first / first.sum(1, keepdim=True), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    "method",
    [
        vtr.CLSAttention(keep=20, layers=(1, 3), ensemble=2),
        vtr.EViT(keep=20, fuse=False),
        vtr.FlowCut(keep=20),
        vtr.ToFe(keep=20, final_rejoin=False),
    ],
    ids=lambda m: m.name,
)
def test_tokens_hidden_from_the_class_token_are_not_chosen(method: Method) -> None:
    model, seen = vit(), torch.ones(65, dtype=torch.bool)
    seen[30:] = False
    with vtr.apply(model, method) as handle, torch.no_grad():
        model.forward_features(images(), attn_mask=seen.expand(2, 1, 65, 65))
        for record in handle.trace.stages:
            gone = record.total.source < 0
            hidden, visible = gone[:, 29:].all(1), gone[:, :29].any(1)
            assert bool((hidden | ~visible).all())  # none that is seen goes before one that is not
        kept = handle.trace.kept
    assert kept is not None
    assert kept.shape[1] == 20
    assert int(kept.max()) < 29


def test_the_mean_query_sees_what_some_query_sees() -> None:
    """Two images in one sequence, which do not see each other, and a tail that nothing sees."""
    model = vit(depth=4, class_token=False, global_pool="avg")
    part = torch.arange(64) // 25
    seen = (part[:, None] == part) & (part < 2)
    seen[part == 2, 0] = True  # no row may be empty
    SEEN.clear()
    for dtype in (torch.float32, torch.float16):
        lowest = torch.full((64, 64), torch.finfo(dtype).min).masked_fill(seen, 0.0)
        for mask in (seen, additive(seen).to(dtype), lowest.to(dtype)):
            with vtr.apply(model.to(dtype), Look(keep=40, layers=(0,))), torch.no_grad():
                model.forward_features(images().to(dtype), attn_mask=mask)
            inflow = SEEN[0][2]
            assert bool((inflow[:, :50] > 1e-6).all())
            assert float(inflow[:, 50:].abs().max()) == 0.0
            assert float(inflow[:, :50].std()) > 1e-4  # logits were not lost in the mask
