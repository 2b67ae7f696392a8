"""A wrapped model in use: chats, losses, pipelines, copies, errors."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch

import vtr
from tests.vision.vlm.models import (
    ENCODES_FIRST,
    FAMILIES,
    IMAGE,
    TEXT,
    build,
    clip,
    noise,
    prompts,
    transformers,
)
from tests.vision.vlm.picks import (
    BOTH,
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

CLOSE = 3e-5
turns = pytest.mark.parametrize("name", ["llava", "llava_onevision", "qwen2_5_vl", "qwen3_vl"])


@cache
def made(name: str, batch: int) -> tuple[Any, dict[str, Any]]:
    return FAMILIES[name](batch)


def grown(inputs: dict[str, Any], sequences: torch.Tensor, more: torch.Tensor) -> dict[str, Any]:
    """The prompt of a second turn: everything so far and new text."""
    ids = torch.cat([sequences, more], 1)
    mask = torch.ones_like(ids)
    mask[:, : inputs["attention_mask"].shape[1]] = inputs["attention_mask"]
    return {"input_ids": ids, "attention_mask": mask}


def question(batch: int) -> torch.Tensor:
    return torch.arange(20, 25).expand(batch, 5)


# ---- chats ----------------------------------------------------------------------------------


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
        second = generate(model, turn, past_key_values=first.past_key_values)
        assert lengths(second) == [n + 6 + STEPS - 1 for n in held]
    with Masked(model, gone):
        first = generate(model, inputs)
        turn = grown(inputs, first.sequences, question(batch))
        masked = generate(model, turn, past_key_values=first.past_key_values)
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
        cache = out.past_key_values
        assert cache.get_seq_length() == n
        out = model(
            input_ids=second["input_ids"],
            attention_mask=mask,
            pixel_values=images[1:],
            past_key_values=cache,
        )
        later = gone_of(handle, second["input_ids"])
        step = model(
            input_ids=torch.tensor([[7]]),
            attention_mask=torch.ones(1, whole.shape[1] + 1, dtype=torch.long),
            past_key_values=cache,
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
            seen.append(
                (site.images, site.text_after.sum(1).tolist(), site.extra["entry"].tolist())
            )
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


# ---- losses ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "internvl"])
@pytest.mark.parametrize("method", [PROMPT, DECODER], ids=["prompt", "decoder"])
def test_the_loss_is_that_of_the_masked_run(name: str, method: Pick) -> None:
    model, inputs = made(name, 2)
    ids = inputs["input_ids"]
    labels = torch.where((ids == IMAGE) | (inputs["attention_mask"] == 0), -100, ids)
    for row in labels:  # questions are not learned, answers are
        row[: int((row == -100).nonzero().max()) + 2] = -100
    with vtr.apply(model, method) as handle:
        out = model(**inputs, labels=labels)
        rows = model(**inputs, labels=labels, return_dict=False)
        gone = gone_of(handle, ids)
    with Masked(model, gone):
        masked = model(**inputs, labels=labels)
    torch.testing.assert_close(out.loss, masked.loss, rtol=0, atol=CLOSE)
    torch.testing.assert_close(rows[0], out.loss)
    assert out.logits.shape[1] < ids.shape[1]


def test_the_loss_where_only_the_shorter_sample_is_cut() -> None:
    """The longest row keeps its length, and the others move under it."""
    model, inputs = made("llava", 2)
    ids = inputs["input_ids"]
    labels = torch.where((ids == IMAGE) | (inputs["attention_mask"] == 0), -100, ids)
    for row in labels:
        row[: int((row == -100).nonzero().max()) + 2] = -100
    for at in (PROMPT.at, (("decoder", 1, "end"),)):
        with vtr.apply(model, Pick(at, ((4, 32),))) as handle:
            out = model(**inputs, labels=labels)
            gone = gone_of(handle, ids)
        assert out.logits.shape[1] == ids.shape[1]
        with Masked(model, gone):
            masked = model(**inputs, labels=labels)
        torch.testing.assert_close(out.loss, masked.loss, rtol=0, atol=CLOSE)


def test_gradients_flow_through_cuts() -> None:
    model, inputs = FAMILIES["llava"](2)
    labels = torch.where(inputs["input_ids"] == IMAGE, -100, inputs["input_ids"])
    with vtr.apply(model, BOTH):
        model(**inputs, labels=labels).loss.backward()
    inner = model.model
    for part in (
        inner.multi_modal_projector.linear_1,
        inner.language_model.layers[3].self_attn.q_proj,
    ):
        assert float(part.weight.grad.abs().max()) > 0


# ---- positions ------------------------------------------------------------------------------


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


# ---- life -----------------------------------------------------------------------------------


def state(model: Any) -> list[Any]:
    """Attributes and hooks of every module."""
    hooks = ("_forward_hooks", "_forward_pre_hooks")
    return [
        (sorted(vars(m)), [list(getattr(m, h).values()) for h in hooks]) for m in model.modules()
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_removing_restores_the_model_to_the_bit(name: str) -> None:
    model, inputs = made(name, 2)
    dense = generate(model, inputs)
    keys, before = list(model.state_dict()), state(model)
    handle = vtr.apply(model, BOTH)
    assert list(model.state_dict()) == keys
    generate(model, inputs)
    handle.pause()
    same(dense, generate(model, inputs))
    handle.resume()
    assert min(lengths(generate(model, inputs))) < min(lengths(dense))
    handle.remove()
    same(dense, generate(model, inputs))
    assert state(model) == before


def test_an_exception_leaves_the_model_usable() -> None:
    class Broken(Pick):
        def reduce(self, site: Any) -> Any:
            if site.site == "decoder" and broken:
                raise ZeroDivisionError("in the middle")
            return super().reduce(site)

    model, inputs = made("llava", 2)
    dense = generate(model, inputs)
    broken = True
    with vtr.apply(model, Broken(BOTH.at, BOTH.keep)):
        with pytest.raises(ZeroDivisionError):
            generate(model, inputs)
        broken = False
        after = generate(model, inputs)
        text = {k: inputs[k][:, -3:] for k in ("input_ids", "attention_mask")}
        model(**text)
    same(dense, generate(model, inputs))
    with vtr.apply(model, BOTH):
        same(after, generate(model, inputs))


def test_copies_live_on_their_own() -> None:
    model, inputs = FAMILIES["llava"](2)
    dense = generate(model, inputs)
    handle = vtr.apply(model, BOTH)
    reduced = generate(model, inputs)
    twin = copy.deepcopy(model)
    handle.remove()
    same(dense, generate(model, inputs))
    same(reduced, generate(twin, inputs))
    for h in vtr.handles(twin):
        h.remove()
    same(dense, generate(twin, inputs))


def test_a_copied_cache_goes_on_from_the_same_cut() -> None:
    """The usual way to share a prompt's cache between questions."""
    model, inputs = made("llava", 1)
    with torch.no_grad(), vtr.apply(model, BOTH):
        first = model(**inputs)
        mask = torch.ones(1, inputs["input_ids"].shape[1] + 1, dtype=torch.long)
        answers = []
        for token in (30, 31, 30):
            cache = copy.deepcopy(first.past_key_values)
            out = model(
                input_ids=torch.tensor([[token]]), attention_mask=mask, past_key_values=cache
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
        generate(model, turn, past_key_values=first.past_key_values)
    with vtr.apply(model, KEEP_ALL):  # any method will do
        generate(model, turn, past_key_values=first.past_key_values)


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


def test_a_sample_is_drawn_on_the_grid_of_its_own_image() -> None:
    model, inputs = FAMILIES["qwen2_5_vl"](2)
    with vtr.apply(model, vtr.DivPrune(keep=4)) as handle:
        generate(model, inputs)
        (stage,) = handle.trace.stages
        assert stage.grids == ((4, 6), (4, 4))
        for sample in (0, 1):
            assert vtr.draw(handle, sample=sample, size=96).width == 96
    model, inputs = FAMILIES["llava"](2)
    with vtr.apply(model, vtr.DivPrune(keep=4)) as handle:
        generate(model, inputs)
        vtr.draw(handle, inputs["pixel_values"][0], sample=0)
        with pytest.raises(ValueError, match=r"sample 1 .* has 2 pictures: choose with which="):
            vtr.draw(handle, sample=1)
        with pytest.raises(ValueError, match=r"which must be in 0\.\.1"):
            vtr.draw(handle, sample=1, which=2)
        with pytest.raises(ValueError, match=r"sample must be in 0\.\.1, got 2"):
            vtr.draw(handle, sample=2)
        assert vtr.draw(handle, sample=1, which=1, size=96).width == 96


@pytest.mark.parametrize("outer", [True, False], ids=["outer-first", "inner-first"])
def test_a_model_and_its_inner_model_are_not_wrapped_both(outer: bool) -> None:
    model, inputs = FAMILIES["llava"](1)
    dense = generate(model, inputs)
    first, second = (model, model.model) if outer else (model.model, model)
    with vtr.apply(first, vtr.FastV(keep=4)):
        alone = generate(model, inputs)
        with pytest.raises(vtr.UnsupportedModelError, match=r"another vtr\.apply"):
            vtr.apply(second, vtr.DivPrune(keep=8))
        same(alone, generate(model, inputs))
    same(dense, generate(model, inputs))


def test_a_sample_without_an_image_in_a_batch_with_one() -> None:
    model, _ = made("llava", 1)
    inputs = {**prompts([[16], []]), "pixel_values": noise(1, 3, 28, 28)}
    dense = generate(model, inputs)
    for method in (PROMPT, DECODER, BOTH, vtr.create("fastv", keep=5, layer=2)):
        with vtr.apply(model, method) as handle:
            reduced = generate(model, inputs)
            assert handle.trace.stages[0].total.valid[1].sum() == 0
        for a, b in zip(dense.logits, reduced.logits, strict=True):
            torch.testing.assert_close(a[1], b[1], rtol=0, atol=CLOSE)
            assert float((a[0] - b[0]).abs().max()) > CLOSE
            if not torch.equal(a.argmax(-1), b.argmax(-1)):
                break


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["llava_next", "qwen3_vl"])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    model, inputs = FAMILIES[name](2)
    model.to(dtype)
    dense = generate(model, inputs)
    with vtr.apply(model, KEEP_ALL):
        same(dense, generate(model, inputs))
    for method in (BOTH, vtr.create("flowcut", keep=8), vtr.create("sparsevlm")):
        with vtr.apply(model, method):
            reduced = generate(model, inputs)
        assert min(lengths(reduced)) < min(lengths(dense))
        for logits in reduced.logits:
            assert bool(torch.isfinite(logits).all())
        for layer in reduced.past_key_values.layers:
            assert layer.keys.dtype == dtype


