"""Tiny random parts in place of the published ones, for the tests of the model made of them."""

from __future__ import annotations

import torch
from PIL import Image

COLOURS = ("red", "green", "blue")


def tiny(recipe, folder):
    """A tower of 12 layers, a language model of 8, a tokenizer of whole words, four pictures and a caption."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        Dinov2Config,
        Dinov2Model,
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
    )

    special = ["<pad>", "<|im_start|>", "<|im_end|>", recipe.llava.IMAGE]
    text = "user assistant what color is the shape in picture ? yes no a ball" + " ".join(
        ("", *COLOURS)
    )
    words = {w: i for i, w in enumerate([*special, "\n", "<unk>", *text.split()])}
    split = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed"),
         pre_tokenizers.Split("?", "isolated")]
    )  # fmt: skip
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = split
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=special[1:],
    )
    torch.manual_seed(0)
    tower = Dinov2Model(
        Dinov2Config(
            hidden_size=16,
            num_hidden_layers=12,
            num_attention_heads=2,
            patch_size=14,
            image_size=112,
        )
    )
    language = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=8,
            num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True, pad_token_id=0, initializer_range=0.2,
        )
    )  # fmt: skip
    pictures = []
    for i, colour in enumerate((*COLOURS, "red")):
        file = folder / f"{i}.png"
        Image.new("RGB", (64, 64), colour).save(file)
        turns = (
            ("is the shape red?", "yes" if colour == "red" else "no"),
            ("what color is the shape?", colour),
        )
        pictures.append(recipe.questions.Picture(file, turns))
    caption = recipe.questions.Picture(
        folder / "0.png", ((recipe.questions.CAPTION, "a red ball"),)
    )
    model = recipe.llava.join(tower.eval(), language.eval(), tokenizer)
    return recipe.Parts(model, recipe.llava.processor(tokenizer), pictures, [caption])
