"""Sparse prefill together with cuts between layers, compiled, and asked for what it cannot give."""

from __future__ import annotations

import pytest
import torch

import vtr
from vtr.methods.common.prefill import PrefillMethod
from vtr.testing.kinds import KINDS

EVERYTHING = vtr.FlexPrefill(1.0, block=16, min_budget=16, last_rows=1)
SOME = vtr.RandomBlocks(0.1, block=16, last_rows=1)


@pytest.mark.parametrize("name", ["llava-next", "qwen3-vl", "internvl"])
def test_cuts_between_layers_and_a_mask_of_everything(name: str) -> None:
    kind = KINDS[name]
    cut = vtr.FastV(keep=0.5, layer=1)
    with torch.no_grad():
        with vtr.apply(kind.model, cut, **kind.options) as handle:
            alone = kind.call(kind.model, kind.whole)
            shorter = handle.trace.tokens["decoder"]
        with vtr.apply(kind.model, [EVERYTHING, cut], **kind.options) as handle:
            both = kind.call(kind.model, kind.whole)
            assert handle.trace.tokens["decoder"] == shorter
            keys = [handle.trace.tokens["attention"][n][0] for n in range(4)]
    torch.testing.assert_close(both, alone, atol=1e-5, rtol=0)
    assert keys[0] > keys[1] == keys[2] == keys[3]


@pytest.mark.parametrize("name", ["llava-next", "qwen3-vl"])
def test_each_sample_is_dense_or_sparse_by_its_own_length(name: str) -> None:
    kind = KINDS[name].longer
    lengths = [sample["input_ids"].shape[1] for sample in kind.samples]
    assert lengths[0] != lengths[1]
    method = SOME.replace(min_length=max(lengths))
    with torch.no_grad():
        dense = [kind.forward(kind.model, sample)[0, -1] for sample in kind.samples]
        with vtr.apply(kind.model, method, **kind.options):
            alone = [kind.forward(kind.model, sample)[0, -1] for sample in kind.samples]
            both = kind.call(kind.model, kind.whole)[:, 0]
    short = lengths.index(min(lengths))
    torch.testing.assert_close(alone[short], dense[short])
    assert not torch.allclose(alone[1 - short], dense[1 - short], atol=1e-3)
    torch.testing.assert_close(both, torch.stack(alone), atol=1e-5, rtol=0)


def test_a_compiled_model_gives_the_same() -> None:
    kind = KINDS["llava-next"]
    inputs = kind.whole
    with torch.no_grad(), vtr.apply(kind.model, SOME, **kind.options) as handle:
        eager = kind.forward(kind.model, inputs)
        compiled = torch.compile(kind.model, backend="eager")
        found = kind.forward(compiled, inputs)
        torch.testing.assert_close(found, eager, atol=1e-5, rtol=0)
        assert all(note["density"] < 1 for note in handle.trace.notes["attention"].values())


def test_attention_maps_are_refused() -> None:
    kind = KINDS["llava-next"]
    model = kind.build()
    with (
        vtr.apply(model, SOME),
        pytest.raises(ValueError, match="random-blocks computes no whole attention map"),
    ):
        model(**kind.whole, output_attentions=True)
    with vtr.apply(model, SOME):
        model.set_attn_implementation("eager")
        model.model.language_model.config.output_attentions = True
        with pytest.raises(ValueError, match=r"vtr\.draw shows the mask"):
            model(**kind.whole)


def test_text_alone_is_dense() -> None:
    kind = KINDS["llava-next"]
    ids = torch.arange(30, 70)[None]
    with torch.no_grad():
        dense = kind.model(input_ids=ids).logits
        with vtr.apply(kind.model, SOME) as handle:
            assert torch.equal(kind.model(input_ids=ids).logits, dense)
            assert "attention" not in handle.trace.notes


def test_names_of_options_are_in_messages() -> None:
    for options, message in (
        ({"block": 20}, "block must be 16, 32, 64 or 128"),
        ({"last_rows": 0}, "last_rows must be an int from 1 on"),
        ({"min_length": -1}, "min_length must be an int from 0 on"),
        ({"heads": "all"}, "heads must be 'query' or 'kv'"),
        ({"backend": "cuda"}, "backend must be one of"),
        ({"dense_layers": 1.5}, "dense_layers must be a number of first layers"),
    ):
        with pytest.raises(ValueError, match=message):
            vtr.RandomBlocks(0.5, **options)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"Nothing must define blocks\(site\)"):
        vtr.apply(KINDS["llava-next"].model, Nothing())


class Nothing(PrefillMethod):
    name = "nothing"
    paper = "none"
