"""generate without a cache runs the prompt in every call, and keeps what the first one chose."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

import vtr
from tests.vision.vlm.methods import cutting
from tests.vision.vlm.models import ENCODES_FIRST, FAMILIES, IMAGE, VIDEO
from tests.vision.vlm.picks import CLOSE, PROMPT, Pick, generate, same
from tests.vision.vlm.videos import VIDEOS
from vtr.core.method import Reduction
from vtr.core.tokens import TokenMap

pytestmark = pytest.mark.usefixtures("without_gradients")


@cache
def made(name: str) -> tuple[Any, dict[str, Any]]:
    return (FAMILIES | VIDEOS)[name](2)


def frees(model: Any, method: vtr.Method) -> bool:
    info = vtr.handles(model)[0]._wrapping.info
    return any(stage.site == "kv" for stage in method.stages(info))


@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl_video"])
def test_the_answer_is_that_with_a_cache(name: str) -> None:
    """Methods that rank by the last text token would rank by the answer's."""
    model, inputs = made(name)
    refused = chosen = 0
    for method in cutting(model):
        with vtr.apply(model, method) as handle:
            if frees(model, method):
                refused += 1
                with pytest.raises(vtr.UnsupportedMethodError, match="use use_cache=True"):
                    generate(model, inputs, use_cache=False)
                model(**inputs, use_cache=False)  # scoring needs no cache
                continue
            try:
                cached = generate(model, inputs, suppress_tokens=[IMAGE, VIDEO])
            except vtr.UnsupportedMethodError as error:
                assert "inside the vision tower" in str(error)
                continue
            stages, notes = len(handle.trace.stages), set(handle.trace.notes)
            free = generate(model, inputs, use_cache=False, suppress_tokens=[IMAGE, VIDEO])
            same(cached, free, CLOSE)
            assert (len(handle.trace.stages), set(handle.trace.notes)) == (stages, notes)
            chosen += stages > 0
    assert refused and chosen > 3


class Counted(Pick):
    """Counts its decisions, of which every one differs."""

    def reduce(self, site: Any) -> Any:
        calls.append(site.layer)
        half = site.n // 2
        kept = (torch.arange(half) + len(calls) % half).expand(site.batch, -1)
        return Reduction(TokenMap.keep(kept, site.n))


calls: list[int] = []


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_a_method_is_asked_once_for_an_answer(options: dict[str, Any]) -> None:
    if options and not ENCODES_FIRST:
        pytest.skip("this version of transformers repeats images wrongly for beams, unwrapped too")
    model, inputs = FAMILIES["llava"](1)
    with vtr.apply(model, Counted((("prompt", 0, "entry"), ("decoder", 1, "end")))):
        calls.clear()
        cached = generate(model, inputs, **options)
        calls.clear()
        same(cached, generate(model, inputs, use_cache=False, **options), CLOSE)
        assert calls == [0, 1]
        again = generate(
            model, inputs, use_cache=False, **options
        )  # another answer, another choice
        assert calls == [0, 1, 0, 1]
        assert not torch.equal(again.logits[0], cached.logits[0])


def test_calls_of_others_between_leave_the_choice() -> None:
    """Contrastive decoding runs the model in a logits processor."""
    model, inputs = FAMILIES["llava"](1)

    def other(ids: Any, scores: Any) -> Any:
        model(**inputs, use_cache=False)
        return scores

    with vtr.apply(model, Counted()):
        calls.clear()
        cached = generate(model, inputs)
        calls.clear()
        same(cached, generate(model, inputs, use_cache=False, logits_processor=[other]), CLOSE)
    with vtr.apply(model, Counted()):
        calls.clear()
        lost = [model(**inputs, use_cache=False).logits for _ in range(2)]
        assert calls == [0, 0] and not torch.equal(*lost)  # each is a prompt of its own


def test_a_choice_that_fails_holds_nothing() -> None:
    class Broken(Counted):
        def reduce(self, site: Any) -> Any:
            if broken and site.layer:
                raise ZeroDivisionError
            return super().reduce(site)

    model, inputs = FAMILIES["llava"](1)
    broken = True
    with vtr.apply(model, Broken((("prompt", 0, "entry"), ("decoder", 1, "end")))):
        with pytest.raises(ZeroDivisionError):
            generate(model, inputs, use_cache=False)
        broken = False
        calls.clear()
        generate(model, inputs, use_cache=False)
        assert calls == [0, 1]


def test_an_answer_that_goes_on_with_other_samples_is_refused() -> None:
    model, inputs = FAMILIES["llava"](2)
    _, one = FAMILIES["llava"](1)
    with vtr.apply(model, PROMPT):
        generate(model, inputs, use_cache=False)
        made = model.prepare_inputs_for_generation(**one, use_cache=False)
        with pytest.raises(
            RuntimeError, match=r"began with 2 samples .* and continues with 1 of up to 16"
        ):
            model(**made)


def test_a_tower_that_chooses_anew_is_refused_where_it_runs_again() -> None:
    model, inputs = FAMILIES["llava"](1)
    with vtr.apply(model, vtr.Random(keep=0.5, site="encoder")):
        if ENCODES_FIRST:  # its features are made once
            generate(model, inputs, use_cache=False)
            return
        with pytest.raises(RuntimeError, match="random chose other tokens in the vision tower"):
            generate(model, inputs, use_cache=False)
