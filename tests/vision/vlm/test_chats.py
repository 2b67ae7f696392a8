"""A wrapped model in a chat: turns, images in the middle, positions, drafts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import vtr
from tests.vision.vlm.models import (
    FAMILIES,
    made,
    noise,
    prompts,
)
from tests.vision.vlm.picks import (
    BOTH,
    CLOSE,
    DECODER,
    KEEP_ALL,
    PROMPT,
    STEPS,
    Masked,
    Pick,
    generate,
    gone_of,
    lengths,
    same,
)
from vtr.compat.transformers import cache_of, with_cache

turns = pytest.mark.parametrize("name", ["llava", "llava_onevision", "qwen2_5_vl", "qwen3_vl"])


def grown(inputs: dict[str, Any], sequences: torch.Tensor, more: torch.Tensor) -> dict[str, Any]:
    """The prompt of a second turn: everything so far and new text."""
    ids = torch.cat([sequences, more], 1)
    mask = torch.ones_like(ids)
    mask[:, : inputs["attention_mask"].shape[1]] = inputs["attention_mask"]
    return {"input_ids": ids, "attention_mask": mask}


def question(batch: int) -> torch.Tensor:
    return torch.arange(20, 25).expand(batch, 5)


# ---- chats ---------------------------------------------------------------------------------------


@turns
@pytest.mark.parametrize("method", [PROMPT, DECODER, BOTH], ids=["prompt", "decoder", "both"])
@pytest.mark.parametrize("whole", [True, False], ids=["all-ids", "new-ids"])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_second_turn_reuses_the_cache(name: str, method: Pick, whole: bool, batch: int) -> None:
    model, inputs = made(name, batch)
    with vtr.apply(model, method) as handle:
        first = generate(model, inputs)
        gone = gone_of(handle, inputs["input_ids"])
        held = lengths(first)
        # The last token that was generated is not in the cache yet; it comes with the new turn.
        turn = grown(inputs, first.sequences, question(batch))
        if not whole:
            turn["input_ids"] = turn["input_ids"][:, inputs["input_ids"].shape[1] + STEPS - 1 :]
        second = generate(model, turn, **with_cache(type(model).forward, cache_of(first)))
        assert lengths(second) == [n + 6 + STEPS - 1 for n in held]
    with Masked(model, gone):
        first = generate(model, inputs)
        turn = grown(inputs, first.sequences, question(batch))
        masked = generate(model, turn, **with_cache(type(model).forward, cache_of(first)))
    for a, b in zip(second.logits, masked.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=CLOSE)


@pytest.mark.parametrize("method", [PROMPT, DECODER, BOTH], ids=["prompt", "decoder", "both"])
@pytest.mark.parametrize("positions", ["original", "compact"])
def test_a_second_turn_with_an_image_of_its_own(method: Pick, positions: str) -> None:
    """Both turns in one cache equal the step-by-step run without generate."""
    model, _ = made("llava", 1)
    first, second = prompts([[16]]), prompts([[16], [16, 16]])
    second = {"input_ids": second["input_ids"][1:], "attention_mask": second["attention_mask"][1:]}
    n = first["input_ids"].shape[1]
    images = noise(3, 3, 28, 28)
    whole = torch.cat([first["input_ids"], second["input_ids"]], 1)
    chosen = Pick(method.at, tuple((k[0],) for k in method.keep))
    with vtr.apply(model, chosen, positions=positions) as handle:
        out = model(**first, pixel_values=images[:1])
        gone = gone_of(handle, first["input_ids"])
        mask = torch.ones(1, whole.shape[1], dtype=torch.long)
        cache = cache_of(out)
        assert cache.get_seq_length() == n
        out = model(
            input_ids=second["input_ids"],
            attention_mask=mask,
            pixel_values=images[1:],
            **with_cache(type(model).forward, cache),
        )
        later = gone_of(handle, second["input_ids"])
        step = model(
            input_ids=torch.tensor([[7]]),
            attention_mask=torch.ones(1, whole.shape[1] + 1, dtype=torch.long),
            **with_cache(type(model).forward, cache),
        )
    assert cache.get_seq_length() == whole.shape[1] + 1
    both = {k: torch.cat([gone[k], later[k]], 1) for k in gone}
    if positions == "compact" and method is not PROMPT:
        return  # positions differ from layer to layer: no full-length run has them
    ids = torch.cat([whole, torch.tensor([[7]])], 1)
    place = torch.arange(ids.shape[1])[None]
    if positions == "compact":
        dropped = torch.nn.functional.pad(both[0], (0, 1))
        place = place - dropped.long().cumsum(1)
    with Masked(model, {k: torch.nn.functional.pad(g, (0, 1)) for k, g in both.items()}):
        full = model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            position_ids=place,
            pixel_values=images,
        )
    # In the first turn's layers the second image is seen whole by its own tokens only.
    torch.testing.assert_close(step.logits[:, -1], full.logits[:, -1], rtol=0, atol=CLOSE)
    torch.testing.assert_close(out.logits[:, -1], full.logits[:, -2], rtol=0, atol=CLOSE)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_without_an_image_is_untouched(name: str) -> None:
    model, _ = made(name, 1)
    ids = torch.arange(10, 22)[None]
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name.startswith("qwen"):
        text["mm_token_type_ids"] = torch.zeros_like(ids, dtype=torch.int)
    dense = generate(model, text)
    with vtr.apply(model, BOTH) as handle:
        same(dense, generate(model, text))
        assert handle.trace.stages == []


def test_images_are_found_in_the_middle_of_a_chat() -> None:
    model, _ = made("llava", 1)
    inputs = {**prompts([[16, 16], [16]]), "pixel_values": noise(3, 3, 28, 28)}
    seen: list[Any] = []

    class Look(Pick):
        def reduce(self, site: Any) -> Any:
            seen.append((site.images, site.text_after.sum(1).tolist(), site.entry.tolist()))
            return super().reduce(site)

    with vtr.apply(model, Look()):
        generate(model, inputs)
    images, after, entry = seen[0]
    assert images == [[(0, 16, (4, 4)), (16, 16, (4, 4))], [(0, 16, (4, 4))]]
    assert entry == [32, 16]
    assert after == [6, 4]  # text of 3 tokens after each image of the first, 4 of the second


def test_one_image_too_many_is_the_models_own_error() -> None:
    model, inputs = made("llava", 1)
    wrong = {**inputs, "pixel_values": noise(2, 3, 28, 28)}
    with pytest.raises(Exception, match="do not match") as plain:
        generate(model, wrong)
    with vtr.apply(model, PROMPT):
        with pytest.raises(type(plain.value), match="do not match"):
            generate(model, wrong)
        after = generate(model, inputs)
    with vtr.apply(model, PROMPT):
        same(after, generate(model, inputs))


# ---- positions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava", "llava_onevision", "internvl"])
def test_compact_positions_are_those_of_the_short_prompt(name: str) -> None:
    """A prompt that never had the dropped tokens gives the same logits, at every step."""
    model, inputs = made(name, 2)
    inner = model.model
    with vtr.apply(model, PROMPT, positions="compact") as handle:
        reduced = generate(model, inputs)
        gone = gone_of(handle, inputs["input_ids"])[0]
        original = model(**inputs).logits[:, -1]
    held: dict[str, Any] = {}

    def grab(module: Any, args: Any, kwargs: Any) -> None:
        held.setdefault("embeds", kwargs["inputs_embeds"])

    hook = inner.language_model.register_forward_pre_hook(grab, with_kwargs=True)
    generate(model, inputs, max_new_tokens=1)
    hook.remove()
    for b in range(2):
        stay = inputs["attention_mask"][b].bool() & ~gone[b]
        short = held["embeds"][b : b + 1, stay]
        text = generate(
            model, {"inputs_embeds": short, "attention_mask": torch.ones(1, short.shape[1])}
        )
        for x, y in zip(reduced.logits, text.logits, strict=True):
            torch.testing.assert_close(x[b : b + 1], y, rtol=0, atol=CLOSE)
    torch.testing.assert_close(original, reduced.logits[0], rtol=0, atol=CLOSE)
    with vtr.apply(model, PROMPT, positions="original"):
        other = generate(model, inputs)
    assert float((other.logits[0] - reduced.logits[0]).abs().max()) > 100 * CLOSE


def test_a_methods_own_positions_are_the_default() -> None:
    class Compact(Pick):
        positions = "compact"

    model, inputs = made("llava", 2)
    with vtr.apply(model, Compact()):
        own = generate(model, inputs)
    with vtr.apply(model, PROMPT, positions="compact"):
        same(own, generate(model, inputs))
    qwen, prompt = made("qwen2_5_vl", 2)
    with vtr.apply(qwen, Compact()):  # its positions are two-dimensional: they are kept
        own = generate(qwen, prompt)
    with vtr.apply(qwen, PROMPT, positions="original"):
        same(own, generate(qwen, prompt))
    with pytest.raises(ValueError, match="m-RoPE"):
        vtr.apply(qwen, PROMPT, positions="compact")
    with pytest.raises(ValueError, match="positions must be"):
        vtr.apply(model, PROMPT, positions="dense")


# ---- life ----------------------------------------------------------------------------------------


def test_a_copied_cache_goes_on_from_the_same_cut() -> None:
    """The usual way to share a prompt's cache between questions."""
    model, inputs = made("llava", 1)
    with torch.no_grad(), vtr.apply(model, BOTH):
        first = model(**inputs)
        mask = torch.ones(1, inputs["input_ids"].shape[1] + 1, dtype=torch.long)
        answers = []
        for token in (30, 31, 30):
            cache = copy.deepcopy(cache_of(first))
            out = model(
                input_ids=torch.tensor([[token]]),
                attention_mask=mask,
                **with_cache(type(model).forward, cache),
            )
            answers.append(out.logits)
    assert torch.equal(answers[0], answers[2]) and not torch.equal(answers[0], answers[1])


