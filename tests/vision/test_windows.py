"""Encoders with windows: Swin and Swin V2 against blocks that compute everything, and SAM against loops."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import transformers as hf
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import vtr
from tests.tiny import ours
from vtr.core.window_site import WindowGrid
from vtr.testing.models import encoders
from vtr.testing.models.encoders import images, spread

SWIN = {"embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}


def pixels(high: int, wide: int, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(batch, 3, high, wide, generator=generator)


def features(out: Any) -> Tensor:
    if isinstance(out, Tensor):
        return out
    found: Tensor = out.last_hidden_state if getattr(out, "logits", None) is None else out.logits
    return found


# ---- the windows themselves ----------------------------------------------------------------------


@pytest.mark.parametrize("pads_first", [True, False])
@pytest.mark.parametrize("shift", [(0, 0), (2, 1)])
def test_joining_undoes_splitting(shift: tuple[int, int], pads_first: bool) -> None:
    windows = WindowGrid((10, 7), (4, 3), shift, pads_first)
    x = torch.arange(2 * 70 * 3.0).reshape(2, 10, 7, 3)
    pieces = windows.split(x)
    assert pieces.shape == (2, windows.number, windows.area, 3) == (2, 9, 12, 3)
    assert torch.equal(windows.join(pieces), x)
    real = windows.real(x.device)
    assert real is not None and int(real.sum()) == 70
    assert bool((pieces[:, ~real] == 0).all())
    places = windows.places(x.device)
    assert sorted(places.flatten().tolist()) == list(range(12 * 9))
    assert places[1].tolist() == [i * 9 + j for i in range(4) for j in range(3, 6)]


# ---- Swin ----------------------------------------------------------------------------------------


def swin(**more: Any) -> Any:
    return spread(hf.SwinModel(hf.SwinConfig(image_size=64, **{**SWIN, **more})))


def timm_swin(name: str, **more: Any) -> Any:
    return spread(timm.create_model(name, num_classes=0, **{**SWIN, "img_size": 64, **more}))


MODELS: dict[str, Callable[[], Any]] = {
    "swin": swin,
    "swin-positions": lambda: swin(use_absolute_embeddings=False, qkv_bias=False),
    "swin-eager": lambda: _eager(swin),
    "swinv2": lambda: spread(hf.Swinv2Model(hf.Swinv2Config(image_size=64, **SWIN))),
    "timm-swin": lambda: timm_swin("swin_tiny_patch4_window7_224", dynamic_img_size=True),
    "timm-swinv2": lambda: timm_swin("swinv2_tiny_window8_256", strict_img_size=False),
}


def _eager(make: Callable[[], Any]) -> Any:
    model = make()
    model.set_attn_implementation("eager")
    return model


def _put_back(kept: dict[int, Tensor], model: Any) -> list[Any]:
    """Hooks that let every block compute all windows, and then put the skipped ones back."""
    from vtr.core.wrapping import wrapping_of  # the geometry of each block, as its runner sees it

    handle = vtr.apply(model, vtr.SparseViT(0.5))
    wrapping: Any = wrapping_of(model)
    runners = list(wrapping.runners)
    handle.remove()

    def hook(layer: int) -> Any:
        def put(block: Any, args: Any, kwargs: Any, out: Any) -> Any:
            runner = runners[layer]
            windows = runner.windows(args[0], runner.named(args[1:], kwargs))
            after = out[0] if isinstance(out, tuple) else out
            shape = (len(after), *windows.grid, -1)
            ran = torch.zeros(len(after), windows.number, 1, 1, dtype=torch.bool)
            ran[torch.arange(len(after))[:, None], kept[layer]] = True
            pieces = [windows.split(x.reshape(shape)) for x in (after, args[0])]
            mixed = windows.join(torch.where(ran, *pieces)).reshape(after.shape)
            return (mixed, *out[1:]) if isinstance(out, tuple) else mixed

        return put

    return [
        runner.block.register_forward_hook(hook(i), with_kwargs=True)
        for i, runner in enumerate(runners)
        if i in kept
    ]


@pytest.mark.parametrize("size", [(64, 64), (52, 84)])
@pytest.mark.parametrize("name", MODELS)
def test_gathered_windows_are_dense_blocks_with_skipped_windows_put_back(
    name: str, size: tuple[int, int]
) -> None:
    """At a size that needs padding in both stages too (13 x 21 and 7 x 11 tokens)."""
    model, x = MODELS[name](), pixels(*size)
    with torch.no_grad():
        native = features(model(x))
        with vtr.apply(model, vtr.SparseViT((0.6, 0.3, 0.5, 0.5))) as handle:
            found = features(model(x))
            kept = {s.layer: s.map.kept for s in handle.trace.stages}
        assert set(kept) == {0, 1, 2, 3} and not torch.allclose(found, native, atol=1e-2)
        hooks = _put_back(kept, model)
        wanted = features(model(x))
        for hook in hooks:
            hook.remove()
        assert torch.equal(features(model(x)), native)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_flops_are_those_of_a_counter(name: str) -> None:
    model, x = MODELS[name](), pixels(52, 84, 1)

    def counted() -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(x)
        return counter.get_total_flops()

    whole = counted()
    with vtr.apply(model, vtr.SparseViT(0.4)) as handle:
        less = counted()
        dense, reduced = handle.report().flops["encoder"]
    assert reduced - dense == less - whole < 0


def test_a_small_map_makes_windows_smaller_for_good_as_without_a_method() -> None:
    """transformers' set_shift_and_window_size changes the layer when it sees a small map."""
    model, plain = swin(window_size=8), swin(window_size=8)
    small, large = pixels(64, 64), pixels(128, 128)
    with torch.no_grad(), vtr.apply(model, vtr.SparseViT((0.5, 1.0))) as handle:
        model(small)  # stage 2 has 8 x 8 tokens: one window without a shift
        assert handle.trace.tokens["windows"][3] == (1, 1)
        model(large)
        plain(small), plain(large)
        layers = [(m.encoder.layers[1].blocks[1]) for m in (model, plain)]
        assert [(x.window_size, x.shift_size) for x in layers] == [(8, 0), (8, 0)]
        handle.pause()
        assert torch.equal(features(model(large)), features(plain(large)))


