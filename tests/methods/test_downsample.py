"""Smaller pictures: the grid, the cells, and that an encoder computes what it computes from a picture that
Pillow has resized."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from timm.layers import PatchEmbed
from torch import Tensor

import vtr
from tests.tiny import images, spread, vit
from tests.vision import timm_models
from vtr.errors import UnsupportedMethodError
from vtr.methods.downsample import cells, smaller

pytestmark = pytest.mark.usefixtures("without_gradients")
SIDE = st.integers(1, 30)


def pillow(pixels: Tensor, high: int, wide: int) -> Tensor:
    """(..., H, W) float pixels at another size."""
    planes = [
        np.asarray(Image.fromarray(x.numpy()).resize((wide, high), Image.Resampling.BICUBIC))
        for x in pixels.reshape(-1, *pixels.shape[-2:])
    ]
    return torch.from_numpy(np.stack(planes)).reshape(*pixels.shape[:-2], high, wide)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


# ---- the grid -------------------------------------------------------------------------------


@given(rows=SIDE, columns=SIDE, share=st.floats(0.001, 1.0))
def test_the_grid_is_the_largest_of_the_same_proportions(
    rows: int, columns: int, share: float
) -> None:
    """By trying every scale at which one of the two numbers changes."""
    most = max(1, int(share * rows * columns))
    scales = {Fraction(i, n) for n in (rows, columns) for i in range(1, n + 1)}
    sizes = [(max(1, int(s * rows)), max(1, int(s * columns))) for s in scales]
    fits = [(a * b, a, b) for a, b in [(1, 1), *sizes] if a * b <= most]
    _, *best = max(fits)
    assert smaller((rows, columns), most) == tuple(best)


def test_published_factors_give_published_grids() -> None:
    """VTC-Bench divides both sides by 2, 3, 4, 5 and 10."""
    for factor in (2, 3, 4, 5, 10):
        most = -(-60 * 60 // factor**2)
        assert smaller((60, 60), most) == (60 // factor, 60 // factor)
    assert smaller((12, 12), 108) == (10, 10)
    assert smaller((9, 16), 36) == (4, 8)


@given(rows=SIDE, columns=SIDE, share=st.floats(0.001, 1.0))
def test_cells_cover_the_grid(rows: int, columns: int, share: float) -> None:
    grid = (rows, columns)
    small = smaller(grid, max(1, int(share * rows * columns)))
    kept, source = (x[0].tolist() for x in cells(grid, small, torch.device("cpu")))
    assert kept == sorted(set(kept)) and len(kept) == small[0] * small[1]
    assert [source[j] for j in kept] == list(range(len(kept)))
    for j, s in enumerate(source):
        for at, place, n, m in (
            (j // columns, s // small[1], rows, small[0]),
            (j % columns, s % small[1], columns, small[1]),
        ):
            assert place <= Fraction(at * m, n) < place + 1  # its upper left corner lies there


def test_options() -> None:
    assert vtr.Downsample(64).keep == 64 and vtr.create("downsample") == vtr.Downsample(keep=0.25)
    for keep in (0, 1.5, -1, True, "half", None):
        with pytest.raises(ValueError, match="keep must be an int"):
            vtr.Downsample(keep=keep)  # type: ignore[arg-type]


# ---- timm -----------------------------------------------------------------------------------

TIMM: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", {}),
    "oblong": ("vit_tiny_patch16_224", {"img_size": (48, 96)}),
    "registers": ("vit_tiny_patch16_224", {"reg_tokens": 3, "no_embed_class": True}),
    "mean": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
    "siglip": ("vit_base_patch16_siglip_224", {}),
}


@pytest.mark.parametrize("name", TIMM)
def test_timm_models_of_one_size(name: str) -> None:
    """As the same model made with dynamic_img_size=True, which timm runs at any size."""
    kind, more = TIMM[name]
    model = timm_models.build(kind, more)
    twin = timm_models.build(kind, {**more, "dynamic_img_size": True})
    twin.load_state_dict(model.state_dict())
    high, wide = model.patch_embed.img_size
    x = torch.randn(2, 3, high, wide)
    want = twin(pillow(x, high // 2, wide // 2))
    native = model(x)
    with vtr.apply(model, vtr.Downsample(keep=0.25)) as handle:
        close(model(x), want)
        (stage,) = handle.trace.stages
        dense, reduced = handle.report().flops["encoder"]
        with pytest.raises(ValueError, match="dynamic_img_size=True"):
            model(x[..., :-8])
    rows, columns = high // 8, wide // 8
    assert (stage.site, stage.layer, stage.grid) == ("image", 0, (rows, columns))
    assert (stage.tokens_in, stage.tokens_out) == (rows * columns, rows * columns // 4)
    assert 3.5 < dense / reduced < 8  # linear layers a quarter, attention a sixteenth
    assert torch.equal(model(x), native)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("eva02_tiny_patch14_224", {"dynamic_img_size": True}),
        ("vit_small_patch16_dinov3", {}),
        ("naflexvit_base_patch16_gap", {}),
    ],
)
def test_timm_models_of_any_size(name: str, more: dict[str, Any]) -> None:
    model = timm_models.build(name, more)
    x = images(2)
    for size in (64, 48):
        y = x[..., :size]
        want = model(pillow(y, 32, size // 2))
        with vtr.apply(model, vtr.Downsample(keep=0.25)):
            close(model(y), want)


def test_outputs_of_full_length_repeat_each_token_for_what_it_covers() -> None:
    model, twin, x = vit(), vit(dynamic_img_size=True), images()
    want = twin.forward_features(pillow(x, 32, 32))
    with vtr.apply(model, vtr.Downsample(keep=16), output="restored"):
        whole = model.forward_features(x)
    with vtr.apply(model, vtr.Downsample(keep=16)):
        (grid,) = model.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)
    close(whole[:, :1], want[:, :1])
    tokens = want[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    repeated = tokens.repeat_interleave(2, 2).repeat_interleave(2, 3)
    close(whole[:, 1:], repeated.flatten(2).transpose(1, 2))
    close(grid, repeated)


@pytest.mark.parametrize(
    "method",
    [vtr.EViT(keep=8, layers=(2,)), vtr.ToMe(r=2), vtr.ToFe(keep=(0.7, 0.6, 0.5))],
    ids=str,
)
def test_other_methods_see_the_smaller_picture(method: vtr.Method) -> None:
    model, twin, x = vit(), vit(dynamic_img_size=True), images()
    torch.manual_seed(1)
    with vtr.apply(twin, method) as alone:
        want = twin(pillow(x, 32, 32))
    torch.manual_seed(1)
    with vtr.apply(model, [vtr.Downsample(keep=16), method]) as handle:
        got = model(x)
    close(got, want)
    for ours, theirs in zip(handle.trace.stages[1:], alone.trace.stages, strict=True):
        assert torch.equal(ours.map.kept, theirs.map.kept)
        assert ours.total.n_in == 64 and ours.grid == (8, 8)
        fine = torch.tensor([(1 + 2 * (j // 4)) * 8 + 1 + 2 * (j % 4) for j in range(16)])
        assert torch.equal(ours.total.kept, fine[theirs.total.kept])


def test_it_compiles() -> None:
    model, x = vit(depth=2), images()
    with vtr.apply(model, vtr.Downsample(keep=16)):
        want = model(x)
        close(torch.compile(model, backend="eager")(x), want)


def test_gradients_reach_pixels_and_positions() -> None:
    model, x = vit(depth=1), images().requires_grad_()
    with torch.enable_grad(), vtr.apply(model, vtr.Downsample(keep=16)):
        model(x).square().sum().backward()
    assert x.grad is not None and x.grad.abs().min() > 0
    assert model.pos_embed.grad is not None and model.pos_embed.grad.abs().sum() > 0


def test_checkpointed_blocks_run_again_with_the_smaller_picture() -> None:
    found = []
    for again in (False, True):
        model, x = vit(depth=3), images()
        model.set_grad_checkpointing(again)
        model.train()
        both = [vtr.Downsample(keep=16), vtr.EViT(keep=8, layers=(1,))]
        with torch.enable_grad(), vtr.apply(model, both):
            model(x).square().sum().backward()
        found.append([p.grad for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        assert a is not None and b is not None
        close(a, b)


def test_two_smaller_pictures_are_refused() -> None:
    with pytest.raises(ValueError, match=r"both reduce at image\[0\]"):
        vtr.apply(vit(), [vtr.Downsample(), vtr.Downsample(keep=4)])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("beit_base_patch16_224", "a table for one grid"),
        ("vit_relpos_small_patch16_224", "a table for one grid"),
        ("eva02_tiny_patch14_224", "rotary positions are computed for one grid"),
    ],
)
def test_timm_models_that_take_one_size_alone_are_refused(name: str, reason: str) -> None:
    with pytest.raises(UnsupportedMethodError, match=reason):
        vtr.apply(timm_models.build(name), vtr.Downsample())


def test_patches_instead_of_images_are_refused() -> None:
    model = timm_models.build("naflexvit_base_patch16_gap")
    places = torch.stack(torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij"), -1)
    given = {
        "patches": torch.randn(1, 64, 192),
        "patch_coord": places.reshape(1, 64, 2),
        "patch_valid": torch.ones(1, 64, dtype=torch.bool),
    }
    model(given)
    with (
        vtr.apply(model, vtr.Downsample()),
        pytest.raises(UnsupportedMethodError, match="pass images"),
    ):
        model(given)


def test_patch_embeddings_that_are_no_plain_ones_are_refused() -> None:
    class Overlapping(PatchEmbed):
        """Of another kind, as far as anyone can tell."""

    model = vit()
    model.patch_embed = Overlapping(64, 8, 3, 48)
    with pytest.raises(UnsupportedMethodError, match="its patches come from a Overlapping"):
        vtr.apply(model, vtr.Downsample())


# ---- open_clip ------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["tok", "avg"])
def test_open_clip(pool: str) -> None:
    """As the tower made for smaller pictures, into which open_clip loads the weights."""
    open_clip = pytest.importorskip("open_clip")
    from open_clip.model import resize_pos_embed

    def tower(size: int) -> Any:
        settings = {"width": 48, "layers": 3, "head_width": 16, "patch_size": 8, "image_size": size}
        text = {"context_length": 6, "vocab_size": 40, "width": 32, "heads": 2, "layers": 1}
        return spread(open_clip.CLIP(24, {**settings, "pool_type": pool}, text))

    model, twin, x = tower(64), tower(32), images()
    weights = model.state_dict()
    resize_pos_embed(weights, twin)
    twin.load_state_dict(weights)
    native = model.encode_image(x)
    want = twin.encode_image(pillow(x, 32, 32))
    with vtr.apply(model, vtr.Downsample(keep=0.25)) as handle:
        close(model.encode_image(x), want)
        assert handle.trace.summary() == "image[0] downsample: 64 -> 16 tokens"
    with vtr.apply(model, vtr.Downsample(keep=1.0)):
        assert torch.equal(model.encode_image(x), native)
    with vtr.apply(model, [vtr.Downsample(keep=16), vtr.EViT(keep=8, layers=(1,))]) as handle:
        model.encode_image(x)
        assert handle.trace.tokens["encoder"] == {0: (16, 16), 1: (16, 9), 2: (9, 9)}


# ---- transformers ---------------------------------------------------------------------------


def towers() -> Any:
    pytest.importorskip("transformers")
    from tests.vision import towers

    return towers


NAMES = [
    *("clip", "clip-classes", "metaclip2", "siglip", "siglip-classes", "vit", "vit-classes"),
    *("deit-teacher", "ijepa-classes", "msn", "dinov2", "dinov2-classes", "registers", "dinov3"),
    "internvl",
]


@pytest.mark.parametrize("name", NAMES)
def test_transformers(name: str) -> None:
    """As the tower alone, asked to interpolate its positions where it does not do so by itself."""
    found = towers()
    model, x = found.build(name), found.pixels()
    hooks = [
        module.register_forward_pre_hook(
            lambda m, args, kwargs: (args, {**kwargs, "interpolate_pos_encoding": True}),
            with_kwargs=True,
        )
        for module in model.modules()
        if type(module).__name__.endswith("Embeddings")
        and "interpolate_pos_encoding" in type(module).forward.__code__.co_varnames
        and not type(module).__name__.endswith("PatchEmbeddings")
    ]
    want = found.result(model(pillow(x, 16, 16)))
    for hook in hooks:
        hook.remove()
    with vtr.apply(model, vtr.Downsample(keep=0.25)) as handle:
        close(found.result(model(pixel_values=x)), want)
        assert handle.trace.summary() == "image[0] downsample: 64 -> 16 tokens"


def test_feature_maps_of_a_backbone_have_the_size_of_the_picture() -> None:
    hf = pytest.importorskip("transformers")
    from tests.vision.towers import DINO, pixels

    config = hf.Dinov2Config(**DINO, out_features=["stage2", "stage4"])
    model, x = spread(hf.Dinov2Backbone(config)), pixels()
    small = model(pillow(x, 16, 16)).feature_maps
    with vtr.apply(model, vtr.Downsample(keep=16)):
        whole = model(x).feature_maps
    for a, b in zip(whole, small, strict=True):
        close(a, b.repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_what_transformers_cannot_make_smaller_is_refused_in_words() -> None:
    hf = pytest.importorskip("transformers")
    from tests.vision.towers import MLP, pixels

    config = {k: v for k, v in MLP.items() if k != "image_size"}
    model = spread(hf.Siglip2VisionModel(hf.Siglip2VisionConfig(**config, num_patches=64)))
    with pytest.raises(UnsupportedMethodError, match="max_num_patches"):
        vtr.apply(model, vtr.Downsample())
    model = spread(hf.ViTModel(hf.ViTConfig(**MLP), use_mask_token=True))
    with (
        vtr.apply(model, vtr.Downsample()),
        pytest.raises(UnsupportedMethodError, match="bool_masked_pos"),
    ):
        model(pixels(), bool_masked_pos=torch.zeros(2, 64, dtype=torch.bool))
