"""timm's families: pruned physically is masked as keys; masks and grids of the caller."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import vtr
from tests.tiny import images, vit
from tests.vision.timm_models import build, works
from vtr.core.method import Method


@contextmanager
def block_inputs(model: Any) -> Iterator[list[tuple[Tensor, dict[str, Any]]]]:
    caught: list[tuple[Tensor, dict[str, Any]]] = []
    hooks = [
        b.register_forward_pre_hook(lambda m, a, k: caught.append((a[0], k)), with_kwargs=True)
        for b in model.blocks
    ]
    yield caught
    for hook in hooks:
        hook.remove()


def masked_reference(model: Any, x: Tensor, alive: list[Tensor]) -> Tensor:
    """The model's own blocks on the full sequence; ``alive[i]`` (B, T) are the keys of block i."""
    with torch.no_grad(), block_inputs(model) as caught:
        model.forward_features(x)
    h = caught[0][0]
    for block, (_, kwargs), keys in zip(model.blocks, caught, alive, strict=True):
        bias = torch.zeros(keys.shape).masked_fill(~keys, -float("inf"))[:, None, None, :]
        kwargs = dict(kwargs)
        undo: Callable[[], None] | None = None
        if "shared_rel_pos_bias" in kwargs:
            shared = kwargs["shared_rel_pos_bias"]
            kwargs["shared_rel_pos_bias"] = bias if shared is None else shared + bias
        elif getattr(getattr(block, "attn", None), "rel_pos", None) is not None:
            own = block.attn.rel_pos.get_bias()
            block.attn.rel_pos.get_bias = lambda own=own, bias=bias: own + bias
            undo = lambda block=block: block.attn.rel_pos.__dict__.pop("get_bias")  # noqa: E731
        elif "shared_rel_pos" in kwargs:
            kwargs["shared_rel_pos"] = kwargs["shared_rel_pos"] + bias
        else:
            kwargs["attn_mask"] = bias.expand(-1, -1, keys.shape[1], -1)
        with torch.no_grad():
            h = block(h, **kwargs)
        if undo is not None:
            undo()
    return model.norm(h)


MASKED = [
    ("deit_tiny_patch16_224", {}),
    ("deit_tiny_distilled_patch16_224", {}),
    ("vit_base_patch14_reg4_dinov2", {}),
    ("vit_base_patch16_rpn_224", {}),
    ("vit_base_patch16_siglip_gap_224", {}),
    ("vit_dlittle_patch16_reg1_gap_256", {}),
    ("vit_base_patch16_xp_224", {}),
    ("vit_small_patch16_dinov3", {}),
    ("eva02_tiny_patch14_224", {}),
    ("vit_small_patch16_rope_mixed_224", {}),
    ("vit_pe_core_tiny_patch16_384", {}),
    ("vit_base_patch16_sapiens2", {"num_kv_heads": (1, 3, 1, 3)}),
    ("beit_base_patch16_224", {}),
    ("beit_base_patch16_224", {"use_shared_rel_pos_bias": True, "use_rel_pos_bias": False}),
    ("vit_relpos_base_patch16_cls_224", {}),
    ("vit_srelpos_small_patch16_224", {}),
    ("naflexvit_base_patch16_gap", {}),
    ("naflexvit_base_patch16_gap", {"rope_type": "axial"}),
    ("naflexvit_base_patch16_gap", {"rope_type": "mixed"}),
]


@pytest.mark.parametrize(("name", "more"), MASKED, ids=str)
def test_pruning_equals_masking_the_dropped_keys(name: str, more: dict[str, Any]) -> None:
    model, x = build(name, more), images()
    method: Method
    if "cls-attention" in works(model):
        method = vtr.CLSAttention(keep=(30, 11), layers=(0, 2))
    else:
        method = vtr.Random(keep=(30, 11), layers=(0, 2), seed=4)
    with vtr.apply(model, method) as handle, torch.no_grad():
        short = model.forward_features(x)
    prefix = model.num_prefix_tokens
    alive = [torch.ones(2, 64 + prefix, dtype=torch.bool)]
    for layer in range(3):
        keys = alive[-1]
        for record in handle.trace.stages:
            if record.layer == layer:
                keys = record.total.with_prefix(prefix).source >= 0
        alive.append(keys)
    full = masked_reference(model, x, alive)
    whole = handle.trace.stages[-1].total.with_prefix(prefix)
    assert whole.n_out == 11 + prefix
    torch.testing.assert_close(short, whole.gather(full), atol=2e-4, rtol=2e-4)


