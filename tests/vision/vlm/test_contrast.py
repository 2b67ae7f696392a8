"""Decoding by contrast, against a calculation without a cache, a batch or a processor (``contrasts.py``)."""

from __future__ import annotations

import copy
import gc
import weakref
from functools import cache
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

import vtr
from tests.vision.vlm.contrasts import Loudest, Mean, Reference, contrasted
from tests.vision.vlm.models import FAMILIES, noise, prompts, repeats_samples
from tests.vision.vlm.picks import DECODER, generate
from tests.vision.vlm.videos import VIDEOS
from vtr.compat.transformers import PROCESSORS, cache_of, with_cache
from vtr.testing.models.prompts import split, with_completion
from vtr.vision.vlm.branch import Branch, branch_of

pytestmark = pytest.mark.usefixtures("without_gradients")
SECOND = Loudest(alpha=2.0)


@cache
def made(name: str) -> tuple[Any, dict[str, Any]]:
    return (FAMILIES | VIDEOS)[name](2)


def written(out: Any, inputs: dict[str, Any]) -> list[list[int]]:
    return out.sequences[:, inputs["input_ids"].shape[1] :].tolist()  # type: ignore[no-any-return]


def agree(found: Tensor, wanted: np.ndarray, tolerance: float = 2e-5) -> None:
    """Log-probabilities of the same tokens; a token at the limit of beta may be one of them or not."""
    got = found.double().log_softmax(-1).numpy()
    both = np.isfinite(got) & np.isfinite(wanted)
    assert both.sum() >= max(1, np.isfinite(wanted).sum() - 2)
    assert (np.isfinite(got) ^ np.isfinite(wanted)).sum() <= 2
    np.testing.assert_allclose(got[both], wanted[both], atol=tolerance)


# ---- the formula ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("llava", SECOND),
        ("llava_onevision", Mean(alpha=0.5)),
        ("qwen2_5_vl", SECOND),
        ("qwen3_vl", SECOND),
        ("qwen3_vl", Mean(alpha=0.5)),
        ("internvl", SECOND),
        ("qwen2_5_vl_video", SECOND),
        ("llava_onevision_mixed", SECOND),
    ],
    ids=str,
)
def test_every_step_has_the_scores_of_the_formula(name: str, method: Any) -> None:
    """Of samples in a batch with padding on the left, of which one has several images."""
    model, inputs = made(name)
    with vtr.apply(model, method):
        out = generate(model, inputs, output_scores=True)
    for b, (sample, text) in enumerate(zip(split(inputs), written(out, inputs), strict=True)):
        reference = Reference(model, method, sample)
        for step, scores in enumerate(out.scores):
            agree(scores[b], reference.scores(text[:step]))


def test_positions_may_be_numbered_anew() -> None:
    class Compact(Loudest):
        positions: ClassVar[str] = "compact"

    model, inputs = made("llava")
    with vtr.apply(model, Compact(alpha=2.0)):
        out = generate(model, inputs, output_scores=True)
    sample, text = split(inputs)[1], written(out, inputs)[1]
    for step in (0, 3):
        agree(out.scores[step][1], Reference(model, SECOND, sample, True).scores(text[:step]))


