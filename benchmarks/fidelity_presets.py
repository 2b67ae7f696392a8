"""Dry runs of presets: each published setting on a small model with the layers and tokens of the real one.

A model of :data:`MODELS` has the class, the layers and the visual tokens of the model that a setting was
published for, with small widths and random weights. A run says how many visual tokens each layer of the language
model gets. The FLOPs of vtr's report follow from these and from the shapes of the real model, which lies on the
meta device; so do the paper's, by the paper's own formula.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

import vtr
from vtr import api
from vtr.inspect.flops import llm_flops
from vtr.testing.models.vlms import IMAGE, QWEN_IDS, VIDEO, Inputs, build
from vtr.vision.vlm.costs import language_costs

BEFORE, AFTER = 35, 21  # words before the picture (LLaVA's system prompt), and of a question
CLOSE = 0.02  # of FLOPs, and of the tokens that a preset's name says


class Widths(NamedTuple):
    """Widths of a language model."""

    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int


SMALL = Widths(32, 32, 2, 1, 16, 200)
MANY_HEADS = Widths(
    64, 32, 32, 32, 2, 200
)  # for SparseVLM's second release, which chooses 14 of 32
VICUNA_7B = Widths(4096, 11008, 32, 32, 128, 32064)
VICUNA_13B = Widths(5120, 13824, 40, 40, 128, 32064)
QWEN_7B = Widths(3584, 18944, 28, 4, 128, 152064)
QWEN3_8B = Widths(4096, 12288, 32, 8, 128, 151936)
QWEN3_32B = Widths(5120, 25600, 64, 8, 128, 151936)

Parts = Callable[[dict[str, Any]], tuple[Any, Any]]


@dataclass(frozen=True)
class Real:
    """A model that settings were published for.

    Attributes:
        layers: of the language model.
        runs: visual tokens of the picture or video, in one piece or with words between the pieces.
        widths: of the language model.
        parts: class and configuration, given the options of the language model.
        pixels: the picture or video.
        kind: placeholder of a visual token.
        small: widths of the dry run.
    """

    layers: int
    runs: tuple[int, ...]
    widths: Widths
    parts: Parts
    pixels: Callable[[], Inputs]
    kind: int = IMAGE
    small: Widths = SMALL

    @property
    def tokens(self) -> int:
        return sum(self.runs)

    def model(self, widths: Widths) -> Any:
        return build(*self.parts(text(self.layers, widths)))

    def inputs(self) -> Inputs:
        words = torch.randint(5, 140, (4 * 64 + 64,), generator=torch.Generator().manual_seed(1))
        pieces = [words[:BEFORE]]
        for i, number in enumerate(self.runs):
            pieces += [words[BEFORE + 4 * i :][: 4 * bool(i)], torch.full((number,), self.kind)]
        ids = torch.cat([*pieces, words[-AFTER:]])[None]
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **self.pixels()}
        if any("grid" in name for name in inputs):
            inputs["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
        return inputs


def text(layers: int, widths: Widths) -> dict[str, Any]:
    return {
        "vocab_size": widths.vocabulary,
        "hidden_size": widths.hidden,
        "intermediate_size": widths.mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": widths.heads,
        "num_key_value_heads": widths.kv_heads,
        "head_dim": widths.head_dim,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
    }


TOWER = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}


def clip() -> Any:
    return transformers.CLIPVisionConfig(
        **TOWER, num_hidden_layers=24, image_size=336, patch_size=14, projection_dim=32
    )


def siglip(side: int) -> Any:
    return transformers.SiglipVisionConfig(
        **TOWER, num_hidden_layers=26, image_size=14 * side, patch_size=14, vision_use_head=False
    )


def llava(language: dict[str, Any]) -> tuple[Any, Any]:
    return transformers.LlavaForConditionalGeneration, transformers.LlavaConfig(
        vision_config=clip(),
        text_config=transformers.LlamaConfig(**language),
        image_token_id=IMAGE,
        image_seq_length=576,
        vision_feature_layer=-2,
    )


def llava_next(language: dict[str, Any]) -> tuple[Any, Any]:
    return transformers.LlavaNextForConditionalGeneration, transformers.LlavaNextConfig(
        vision_config=clip(),
        text_config=transformers.LlamaConfig(**language),
        image_token_id=IMAGE,
        image_seq_length=576,
        image_grid_pinpoints=[[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
        vision_feature_layer=-2,
    )


def onevision(side: int) -> Parts:
    """Frames and tiles of side x side patches."""

    def parts(language: dict[str, Any]) -> tuple[Any, Any]:
        size = 14 * side
        return (
            transformers.LlavaOnevisionForConditionalGeneration,
            transformers.LlavaOnevisionConfig(
                vision_config=siglip(side),
                text_config=transformers.Qwen2Config(**language),
                image_token_id=IMAGE,
                video_token_id=VIDEO,
                image_grid_pinpoints=[[size, 2 * size], [2 * size, size], [2 * size, 2 * size]],
                vision_feature_layer=-1,
                vision_feature_select_strategy="full",
                vision_aspect_ratio="anyres_max_9",
            ),
        )

    return parts


def qwen(name: str, depth: int, **tower: Any) -> Parts:
    """A Qwen-VL: ``Qwen2VL``, ``Qwen2_5_VL`` or ``Qwen3VL``, with a tower of so many layers."""

    def parts(language: dict[str, Any]) -> tuple[Any, Any]:
        half = language["head_dim"] // 2
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4}
        rope["mrope_section"] = [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]
        if name == "Qwen3VL":
            rope["mrope_interleaved"] = True
        vision = {"depth": depth, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2}
        wide = {"embed_dim": 32} if name == "Qwen2VL" else {"hidden_size": 32}
        out = "hidden_size" if name == "Qwen2VL" else "out_hidden_size"
        wide |= {} if name == "Qwen2VL" else {"intermediate_size": 32}
        vision |= {"temporal_patch_size": 2, **wide, out: language["hidden_size"], **tower}
        config = getattr(transformers, f"{name}Config")(
            text_config={**language, "rope_parameters": rope}, vision_config=vision, **QWEN_IDS
        )
        return getattr(transformers, f"{name}ForConditionalGeneration"), config

    return parts


def grid(*sides: int) -> Callable[[], Inputs]:
    """A picture, or a video of several steps, of so many steps, rows and columns of patches."""

    def pixels() -> Inputs:
        video = sides[0] > 1
        values = noise(sides[0] * sides[1] * sides[2], 3 * 2 * 4 * 4)
        names = (
            ("pixel_values_videos", "video_grid_thw")
            if video
            else ("pixel_values", "image_grid_thw")
        )
        return {names[0]: values, names[1]: torch.tensor([sides])}

    return pixels


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def image() -> Inputs:
    return {"pixel_values": noise(1, 3, 336, 336)}


def tiles(side: int) -> Callable[[], Inputs]:
    """A square picture of 2 x 2 tiles beside the small one of the whole."""
    sizes = torch.tensor([[2 * side, 2 * side]])
    return lambda: {"pixel_values": noise(5, 3, side, side)[None], "image_sizes": sizes}


def frames(number: int, side: int) -> Callable[[], Inputs]:
    return lambda: {"pixel_values_videos": noise(number, 3, 14 * side, 14 * side)[None]}


QWEN2_VL = qwen("Qwen2VL", 32, mlp_ratio=2)
QWEN2_5_VL = qwen("Qwen2_5_VL", 32, window_size=32, fullatt_block_indexes=[7, 15, 23, 31])
QWEN3_VL = qwen("Qwen3VL", 27, num_position_embeddings=2304, deepstack_visual_indexes=[8, 16, 24])

MODELS = {
    "llava-1.5-7b": Real(32, (576,), VICUNA_7B, llava, image, small=MANY_HEADS),
    "llava-1.5-13b": Real(40, (576,), VICUNA_13B, llava, image),
    "llava-next-7b": Real(32, (5 * 576 + 48,), VICUNA_7B, llava_next, tiles(336)),
    "llava-onevision-7b": Real(28, (32 * 196 + 1,), QWEN_7B, onevision(27), frames(32, 27), VIDEO),
    "llava-onevision-7b, a picture": Real(
        28, (729 + 54 * 54 + 54,), QWEN_7B, onevision(27), tiles(378)
    ),
    "llava-video-7b": Real(28, (64 * 169 + 1,), QWEN_7B, onevision(26), frames(64, 26), VIDEO),
    "qwen2-vl-7b": Real(28, (576,), QWEN_7B, QWEN2_VL, grid(1, 48, 48)),
    "qwen2-vl-7b, a video": Real(28, (16 * 144,), QWEN_7B, QWEN2_VL, grid(16, 24, 24), VIDEO),
    "qwen2.5-vl-7b": Real(28, (16 * 144,), QWEN_7B, QWEN2_5_VL, grid(16, 24, 24), VIDEO),
    "qwen3-vl-8b": Real(36, (144,) * 32, QWEN3_8B, QWEN3_VL, grid(32, 24, 24), VIDEO),
    "qwen3-vl-32b": Real(64, (144,) * 32, QWEN3_32B, QWEN3_VL, grid(32, 24, 24), VIDEO),
}
"""By the name that presets call a model. Frames are those of :data:`vtr.evaluate.reproduce.MODELS`; the sizes of
pictures and videos that the Qwen models take as they are were chosen here. LLaVA-Video, which transformers does not
have, is a LLaVA-OneVision whose frames have 13 x 13 tokens."""


class Dry(NamedTuple):
    """Result of a dry run.

    Attributes:
        steps: (layer, visual tokens) of the language model, from that layer on.
        flops: dense and reduced, of the language model's prefill, in vtr's report for the real widths.
    """

    steps: tuple[tuple[int, int], ...]
    flops: tuple[int, int]

    def tokens(self, layers: int) -> list[int]:
        """Visual tokens in each layer."""
        found: list[int] = []
        for layer, number in self.steps:
            found[layer:] = [number] * (layers - layer)
        return found


def model_of(method: str, preset: str) -> str | None:
    """Name the model of :data:`MODELS` on which a preset is run; None without one."""
    name = preset.partition("/")[0]
    if method == "vflowopt" and name == "llava-onevision-7b":
        name += ", a picture"
    if method == "framefusion" and name == "qwen2-vl-7b":
        name += ", a video"
    return name if name in MODELS else None


@cache
def _small(name: str) -> tuple[Any, Inputs]:
    return MODELS[name].model(MODELS[name].small), MODELS[name].inputs()


@cache
def _real(name: str) -> Any:
    with torch.device("meta"):
        return api._wrapping(MODELS[name].model(MODELS[name].widths))


def run(method: vtr.Method, name: str) -> Dry:
    """Run a setting once on the small model of ``name``."""
    model, inputs = _small(name)
    others = inputs["input_ids"].shape[1] - MODELS[name].tokens
    with torch.no_grad(), vtr.apply(model, method) as handle:
        model(**inputs, logits_to_keep=1)
        wrapping: Any = handle._wrapping
        last = wrapping.language.last
        found = [int(mask.sum()) - others for mask in last.entered]
        flops = language_costs(_real(name), last)["language"]
    steps = [(i, n) for i, n in enumerate(found) if i == 0 or n != found[i - 1]]
    return Dry(tuple(steps), flops)


def paper_flops(counts: str, tokens: Sequence[int], widths: Widths) -> float:
    """FLOPs of the layers as papers count them, given the number of tokens in each.

    ``"multiply-adds"`` is half of :func:`vtr.inspect.flops.llm_flops`; ``"FastV's formula"`` is
    ``4 n d^2 + 2 n^2 d + 2 n d m``: the multiply-adds of an MLP of two matrices, with keys as wide as queries.
    """
    d, m = widths.hidden, widths.mlp
    if counts == "multiply-adds":
        return llm_flops(tokens, d, kv_dim=widths.kv_heads * widths.head_dim, ff_dim=m) / 2
    assert counts == "FastV's formula", counts
    return float(sum(4 * n * d * d + 2 * n * n * d + 2 * n * d * m for n in tokens))


SAYS = ("entry", "removed", "left", "mean", "kept", "content")


@dataclass(frozen=True)
class Expected:
    """Published behaviour of a method's presets; ``[METHOD.dry]`` of ``fidelity.toml``.

    Attributes:
        acts: layers of the language model that are the first with fewer tokens; 0 is before it. By the
            layers of the model if they differ, or None if the content decides.
        says: what the number or share in a preset's name is: tokens that enter the language model
            (``"entry"``), those that are ``"removed"`` before it, those ``"left"`` at the end, the ``"mean"`` over the
            layers; ``"kept"`` if the options have the numbers of all cuts (:func:`kept`);
            ``"content"`` if the content decides.
        numbers: tokens of presets whose names say less.
        others: ``acts`` and ``says`` of presets that differ.
    """

    acts: tuple[int, ...] | None
    says: str
    numbers: Mapping[str, int]
    others: Mapping[str, Mapping[str, Any]]

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Expected:
        says = facts["says"]
        if says not in SAYS:
            raise ValueError(f"says must be one of {SAYS}, got {says!r}")
        acts = tuple(facts["acts"]) if "acts" in facts else None
        return cls(acts, says, facts.get("numbers", {}), facts.get("others", {}))

    def wrong(self, method: Any, preset: str, dry: Dry) -> list[str]:
        """List what a dry run did otherwise."""
        other = self.others.get(preset, {})
        acts, says = other.get("acts", self.acts), other.get("says", self.says)
        name = model_of(method.name, preset)
        assert name is not None
        real = MODELS[name]
        found = dry.tokens(real.layers)
        cuts = [i for i, n in dry.steps if i or n < real.tokens]
        wrong = [] if acts is None or cuts == list(acts) else [f"acts at layers {cuts}"]
        if says == "content":
            return wrong
        if says == "kept":
            own = getattr(method, "method", method)
            due = kept(own.keep, real.tokens, own.recycle)
            left = [n for i, n in dry.steps if i]
            return wrong if left == due else [*wrong, f"keeps {left}, not {due}"]
        got = {"mean": sum(found) / len(found), "left": found[-1]}.get(says, found[0])
        wanted = self.numbers.get(preset) or named_tokens(preset, real.tokens, says)
        if abs(got - wanted) > max(CLOSE * wanted, 0.5):
            wrong.append(f"{got:.1f} tokens, not {wanted:.1f}")
        return wrong


def kept(keep: Sequence[int], tokens: int, recycle: bool) -> list[int]:
    """Count SparseVLM's tokens after each cut; of those dropped, int(0.3 n) + 1 become one token
    for every ten, and one (the released code)."""
    found = []
    for number in keep:
        tokens = number + ((int(0.3 * (tokens - number)) + 1) // 10 + 1 if recycle else 0)
        found.append(tokens)
    return found


def named_tokens(preset: str, tokens: int, says: str) -> float:
    """Read the number of tokens that a preset's name says: ``64``, ``25%``, ``k2-r50%``, ``128-fastv``."""
    label = preset.partition("/")[2]
    found = re.fullmatch(r"(k\d+-r)?([0-9.]+)(%?)(-[a-z]+)?", label)
    if found is None:
        raise ValueError(f"{preset!r} names no number of tokens")
    value = float(found[2]) * (tokens / 100 if found[3] else 1)
    return tokens - value if found[1] or says == "removed" else value


