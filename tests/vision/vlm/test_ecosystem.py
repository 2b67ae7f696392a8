"""What stands around a model: processors, pipelines, streamers, accelerate."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import vtr
from tests.vision.vlm.models import FAMILIES, IMAGE
from tests.vision.vlm.picks import BOTH, PROMPT, generate, same

transformers = pytest.importorskip("transformers")

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "what", "is", "this", "?", "a", "cat", "no", "USER", ":"]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}"
)


def processor() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    vocabulary = {w: i for i, w in enumerate(WORDS)}
    vocabulary |= {f"w{i}": i for i in range(len(WORDS), 200) if i != IMAGE}
    vocabulary["<image>"] = IMAGE
    inner = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        padding_side="left",
    )
    images = transformers.CLIPImageProcessor(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    )
    return transformers.LlavaProcessor(
        images,
        tokenizer,
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def picture(seed: int) -> Any:
    from PIL import Image

    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    )


def chat(seed: int) -> list[dict[str, Any]]:
    parts = [{"type": "image", "image": picture(seed)}, {"type": "text", "text": "what is this ?"}]
    return [{"role": "USER", "content": parts}]


def test_the_image_text_pipeline() -> None:
    model, _ = FAMILIES["llava"](1)
    pipe = transformers.pipeline("image-text-to-text", model=model, processor=processor())
    options: dict[str, Any] = {"max_new_tokens": 6, "return_full_text": False}
    dense = pipe(text=chat(0), **options)
    with vtr.apply(pipe, BOTH) as handle:  # the pipeline itself, or its model
        reduced = pipe(text=chat(0), **options)
        assert [s.tokens_in for s in handle.trace.stages] == [16, 8]
        assert handle.trace.stages[-1].tokens_out == 3
        several = pipe(text=[chat(0), chat(1)], batch_size=2, **options)
        assert len(several) == 2
    assert isinstance(reduced[0]["generated_text"], str)
    assert reduced[0]["generated_text"] != dense[0]["generated_text"]
    assert pipe(text=chat(0), **options) == dense


def test_a_streamer_gets_every_token() -> None:
    model, _ = FAMILIES["llava"](1)
    tools = processor()
    inputs = tools.apply_chat_template(
        chat(0), tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    pieces: list[str] = []

    class Streamer(transformers.TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            pieces.append(text)

    with vtr.apply(model, PROMPT):
        out = model.generate(
            **inputs, max_new_tokens=6, do_sample=False, streamer=Streamer(tools, skip_prompt=True)
        )
    answer = tools.decode(out[0, inputs["input_ids"].shape[1] :])
    assert "".join(pieces).split() == answer.split() and len(answer.split()) == 6


def test_accelerates_device_map() -> None:
    pytest.importorskip("accelerate")
    from accelerate import dispatch_model

    model, inputs = FAMILIES["llava"](2)
    with vtr.apply(model, BOTH):
        reduced = generate(model, inputs)
    parts = {"model.vision_tower": "cpu", "model.multi_modal_projector": "cpu", "lm_head": "cpu"}
    parts |= {f"model.language_model.{n}": "cpu" for n in ("embed_tokens", "norm", "rotary_emb")}
    parts |= {f"model.language_model.layers.{i}": "cpu" for i in range(4)}
    hooked = dispatch_model(model, parts, main_device="cpu", force_hooks=True)
    dense = generate(hooked, inputs)
    assert any("_hf_hook" in vars(m) for m in hooked.modules())
    with vtr.apply(hooked, BOTH):
        same(reduced, generate(hooked, inputs))
    with vtr.apply(hooked, vtr.create("flowcut", keep=6)) as handle:  # cuts inside the tower too
        generate(hooked, inputs)
        assert handle.trace.stages[0].site == "encoder"
    same(dense, generate(hooked, inputs))


def test_a_saved_model_knows_nothing_of_the_methods(tmp_path: Any) -> None:
    model, inputs = FAMILIES["llava"](2)
    dense = generate(model, inputs)
    with vtr.apply(model, BOTH):
        model.save_pretrained(tmp_path)
    again = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    same(dense, generate(again, inputs))
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_accelerates_hooks_come_and_go_under_a_wrapped_model() -> None:
    """They move a module's forward, also one that a method in the tower has set."""
    pytest.importorskip("accelerate")
    from accelerate import dispatch_model
    from accelerate.hooks import remove_hook_from_submodules

    model, inputs = FAMILIES["llava"](2)
    method = vtr.create("flowcut", keep=6)
    parts = {"model": "cpu", "lm_head": "cpu"}

    def hooked() -> list[bool]:
        layers = model.model.vision_tower.encoder.layers
        return ["_hf_hook" in vars(m) and "forward" in vars(m) for m in layers]

    dense = generate(model, inputs)
    handle = vtr.apply(model, method)
    reduced = generate(model, inputs)
    dispatch_model(model, parts, main_device="cpu", force_hooks=True)
    same(reduced, generate(model, inputs))
    handle.remove()
    assert all(hooked())
    same(dense, generate(model, inputs))
    with vtr.apply(model, method) as handle:
        same(reduced, generate(model, inputs))
        remove_hook_from_submodules(model)
        same(reduced, generate(model, inputs))
    assert not any(hooked())
    same(dense, generate(model, inputs))
    with vtr.apply(
        model, method
    ):  # an own forward that the hooks left behind is no other library's
        same(reduced, generate(model, inputs))
    same(dense, generate(model, inputs))


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("method", ["fastv", "pyramiddrop", "visionzip"])
def test_weights_that_come_when_a_layer_runs(name: str, method: str) -> None:
    """Accelerate's offloading (``device_map="auto"`` where a model is too large): they are on meta else."""
    pytest.importorskip("accelerate")
    from accelerate import cpu_offload

    model, inputs = FAMILIES[name](2)
    with vtr.apply(model, vtr.create(method, keep=3)):
        reduced = generate(model, inputs)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(p.is_meta for p in model.model.language_model.layers[1].parameters())
    with vtr.apply(model, vtr.create(method, keep=3)) as handle:
        same(reduced, generate(model, inputs))
        assert handle.report().to_dict()["kv_bytes"]["reduced"] > 0


class Packed(torch.nn.Module):
    """A linear layer as quantisation makes them: its weights are a buffer of another name."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.register_buffer("qweight", layer.weight.data.clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.qweight.T


def test_quantised_language_models() -> None:
    model, inputs = FAMILIES["llava"](2)
    method = vtr.create("fastv", keep=3)
    with vtr.apply(model, method) as handle:
        plain, report = generate(model, inputs), handle.report().to_dict()
    for layer in model.model.language_model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, child in list(part.named_children()):
                if isinstance(child, torch.nn.Linear):
                    setattr(part, name, Packed(child))
    with vtr.apply(model, method) as handle:
        same(plain, generate(model, inputs), 1e-5)
        assert handle.report().to_dict() == report
