"""Sparse prefill together with cuts between layers, compiled, and asked for what it cannot give."""

from __future__ import annotations

import functools

import pytest
import torch

import vtr
from tests.laws.everyone import INSIDE
from vtr.core.registry import registry
from vtr.methods.common.prefill import PrefillMethod
from vtr.testing import KINDS, examples
from vtr.testing.kinds import Kind

SOME = vtr.RandomBlocks(0.1, block=16, last_rows=1)
CUT = vtr.FastV(keep=0.5, layer=1)


def lengths(kind: Kind) -> list[int]:
    """Tokens of each sample."""
    return [sample["input_ids"].shape[1] for sample in kind.samples]


@functools.cache
def cut_alone() -> tuple[torch.Tensor, dict[int, tuple[int, int]]]:
    """The logits of a batch under a cut alone, and the tokens of each layer."""
    kind = KINDS["llava-next"].longer
    with torch.no_grad(), vtr.apply(kind.model, CUT, **kind.options) as handle:
        return kind.call(kind.model, kind.whole)[:, 0], handle.trace.tokens["decoder"]


@pytest.mark.parametrize("name", INSIDE)
def test_cuts_between_layers(name: str) -> None:
    """Everything kept, a cut is what it is alone; else each sample is what it is alone."""
    kind, settings = KINDS["llava-next"].longer, examples(registry()[name])
    model = kind.model
    wanted, tokens = cut_alone()
    with torch.no_grad():
        for method in (
            settings.everything if name != "dam" else ()
        ):  # which needs lines of this model
            with vtr.apply(model, [method, CUT], **kind.options) as handle:
                found = kind.call(model, kind.whole)[:, 0]
                assert handle.trace.tokens["decoder"] == tokens
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
        with vtr.apply(model, [settings.some[0], CUT], **kind.options) as handle:
            both = kind.call(model, kind.whole)[:, 0]
            keys = handle.trace.tokens["attention"]
            alone = torch.cat([kind.call(model, sample)[:, 0] for sample in kind.samples])
    torch.testing.assert_close(both, alone, atol=1e-5, rtol=0)
    for layer, (here, _) in keys.items():
        assert here == (max(lengths(kind)) if layer == 0 else keys[max(keys)][0])


@pytest.mark.parametrize("name", ["llava-next", "qwen3-vl"])
def test_each_sample_is_dense_or_sparse_by_its_own_length(name: str) -> None:
    kind = KINDS[name].longer
    tokens = lengths(kind)
    assert tokens[0] != tokens[1]
    method = SOME.replace(min_length=max(tokens))
    with torch.no_grad():
        dense = [kind.forward(kind.model, sample)[0, -1] for sample in kind.samples]
        with vtr.apply(kind.model, method, **kind.options):
            alone = [kind.forward(kind.model, sample)[0, -1] for sample in kind.samples]
            both = kind.call(kind.model, kind.whole)[:, 0]
    short = tokens.index(min(tokens))
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
