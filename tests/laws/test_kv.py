"""Methods at the KV cache, where the laws of a conversation are not enough: all ways of generate, caches, refusals."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import vtr
from tests.laws.everyone import CACHE
from tests.laws.test_inside import (
    close,
    forced,
    generate,
    logits,
    positions,
    prompted,
    sliding,
    transformers,
)
from tests.laws.test_planted_inside import Flatter, Thirds
from tests.laws.test_planted_kv import AllLayers, Fewer, Merging, Received, SmallKeys
from tests.vision.vlm.models import repeats_samples
from vtr.compat.transformers import cache_of, with_cache
from vtr.core.registry import registry
from vtr.testing import KINDS, examples
from vtr.testing import kv as laws
from vtr.testing.methods import trial_of

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.compat]

KIND = KINDS["internvl"].longer
OWN = (
    SmallKeys(0.4),
    Received(0.4, every=1, evict="all", first=1, recent=3, heads="adaptive"),
    Merging(0.4, every=2),
    Fewer(2),
    AllLayers(0.4, depth="pyramid"),
)
# What keeps everything of them.
WHOLE: dict[type, dict[str, Any]] = {
    SmallKeys: {"keep": 1.0},
    Received: {"keep": 1.0, "evict": "visual"},
    Merging: {"keep": 1.0},
    Fewer: {"low": 16},
    AllLayers: {"keep": 1.0, "depth": "uniform"},
}
every = pytest.mark.parametrize("method", OWN, ids=lambda m: type(m).__name__)
SAID = torch.tensor([[31, 77, 8], [5, 60, 99]])


def after(model: Any, cache: Any, inputs: dict[str, Any], tokens: Tensor = SAID) -> Tensor:
    """Logits behind tokens that continue a prompt from its cache."""
    return forced(model, cache, inputs["attention_mask"], tokens)


# ---- who may use a cache -------------------------------------------------------------------------


@every
def test_a_cache_is_for_the_method_alone(method: Any) -> None:
    model, inputs = KIND.model, KIND.whole
    with vtr.apply(model, method) as handle:
        cache = prompted(model, inputs)
        wanted = after(model, copy.deepcopy(cache), inputs)
        handle.pause()
        with pytest.raises(RuntimeError, match="only be continued while a method at the site kv"):
            after(model, copy.deepcopy(cache), inputs)
        handle.resume()
        assert torch.equal(after(model, copy.deepcopy(cache), inputs), wanted)
    with pytest.raises(RuntimeError, match="only be continued while a method at the site kv"):
        after(model, copy.deepcopy(cache), inputs)
    for other in (vtr.FastV(keep=0.5), method.replace(dense_layers=1)):
        with vtr.apply(model, other), pytest.raises(RuntimeError, match="at the site kv"):
            after(model, copy.deepcopy(cache), inputs)
    with vtr.apply(model, method):
        assert torch.equal(after(model, cache, inputs), wanted)


def test_a_call_that_failed_leaves_the_cache_guarded() -> None:
    model, inputs = KIND.model, KIND.whole

    def fail(*args: Any) -> None:
        raise InterruptedError

    with vtr.apply(model, SmallKeys(0.4)):
        cache = prompted(model, inputs)
        hook = model.model.language_model.layers[1].register_forward_pre_hook(fail)
        with pytest.raises(InterruptedError):
            after(model, cache, inputs)
        hook.remove()
    with pytest.raises(RuntimeError, match="only be continued while a method at the site kv"):
        after(model, cache, inputs)


# ---- generate in all its ways --------------------------------------------------------------------


def several_of(times: int) -> dict[str, Any]:
    """Both samples, each several times in a row."""
    rows = [sample for sample in KIND.samples for _ in range(times)]
    return KIND.batch(rows)


@every
def test_a_static_cache_is_a_dynamic_one(method: Any) -> None:
    model, inputs = KIND.model, KIND.whole
    with vtr.apply(model, method):
        wanted = logits(generate(model, inputs))
        close(logits(generate(model, inputs, cache_implementation="static")), wanted)
    with vtr.apply(model, method.replace(**WHOLE[type(method)])):
        found = logits(generate(model, inputs, cache_implementation="static"))
    wanted = logits(generate(model, inputs, cache_implementation="static"))
    if torch.equal(wanted, logits(generate(model, inputs))):
        assert torch.equal(found, wanted)
    else:  # the model's own caches differ by rounding
        close(found, wanted, 1e-5)


@repeats_samples
@every
def test_samples_have_the_logits_of_their_texts(method: Any) -> None:
    """Several of each prompt; the same seed gives the same."""
    model, inputs = KIND.model, KIND.whole
    options = {"do_sample": True, "num_return_sequences": 2, "temperature": 2.0}
    with vtr.apply(model, method):
        out = generate(model, inputs, **options)
        assert torch.equal(generate(model, inputs, **options).sequences, out.sequences)
        texts, several = out.sequences[:, inputs["input_ids"].shape[1] :], several_of(2)
        later = after(model, prompted(model, several), several, texts[:, :-1])
    close(logits(out)[:, 1:], later)
    assert len({tuple(row) for row in texts.tolist()}) > 2


@repeats_samples
@every
def test_each_beam_has_the_score_of_its_text(method: Any) -> None:
    model, inputs = KIND.model, KIND.whole
    with vtr.apply(model, method):
        out = generate(model, inputs, num_beams=3, num_return_sequences=3, output_scores=True)
        texts, several = out.sequences[:, inputs["input_ids"].shape[1] :], several_of(3)
        begin = generate(model, several, max_new_tokens=1)
        later = after(model, prompted(model, several), several, texts[:, :-1])
    scores = torch.cat([logits(begin), later], 1).log_softmax(-1)
    close(out.sequences_scores, scores.gather(2, texts[..., None]).mean((1, 2)))
    assert len({tuple(row) for row in texts[:3].tolist()}) == 3


@every
def test_drafts_are_right_or_refused(method: Any) -> None:
    model, sample = KIND.model, KIND.samples[1]
    options = {"max_new_tokens": 6, "prompt_lookup_num_tokens": 3}
    with vtr.apply(model, method):
        if method.while_decoding:
            words = f"{method.name} chooses entries of the KV cache while the answer is written"
            with pytest.raises(vtr.UnsupportedMethodError, match=words):
                generate(model, sample, **options)
            return
        wanted = generate(model, sample, max_new_tokens=6)
        found = generate(model, sample, **options)
    assert torch.equal(found.sequences, wanted.sequences)
    close(logits(found), logits(wanted))


def test_drafts_are_refused_with_a_budget_in_bytes() -> None:
    with (
        vtr.apply(KIND.model, SmallKeys(bytes="1MB")),
        pytest.raises(vtr.UnsupportedMethodError, match="use every=0 and keep instead of bytes"),
    ):
        generate(KIND.model, KIND.samples[1], prompt_lookup_num_tokens=3)


@every
def test_a_later_turn_of_generate(method: Any) -> None:
    """It continues from the cache of the first, and is what the tokens are one by one or in a turn."""
    model, sample = KIND.model, KIND.samples[0]
    more = torch.tensor([[31, 77, 8]])
    with vtr.apply(model, method):
        out = generate(model, sample)
        ids = torch.cat([out.sequences, more], 1)
        cache, said = copy.deepcopy(cache_of(out)), out.sequences[:, sample["input_ids"].shape[1] :]
        again = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        found = generate(model, again, **with_cache(type(model).forward, cache_of(out)))
        mask = torch.ones(1, cache.get_seq_length(), dtype=torch.long)
        turn = torch.cat([said[:, -1:], more], 1)
        mask = torch.cat([mask, torch.ones_like(turn)], 1)
        with torch.no_grad():
            wanted = model(
                input_ids=turn, attention_mask=mask, position_ids=mask.cumsum(1)[:, -4:] - 1,
                **with_cache(type(model).forward, cache),
            ).logits[:, -1]  # fmt: skip
    close(found.logits[0], wanted)


# ---- what callers do with a cache ----------------------------------------------------------------


@every
def test_tokens_are_taken_back(method: Any) -> None:
    """As after an answer that is asked for again."""
    model, inputs = KIND.model, KIND.whole
    method = method.replace(every=0)
    with vtr.apply(model, method):
        cache = prompted(model, inputs)
        wanted = after(model, copy.deepcopy(cache), inputs)
        after(model, cache, inputs, SAID.flip(1))
        cache.crop(-3)
        assert torch.equal(after(model, copy.deepcopy(cache), inputs), wanted)
        length, held = cache.get_seq_length(), [layer.columns() for layer in cache.layers]
        cache.crop(-6)  # and a part of the prompt
        assert cache.get_seq_length() == length - 6
        for layer, before in zip(cache.layers, held, strict=True):
            found = layer.columns()
            left = before.masked_fill(before >= length - 6, -1).sort(2).values
            assert torch.equal(found.sort(2).values, left[..., -found.shape[2] :])
        shorter = {**inputs, "attention_mask": inputs["attention_mask"][:, :-6]}
        assert after(model, cache, shorter).isfinite().all()


@every
@pytest.mark.parametrize("way", ["repeat", "select", "reorder", "copy"])
def test_rows_are_moved(method: Any, way: str) -> None:
    model, inputs = KIND.model, KIND.whole
    mask, batch = inputs["attention_mask"], torch.arange(2)
    rows = {
        "repeat": batch.repeat_interleave(2),
        "select": torch.tensor([1]),
        "reorder": batch.flip(0),
    }
    index = rows.get(way, batch)
    with vtr.apply(model, method):
        cache = prompted(model, inputs)
        wanted = after(model, copy.deepcopy(cache), inputs)
        if way == "repeat":
            cache.batch_repeat_interleave(2)
        elif way == "select":
            cache.batch_select_indices(index)
        elif way == "reorder":
            cache.reorder_cache(index)
        else:
            cache = copy.deepcopy(cache)
        found = after(model, cache, {"attention_mask": mask[index]}, SAID[index])
    close(found, wanted[index])


@every
def test_a_cache_is_emptied_and_used_again(method: Any) -> None:
    model, inputs = KIND.model, KIND.whole
    with vtr.apply(model, method), torch.no_grad():
        cache = prompted(model, inputs)
        wanted = after(model, copy.deepcopy(cache), inputs)
        after(model, cache, inputs)
        cache.reset()
        assert cache.get_seq_length() == 0 and sum(x.nbytes for x in cache.layers) == 0
        cache.crop(-1)  # an empty one has nothing to take back or to move
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([1]))
        more = with_cache(type(model).forward, cache)
        model(**inputs, position_ids=positions(inputs), use_cache=True, **more)
        assert torch.equal(after(model, cache, inputs), wanted)
    cache.reset()  # an empty one is for every model
    dense = prompted(model, inputs)
    with torch.no_grad():
        model(**inputs, position_ids=positions(inputs), use_cache=True, **more)
    assert torch.equal(after(model, cache, inputs), after(model, dense, inputs))


# ---- refusals ------------------------------------------------------------------------------------


def test_generate_without_a_cache_is_refused() -> None:
    with (
        vtr.apply(KIND.model, SmallKeys(0.4)),
        pytest.raises(
            vtr.UnsupportedMethodError, match=r"small-keys acts on the KV cache.*use use_cache=True"
        ),
    ):
        generate(KIND.model, KIND.whole, use_cache=False)


@pytest.mark.parametrize("name", ["DynamicSlidingWindowLayer", "Fp8QuantizedLayer"])
def test_layers_that_hold_no_plain_entries_are_refused(name: str) -> None:
    made = getattr(transformers.cache_utils, name, None)
    if made is None:
        pytest.skip(f"this transformers has no {name}")
    cache = transformers.DynamicCache()
    options = {"sliding_window": 24} if "Sliding" in name else {}
    cache.layers = [made(**options) for _ in KIND.model.model.language_model.layers]
    with (
        vtr.apply(KIND.model, SmallKeys(0.4)),
        pytest.raises(
            vtr.UnsupportedMethodError,
            match=f"small-keys chooses entries.*layer 0 holds them in a {name}",
        ),
    ):
        KIND.model(**KIND.whole, **with_cache(type(KIND.model).forward, cache))


def test_sliding_windows_are_refused() -> None:
    with pytest.raises(vtr.UnsupportedMethodError, match="sliding-window layers, whose caches"):
        vtr.apply(sliding()[0], SmallKeys(0.4))


@pytest.mark.parametrize("other", [Flatter(), vtr.TidalDecode()], ids=["edit", "decode"])
def test_methods_that_read_the_whole_cache_are_refused_beside(other: Any) -> None:
    for methods in ([SmallKeys(0.4), other], [other, SmallKeys(0.4)]):
        with pytest.raises(ValueError, match=f"{other.name} reads the whole KV cache"):
            vtr.apply(KIND.model, methods)


# ---- beside other methods ------------------------------------------------------------------------


@pytest.mark.parametrize("other", [vtr.FastV(keep=0.5), Thirds(block=16, last_rows=2)], ids=str)
@every
def test_beside_a_cut_or_a_sparse_prefill(method: Any, other: Any) -> None:
    """Everything kept is the other method alone; and a sample alone is as in a batch."""
    model, inputs = KIND.model, KIND.whole
    with vtr.apply(model, other):
        wanted = logits(generate(model, inputs))
    with vtr.apply(model, [other, method.replace(**WHOLE[type(method)])]):
        assert torch.equal(logits(generate(model, inputs)), wanted)
    with vtr.apply(model, [method, other]) as handle:
        both = generate(model, inputs)
        assert not torch.allclose(logits(both)[:, 1:], wanted[:, 1:], atol=1e-4)
        assert handle.trace.notes["kv"]
        for b, sample in enumerate(KIND.samples):
            close(logits(generate(model, sample))[0], logits(both)[b], 2e-4)
        moved = generate(model, inputs, num_beams=2)
    assert moved.sequences.shape[0] == 2


@repeats_samples
@pytest.mark.parametrize("name", CACHE[1::3])
def test_each_beam_of_a_registered_method_has_the_score_of_its_text(name: str) -> None:
    method = examples(registry()[name]).some[0]
    test_each_beam_has_the_score_of_its_text(method)


@repeats_samples
@pytest.mark.parametrize("name", CACHE[2::3])
def test_samples_of_a_registered_method_have_the_logits_of_their_texts(name: str) -> None:
    test_samples_have_the_logits_of_their_texts(examples(registry()[name]).some[0])


@pytest.mark.parametrize("name", CACHE[::3])
def test_a_registered_method_moves_rows_and_takes_tokens_back(name: str) -> None:
    method = examples(registry()[name]).some[0]
    test_rows_are_moved(method, "reorder")
    test_tokens_are_taken_back(method)


@dataclass(frozen=True, kw_only=True)
class Selection(vtr.VASparse):
    """Its selection alone: the law of contrasts holds the whole, and sums are no full cache with a mask."""

    name: ClassVar[str] = "vasparse-selection"

    @classmethod
    def examples(cls) -> Any:
        parts: Any = {"merge": False, "penalty": 0.0, "alpha": 0.0}
        return {"some": (cls(0.6, **parts),), "everything": (cls(1.0, **parts),), "counted": ()}


def test_the_selection_of_vasparse_is_a_full_cache_with_a_mask() -> None:
    trial = trial_of(KIND, examples(Selection))
    for law in (laws.everything, laws.masked, laws.alone, laws.text):
        law(trial)
