"""Methods that cut the tower beside methods that look into it."""

from __future__ import annotations

import pytest

import vtr
from tests.vision.vlm.models import made
from tests.vision.vlm.picks import generate

pytestmark = pytest.mark.usefixtures("without_gradients")

CUT = vtr.FlowCut(keep=12, language=False)


@pytest.mark.parametrize("name", ["llava", "llava_next"])
@pytest.mark.parametrize("look", ["visionzip", "vflowopt"])
def test_scores_of_a_tower_that_was_cut_before(name: str, look: str) -> None:
    model, inputs = made(name, 2)
    with (
        vtr.apply(model, [CUT, vtr.create(look, keep=0.3)]),
        pytest.raises(ValueError, match="flowcut cut the tower before it looked"),
    ):
        generate(model, inputs)


def test_layers_that_are_cut_between_their_looks() -> None:
    model, inputs = made("llava", 2)
    with (
        vtr.apply(model, [vtr.VTCCLS(keep=4), CUT]),
        pytest.raises(ValueError, match="cuts the encoder between the layers"),
    ):
        generate(model, inputs)


def test_a_cut_in_the_tower_and_text_attention_behind_it() -> None:
    model, inputs = made("llava", 2)
    with vtr.apply(model, [CUT, vtr.FastV(keep=4)]) as handle:
        generate(model, inputs)
        stages = [(s.method, s.site, s.tokens_out) for s in handle.trace.stages]
    assert stages[-2:] == [("flowcut", "prompt", 24), ("fastv", "decoder", 8)]
