"""Models in folders, as vLLM reads them: the built-in LLaVA, and a tiny random Qwen2.5-VL with its processor."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

END = "<|endoftext|>"
NAMES = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")


def llava(folder: Path) -> Any:
    """Save the built-in LLaVA under the names that published checkpoints have; return model and processor."""
    from safetensors.torch import load_file, save_file

    from vtr import zoo

    model, processor = zoo.load_vlm("digits-llava")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    file = folder / "model.safetensors"
    weights = load_file(file)
    inner = {
        k if "vision_model" in k else k.replace("vision_tower.", "vision_tower.vision_model."): v
        for k, v in weights.items()
    }
    save_file(inner, file, metadata={"format": "pt"})
    return model, processor


def qwen(folder: Path) -> Any:
    """Save a tiny random Qwen2.5-VL; return model and processor."""
    import transformers
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as token_models

    from vtr.testing.models import vlms

    config = copy.deepcopy(vlms.qwen2_5_vl(1)[0].config)
    text, width = config.text_config, 128
    text.hidden_size, text.head_dim = width, 32  # vLLM's attention on a CPU has no heads of 16
    text.rope_parameters = {**text.rope_parameters, "mrope_section": [4, 6, 6]}
    config.vision_config.out_hidden_size = width
    torch.manual_seed(0)
    model = transformers.Qwen2_5_VLForConditionalGeneration(config).eval()
    ids = [model.config.image_token_id, model.config.video_token_id]
    ids += [model.config.vision_start_token_id, model.config.vision_end_token_id]
    words = {f"w{i}": i for i in range(model.config.text_config.vocab_size)}
    for name, i in zip(NAMES, ids, strict=True):
        del words[f"w{i}"]
        words[name] = i
    del words["w0"]
    words[END] = 0
    plain = Tokenizer(token_models.WordLevel(words, unk_token="w3"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain,
        pad_token=END,
        unk_token="w3",
        additional_special_tokens=list(NAMES),
        extra_special_tokens={
            "image_token": NAMES[0],
            "video_token": NAMES[1],
            "vision_bos_token": NAMES[2],
            "vision_eos_token": NAMES[3],
        },
    )
    sizes = {
        "patch_size": 4,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "size": {"shortest_edge": 64, "longest_edge": 128 * 128},
    }
    processor = transformers.Qwen2_5_VLProcessor(
        transformers.Qwen2VLImageProcessor(**sizes),
        tokenizer,
        transformers.Qwen2VLVideoProcessor(**sizes),
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor
