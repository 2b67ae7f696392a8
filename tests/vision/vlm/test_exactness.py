"""Every family: what is kept changes nothing, what is cut is gone and nothing else."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

import vtr
from tests.vision.vlm.models import ENCODES_FIRST, FAMILIES, visual
from tests.vision.vlm.picks import (
    BOTH,
    CLOSE,
    DECODER,
    KEEP_ALL,
    MIDDLE,
    PROMPT,
    STEPS,
    Masked,
    Pick,
    generate,
    gone_of,
    lengths,
    same,
)
from tests.vision.vlm.videos import VIDEOS
from vtr.compat.transformers import cache_of

ALL = FAMILIES | VIDEOS
family = pytest.mark.parametrize("name", ALL)


@cache
def made(name: str, batch: int) -> tuple[Any, dict[str, Any]]:
    return ALL[name](batch)


pytestmark = pytest.mark.usefixtures("without_gradients")


def cuts(output: Any, inputs: dict[str, Any]) -> None:
    """The cache is really shorter than the prompt and what was generated."""
    full = inputs["input_ids"].shape[1] + STEPS - 1
    assert min(lengths(output)) < full


@pytest.mark.compat
@family
@pytest.mark.parametrize("batch", [1, 2])
def test_keeping_everything_changes_nothing(name: str, batch: int) -> None:
    model, inputs = made(name, batch)
    dense = generate(model, inputs)
    with vtr.apply(model, KEEP_ALL) as handle:
        kept = generate(model, inputs)
        assert len(handle.trace.stages) == 3
        assert all(s.tokens_in == s.tokens_out for s in handle.trace.stages)
    same(dense, kept)


@family
@pytest.mark.parametrize(
    "method", [PROMPT, DECODER, BOTH, MIDDLE], ids=["prompt", "decoder", "both", "middle"]
)
def test_what_is_dropped_is_masked_out_and_gone(name: str, method: Pick) -> None:
    model, inputs = made(name, 2)
    ids = inputs["input_ids"]
    with vtr.apply(model, method) as handle:
        reduced = generate(model, inputs)
        gone = gone_of(handle, ids)
    text = (~visual(ids)).logical_and(inputs["attention_mask"].bool()).sum(1)
    wanted = []
    for i in range(4):
        layers = [k for k in gone if k <= i]
        left = inputs["attention_mask"].sum(1)
        if layers:
            left = text + (visual(ids) & ~gone[max(layers)]).sum(1)
            wanted.append(int(left.max()) + STEPS - 1)
        else:
            wanted.append(ids.shape[1] + STEPS - 1)
    assert lengths(reduced) == wanted
    cuts(reduced, inputs)
    with Masked(model, gone):
        masked = generate(model, inputs)
    same(masked, reduced, CLOSE)
    dense = generate(model, inputs)
    change = max(
        float((a - b).abs().max()) for a, b in zip(dense.logits, reduced.logits, strict=True)
    )
    assert change > 100 * CLOSE  # or the comparison would show nothing


@pytest.mark.compat
@pytest.mark.parametrize("name", ["qwen3_vl", "qwen3_vl_video"])
@pytest.mark.parametrize("place", ["middle", "end"])
def test_deepstack_features_follow_a_cut_among_their_layers(name: str, place: str) -> None:
    """Qwen3-VL adds features of the tower after its first layers: also for tokens that are left."""
    model, inputs = made(name, 2)
    for at, keep in (
        ((("decoder", 0, place),), ((5, 3),)),
        ((("decoder", 0, place),), ((24, 3),)),  # the longer row keeps its length
        (
            (("decoder", 0, place), ("decoder", 1, place), ("decoder", 2, place)),
            ((9, 8), (7,), (2,)),
        ),
    ):
        with vtr.apply(model, Pick(at, keep)) as handle:
            reduced = generate(model, inputs)
            gone = gone_of(handle, inputs["input_ids"])
        with Masked(model, gone):
            same(generate(model, inputs), reduced, CLOSE)


@family
def test_a_sample_of_a_batch_gets_what_it_gets_alone(name: str) -> None:
    model, inputs = made(name, 2)
    _, alone = made(name, 1)
    with vtr.apply(model, BOTH):
        both, one = generate(model, inputs), generate(model, alone)
    assert torch.equal(both.sequences[:1, -STEPS:], one.sequences[:, -STEPS:])
    for a, b in zip(both.logits, one.logits, strict=True):
        torch.testing.assert_close(a[:1], b, rtol=0, atol=CLOSE)


# One sample without padding, whose layers are given no mask, is a case of its own.
ALONE = ("llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "internvl")


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"cache_implementation": "static"},
        {"use_cache": False},
    ],
    ids=["beams", "static", "uncached"],
)
@pytest.mark.parametrize(
    ("name", "batch"), [*((name, 2) for name in ALL), *((name, 1) for name in ALONE)]
)
def test_ways_to_generate(name: str, options: dict[str, Any], batch: int) -> None:
    if "num_beams" in options and not ENCODES_FIRST:
        pytest.skip("this version of transformers repeats images wrongly for beams, unwrapped too")
    model, inputs = made(name, batch)
    dense = generate(model, inputs, **options)
    with vtr.apply(model, KEEP_ALL):
        same(dense, generate(model, inputs, **options), CLOSE)
    method = Pick(keep=((4,),))  # of every beam alike
    again = {**options, "use_cache": False} if "num_beams" in options else {}
    with vtr.apply(model, method):  # the same tokens by another way
        same(generate(model, inputs, **again), generate(model, inputs, **options), CLOSE)


@pytest.mark.parametrize("name", ["llava", "llava_onevision", "qwen2_5_vl", "qwen3_vl_video"])
@pytest.mark.parametrize("method", [DECODER, BOTH], ids=["decoder", "both"])
@pytest.mark.parametrize("batch", [1, 2])
def test_static_caches_inside_the_language_model(name: str, method: Pick, batch: int) -> None:
    model, inputs = made(name, batch)
    with vtr.apply(model, method):
        static = generate(model, inputs, cache_implementation="static")
        same(generate(model, inputs), static, CLOSE)
        held = [int(layer.cumulative_length) for layer in cache_of(static).layers]
        assert held == lengths(generate(model, inputs))


def test_flash_attention_is_given_no_positions_with_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention reads gapped positions of one sample as packed sequences (as the mask does).

    A probe stands where flash attention would: it is given what flash would be given.
    """
    from vtr.vision.vlm.wrapping import VLMWrapping

    monkeypatch.setattr(VLMWrapping, "flash", True)
    asked = {"flash_attention": True}
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    seen: list[Any] = []

    def attend(module: Any, *args: Any, position_ids: Any = None, **kwargs: Any) -> Any:
        if getattr(module, "is_causal", False) and args[0].shape[2] > 1:
            seen.append(position_ids)
        return sdpa_attention_forward(module, *args, **kwargs)

    AttentionInterface.register("probed", attend)
    AttentionMaskInterface.register("probed", sdpa_mask)
    for name in ("llava", "qwen3_vl"):
        model, inputs = FAMILIES[name](1)
        with vtr.apply(model, BOTH, **asked):
            plain = generate(model, inputs)
        model.model.language_model.set_attn_implementation("probed")
        seen.clear()
        generate(model, inputs)
        assert len(seen) == 4
        if name == "llava":
            assert all(p is not None for p in seen)
        seen.clear()
        with vtr.apply(model, BOTH, **asked):
            same(plain, generate(model, inputs), CLOSE)
        assert len(seen) == 4 and all(p is None for p in seen)


