"""The built-in model for chats about many pictures: its architecture and its processor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from vtr.zoo.chat_questions import SPECIAL, VOCABULARY
from vtr.zoo.llava import word_llava, word_processor
from vtr.zoo.slides import IMAGE
from vtr.zoo.video_llava import HEAD

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

PATCH = 8  # pixels, side of a patch
GRID = IMAGE // PATCH
TOKENS = GRID * GRID  # of a picture
TOWER, TOWER_LAYERS = 64, 4
WIDTH, LAYERS, MLP = 128, 4, 224
KEY_HEADS = 2

CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}USER: "
    "{% if m['content'] is string %}{{ m['content'] }} {% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image> "
    "{% elif c['type'] == 'text' %}{{ c['text'] }} {% endif %}{% endfor %}{% endif %}"
    "{% else %}ASSISTANT: {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endif %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def build(attention: str = "sdpa") -> LlavaForConditionalGeneration:
    """Build a randomly initialised LLaVA: CLIP tower of 4 layers of 64, Llama of 4 layers of 128 with 4
    query and 2 key-value heads, 16 visual tokens for a picture of 32 pixels.

    Raises:
        MissingDependencyError: transformers is not installed.
    """
    return word_llava(
        VOCABULARY,
        "the built-in model for chats",
        vision={
            "hidden_size": TOWER,
            "num_hidden_layers": TOWER_LAYERS,
            "image_size": IMAGE,
            "patch_size": PATCH,
        },
        language={
            "hidden_size": WIDTH,
            "intermediate_size": MLP,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": WIDTH // HEAD,
            "num_key_value_heads": KEY_HEADS,
            "max_position_embeddings": 2048,
        },
        layer=-1,
        attention=attention,
    )


def features(tower: Any, pictures: Tensor) -> Tensor:
    """Patch features that the projector reads: ``(m, 3, 32, 32)`` normalised -> ``(m, 16, 64)``."""
    return tower(pictures, output_hidden_states=True).hidden_states[-1][:, 1:]


def processor() -> Any:
    """Build a real ``LlavaProcessor``: CLIP's image processor at 32 pixels, a word-level tokenizer, a chat
    template."""
    return word_processor(VOCABULARY, SPECIAL, CHAT, IMAGE, PATCH)