def test_a_mask_of_the_wrong_width_is_refused() -> None:
    model, inputs = made("llava", 1)
    with vtr.apply(model, PROMPT):
        cache = model(**inputs).past_key_values
        with pytest.raises(ValueError, match="one for every token so far"):
            model(
                input_ids=torch.tensor([[7]]),
                attention_mask=torch.ones(1, 6, dtype=torch.long),
                past_key_values=cache,
            )


def test_methods_follow_one_another() -> None:
    model, inputs = made("llava", 2)
    with vtr.apply(model, [PROMPT, DECODER]) as handle:
        one = generate(model, inputs)
        assert [s.site for s in handle.trace.stages] == ["prompt", "decoder", "decoder"]
        assert handle.trace.stages[-1].total.n_in == 32
    first, second = vtr.apply(model, DECODER), vtr.apply(model, PROMPT)
    same(one, generate(model, inputs))
    first.remove()
    with pytest.raises(ValueError, match="different layers"):
        vtr.apply(model, PROMPT)
    second.remove()


def test_stages_that_do_not_exist_are_refused() -> None:
    model, _ = made("llava", 1)
    with pytest.raises(ValueError, match="nothing comes after layer 3"):
        vtr.apply(model, Pick((("decoder", 3, "end"),)))
    with pytest.raises(ValueError, match="nothing comes after layer 3"):
        vtr.apply(model, Pick((("decoder", 3, "middle"),)))
    with pytest.raises(ValueError, match="'start', 'middle' or 'end'"):
        vtr.apply(model, Pick((("decoder", 1, "inside"),)))
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_the_inner_model_can_be_wrapped() -> None:
    model, inputs = FAMILIES["llava"](2)
    with vtr.apply(model, BOTH):
        whole = model(**inputs)
    with vtr.apply(model.model, BOTH) as handle:
        inner = model.model(**inputs)
        assert handle.report().to_dict()["kv_bytes"] is not None
    torch.testing.assert_close(model.lm_head(inner.last_hidden_state), whole.logits)