@repeats_samples
@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_a_beam_has_the_score_of_its_text(name: str) -> None:
    model, inputs = made(name)
    with vtr.apply(model, SECOND):
        out = generate(model, inputs, num_beams=3, num_return_sequences=3, output_scores=True)
    references = [Reference(model, SECOND, sample) for sample in split(inputs)]
    for row, text in enumerate(written(out, inputs)):
        total = np.mean([references[row // 3].scores(text[:t])[x] for t, x in enumerate(text)])
        assert abs(total - float(out.sequences_scores[row])) < 1e-5


def test_beams_of_samples_with_the_same_text_are_kept_apart() -> None:
    """Equal ids have equal caches in one sample alone: the pictures of another one differ."""
    model, _ = FAMILIES["llava"](1)
    one = prompts([[16]])
    both = {k: torch.cat([v, v]) for k, v in one.items()}
    pixels = noise(2, 3, 28, 28)
    rows = [{**one, "pixel_values": pixels[b : b + 1]} for b in range(2)]
    with vtr.apply(model, SECOND):
        found = generate(model, {**both, "pixel_values": pixels}, num_beams=3, output_scores=True)
        alone = [generate(model, row, num_beams=3, output_scores=True) for row in rows]
    for b in range(2):
        assert torch.equal(found.sequences[b], alone[b].sequences[0])
        torch.testing.assert_close(found.sequences_scores[b], alone[b].sequences_scores[0])


def test_sampling_draws_from_the_formula() -> None:
    model, inputs = made("llava")
    with vtr.apply(model, SECOND):
        torch.manual_seed(3)
        out = generate(model, inputs, do_sample=True, temperature=0.7, top_k=0, output_scores=True)
    text = written(out, inputs)[0]
    for step, scores in enumerate(out.scores):
        wanted = Reference(model, SECOND, split(inputs)[0]).scores(text[:step]) / 0.7
        agree(scores[0], wanted - np.log(np.exp(wanted[np.isfinite(wanted)]).sum()))
        assert np.isfinite(wanted[text[step]])


# ---- its limits ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_the_same_prompt_makes_no_difference(name: str) -> None:
    model, inputs = made(name)
    with vtr.apply(model, Loudest(k=10**6, alpha=3.0, beta=0.0)):
        out = generate(model, inputs, output_scores=True)
    for scores, logits in zip(out.scores, out.logits, strict=True):
        assert torch.equal(scores, logits)


def test_alpha_zero_leaves_beams_as_they_are() -> None:
    model, inputs = made("llava")
    wanted = generate(model, inputs, num_beams=3, output_scores=True)
    with vtr.apply(model, Loudest(alpha=0.0)):
        found = generate(model, inputs, num_beams=3, output_scores=True)
    assert torch.equal(found.sequences, wanted.sequences)
    assert torch.equal(found.sequences_scores, wanted.sequences_scores)


def test_a_token_that_is_forbidden_makes_others_plausible() -> None:
    """Without it nothing would be left to choose from."""
    model, inputs = made("llava")
    first = generate(model, inputs, max_new_tokens=1).logits[0]
    best = first.argmax(-1)
    forbidden = sorted(set(best.tolist()))
    with vtr.apply(model, Loudest(beta=1.0)):
        out = generate(model, inputs, max_new_tokens=1, suppress_tokens=forbidden)
    left = first.index_fill(1, torch.tensor(forbidden), -float("inf"))
    assert torch.equal(out.sequences[:, -1], left.argmax(-1))


def test_samples_without_pictures_are_left_as_they_are() -> None:
    model, _ = FAMILIES["llava"](1)
    inputs = {"pixel_values": noise(1, 3, 28, 28), **prompts([[16], []])}
    options = {"do_sample": True, "output_scores": True}
    torch.manual_seed(5)
    wanted = generate(model, inputs, **options)
    for method in (SECOND, Mean()):
        with vtr.apply(model, method):
            torch.manual_seed(5)
            found = generate(model, inputs, **options)
            text = generate(model, prompts([[]]), output_scores=True)
        assert not torch.equal(found.scores[0][0], wanted.scores[0][0])
        assert torch.equal(found.scores[0][1], wanted.scores[0][1])
        assert torch.equal(text.scores[0], text.logits[0])


# ---- generate ------------------------------------------------------------------------------------


@repeats_samples
@pytest.mark.parametrize(
    ("name", "method"), [("llava", Mean()), ("qwen3_vl", SECOND)], ids=["llava", "qwen3_vl"]
)
def test_every_cache_of_the_model(name: str, method: Any) -> None:
    model, inputs = made(name)
    with vtr.apply(model, method):
        for options in ({}, {"num_beams": 2}):
            wanted = generate(model, inputs, **options).sequences
            assert torch.equal(generate(model, inputs, **options).sequences, wanted)
            static = generate(model, inputs, cache_implementation="static", **options)
            assert torch.equal(static.sequences, wanted)
            free = generate(model, inputs, use_cache=False, **options)
            assert torch.equal(free.sequences, wanted)


def test_what_the_model_keeps_between_calls_is_its_own() -> None:
    model, inputs = made("qwen3_vl")
    generate(model, inputs)
    wanted = model.model.rope_deltas.clone()
    with vtr.apply(model, SECOND):
        generate(model, inputs)
    assert torch.equal(model.model.rope_deltas, wanted)


@pytest.mark.parametrize("other", [DECODER, vtr.FastV(keep=0.4)], ids=["cuts", "fastv"])
def test_other_methods_act_on_the_models_own_run_alone(other: Any) -> None:
    model, inputs = made("llava")
    with vtr.apply(model, [other, SECOND]):
        out = generate(model, inputs, output_scores=True)
    with vtr.apply(model, other):
        plain = generate(model, inputs)
    assert torch.equal(plain.logits[0], out.logits[0])
    for b, (sample, text) in enumerate(zip(split(inputs), written(out, inputs), strict=True)):
        reference = Reference(model, SECOND, sample)
        for step in range(4):
            full = out.logits[step][b].double().numpy()
            other_run = reference.both(text[:step])[1]
            agree(out.scores[step][b], contrasted(full, other_run, SECOND.alpha, SECOND.beta))


def test_a_failure_inside_leaves_the_model_usable() -> None:
    model, inputs = made("llava")

    def fail(*args: Any) -> None:
        raise ZeroDivisionError

    with vtr.apply(model, SECOND) as handle:
        wanted = generate(model, inputs)
        session = handle._wrapping.contrast  # type: ignore[attr-defined]
        hook = model.model.language_model.layers[1].register_forward_pre_hook(
            lambda *a: fail() if session.inside else None
        )
        with pytest.raises(ZeroDivisionError):
            generate(model, inputs)
        hook.remove()
        assert not session.inside
        assert torch.equal(generate(model, inputs).sequences, wanted.sequences)
    assert PROCESSORS not in model.__dict__


def test_the_second_run_ends_with_its_generate() -> None:
    model, inputs = made("llava")
    with vtr.apply(model, SECOND):
        out = generate(model, inputs)
        kept = weakref.ref(branch_of(cache_of(out)))  # type: ignore[arg-type]
        del out
        gc.collect()
        assert kept() is None


# ---- conversations -------------------------------------------------------------------------------


def turn(model: Any, inputs: dict[str, Any], cache: Any, **options: Any) -> Any:
    """Continue a cache with text."""
    text = {k: v for k, v in inputs.items() if "pixel" not in k and "grid" not in k}
    return generate(model, text, **with_cache(type(model).forward, cache), **options)


SAID = torch.tensor([[31, 32, 33]])


@pytest.mark.parametrize("method", [SECOND, Mean()], ids=str)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_later_turn_continues_both_runs(name: str, method: Any) -> None:
    model, inputs = made(name)
    one = split(inputs)[0]
    with vtr.apply(model, method):
        first = generate(model, one)
        longer = with_completion(one, torch.cat([first.sequences[0, -4:], SAID[0]]))
        whole = generate(model, longer, output_scores=True)
        twin, shorter = (copy.deepcopy(cache_of(first)) for _ in range(2))
        for layer in shorter.layers:  # the last words are taken back
            layer.keys, layer.values = layer.keys[:, :, :-2], layer.values[:, :, :-2]
        for past in (cache_of(first), twin, shorter):
            later = turn(model, longer, past, output_scores=True)
            assert torch.equal(later.sequences, whole.sequences)
            for x, y in zip(later.scores, whole.scores, strict=True):
                agree(x[0], y[0].double().log_softmax(-1).numpy())


def test_a_conversation_may_begin_with_text() -> None:
    """Both runs are the same one until a picture comes."""
    model, inputs = FAMILIES["llava"](1)
    text = {"input_ids": SAID, "attention_mask": torch.ones_like(SAID)}
    with vtr.apply(model, SECOND):
        first = generate(model, text)
        ids = torch.cat([first.sequences, inputs["input_ids"]], 1)
        longer = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        whole = generate(model, longer)
        cache = with_cache(type(model).forward, cache_of(first))
        assert torch.equal(generate(model, longer, **cache).sequences, whole.sequences)


def test_a_cache_whose_pictures_it_has_not_seen_is_refused() -> None:
    model, inputs = FAMILIES["llava"](1)
    past = cache_of(model(**inputs, use_cache=True))
    longer = with_completion(inputs, SAID[0])
    with vtr.apply(model, SECOND):
        with pytest.raises(RuntimeError, match=r"for the first 22 columns.*begin with a new cache"):
            turn(model, longer, past)
        first = generate(model, inputs)
        other = with_completion(inputs, torch.cat([first.sequences[0, -4:] + 1, SAID[0]]))
        with pytest.raises(RuntimeError, match="begin with a new cache"):
            turn(model, other, cache_of(first))


# ---- refusals ------------------------------------------------------------------------------------


def test_assisted_decoding_is_refused() -> None:
    model, inputs = FAMILIES["llava"](1)
    with vtr.apply(model, SECOND):
        with pytest.raises(
            vtr.UnsupportedMethodError, match="loudest contrasts one token at a time"
        ):
            generate(model, inputs, prompt_lookup_num_tokens=2)
        generate(model, inputs)


def test_a_processor_without_a_call_is_refused() -> None:
    model, inputs = FAMILIES["llava"](1)
    with vtr.apply(model, SECOND):
        made = getattr(model, PROCESSORS)(generation_config=model.generation_config)
        with pytest.raises(RuntimeError, match="has not called the language model for this step"):
            made(inputs["input_ids"], torch.zeros(1, 200))


def test_rows_that_follow_nothing_are_refused() -> None:
    branch = Branch(None)
    branch.ids = torch.tensor([[1, 2], [1, 3]])
    branch.follow(torch.tensor([[1, 3, 5], [1, 3, 6]]), beams=2)
    with pytest.raises(RuntimeError, match="continues none of the rows"):
        branch.follow(torch.tensor([[1, 4, 5], [1, 3, 6]]), beams=2)
    branch.ids = torch.tensor([[1, 2], [1, 3]])
    with pytest.raises(RuntimeError, match="continues none of the rows"):  # of another sample
        branch.follow(torch.tensor([[1, 3, 5], [1, 3, 6]]), beams=1)


def test_what_cannot_be_combined_is_refused() -> None:
    model, _ = FAMILIES["llava"](1)
    with pytest.raises(ValueError, match="loudest and mean both contrast the logits"):
        vtr.apply(model, [SECOND, Mean()])
    with pytest.raises(ValueError, match=r"chooses among all visual tokens.*tome cuts some before"):
        vtr.apply(model, [SECOND, vtr.ToMe(r=1)])
    with pytest.raises(vtr.UnsupportedMethodError, match="a LlavaModel writes no text: apply the"):
        vtr.apply(model.model, SECOND)


def test_options_are_checked() -> None:
    for wrong in ({"alpha": -1.0}, {"alpha": float("inf")}, {"beta": 1.5}, {"beta": True}):
        (name,) = wrong
        with pytest.raises(ValueError, match=f"{name} must be a number"):
            Loudest(**wrong)  # type: ignore[arg-type]

    class Nothing(Loudest):
        keep = vtr.methods.base.ContrastMethod.keep

    model, inputs = FAMILIES["llava"](1)
    with vtr.apply(model, Nothing()), pytest.raises(NotImplementedError, match=r"keep\(site\)"):
        generate(model, inputs)