@pytest.mark.parametrize("name", ["swin", "swinv2"])
def test_backbones_and_attentions(name: str) -> None:
    config = (hf.SwinConfig if name == "swin" else hf.Swinv2Config)(
        image_size=64, out_features=["stage1", "stage2"], **SWIN
    )
    cls = hf.SwinBackbone if name == "swin" else hf.Swinv2Backbone
    model, x = spread(cls(config)), pixels(64, 64)
    with torch.no_grad():
        native = [f.shape for f in model(x).feature_maps]
        with vtr.apply(model, vtr.SparseViT(0.5)) as handle:
            found = [f.shape for f in model(x).feature_maps]
        assert found == native and handle.trace.tokens["windows"][0] == (8, 8)
        tower = _eager(MODELS[name])
        with vtr.apply(tower, vtr.SparseViT(0.5)):
            maps = tower(x, output_attentions=True).attentions
    assert [m.shape[0] for m in maps] == [2 * 8, 2 * 2]  # of the windows that ran


def test_training_goes_through_the_windows_that_ran() -> None:
    model = swin(drop_path_rate=0.2, hidden_dropout_prob=0.1).train()
    with vtr.apply(model, vtr.SparseViT(0.5)):
        features(model(pixels(64, 64))).square().mean().backward()
    gradients = [p.grad for p in model.parameters()]
    assert all(g is not None and bool(g.isfinite().all()) for g in gradients)
    assert any(bool(g.any()) for g in gradients if g is not None)


