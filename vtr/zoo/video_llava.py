"""The built-in video model: a LLaVA-OneVision with the tower of the built-in LLaVA, and its
processor."""

from __future__ import annotations

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


def build(attention: str = "sdpa") -> LlavaOnevisionForConditionalGeneration:
    """A randomly initialised LLaVA-OneVision: CLIP tower of 5 layers of 128, Llama of 5 layers of
    160, 36 tokens for a frame of 96 pixels, 2.4 M parameters.

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
        hidden_size=DIM,
        intermediate_size=3 * DIM,
        num_hidden_layers=TOWER_LAYERS,
        num_attention_heads=4,
        hidden_act="gelu",
        image_size=IMAGE,
        patch_size=PATCH,
        projection_dim=DIM,
    )
    language = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=WIDTH,
        intermediate_size=400,
        num_hidden_layers=LANGUAGE_LAYERS,
        num_attention_heads=5,
        num_key_value_heads=5,
        max_position_embeddings=1024,
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
        image_grid_pinpoints=[[IMAGE, IMAGE]],
        tie_word_embeddings=True,
    )
    return from_config(LlavaOnevisionForConditionalGeneration, config, attention)


def processor() -> Any:
    """A real ``LlavaOnevisionProcessor`` at 96 pixels: image and video processors, a word-level
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
        "size": {"height": IMAGE, "width": IMAGE},
        "image_mean": [MEAN] * 3,
        "image_std": [STD] * 3,
    }
    return LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(
            image_grid_pinpoints=[[IMAGE, IMAGE]], **looks
        ),
        tokenizer=tokenizer,
        video_processor=LlavaOnevisionVideoProcessor(**looks),
        num_image_tokens=PATCHES + 1,  # with the class token, which "default" takes off again
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
    """Patch features that the projector reads: ``(n, 3, 96, 96)`` -> ``(n, 144, 128)``."""
    return tower(frames, output_hidden_states=True).hidden_states[-1][:, 1:]


def pool_order() -> Tensor:
    """Patches of every pooled token, ``(36, 4)`` int64: which patches make which token."""
    index = torch.arange(PATCHES).view(SIDE, 2, SIDE, 2)
    return index.permute(0, 2, 1, 3).reshape(PER_FRAME, 4)
