"""The built-in video models and their processors: a LLaVA-OneVision with the tower of the built-in
LLaVA, and a smaller one for 64 frames."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vtr.compat.transformers import from_config
from vtr.errors import missing
from vtr.zoo.clips import SECONDS
from vtr.zoo.data import GRID, IMAGE, MEAN, PATCH, STD
from vtr.zoo.llava import DIM
from vtr.zoo.video_questions import SPECIAL, VOCABULARY

if TYPE_CHECKING:
    from transformers import LlavaOnevisionForConditionalGeneration

PATCHES = GRID * GRID
SIDE = GRID // 2  # of a frame's grid after 2 x 2 pooling
PER_FRAME = SIDE * SIDE
TOKENS = SECONDS * PER_FRAME  # without the newline that ends a video
TOWER_LAYERS = 5  # those of the built-in LLaVA's tower that it reads
LANGUAGE_LAYERS = 5
WIDTH = 160
HEAD = 32

CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% if m['content'] is string %}USER: {{ m['content'] }} {% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'video' %}<video>"
    "{% elif c['type'] == 'image' %}<image>{% endif %}{% endfor %}"
    "USER: {% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }} {% endif %}{% endfor %}"
    "{% endif %}{% else %}ASSISTANT: {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endif %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """Sizes of a LLaVA-OneVision. Heads are 32 wide in the language model.

    Attributes:
        image, patch: pixels, side of a frame and of a patch.
        tower, tower_layers: width and depth of the CLIP tower, of 4 heads and with an MLP of three
            times its width.
        width, layers: of the Llama.
        mlp: width of its MLP.
        key_heads: number of its key-value heads.
        positions: longest prompt.
    """

    image: int
    patch: int
    tower: int
    tower_layers: int
    width: int
    layers: int
    mlp: int
    key_heads: int
    positions: int

    @property
    def grid(self) -> int:
        """Patches along a side of a frame."""
        return self.image // self.patch


CLIPS = Shape(IMAGE, PATCH, DIM, TOWER_LAYERS, WIDTH, LANGUAGE_LAYERS, 400, 5, 1024)
"""``digits-video``: 36 tokens for a frame of 96 pixels, 2.4 M parameters."""
SLIDES = Shape(32, 4, 64, 4, 128, 4, 224, 2, 2048)
"""``digits-long``: 16 tokens for a frame of 32 pixels, 0.75 M parameters."""


def build(attention: str = "sdpa", shape: Shape = CLIPS) -> LlavaOnevisionForConditionalGeneration:
    """Build a randomly initialised LLaVA-OneVision.

    Raises:
        MissingDependencyError: transformers is not installed.
    """
    try:
        from transformers import (
            CLIPVisionConfig,
            LlamaConfig,
            LlavaOnevisionConfig,
            LlavaOnevisionForConditionalGeneration,
        )
    except ImportError as error:
        raise missing("transformers", "vlm", "the built-in video model") from error
    vision = CLIPVisionConfig(
        hidden_size=shape.tower,
        intermediate_size=3 * shape.tower,
        num_hidden_layers=shape.tower_layers,
        num_attention_heads=4,
        hidden_act="gelu",
        image_size=shape.image,
        patch_size=shape.patch,
        projection_dim=shape.tower,
    )
    language = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=shape.width,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.width // HEAD,
        num_key_value_heads=shape.key_heads,
        max_position_embeddings=shape.positions,
        bos_token_id=VOCABULARY["<s>"],
        eos_token_id=VOCABULARY["</s>"],
        pad_token_id=VOCABULARY["<pad>"],
        tie_word_embeddings=True,
    )
    config = LlavaOnevisionConfig(
        vision_config=vision,
        text_config=language,
        image_token_index=VOCABULARY["<image>"],
        video_token_index=VOCABULARY["<video>"],
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_grid_pinpoints=[[shape.image, shape.image]],
        tie_word_embeddings=True,
    )
    return from_config(LlavaOnevisionForConditionalGeneration, config, attention)


def processor(shape: Shape = CLIPS) -> Any:
    """Build a real ``LlavaOnevisionProcessor`` for frames of a model's size: image and video processors, a word-level
    tokenizer, a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
        PreTrainedTokenizerFast,
    )

    words = Tokenizer(models.WordLevel(dict(VOCABULARY), unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Split("?", "isolated"),
            pre_tokenizers.Split(",", "isolated"),
        ]
    )
    pad, bos, eos, unknown, image, video = SPECIAL
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        unk_token=unknown,
        additional_special_tokens=[image, video],
        padding_side="left",
    )
    looks = {
        "size": {"height": shape.image, "width": shape.image},
        "image_mean": [MEAN] * 3,
        "image_std": [STD] * 3,
    }
    return LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(
            image_grid_pinpoints=[[shape.image, shape.image]], **looks
        ),
        tokenizer=tokenizer,
        video_processor=LlavaOnevisionVideoProcessor(**looks),
        num_image_tokens=shape.grid**2 + 1,  # with the class token, which "default" takes off again
        vision_feature_select_strategy="default",
        chat_template=CHAT,
        image_token=image,
        video_token=video,
    )


def tower_from_llava(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tower of the built-in LLaVA, by the names that the tower's own module has, without the last
    layer, whose output LLaVA does not read."""
    out = {}
    for key, value in weights.items():
        name = key.rpartition("vision_tower.")[2].removeprefix("vision_model.")
        if "vision_tower." in key and f"layers.{TOWER_LAYERS}." not in name:
            out[name] = value.float()
    return out


def features(tower: Any, frames: Tensor) -> Tensor:
    """Patch features that the projector reads: ``(n, 3, 96, 96)`` -> ``(n, 144, 128)`` in the model of
    :data:`CLIPS`."""
    return tower(frames, output_hidden_states=True).hidden_states[-1][:, 1:]


def pool_order(shape: Shape = CLIPS) -> Tensor:
    """Patches of every pooled token, ``(36, 4)`` int64 in the model of :data:`CLIPS`."""
    side = shape.grid // 2
    index = torch.arange(shape.grid**2).view(side, 2, side, 2)
    return index.permute(0, 2, 1, 3).reshape(side**2, 4)