def test_keeping_all_reports_no_gain() -> None:
    model, inputs = made("llava", 2)
    with vtr.apply(model, KEEP_ALL) as handle:
        with pytest.raises(RuntimeError, match="has not been called"):
            handle.report()
        generate(model, inputs)
        report = handle.report().to_dict()
    assert report["flops"]["language"]["dense"] == report["flops"]["language"]["reduced"]
    assert report["kv_bytes"]["dense"] == report["kv_bytes"]["reduced"]


def test_layers_of_an_unknown_form_are_not_cut_in_the_middle() -> None:
    """A layer of another form than x + mlp(norm(x)) would lose what its form adds."""
    model, _ = FAMILIES["llava"](1)
    layers = model.model.language_model.layers
    layers[0].__class__ = type("OddLayer", (type(layers[0]),), {})
    with pytest.raises(
        vtr.UnsupportedMethodError, match=r"OddLayer cannot be opened: use the layer's end"
    ):
        vtr.apply(model, Pick((("decoder", 1, "middle"),)))


def test_the_trace_can_be_drawn() -> None:
    model, inputs = made("llava", 1)
    with vtr.apply(model, BOTH) as handle:
        model(**inputs)
        assert [s.grid for s in handle.trace.stages] == [(4, 4), (4, 4)]
        picture = vtr.draw(handle, inputs["pixel_values"])
    assert picture.size[0] > picture.size[1]
    assert handle.trace.kept is not None and handle.trace.kept.tolist() == [
        sorted(handle.trace.kept[0].tolist())
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_can_be_drawn(name: str) -> None:
    """Grids, packed crops, and tiles; with a picture and without."""
    model, inputs = FAMILIES[name](1)
    with vtr.apply(model, PROMPT) as handle:
        model(**inputs)
        (stage,) = handle.trace.stages
        assert stage.frames is not None
        views = {span.views for span in stage.frames.videos[0]}
        for image in (None, torch.rand(3, 20, 40)):
            picture = vtr.draw(handle, image, size=64, show_input=False)
            parts = max(1, *(len(v) for v in views))
            assert picture.width == parts * 64 + (parts - 1) * 8


def test_crops_of_a_tower_are_not_taken_for_samples() -> None:
    """LLaVA-NeXT's tower counts crops: its own stages say nothing of a sample, the prompt's do."""
    model, inputs = FAMILIES["llava_next"](2)
    with vtr.apply(model, vtr.CLSAttention(keep=0.5, layers=(1,), site="encoder")) as handle:
        model(**inputs)
        tower, prompt = handle.trace.stages
        assert tower.total.batch > prompt.total.batch == 2
        for sample in (0, 1):  # the base crop, and the crops put together
            assert vtr.draw(handle, sample=sample, size=64, show_input=False).width == 2 * 64 + 8
    model, inputs = FAMILIES["llava"](1)
    with vtr.apply(model, vtr.CLSAttention(keep=0.5, layers=(1,), site="encoder")) as handle:
        model(**inputs)
        assert vtr.draw(handle, size=64).width == 2 * 64 + 8  # the tower's stage, the prompt's


def test_a_family_that_cannot_work_is_refused_with_its_reason() -> None:
    config = transformers.Gemma3Config(
        text_config={**TEXT, "head_dim": 16, "sliding_window": 8},
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "image_size": 28,
            "patch_size": 7,
        },
        mm_tokens_per_image=4,
    )
    model = transformers.Gemma3ForConditionalGeneration(config)
    with pytest.raises(vtr.UnsupportedModelError, match=r"both directions.*LLaVA-1\.5"):
        vtr.apply(model, PROMPT)


