"""vtr.sinks: first, hidden and secondary sinks of a model, against its own eager attention and hidden states."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import vtr
from tests.tiny import vit
from tests.vision.vlm.models import IMAGE, llava
from vtr.inspect.sinks import COLOURS, Sinks, massive_layers


@pytest.fixture(scope="module")
def found() -> tuple[Any, dict[str, Any], Sinks]:
    model, inputs = llava(2)
    return model, inputs, vtr.sinks(model, inputs, threshold=0.08, likeness=0.5, rows=3)


def test_they_are_those_of_eager_attention(found: Any) -> None:
    model, inputs, sinks = found
    language = model.model.language_model
    before = language.config._attn_implementation
    language.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(**inputs, output_attentions=True, output_hidden_states=True)
    language.set_attn_implementation(before)
    mask = inputs["attention_mask"].bool()
    assert torch.equal(sinks.valid, mask) and torch.equal(
        sinks.visual, inputs["input_ids"] == IMAGE
    )
    layers = len(out.attentions)
    for b in range(2):
        live = mask[b].nonzero().flatten().tolist()
        first = live[0]
        lead = [float(out.hidden_states[n][b, first].norm()) for n in range(layers)]
        rise = max(range(1, layers), key=lambda n: lead[n] - lead[n - 1])
        for n in range(layers):
            hidden, secondary = [], []
            for j in live:
                rows = [i for i in live if i >= j]
                mean = float(out.attentions[n][b, :, rows, j].mean())
                assert float(sinks.received[n, b, j]) == pytest.approx(mean, abs=1e-5)
                state, leader = out.hidden_states[n][b, j], out.hidden_states[n][b, first]
                assert float(sinks.norm[n, b, j]) == pytest.approx(float(state.norm()), rel=1e-4)
                if j == first:
                    assert bool(sinks.first[n, b, j]) == (mean > 0.08)
                    continue
                if mean > 0.08 and len(rows) >= 3:
                    hidden.append(j)
                if n >= rise and abs(float(torch.cosine_similarity(state, leader, 0))) > 0.5:
                    secondary.append(j)
            assert sinks.tokens("hidden", n, b) == hidden
            assert sinks.tokens("secondary", n, b) == secondary
            assert set(sinks.tokens("first", n, b)) <= {first}
    assert sinks.hidden.any() and not sinks.hidden.all()


def test_the_model_is_left_as_it_was(found: Any) -> None:
    model, inputs, _ = found
    assert not vtr.handles(model)
    with torch.no_grad():
        before = model(**inputs).logits
        vtr.sinks(model, inputs)
        assert torch.equal(model(**inputs).logits, before)


def test_a_token_is_massive_between_its_rise_and_its_fall() -> None:
    norm = torch.tensor([[1.0, 1.0], [2.0, 1.1], [90.0, 1.2], [95.0, 1.3], [99.0, 9.0], [4.0, 9.0]])
    assert massive_layers(norm).T.tolist() == [
        [False, False, True, True, True, False],
        [False, False, False, False, True, True],
    ]
    assert not massive_layers(norm[:1]).any()


def planted() -> Sinks:
    """2 layers, 4 tokens behind one of padding: each kind once, and one token of two kinds."""
    empty = torch.zeros(2, 1, 5, dtype=torch.bool)
    first, hidden, secondary = empty.clone(), empty.clone(), empty.clone()
    first[0, 0, 1] = hidden[0, 0, 2] = hidden[1, 0, 3] = secondary[1, 0, 3] = secondary[1, 0, 4] = (
        True
    )
    share = torch.full((2, 1, 5), 1e-4)
    share[1, 0, 1] = 1.0
    valid = torch.tensor([[False, True, True, True, True]])
    visual = torch.tensor([[False, False, True, True, False]])
    return Sinks(share, share, first, hidden, secondary, valid, visual)


def test_a_picture_has_the_colour_of_each_kind() -> None:
    pixels = np.asarray(planted().draw(size=6)).astype(int)
    bar, lines = pixels[24:30], pixels[32:]
    assert lines.shape == (12, 1200, 3)
    colour = {kind: list(c) for kind, c in COLOURS.items()}

    def at(layer: int, token: int, half: int = 0) -> list[int]:
        return lines[layer * 6 + 3 * half + 1, token * 300 + 150].tolist()

    assert at(0, 0) == colour["first"] and at(0, 1) == colour["hidden"]
    assert at(1, 2) == colour["hidden"] and at(1, 2, 1) == colour["secondary"]
    assert at(1, 3) == colour["secondary"]
    assert at(0, 3) == [255] * 3 and max(at(1, 0)) < 50  # by attention: 1e-4, and all
    assert (bar[:, 300:900] != 255).any(-1).all() and (bar[:, 900:] == 255).all()


def test_a_summary_counts_them() -> None:
    lines = planted().summary().splitlines()
    assert len(lines) == 3
    assert lines[1].split() == ["0", "0.0", "%", "1", "(1)", "0", "(0)"]
    assert lines[2].split() == ["1", "100.0", "%", "1", "(1)", "2", "(1)"]
    assert repr(planted()) == "Sinks(2 layers, 1 samples of 5 columns)"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.draw(sample=1), r"sample must be in 0\.\.0, got 1"),
        (lambda s: s.draw(size=1), "size must be at least 2"),
        (lambda s: s.tokens("last", 0), "kind must be one of first, hidden, secondary"),
        (lambda s: s.tokens("first", 2), r"layer must be in 0\.\.1, got 2"),
        (lambda s: s.summary(-1), "sample must be in"),
    ],
)
def test_bad_questions_are_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(planted())


def test_bad_calls_are_refused(found: Any) -> None:
    model, inputs, _ = found
    for options in ({"threshold": 0}, {"likeness": 1.0}, {"rows": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            vtr.sinks(model, inputs, **options)
    words = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3).long()}
    with pytest.raises(ValueError, match="the inputs have no image or video"):
        vtr.sinks(model, words)
    with vtr.apply(model, vtr.FastV()), pytest.raises(ValueError, match="wrapped already"):
        vtr.sinks(model, inputs)
    with pytest.raises(vtr.UnsupportedMethodError):
        vtr.sinks(vit(), {})
