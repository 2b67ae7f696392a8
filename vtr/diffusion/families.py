"""The families of diffusion transformers: their attention modules, and the order of their tokens.

A family reads its facts from the arguments of the transformer's forward call: the grid of tokens, the
place of the text, which text is padding, the timestep.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from vtr.diffusion import views
from vtr.diffusion.unet import unet_blocks
from vtr.diffusion.views import SequenceView


@dataclass(frozen=True)
class DiffusionFamily:
    """One family.

    Attributes:
        name: for messages.
        classes: the transformer classes of diffusers.
        blocks: names of the lists of blocks, in order; their layers are numbered like this. For a UNet the
            parts that hold its blocks.
        attention: names of a block's attention modules that see the image or video tokens.
        view: from the transformer and its bound arguments.
        mlp: name of a block's MLP on these tokens, None if it has none.
        cross: name of a block's cross-attention, if tokens can be merged around it.
        latents: the argument with the latents, one tensor or a list of one per sample.
        time: the argument with the timesteps.
        streams: the argument of a block with the tokens that it attends to, for the lists of blocks whose
            first argument is another.
        merges: the tokens of a block can be merged around its attention.
        rope: the processor's argument with rotary factors, if any.
        split_rope: it is a pair, for the image and for the text.
        joint: text is in the same sequence.
        text_first: before the image or video.
        rising: timesteps rise during a run.
        flipped: its pipelines give the transformer (1000 - timestep) / 1000.
        scale: the scheduler's timesteps over those that its pipelines give the transformer.
        masked: the attention function gets a mask, of the text's padding alone.
        loops: if the processor calls attention once per sample (with its valid text only), the part
            before the blocks whose first argument has a row for each sample, else "".
        video: it makes videos: several frames are moments, not reference images.
        unet: tokens exist at several resolutions, each block has its own grid, and ``view`` gives that
            of the latents.
    """

    name: str
    classes: tuple[str, ...]
    blocks: tuple[str, ...]
    view: Callable[[Any, dict[str, Any]], SequenceView]
    attention: tuple[str, ...] = ("attn1",)
    mlp: str | None = None
    cross: str | None = None
    latents: str = "hidden_states"
    time: str = "timestep"
    streams: tuple[tuple[str, str], ...] = ()
    merges: bool = True
    rope: str | None = None
    split_rope: bool = False
    joint: bool = False
    text_first: bool = False
    rising: bool = False
    flipped: bool = False
    scale: float = 1.0
    masked: bool = False
    loops: str = ""
    video: bool = False
    unet: bool = False


def blocks_of(family: DiffusionFamily, model: Any) -> list[nn.Module]:
    """The blocks of a transformer, in order."""
    return [block for _, block in _blocks(family, model)]


def _blocks(family: DiffusionFamily, model: Any) -> Iterator[tuple[str, nn.Module]]:
    if family.unet:
        yield from (("", found.block) for found in unet_blocks(model))
        return
    for name in family.blocks:
        held: Any = model
        for part in name.split("."):
            held = getattr(held, part)
        yield from ((name, block) for block in held)


def stream_of(family: DiffusionFamily, model: Any, number: int) -> str:
    """The argument of a block with the tokens that it attends to; "" is its first."""
    name = [name for name, _ in _blocks(family, model)][number]
    return dict(family.streams).get(name, "")


def layers_of(family: DiffusionFamily, model: Any) -> list[tuple[int, nn.Module]]:
    """The attention modules in order, each with the number of its block."""
    return [
        (number, module)
        for number, block in enumerate(blocks_of(family, model))
        for name in family.attention
        if (module := getattr(block, name, None)) is not None
    ]


_BLOCKS = ("transformer_blocks",)
_DUAL_SINGLE = ("transformer_blocks", "single_transformer_blocks")

FAMILIES = (
    DiffusionFamily(
        "Wan", ("WanTransformer3DModel", "ChronoEditTransformer3DModel"), ("blocks",), views.latent,
        mlp="ffn", rope="rotary_emb", video=True,
    ),
    DiffusionFamily(
        "Wan-VACE", ("WanVACETransformer3DModel",), ("blocks", "vace_blocks"), views.latent, mlp="ffn",
        rope="rotary_emb", video=True, streams=(("vace_blocks", "control_hidden_states"),),
    ),
    DiffusionFamily(
        "Wan-Animate", ("WanAnimateTransformer3DModel",), ("blocks",), views.latent, mlp="ffn",
        rope="rotary_emb", video=True,
    ),
    DiffusionFamily(
        "SkyReels-V2", ("SkyReelsV2Transformer3DModel",), ("blocks",), views.skyreels, mlp="ffn",
        rope="rotary_emb", video=True,
    ),
    DiffusionFamily(
        "HunyuanVideo", ("HunyuanVideoTransformer3DModel",), _DUAL_SINGLE, views.hunyuan_video,
        attention=("attn",), rope="image_rotary_emb", joint=True, masked=True, video=True,
    ),
    DiffusionFamily(
        "HunyuanVideo-1.5", ("HunyuanVideo15Transformer3DModel",), _BLOCKS, views.hunyuan_video_15,
        attention=("attn",), mlp="ff", rope="image_rotary_emb", joint=True, masked=True, video=True,
    ),
    DiffusionFamily(
        "FramePack", ("HunyuanVideoFramepackTransformer3DModel",), _DUAL_SINGLE, views.framepack,
        attention=("attn",), rope="image_rotary_emb", joint=True, masked=True, merges=False,
        video=True,
    ),
    DiffusionFamily(
        "CogVideoX", ("CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel"), _BLOCKS,
        views.cogvideox, mlp="ff", rope="image_rotary_emb", joint=True, text_first=True, video=True,
    ),
    DiffusionFamily(
        "EasyAnimate", ("EasyAnimateTransformer3DModel",), _BLOCKS, views.latent,
        rope="image_rotary_emb", joint=True, text_first=True, video=True,
    ),
    DiffusionFamily(
        "Mochi", ("MochiTransformer3DModel",), _BLOCKS, views.latent, mlp="ff",
        rope="image_rotary_emb", joint=True, rising=True, loops="time_embed", video=True,
    ),
    DiffusionFamily(
        "LTX-Video", ("LTXVideoTransformer3DModel",), _BLOCKS, views.ltx, mlp="ff",
        rope="image_rotary_emb", video=True,
    ),
    DiffusionFamily(
        "LTX-2", ("LTX2VideoTransformer3DModel",), _BLOCKS, views.ltx, mlp="ff",
        rope="query_rotary_emb", video=True,
    ),
    DiffusionFamily(
        "Cosmos", ("CosmosTransformer3DModel",), _BLOCKS, views.latent, mlp="ff",
        rope="image_rotary_emb", video=True,
    ),
    DiffusionFamily(
        "Kandinsky-5", ("Kandinsky5Transformer3DModel",), ("visual_transformer_blocks",),
        views.kandinsky, attention=("self_attention",), mlp="feed_forward", rope="rotary_emb",
        video=True,
    ),
    DiffusionFamily(
        "Flux",
        ("FluxTransformer2DModel", "OvisImageTransformer2DModel", "LongCatImageTransformer2DModel"),
        _DUAL_SINGLE, views.flux, attention=("attn",), rope="image_rotary_emb", joint=True,
        text_first=True, scale=1000.0,
    ),
    DiffusionFamily(
        "Flux.2", ("Flux2Transformer2DModel",), _DUAL_SINGLE, views.flux, attention=("attn",),
        rope="image_rotary_emb", joint=True, text_first=True, scale=1000.0,
    ),
    DiffusionFamily(
        "Flux.3", ("Flux3Transformer2DModel",), ("mode_blocks.image", "single_transformer_blocks"),
        views.flux3, attention=("attn",), rope="image_rotary_emb", joint=True, text_first=True,
        scale=1000.0,
    ),
    DiffusionFamily(
        "Chroma", ("ChromaTransformer2DModel",), _DUAL_SINGLE, views.chroma, attention=("attn",),
        rope="image_rotary_emb", joint=True, text_first=True, masked=True, scale=1000.0,
    ),
    DiffusionFamily(
        "Krea-2", ("Krea2Transformer2DModel",), _BLOCKS, views.krea, attention=("attn",), mlp="ff",
        rope="image_rotary_emb", joint=True, text_first=True, masked=True, scale=1000.0,
    ),
    DiffusionFamily(
        "Qwen-Image", ("QwenImageTransformer2DModel",), _BLOCKS, views.qwen, attention=("attn",),
        mlp="img_mlp", rope="image_rotary_emb", split_rope=True, joint=True, text_first=True, masked=True,
        scale=1000.0,
    ),
    DiffusionFamily(
        "Z-Image", ("ZImageTransformer2DModel",), ("layers",), views.z_image, attention=("attention",),
        mlp="feed_forward", latents="x", time="t", rope="freqs_cis", joint=True, flipped=True,
        masked=True,
    ),
    DiffusionFamily(
        "Lumina-2", ("Lumina2Transformer2DModel",), ("layers",), views.lumina, attention=("attn",),
        mlp="feed_forward", rope="image_rotary_emb", joint=True, text_first=True, flipped=True,
    ),
    DiffusionFamily(
        "HunyuanImage", ("HunyuanImageTransformer2DModel",), _DUAL_SINGLE, views.hunyuan_image,
        attention=("attn",), rope="image_rotary_emb", joint=True, masked=True,
    ),
    DiffusionFamily(
        "CogView4", ("CogView4Transformer2DModel",), _BLOCKS, views.image, rope="image_rotary_emb",
        joint=True, text_first=True,
    ),
    DiffusionFamily(
        "CogView3-Plus", ("CogView3PlusTransformer2DModel",), _BLOCKS, views.image, mlp="ff",
        joint=True, text_first=True,
    ),
    DiffusionFamily(
        "AuraFlow", ("AuraFlowTransformer2DModel",),
        ("joint_transformer_blocks", "single_transformer_blocks"), views.image, attention=("attn",),
        mlp="ff", joint=True, text_first=True, scale=1000.0,
    ),
    DiffusionFamily(
        "SD3", ("SD3Transformer2DModel",), _BLOCKS, views.image, attention=("attn", "attn2"), mlp="ff",
        joint=True,
    ),
    DiffusionFamily("PixArt", ("PixArtTransformer2DModel",), _BLOCKS, views.image, mlp="ff"),
    DiffusionFamily("DiT", ("DiTTransformer2DModel",), _BLOCKS, views.image, mlp="ff"),
    DiffusionFamily(
        "HunyuanDiT", ("HunyuanDiT2DModel",), ("blocks",), views.image, mlp="ff",
        rope="image_rotary_emb",
    ),
    DiffusionFamily(
        "UNet", ("UNet2DConditionModel",), ("down_blocks", "mid_block", "up_blocks"), views.unet,
        mlp="ff", cross="attn2", latents="sample", unet=True,
    ),
)  # fmt: skip

_LINEAR = "its attention is linear: there is no map to thin out"
_CONVOLUTIONS = "it has no transformer blocks: its attention is a layer between convolutions"
_MOVING = "its blocks attend within a frame, and others along time"
_PART = "it is a part of a UNet: wrap the UNet or its pipeline"
_SOUND = "it makes sound: its tokens are a line of time and no grid"
_CACHED = "its queries attend to keys and values of a cache beside their own, under a mask of the library's "

# Transformers of diffusers that cannot work, and why.
REFUSED = {
    "SanaTransformer2DModel": _LINEAR,
    "SanaVideoTransformer3DModel": _LINEAR,
    "SanaWMTransformer3DModel": "most of its layers are recurrent: they have no map to thin out",
    "OmniGenTransformer2DModel": "text and images are one sequence of a language model, under a mask "
    "that is causal for the text",
    "Cosmos3OmniTransformer": "text, images and sound are one sequence of a language model, causal for "
    "the text",
    "AnyFlowFARTransformer3DModel": "frames come one after the other, under a causal mask of "
    "flex attention",
    "GlmImageTransformer2DModel": _CACHED + "condition images",
    "QwenImage21Transformer2DModel": _CACHED + "text and images",
    "WanAnimate2Transformer3DModel": _CACHED + "reference video",
    "Ideogram4Transformer2DModel": "samples are packed into one sequence, under a mask of their segments",
    "Kandinsky6SRTransformer3DModel": "its own attention is sparse, with tokens in tiles",
    "PRXTransformer2DModel": "queries are those of the image, keys also those of the text: a "
    "mask of the sequence is not square",
    "LatteTransformer3DModel": "it attends within a frame, and then within a place of all frames: what "
    "a sparse mask would leave is little",
    "DreamLiteTransformer2DModel": _PART,
    "DualTransformer2DModel": _PART,
    "MotionAdapter": _PART,
    "Transformer2DModel": _PART,
    "TransformerTemporalModel": _PART,
    "PriorTransformer": "it makes an embedding: its tokens are no grid",
    "RFD4ProteinaTransformer": "it makes proteins: its tokens are no grid",
    "AceStepTransformer1DModel": _SOUND,
    "LongCatAudioDiTTransformer": _SOUND,
    "MiniMaxMusic3RVQDepthDecoder": _SOUND,
    "MiniMaxMusic3Transformer1DModel": _SOUND,
    "StableAudio3DiTModel": _SOUND,
    "StableAudioDiTModel": _SOUND,
    "T5FilmDecoder": _SOUND,
    "I2VGenXLUNet": _MOVING,
    "UNet1DModel": _SOUND,
    "UNet2DModel": _CONVOLUTIONS,
    "UNet3DConditionModel": _MOVING,
    "UNetMotionModel": _MOVING,
    "UNetSpatioTemporalConditionModel": _MOVING,
}

# Those that might become a family: nobody has written their entry.
LATER = frozenset(
    {
        "AllegroTransformer3DModel",
        "AnyFlowTransformer3DModel",
        "BriaTransformer2DModel",
        "BriaFiboTransformer2DModel",
        "BriaFibo2Transformer2DModel",
        "DreamLiteUNetModel",
        "ErnieImageTransformer2DModel",
        "HeliosTransformer3DModel",
        "HiDreamImageTransformer2DModel",
        "JoyImageEditTransformer3DModel",
        "JoyImageEditPlusTransformer3DModel",
        "Kandinsky3UNet",
        "Kandinsky6Transformer3DModel",
        "LuminaNextDiT2DModel",
        "MiniMaxH3Transformer3DModel",
        "MotifVideoTransformer3DModel",
        "NucleusMoEImageTransformer2DModel",
        "SanaWMLTX2RefinerTransformer3DModel",
        "StableCascadeUNet",
        "UVit2DModel",
    }
)


def family_of(model: Any) -> DiffusionFamily | None:
    """The family of a transformer, by the name of its class or of one it derives from; None for a class of diffusers
    that is refused, or not wrapped yet, though it derives from a wrapped one."""
    for cls in type(model).__mro__:
        if cls.__name__ in REFUSED or cls.__name__ in LATER:
            return None
        for family in FAMILIES:
            if cls.__name__ in family.classes and cls.__module__.startswith("diffusers."):
                return family
    return None


def refusal_of(model: Any) -> str:
    """Return the reason why a model of diffusers is not supported, or ''."""
    for cls in type(model).__mro__:
        if cls.__name__ in REFUSED:
            return REFUSED[cls.__name__]
        if cls.__name__ in LATER:
            return "it is not wrapped yet"
    return ""