def test_flash_attention_is_refused_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its results after a cut have not been compared on a GPU."""
    model, inputs = FAMILIES["llava"](1)
    config = model.model.language_model.config
    words = r"'flash_attention_2'.*not been proven.*set_attn_implementation\('sdpa'\)"
    with vtr.apply(model, PROMPT):
        plain = generate(model, inputs)
        with monkeypatch.context() as patch:  # chosen while wrapped
            patch.setattr(config, "_attn_implementation_internal", "flash_attention_2")
            with pytest.raises(vtr.UnsupportedMethodError, match=words):
                generate(model, inputs)
        same(plain, generate(model, inputs))
    with monkeypatch.context() as patch:
        patch.setattr(config, "_attn_implementation_internal", "flash_attention_2")
        with pytest.raises(vtr.UnsupportedMethodError, match=words):
            vtr.apply(model, PROMPT)
        assert all(s.reason and not s.supported for s in vtr.supported(model))
        vtr.apply(model, PROMPT, flash_attention=True).remove()


@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
@pytest.mark.parametrize("method", [PROMPT, DECODER], ids=["prompt", "decoder"])
def test_eager_attention(name: str, method: Pick) -> None:
    model, inputs = FAMILIES[name](2)
    with vtr.apply(model, method):
        fused = generate(model, inputs)
    model.set_attn_implementation("eager")
    with vtr.apply(model, method):
        same(fused, generate(model, inputs), CLOSE)


@pytest.mark.parametrize("options", [{}, {"use_cache": False}], ids=["cached", "uncached"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_positions_with_gaps_are_no_packed_sequences(name: str, options: dict[str, Any]) -> None:
    """One sample, no padding, no mask given: the case that transformers reads as packed sequences."""
    model, inputs = made(name, 1)
    without = {k: v for k, v in inputs.items() if k != "attention_mask"}
    with vtr.apply(model, PROMPT) as handle:
        reduced = model(**without, **options).logits[:, -1]
        gone = gone_of(handle, inputs["input_ids"])
    with Masked(model, gone):
        masked = model(**without).logits[:, -1]
    torch.testing.assert_close(reduced, masked, rtol=0, atol=CLOSE)


@pytest.mark.parametrize(
    "name",
    [
        "llava",
        "llava_next",
        "llava_onevision",
        "internvl",
        "llava_onevision_mixed",
        "video_llama_3",
    ],
)
def test_right_padding(name: str) -> None:
    model, inputs = made(name, 2)
    shift = (inputs["attention_mask"] == 0).sum(1)
    turned = dict(inputs)
    for key in ("input_ids", "attention_mask"):
        rows = zip(inputs[key], shift.tolist(), strict=True)
        turned[key] = torch.stack([torch.roll(row, -n) for row, n in rows])
    turned["position_ids"] = (turned["attention_mask"].cumsum(1) - 1).clamp(min=0)
    left = {**inputs, "position_ids": (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)}
    with vtr.apply(model, BOTH, output="reduced"):
        a, b = model(**left).logits, model(**turned).logits
    numbers = torch.tensor([len(t) for t in [a[0]] * 2])
    assert a.shape == b.shape and bool((numbers == a.shape[1]).all())
    with vtr.apply(model, BOTH) as handle:
        c, d = model(**left).logits, model(**turned).logits
        last = handle.trace.stages[-1].total.valid.sum(1)
    text = ((~visual(turned["input_ids"])) & turned["attention_mask"].bool()).sum(1)
    ends = (text + last).tolist()
    for row, end in enumerate(ends):
        torch.testing.assert_close(a[row, -1], b[row, end - 1], rtol=0, atol=CLOSE)
        torch.testing.assert_close(c[row, -1], a[row, -1], rtol=0, atol=CLOSE)
        torch.testing.assert_close(d[row, -1 - shift[row]], a[row, -1], rtol=0, atol=CLOSE)