@pytest.mark.parametrize("name", ["swin", "timm-swin"])
def test_checkpointing_is_refused(name: str) -> None:
    model = MODELS[name]().train()
    if name == "swin":
        model.gradient_checkpointing_enable()
    else:
        model.set_grad_checkpointing()
    with (
        vtr.apply(model, vtr.SparseViT(0.5)),
        pytest.raises(vtr.UnsupportedMethodError, match="activation checkpointing runs the blocks"),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        features(model(pixels(64, 64).requires_grad_())).sum().backward()


def test_a_block_alone_is_refused() -> None:
    model = swin()
    with (
        vtr.apply(model, vtr.SparseViT(0.5)),
        pytest.raises(RuntimeError, match="entered in the middle"),
    ):
        model.encoder.layers[1].blocks[0](torch.randn(1, 64, 48), (8, 8))


@pytest.mark.parametrize("name", ["timm_swin", "timm_sam"])
def test_an_exported_graph_chooses_for_other_images(name: str) -> None:
    model, x = getattr(encoders, name)(), images(2, 0, 80 if name == "timm_sam" else 56)
    method = vtr.Expedit(1, 9) if name == "timm_sam" else vtr.SparseViT(0.5)
    with torch.no_grad(), vtr.apply(model, method):
        graph = torch.export.export(model, (x,)).module()
        other = x.flip(-1)
        torch.testing.assert_close(graph(other), model(other), atol=1e-5, rtol=1e-5)


def test_a_timm_swin_inside_of_transformers() -> None:
    config = hf.TimmWrapperConfig(
        architecture="swin_tiny_patch4_window7_224", model_args={**SWIN, "img_size": 64}
    )
    model = hf.TimmWrapperModel(config).eval()
    with torch.no_grad(), vtr.apply(model, vtr.SparseViT(0.5)) as handle:
        model(pixels(64, 64))
    assert handle.trace.tokens["windows"][0] == (8, 8) and ours(model) == []


# ---- SAM -----------------------------------------------------------------------------------------


def sam(size: tuple[int, int] = (80, 80), **more: Any) -> Any:
    """An encoder without absolute positions, which takes a picture that is not square."""
    config = hf.SamVisionConfig(
        hidden_size=48, num_hidden_layers=5, num_attention_heads=3, mlp_dim=96, image_size=80,
        patch_size=8, window_size=4, global_attn_indexes=[2], output_channels=16, use_abs_pos=False,
        **more,
    )  # fmt: skip
    model: Any = spread(hf.SamVisionModel(config))
    model.vision_encoder.patch_embed.image_size = size
    return model


def by_hand(model: Any, x: Tensor, first: int, side: int, until: int | None) -> Tensor:
    """The encoder with clusters, window by window: rel. positions are resized by its own attention."""
    from vtr.methods.common.clusters import WindowClusters

    encoder = model.vision_encoder
    h = encoder.patch_embed(x)
    batch, high, wide, width = h.shape
    rows, columns = -(-high // 4), -(-wide // 4)
    found: list[Any] = []

    def windows(grid: Tensor, n: int) -> list[Tensor]:
        return [
            grid[:, r * n : r * n + n, c * n : c * n + n]
            for r in range(rows)
            for c in range(columns)
        ]

    def glued(parts: list[Tensor]) -> Tensor:
        lines = [torch.cat(parts[r * columns : (r + 1) * columns], 2) for r in range(rows)]
        return torch.cat(lines, 1)

    for i, layer in enumerate([*encoder.layers, None]):
        if found and (i == until or layer is None):
            parts = [
                f.restore(w.reshape(batch, -1, width)).reshape(batch, 4, 4, width)
                for f, w in zip(found, windows(h, side), strict=True)
            ]
            h, found = glued(parts)[:, :high, :wide], []
        if layer is None:
            break
        if i == first:
            padded = h.new_zeros(batch, rows * 4, columns * 4, width)
            padded[:, :high, :wide] = h
            for w in windows(padded, 4):
                one = WindowClusters(
                    w.reshape(batch, 1, 16, width), (4, 4), (side, side),
                    iterations=5, temperature=0.01, reach=2,
                )  # fmt: skip
                one.weigh(min(20, side * side), "sum")
                found.append(one)
            h = glued([f.centres.reshape(batch, side, side, width) for f in found])
        if not found:
            h = layer(h)
            continue
        given = layer.layer_norm1(h)
        if layer.window_size:
            given = glued([layer.attn(hidden_states=w)[0] for w in windows(given, side)])
        else:
            given = layer.attn(hidden_states=given)[0]
        h = h + given
        h = h + layer.mlp(layer.layer_norm2(h))
    return encoder.neck(h)


@pytest.mark.parametrize("until", [None, 4])
@pytest.mark.parametrize("size", [(80, 80), (72, 104)])
def test_sam_with_clusters_is_the_encoder_by_hand(size: tuple[int, int], until: int | None) -> None:
    """Also for a picture of 9 x 13 tokens, whose windows are padded to 12 x 16."""
    model, x = sam(size), pixels(*size)
    with torch.no_grad(), vtr.apply(model, vtr.Expedit(1, 9, until=until)) as handle:
        found = features(model(x))
        (stage,) = handle.trace.stages
    with torch.no_grad():
        torch.testing.assert_close(found, by_hand(model, x, 1, 3, until), atol=1e-4, rtol=1e-4)
    rows, columns = -(-size[0] // 32), -(-size[1] // 32)
    assert (stage.tokens_in, stage.tokens_out) == (rows * columns * 16, rows * columns * 9)
    assert stage.grid == (4 * rows, 4 * columns)
    tokens, small = size[0] * size[1] // 64, rows * columns * 9
    counts = [tokens, small, small, small, small if until is None else tokens]
    assert [handle.trace.tokens["windows"][i][0] for i in range(5)] == counts


def test_sam_has_the_flops_of_a_counter() -> None:
    model, x = sam((72, 104)), pixels(72, 104, 1)
    model.vision_encoder.config._attn_implementation = "sdpa"

    def counted() -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(x)
        return counter.get_total_flops()

    whole = counted()
    with vtr.apply(model, vtr.Expedit(1, 9)) as handle:
        less = counted()
        dense, reduced = handle.report().flops["encoder"]
    assert reduced - dense == less - whole < 0


def test_timm_sam_of_another_size() -> None:
    model = encoders.timm_sam()
    with torch.no_grad(), vtr.apply(model, vtr.Expedit(1, 9)) as handle:
        out = model.forward_features(images(2, 0, 80))
        assert out.shape == (2, 16, 10, 10)
        with pytest.raises(vtr.UnsupportedMethodError, match="forward_intermediates"):
            model.forward_intermediates(images(1, 0, 80))
    assert handle.removed
    assert len(model.forward_intermediates(images(1, 0, 80))[1]) == 4


def test_a_whole_sam_model_predicts_masks() -> None:
    vision = dict(
        hidden_size=48, num_hidden_layers=4, num_attention_heads=3, mlp_dim=96, image_size=64,
        patch_size=8, window_size=4, global_attn_indexes=[2], output_channels=32, num_pos_feats=16,
    )  # fmt: skip
    config = hf.SamConfig(
        vision_config=vision,
        prompt_encoder_config=dict(
            hidden_size=32, image_size=64, patch_size=8, mask_input_channels=4
        ),
        mask_decoder_config=dict(
            hidden_size=32,
            mlp_dim=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            iou_head_hidden_dim=32,
        ),
    )
    model, x = spread(hf.SamModel(config)), pixels(64, 64)
    points = torch.tensor([[[[20.0, 30.0]]], [[[40.0, 10.0]]]])
    with torch.no_grad():
        native = model(pixel_values=x, input_points=points)
        with vtr.apply(model, vtr.Expedit(1, 9)) as handle:
            found = model(pixel_values=x, input_points=points)
            assert handle.trace.stages[0].tokens_out == 4 * 9
            twin = copy.deepcopy(model)
        again = twin(pixel_values=x, input_points=points)
    assert found.pred_masks.shape == native.pred_masks.shape
    assert not torch.equal(found.pred_masks, native.pred_masks)
    assert torch.equal(again.pred_masks, found.pred_masks)


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "other", "reason"),
    [
        (encoders.swin, "vtr.SparseViT", "its windows need the full grid of tokens"),
        (encoders.swinv2, "vtr.SparseViT", "its windows need the full grid of tokens"),
        (encoders.timm_swin, "vtr.SparseViT", "its windows need the full grid of tokens"),
        (encoders.timm_swinv2, "vtr.SparseViT", "its windows need the full grid of tokens"),
        (encoders.sam, "vtr.Expedit", "2-D grids with windowed attention"),
        (encoders.timm_sam, "vtr.Expedit", "2-D grids with windowed attention"),
    ],
)
def test_methods_that_cut_tokens_are_refused(
    make: Callable[[], nn.Module], other: str, reason: str
) -> None:
    model = make()
    for name in ("tome", "evit", "random", "downsample"):
        with pytest.raises(vtr.UnsupportedMethodError, match=reason) as error:
            vtr.apply(model, name)
        assert other in str(error.value)
    assert ours(model) == []


def test_each_model_takes_its_own_kind_of_windows() -> None:
    swins = {s.name for s in vtr.supported(encoders.swin()) if s.supported}
    assert swins == {"sparsevit"}
    large = spread(
        hf.SamVisionModel(
            hf.SamVisionConfig(
                hidden_size=16, num_hidden_layers=2, num_attention_heads=1, image_size=112,
                patch_size=8, global_attn_indexes=[1],
            )
        )
    )  # fmt: skip
    assert {s.name for s in vtr.supported(large) if s.supported} == {"expedit"}
    with pytest.raises(
        vtr.UnsupportedMethodError, match="needs whole_windows at the site 'windows'"
    ):
        vtr.apply(large, vtr.SparseViT())
    with pytest.raises(
        vtr.UnsupportedMethodError, match="needs window_tokens at the site 'windows'"
    ):
        vtr.apply(encoders.swin(), vtr.Expedit())


SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "mlp_dim": 8}


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: hf.SamVisionModel(hf.SamVisionConfig(**SIZES, global_attn_indexes=[0])), "no windows"),
        (lambda: hf.SamHQVisionModel(hf.SamHQVisionConfig(**SIZES, global_attn_indexes=[0])), "mask decoder"),
        (lambda: hf.VitDetModel(hf.VitDetConfig(**{**SIZES, "mlp_ratio": 1})), "shown on SAM alone"),
        (lambda: hf.DonutSwinModel(hf.DonutSwinConfig(**SWIN)), "works on SwinModel"),
        (lambda: hf.Swin2SRModel(hf.Swin2SRConfig(embed_dim=8, depths=[1], num_heads=[1])), "super-resolution"),
        (lambda: timm.create_model("hieradet_small", embed_dim=8, num_heads=1, stages=(1, 1, 1, 1)), "SAM 2"),
        (lambda: timm.create_model("swinv2_cr_tiny_224", embed_dim=24), "works on SwinTransformer"),
        (lambda: timm.create_model("samvit_base_patch16", depth=1, global_attn_indexes=(0,)), "no windows"),
        (lambda: timm.create_model("samvit_base_patch16", depth=1, use_rope=True, use_rel_pos=False), "rotary"),
    ],
)  # fmt: skip
def test_their_relatives_are_refused_with_the_reason(make: Callable[[], Any], reason: str) -> None:
    with pytest.raises(vtr.UnsupportedModelError, match=reason):
        vtr.supported(make())
