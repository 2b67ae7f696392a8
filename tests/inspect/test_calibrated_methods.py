"""Every calibrated method of the registry for language models, from data through a file to a model, by registration alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vtr
from tests.vision.vlm import models
from vtr.core.method import Method
from vtr.core.registry import registry
from vtr.methods.base import LanguageAttentionMethod
from vtr.testing.examples import examples

METHODS = [
    name
    for name, cls in registry().items()
    if cls.calibrated and issubclass(cls, LanguageAttentionMethod)
]

# Options with which a method takes its numbers from the table, and finds some in random weights.
FROM_TABLE: dict[str, dict[str, Any]] = {
    "act": {"heads": None, "least": 0.0},
    "dam": {"vertical": None, "slash": None, "length": 64},
    "var": {"dims": None},
    "vhr": {"heads": "plan"},
}


# Methods that work without a table too, in these settings.
WITHOUT = {"sale"}


def setting(name: str) -> Method:
    """The method as the laws of `vtr.testing` set it, with its numbers from the table."""
    some = examples(registry()[name]).some
    return some[0].replace(**FROM_TABLE.get(name, {}))


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
@pytest.mark.parametrize("name", METHODS)
def test_a_calibrated_method_works_with_its_plan(name, family, tmp_path):
    model, batch = getattr(models, family)(2)
    method = setting(name)
    with torch.no_grad():
        dense = model(**batch).logits
    if name not in WITHOUT:
        with pytest.raises(vtr.UnsupportedMethodError, match=r"vtr\.calibrate\(model, batches"):
            vtr.apply(model, method)
    plan = vtr.calibrate(model, [batch, batch], method, description="noise")
    assert plan.methods == (method,) and plan.data["samples"] == 4
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, dense)
    found = []
    for file in ("plan.json", "plan.safetensors"):
        plan.save(tmp_path / file)
        again = vtr.Plan.load(tmp_path / file)
        assert again == plan
        with vtr.apply(model, again) as handle, torch.no_grad():
            found.append(model(**batch).logits)
        assert handle.methods == (method,)
    assert torch.equal(*found)
    assert torch.isfinite(found[0]).all() and not torch.equal(found[0], dense)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, dense)


@pytest.mark.parametrize("name", METHODS)
def test_its_numbers_follow_the_data_and_not_its_batches(name):
    model, batch = models.llava(2)
    from vtr.testing.models.prompts import split

    together = vtr.calibrate(model, [batch], setting(name)).tables[0]
    alone = vtr.calibrate(model, split(batch), setting(name)).tables[0]
    assert together.keys() == alone.keys()
    for entry, tensor in together.items():
        torch.testing.assert_close(tensor, alone[entry], atol=1e-4, rtol=1e-3)