@dataclass(frozen=True)
class Cost:
    """A paper's own number of FLOPs; ``[[METHOD.costs]]`` of ``fidelity.toml``.

    Attributes:
        preset: whose number it is.
        value: in units of 10^12, or a share of the full model's.
        counts: the paper's formula (:func:`paper_flops`), or empty if it cannot be compared.
        source: of the number.
        text: tokens of text that the paper counts.
        share: ``value`` is a share.
        dense: the paper's number of the full model, in units of 10^12.
        note: how the paper's number differs from that of a report.
    """

    preset: str
    value: float
    source: str
    note: str
    counts: str = ""
    text: int = 0
    share: bool = False
    dense: float | None = None

    def ours(self, method: str, dry: Dry) -> tuple[float, float]:
        """FLOPs by the paper's formula for the tokens of a dry run, and of the full model."""
        name = model_of(method, self.preset)
        assert name is not None
        real = MODELS[name]
        tokens = [n + self.text for n in dry.tokens(real.layers)]
        full = [real.tokens + self.text] * real.layers
        part, whole = (paper_flops(self.counts, t, real.widths) / 1e12 for t in (tokens, full))
        return (part / whole if self.share else part), whole

    def off(self, method: str, dry: Dry) -> float:
        """The largest relative difference from the paper's numbers."""
        part, whole = self.ours(method, dry)
        off = abs(part / self.value - 1)
        return off if self.dense is None else max(off, abs(whole / self.dense - 1))
