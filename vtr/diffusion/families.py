"""The families of diffusion transformers: their attention modules, and the order of their tokens.

A family reads its facts from the arguments of the transformer's forward call: the grid of tokens, the
place of the text, which text is padding, the timestep.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Grid = tuple[int, int, int]


class SequenceView(NamedTuple):
    """The facts in the arguments of one forward call: ``grid`` (frames, height, width) in tokens, and
    ``text_valid`` (B, T) bool for joint text with padding, else None."""

    grid: Grid
    text_valid: Tensor | None = None


@dataclass(frozen=True)
class DiffusionFamily:
    """One family.

    Attributes:
        name: for messages.
        classes: the transformer classes of diffusers.
        blocks: names of the lists of blocks, in order.
        attention: names of a block's attention modules that see the image or video tokens.
        view: from the transformer and its bound arguments.
        mlp: name of a block's MLP on these tokens, None if it has none.
        rope: the processor's argument with rotary factors, if any.
        split_rope: it is a pair, for the image and for the text.
        joint: text is in the same sequence.
        text_first: before the image or video.
        rising: timesteps rise during a run.
        scale: the scheduler's timesteps over those that its pipelines give the transformer.
        masked: the attention function gets a mask, of the text's padding alone.
        loops: if the processor calls attention once per sample (with its valid text only), the part
            before the blocks whose first argument has a row for each sample, else "".
        video: it makes videos: several frames are moments, not reference images.
    """

    name: str
    classes: tuple[str, ...]
    blocks: tuple[str, ...]
    view: Callable[[Any, dict[str, Any]], SequenceView]
    attention: tuple[str, ...] = ("attn1",)
    mlp: str | None = None
    rope: str | None = None
    split_rope: bool = False
    joint: bool = False
    text_first: bool = False
    rising: bool = False
    scale: float = 1.0
    masked: bool = False
    loops: str = ""
    video: bool = False


def blocks_of(family: DiffusionFamily, model: Any) -> list[nn.Module]:
    """The blocks of a transformer, in order."""
    return [block for name in family.blocks for block in getattr(model, name)]


def layers_of(family: DiffusionFamily, model: Any) -> list[tuple[int, nn.Module]]:
    """The attention modules in order, each with the number of its block."""
    return [
        (number, module)
        for number, block in enumerate(blocks_of(family, model))
        for name in family.attention
        if (module := getattr(block, name, None)) is not None
    ]


def _grid(size: Sequence[int], patch: Sequence[int]) -> Grid:
    """Tokens of latents (frames, height, width) in patches."""
    if any(n % p for n, p in zip(size, patch, strict=True)):
        raise ValueError(
            f"latents of {size[0]} x {size[1]} x {size[2]} (frames, height, width) do not divide "
            f"into patches of {patch[0]} x {patch[1]} x {patch[2]}: choose a size or number of frames "
            "that does, as the pipeline's own defaults do"
        )
    frames, height, width = (n // p for n, p in zip(size, patch, strict=True))
    return frames, height, width


def _latent(model: Any, given: dict[str, Any]) -> SequenceView:
    """(B, C, F, H, W) and a patch size with or without time."""
    patch = model.config.patch_size
    if isinstance(patch, int):
        patch = (getattr(model.config, "patch_size_t", None) or 1, patch, patch)
    return SequenceView(_grid(given["hidden_states"].shape[-3:], patch))


def _hunyuan_video(model: Any, given: dict[str, Any]) -> SequenceView:
    mask = given["encoder_attention_mask"]
    # The model counts the valid tokens and takes that many from the start.
    count = mask.sum(1, dtype=torch.int64)
    valid = torch.arange(mask.shape[1], device=mask.device) < count[:, None]
    return SequenceView(_latent(model, given).grid, None if bool(valid.all()) else valid)


def _cogvideox(model: Any, given: dict[str, Any]) -> SequenceView:
    shape, side = given["hidden_states"].shape, model.config.patch_size
    return SequenceView(_grid((shape[1], *shape[3:]), (model.config.patch_size_t or 1, side, side)))


def _image(model: Any, given: dict[str, Any]) -> SequenceView:
    side = model.config.patch_size
    return SequenceView(_grid((1, *given["hidden_states"].shape[-2:]), (1, side, side)))


def _ltx(model: Any, given: dict[str, Any]) -> SequenceView:
    sizes = [given.get(name) for name in ("num_frames", "height", "width")]
    known = [int(n) for n in sizes if n is not None]
    if len(known) < 3:
        raise RuntimeError(
            "the LTX transformer was called without num_frames, height and width (conditions are "
            "packed with the video): the place of its tokens is not known; use LTXPipeline"
        )
    return SequenceView((known[0], known[1], known[2]))


def _flux(model: Any, given: dict[str, Any]) -> SequenceView:
    ids = given["img_ids"]
    ids = ids[0] if ids.ndim == 3 else ids
    frames, height, width = (int(n) + 1 for n in (ids.amax(0) - ids.amin(0)).tolist())
    if frames * height * width != ids.shape[0]:
        raise RuntimeError(
            f"img_ids names {ids.shape[0]} tokens that are no {frames} x {height} x {width} grid "
            "(images of several sizes in one sequence): attention over them cannot be thinned out"
        )
    return SequenceView((frames, height, width))


def _qwen(model: Any, given: dict[str, Any]) -> SequenceView:
    shapes = given["img_shapes"]
    images = [tuple(s) for s in (shapes[0] if isinstance(shapes[0], list) else [shapes[0]])]
    if len({(height, width) for _, height, width in images}) != 1:
        raise RuntimeError(
            f"images of several sizes {images} in one sequence: attention over them cannot be "
            "thinned out; give references of the size of the image"
        )
    frames = sum(int(n) for n, _, _ in images)
    mask = given.get("encoder_hidden_states_mask")
    valid = None if mask is None else mask.bool()
    if valid is not None and bool(valid.all()):
        valid = None
    return SequenceView((frames, int(images[0][1]), int(images[0][2])), valid)


_BLOCKS = ("transformer_blocks",)
_DUAL_SINGLE = ("transformer_blocks", "single_transformer_blocks")

FAMILIES = (
    DiffusionFamily(
        "Wan", ("WanTransformer3DModel",), ("blocks",), _latent, mlp="ffn", rope="rotary_emb",
        video=True,
    ),
    DiffusionFamily(
        "HunyuanVideo", ("HunyuanVideoTransformer3DModel",), _DUAL_SINGLE, _hunyuan_video,
        attention=("attn",), rope="image_rotary_emb", joint=True, masked=True, video=True,
    ),
    DiffusionFamily(
        "CogVideoX", ("CogVideoXTransformer3DModel",), _BLOCKS, _cogvideox, mlp="ff",
        rope="image_rotary_emb", joint=True, text_first=True, video=True,
    ),
    DiffusionFamily(
        "Mochi", ("MochiTransformer3DModel",), _BLOCKS, _latent, mlp="ff", rope="image_rotary_emb",
        joint=True, rising=True, loops="time_embed", video=True,
    ),
    DiffusionFamily(
        "LTX-Video", ("LTXVideoTransformer3DModel",), _BLOCKS, _ltx, mlp="ff",
        rope="image_rotary_emb", video=True,
    ),
    DiffusionFamily(
        "Flux", ("FluxTransformer2DModel",), _DUAL_SINGLE, _flux, attention=("attn",),
        rope="image_rotary_emb", joint=True, text_first=True, scale=1000.0,
    ),
    DiffusionFamily(
        "Qwen-Image", ("QwenImageTransformer2DModel",), _BLOCKS, _qwen, attention=("attn",),
        mlp="img_mlp", rope="image_rotary_emb", split_rope=True, joint=True, text_first=True, masked=True,
        scale=1000.0,
    ),
    DiffusionFamily(
        "SD3", ("SD3Transformer2DModel",), _BLOCKS, _image, attention=("attn", "attn2"), mlp="ff",
        joint=True,
    ),
    DiffusionFamily("PixArt", ("PixArtTransformer2DModel",), _BLOCKS, _image, mlp="ff"),
    DiffusionFamily("DiT", ("DiTTransformer2DModel",), _BLOCKS, _image, mlp="ff"),
    DiffusionFamily(
        "HunyuanDiT", ("HunyuanDiT2DModel",), ("blocks",), _image, mlp="ff",
        rope="image_rotary_emb",
    ),
)  # fmt: skip

_LINEAR = "its attention is linear: there is no map to thin out"
_UNET = "a UNet has no one grid of tokens; the adapters are for diffusion transformers"

# Transformers of diffusers that are near to a family, and why they are not of it.
REFUSED = {
    "HunyuanVideo15Transformer3DModel": "it attends under a token-level (N x N) mask of three "
    "texts of different padding",
    "HunyuanVideoFramepackTransformer3DModel": "packed frames of history in several resolutions "
    "are in front of the video, so that its tokens are no grid",
    "LTX2VideoTransformer3DModel": "its video and audio streams attend to each other in both ways",
    "WanVACETransformer3DModel": "its control blocks run beside the main blocks and are not "
    "numbered with them",
    "WanAnimateTransformer3DModel": "it puts reference and pose frames into the sequence",
    "SkyReelsV2Transformer3DModel": "each frame may have a own noise level, so that there is "
    "no step",
    "SanaTransformer2DModel": _LINEAR,
    "SanaVideoTransformer3DModel": _LINEAR,
    "UNet2DConditionModel": _UNET,
    "UNet2DModel": _UNET,
    "UNet3DConditionModel": _UNET,
    "UNetMotionModel": _UNET,
    "UNetSpatioTemporalConditionModel": _UNET,
}


def family_of(model: Any) -> DiffusionFamily | None:
    """The family of a transformer, by the name of its class or of one it derives from."""
    for cls in type(model).__mro__:
        for family in FAMILIES:
            if cls.__name__ in family.classes and cls.__module__.startswith("diffusers."):
                return family
    return None


def refusal_of(model: Any) -> str:
    """Return the reason why a model of diffusers is not supported, or ''."""
    for cls in type(model).__mro__:
        if cls.__name__ in REFUSED:
            return REFUSED[cls.__name__]
    return ""
