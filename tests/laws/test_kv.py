"""Methods at the KV cache, where the laws of a conversation are not enough: all ways of generate, caches, refusals."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import vtr
from tests.laws.test_inside import forced, prompted
from tests.laws.test_planted_kv import AllLayers, Fewer, Merging, Received, SmallKeys
from vtr.testing import KINDS

pytestmark = pytest.mark.filterwarnings("ignore")

KIND = KINDS["internvl"].longer
OWN = (
    SmallKeys(0.4),
    Received(0.4, every=1, evict="all", first=1, recent=3, heads="adaptive"),
    Merging(0.4, every=2),
    Fewer(2),
    AllLayers(0.4, depth="pyramid"),
)
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
