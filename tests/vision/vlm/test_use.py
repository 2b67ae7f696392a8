"""A wrapped model in use: chats, losses, pipelines, copies, errors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import vtr
from tests.vision.vlm.models import (
    ENCODES_FIRST,
    FAMILIES,
    IMAGE,
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
    Masked,
    Pick,
    generate,
    gone_of,
    lengths,
    same,
)
from vtr.compat.transformers import cache_of, with_cache

# ---- losses --------------------------------------------------------------------------------------


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
    with vtr.apply(model, method, output="reduced"):
        short = model(**inputs, labels=labels)
    torch.testing.assert_close(out.loss, masked.loss, rtol=0, atol=CLOSE)
    torch.testing.assert_close(short.loss, masked.loss, rtol=0, atol=CLOSE)
    torch.testing.assert_close(rows[0], out.loss)
    assert out.logits.shape == masked.logits.shape
    assert short.logits.shape[1] < ids.shape[1]


def test_the_loss_where_only_the_shorter_sample_is_cut() -> None:
    """The longest row keeps its length, and the others move under it."""
    model, inputs = made("llava", 2)
    ids = inputs["input_ids"]
    labels = torch.where((ids == IMAGE) | (inputs["attention_mask"] == 0), -100, ids)
    for row in labels:
        row[: int((row == -100).nonzero().max()) + 2] = -100
    for at in (PROMPT.at, (("decoder", 1, "end"),)):
        for output in ("aligned", "reduced"):
            with vtr.apply(model, Pick(at, ((4, 32),)), output=output) as handle:
                out = model(**inputs, labels=labels)
                gone = gone_of(handle, ids)
                assert out.logits.shape[1] == handle.columns.shape[1] == ids.shape[1]
            with Masked(model, gone):
                masked = model(**inputs, labels=labels)
            torch.testing.assert_close(out.loss, masked.loss, rtol=0, atol=CLOSE)
            if output == "aligned":
                left = (inputs["attention_mask"] == 1) & ~torch.stack(list(gone.values())).any(0)
                torch.testing.assert_close(
                    out.logits[left], masked.logits[left], rtol=0, atol=CLOSE
                )


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


# ---- life ----------------------------------------------------------------------------------------


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
        for layer in cache_of(reduced).layers:
            assert layer.keys.dtype == dtype


def test_a_mask_of_the_wrong_width_is_refused() -> None:
    model, inputs = made("llava", 1)
    with vtr.apply(model, PROMPT):
        cache = cache_of(model(**inputs))
        with pytest.raises(ValueError, match="one for every token so far"):
            model(
                input_ids=torch.tensor([[7]]),
                attention_mask=torch.ones(1, 6, dtype=torch.long),
                **with_cache(type(model).forward, cache),
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
    with pytest.raises(ValueError, match=r"'inside', which does not exist\. Known: "):
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