def test_a_mask_given_by_the_caller_is_narrowed() -> None:
    model, x = vit(), images()
    mask = torch.rand(65, 65) < 0.7
    mask |= torch.eye(65, dtype=torch.bool)
    with vtr.apply(model, vtr.Random(keep=20, layers=(0,), seed=2)) as handle, torch.no_grad():
        short = model.forward_features(x, attn_mask=mask)
    alive = handle.trace.stages[0].total.with_prefix(1).source >= 0
    with torch.no_grad(), block_inputs(model) as caught:
        model.forward_features(x, attn_mask=mask)
    h = caught[0][0]
    with torch.no_grad():
        for i, block in enumerate(model.blocks):
            h = block(h, attn_mask=mask if i == 0 else (mask[None] & alive[:, None, :])[:, None])
    whole = handle.trace.stages[0].total.with_prefix(1)
    # A row whose keys are all masked is undefined; none is here, as each token sees itself.
    torch.testing.assert_close(short, whole.gather(model.norm(h)), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("shape", [(16, 64), (24, 16), (32, 32)])
def test_the_grid_is_that_of_the_image(shape: tuple[int, int]) -> None:
    """16 tokens of a 2 x 8 image are no 4 x 4 grid."""
    model = build("vit_tiny_patch16_224", {"dynamic_img_size": True})
    with vtr.apply(model, vtr.Random(keep=2)) as handle:
        model(torch.randn(1, 3, *shape))
        assert handle.trace.stages[0].grid == (shape[0] // 8, shape[1] // 8)


def test_a_naflex_grid_is_never_guessed() -> None:
    model = build("naflexvit_base_patch16_gap")
    with vtr.apply(model, vtr.Random(keep=2)) as handle:
        model(torch.randn(1, 3, 16, 64))
        assert handle.trace.stages[0].grid == (2, 8)
        y, x = torch.meshgrid(torch.arange(2), torch.arange(8), indexing="ij")
        coord = torch.stack([y, x], -1).reshape(1, 16, 2)
        valid = torch.ones(1, 16, dtype=torch.bool)
        model(torch.randn(1, 16, 8 * 8 * 3), patch_coord=coord, patch_valid=valid)
        assert handle.trace.stages[0].grid is None


def test_naflex_dictionaries() -> None:
    model = build("naflexvit_base_patch16_gap")
    patches = torch.randn(2, 12, 8 * 8 * 3)
    coord = torch.stack(torch.meshgrid(torch.arange(3), torch.arange(4), indexing="ij"), -1)
    inputs = {
        "patches": patches,
        "patch_coord": coord.reshape(1, 12, 2).expand(2, -1, -1),
        "patch_valid": torch.ones(2, 12, dtype=torch.bool),
    }
    with torch.no_grad():
        dense = model(inputs)
        with vtr.apply(model, vtr.ToMe(keep=1.0)):
            torch.testing.assert_close(model(inputs), dense, atol=1e-5, rtol=1e-5)
        with vtr.apply(model, vtr.ToMe(r=1)) as handle:
            assert model(inputs).isfinite().all()
            assert handle.trace.stages[-1].tokens_out == 8
            inputs["patch_valid"][1, 9:] = False
            with pytest.raises(vtr.UnsupportedMethodError, match="padded patches"):
                model(inputs)
            with pytest.raises(vtr.UnsupportedMethodError, match="padded patches"):
                model.forward_features(*inputs.values())
            with pytest.raises(vtr.UnsupportedMethodError, match="padded patches"):
                model.forward_intermediates(inputs, output_fmt="NLC")
            by_place = (None, False, False, False, "NLC", False, False, *list(inputs.values())[1:])
            with pytest.raises(vtr.UnsupportedMethodError, match="padded patches"):
                model.forward_intermediates(patches, *by_place)


def test_naflex_intermediates_of_another_image() -> None:
    model = build("naflexvit_base_patch16_gap")
    with torch.no_grad(), vtr.apply(model, vtr.Random(keep=2)) as handle:
        model(torch.randn(1, 3, 32, 32))
        assert handle.trace.stages[0].grid == (4, 4)
        maps = model.forward_intermediates(torch.randn(1, 3, 16, 64), intermediates_only=True)
        assert maps[-1].shape[-2:] == handle.trace.stages[0].grid == (2, 8)