def test_sliding_windows_are_refused() -> None:
    text = transformers.MistralConfig(**TEXT, sliding_window=8)
    config = transformers.LlavaConfig(vision_config=clip(), text_config=text, image_token_id=IMAGE)
    model = build(transformers.LlavaForConditionalGeneration, config)
    for method in (PROMPT, DECODER):
        with pytest.raises(vtr.UnsupportedMethodError, match="sliding-window layers"):
            vtr.apply(model, method)


def test_checkpointing_is_refused_in_training() -> None:
    model, inputs = FAMILIES["llava"](1)
    model.train()
    model.gradient_checkpointing_enable()
    with (
        vtr.apply(model, PROMPT),
        pytest.raises(RuntimeError, match="gradient_checkpointing_disable"),
    ):
        model(**inputs, use_cache=False)


@pytest.mark.skipif(not ENCODES_FIRST, reason="this version of transformers has no such features")
def test_features_from_elsewhere_have_no_scores() -> None:
    model, inputs = made("llava", 1)
    pixels = inputs["pixel_values"]
    text = {k: v for k, v in inputs.items() if k != "pixel_values"}
    look = vtr.create("vtc-cls", keep=4, window=1)
    with torch.no_grad(), vtr.apply(model, look):
        mine = model.model.get_image_features(pixels)
        model.model.get_image_features(-pixels)
        with pytest.raises(RuntimeError, match="the vision tower did not run for this prompt"):
            model(**text, mm_encoder_outputs={"image": mine})
        again = model.model.get_image_features(pixels)
        a = model(**text, mm_encoder_outputs={"image": again}).logits
        torch.testing.assert_close(a, model(**inputs).logits)


@pytest.mark.skipif(not ENCODES_FIRST, reason="this version of transformers has no such features")
def test_a_prompt_in_chunks_is_refused() -> None:
    model, inputs = made("llava", 1)
    look = vtr.create("vtc-cls", keep=4, window=1)
    with vtr.apply(model, look), pytest.raises(RuntimeError, match="no chunked prefill"):
        generate(model, inputs, prefill_chunk_size=8)