@pytest.mark.parametrize("method", [PROMPT, DECODER], ids=["prompt", "decoder"])
def test_a_cut_cache_is_not_continued_without_a_method(method: Pick) -> None:
    model, inputs = made("llava", 1)
    with vtr.apply(model, method):
        first = generate(model, inputs)
    turn = grown(inputs, first.sequences, question(1))
    with pytest.raises(RuntimeError, match="only be continued while a method is applied"):
        generate(model, turn, **with_cache(type(model).forward, cache_of(first)))
    with vtr.apply(model, KEEP_ALL):  # any method will do
        generate(model, turn, **with_cache(type(model).forward, cache_of(first)))


def test_prompt_lookup_decoding_gives_the_same_tokens() -> None:
    model, inputs = made("llava", 1)
    for method in (PROMPT, DECODER, BOTH):
        with vtr.apply(model, method):
            plain = model.generate(**inputs, max_new_tokens=12, do_sample=False)
            fast = model.generate(
                **inputs, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3
            )
        assert torch.equal(plain, fast)


@pytest.mark.parametrize("method", ["fastv", "sparsevlm", "divprune"])
def test_drafts_of_an_assistant_do_not_change_what_is_kept(method: str) -> None:
    """The first round of drafts runs together with the prompt, as its last text."""
    model, inputs = FAMILIES["llava"](1)
    assistant = copy.deepcopy(model)
    with vtr.apply(model, vtr.create(method, keep=4)) as handle:
        plain = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        kept = handle.trace.kept
        drafted = model.generate(
            **inputs, max_new_tokens=8, do_sample=False, assistant_model=assistant
        )
        assert kept is not None and handle.trace.kept is not None
        assert torch.equal(kept, handle.trace.kept)
    assert torch.equal(plain, drafted)
    assert "_get_candidate_generator" not in vars(model)
