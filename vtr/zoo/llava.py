"""The built-in LLaVA: its architecture, its processor, and its tower made from the built-in ViT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vtr.compat.transformers import from_config
from vtr.errors import missing
from vtr.zoo.data import GRID, IMAGE, MEAN, PATCH, STD
from vtr.zoo.questions import SPECIAL, VOCABULARY

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

PATCHES = GRID * GRID
DIM, TOWER_LAYERS = 128, 6

CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% if m['content'] is string %}USER: {{ m['content'] }} {% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% endif %}{% endfor %}"
    "USER: {% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }} {% endif %}{% endfor %}"
    "{% endif %}{% else %}ASSISTANT: {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endif %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def build(attention: str = "sdpa") -> LlavaForConditionalGeneration:
    """A randomly initialised LLaVA: CLIP tower of 6 layers of 128 (features of the last but one),
    Llama of 4 layers of 160, 144 visual tokens, 2.3 M parameters.

    Raises:
        MissingDependencyError: transformers is not installed.
    """
    return word_llava(
        VOCABULARY,
        "the built-in LLaVA",
        vision={
            "hidden_size": DIM,
            "num_hidden_layers": TOWER_LAYERS,
            "image_size": IMAGE,
            "patch_size": PATCH,
        },
        language={
            "hidden_size": 160,
            "intermediate_size": 400,
            "num_hidden_layers": 4,
            "num_attention_heads": 5,
            "num_key_value_heads": 5,
            "max_position_embeddings": 512,
        },
        layer=-2,
        attention=attention,
    )


def word_llava(
    vocabulary: Mapping[str, int],
    name: str,
    *,
    vision: Mapping[str, int],
    language: Mapping[str, int],
    layer: int,
    attention: str,
) -> LlavaForConditionalGeneration:
    """Build a randomly initialised LLaVA of a CLIP tower and a Llama with tied embeddings.

    Args:
        name: of the model, for the error.
        vision, language: sizes, as their configurations name them.
        layer: of the tower, whose features the language model gets.

    Raises:
        MissingDependencyError: transformers is not installed.
    """
    try:
        from transformers import (
            CLIPVisionConfig,
            LlamaConfig,
            LlavaConfig,
            LlavaForConditionalGeneration,
        )
    except ImportError as error:
        raise missing("transformers", "vlm", name) from error
    width, words = vision["hidden_size"], dict(vocabulary)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            intermediate_size=3 * width,
            num_attention_heads=4,
            hidden_act="gelu",
            projection_dim=width,
            **vision,
        ),
        text_config=LlamaConfig(
            vocab_size=len(words),
            bos_token_id=words["<s>"],
            eos_token_id=words["</s>"],
            pad_token_id=words["<pad>"],
            tie_word_embeddings=True,
            **language,
        ),
        image_token_index=words["<image>"],
        vision_feature_layer=layer,
        vision_feature_select_strategy="default",
        image_seq_length=(vision["image_size"] // vision["patch_size"]) ** 2,
        tie_word_embeddings=True,
    )
    return from_config(LlavaForConditionalGeneration, config, attention)


def processor() -> Any:
    """A real ``LlavaProcessor``: CLIP's image processor at 96 pixels, a word-level tokenizer, a chat
    template."""
    return word_processor(VOCABULARY, SPECIAL, CHAT, IMAGE, PATCH)


def word_processor(
    vocabulary: Mapping[str, int], special: Sequence[str], chat: str, image: int, patch: int
) -> Any:
    """Build a real ``LlavaProcessor`` with a word-level tokenizer.

    Args:
        special: padding, first, last, unknown and image token.
        chat: the chat template.
        image, patch: pixels of the sides of a picture and of a patch.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel(dict(vocabulary), unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("?", "isolated")]
    )
    pad, bos, eos, unknown, picture = special
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        unk_token=unknown,
        additional_special_tokens=[picture],
        padding_side="left",
    )
    images = CLIPImageProcessor(
        size={"height": image, "width": image},
        do_center_crop=False,
        image_mean=[MEAN] * 3,
        image_std=[STD] * 3,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="default",
        chat_template=chat,
        image_token=picture,
        num_additional_image_tokens=1,
    )


def tower_from_vit(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The built-in ViT's weights under the names of a CLIP tower.

    The patch embedding's bias moves into the positions; CLIP's norm in front of the blocks, which
    the ViT does not have, starts near the identity.
    """
    w = {key: value.float() for key, value in weights.items()}
    positions = w["pos_embed"][0].clone()
    positions[1:] += w["patch_embed.proj.bias"]
    out = {
        "embeddings.class_embedding": w["cls_token"][0, 0],
        "embeddings.patch_embedding.weight": w["patch_embed.proj.weight"],
        "embeddings.position_embedding.weight": positions,
        "pre_layrnorm.weight": torch.full((DIM,), 0.7),
        "pre_layrnorm.bias": torch.zeros(DIM),
        "post_layernorm.weight": w["norm.weight"],
        "post_layernorm.bias": w["norm.bias"],
    }
    names = {
        "norm1": "layer_norm1",
        "norm2": "layer_norm2",
        "attn.proj": "self_attn.out_proj",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    for i in range(TOWER_LAYERS):
        for kind in ("weight", "bias"):
            for name, part in zip("qkv", w[f"blocks.{i}.attn.qkv.{kind}"].chunk(3), strict=True):
                out[f"encoder.layers.{i}.self_attn.{name}_proj.{kind}"] = part.contiguous()
            for old, new in names.items():
                out[f"encoder.layers.{i}.{new}.{kind}"] = w[f"blocks.{i}.{old}.{kind}"]
    return out


def tower_states(tower: Any, images: Tensor, kept: Tensor | None, layers: int) -> list[Tensor]:
    """Hidden states of a CLIP tower that sees only the patches ``kept`` (n, k): the input of the
    first layer and the output of each of the first ``layers``."""
    h = tower.pre_layrnorm(tower.embeddings(images))
    if kept is not None:
        index = kept[..., None].expand(-1, -1, h.shape[-1])
        h = torch.cat([h[:, :1], h[:, 1:].gather(1, index)], 1)
    states = [h]
    for layer in tower.encoder.layers[:layers]:
        states.append(layer(states[-1], attention_mask=None))
    return states
