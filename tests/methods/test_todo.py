"""ToDo: which keys are taken, and attention to them, written out in float64."""

from __future__ import annotations

import math

import pytest
import torch

import vtr
from tests.diffusion.models import CASES, replaced
from tests.methods.sites import TOLERANCE, Run, attention, tensors, visible

GRIDS = [(1, 4, 6), (2, 5, 7), (3, 1, 9)]


def taken(grid, factor):
    """Indices of the tokens whose place is nearest to the centre of each coarse cell."""
    frames, height, width = grid
    sides = [max(1, size // factor) for size in (height, width)]
    rows, columns = (
        [math.floor((i + 0.5) * size / number) for i in range(number)]
        for size, number in zip((height, width), sides, strict=True)
    )
    return [(f * height + r) * width + c for f in range(frames) for r in rows for c in columns]


def formula(grid, text, text_first, factor, bias, q, k, v, valid):
    """All pairs in float64: rows of the grid see some of its tokens and the text, text sees all."""
    n = torch.Size(grid).numel()
    first = text if text_first else 0
    seen = torch.ones(n + text, n + text, dtype=torch.bool)
    seen[first : first + n, first : first + n] = False
    at = [first + i for i in taken(grid, factor)]
    seen[first : first + n, at] = True
    weight = torch.zeros(n + text, n + text, dtype=torch.float64)
    if bias and text:
        weight[first : first + n, at] = math.log(n / len(at))
    group = q.shape[1] // k.shape[1]
    q, k, v = (
        t.double() for t in (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))
    )
    scores = (q @ k.mT * q.shape[-1] ** -0.5 + weight).masked_fill(~(seen & valid), -math.inf)
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("text", [0, 5])
def test_equals_the_formula(grid, factor, text, dtype):
    for text_first, bias, padded in (
        (True, False, True),
        (False, True, True),
        (False, False, False),
    ):
        qkv = tensors(grid, text, heads=4, key_heads=2, dtype=dtype)
        valid = None
        if text and padded:
            valid = torch.ones(2, text, dtype=torch.bool)
            valid[1, 2:] = False
        run = Run(vtr.ToDo(factor, bias=bias), grid, text, text_first=text_first, text_valid=valid)
        found = run(qkv)
        keys = visible(grid, text, text_first, valid, 2)[:, None, None]
        wanted = formula(grid, text, text_first, factor, bias, *qkv, keys)
        torch.testing.assert_close(
            found.double(), wanted, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
        )
        total, n, some = qkv[0].shape[2], torch.Size(grid).numel(), len(taken(grid, factor))
        pairs = n * (some + text) + text * total
        assert run.notes["work"] == run.notes["density"] == pytest.approx(pairs / total**2)


@pytest.mark.parametrize("grid", [(1, 9, 14), (2, 13, 7), (1, 64, 64), (1, 45, 80)])
@pytest.mark.parametrize("factor", [2, 3, 4])
def test_takes_what_nearest_exact_takes(grid, factor):
    from vtr.methods.todo import coarse

    frames, height, width = grid
    index = torch.arange(frames * height * width).double().view(frames, 1, height, width)
    size = (max(1, height // factor), max(1, width // factor))
    wanted = torch.nn.functional.interpolate(index, size, mode="nearest-exact").flatten().long()
    assert torch.equal(coarse(grid, factor), wanted)
    assert coarse(grid, factor).tolist() == taken(grid, factor)


@pytest.mark.parametrize(("text", "bias"), [(0, False), (6, True)])
def test_a_picture_of_one_colour_is_unchanged(text, bias):
    grid = (2, 5, 7)
    q, k, v = tensors(grid, text)
    k[:, :, :70], v[:, :, :70] = k[:, :, :1], v[:, :, :1]
    run = Run(vtr.ToDo(2, bias=bias), grid, text)
    torch.testing.assert_close(run((q, k, v)), run.site((q, k, v)).dense(), atol=1e-6, rtol=1e-5)
    if text:
        plain = Run(vtr.ToDo(2), grid, text)((q, k, v))
        assert (plain - run.site((q, k, v)).dense()).abs().max() > 1e-2, "the text would weigh more"


def test_factor_one_is_the_dense_call():
    qkv = tensors((1, 5, 7), 3)
    run = Run(vtr.ToDo(1), (1, 5, 7), 3)
    assert torch.equal(run(qkv), run.site(qkv).dense()) and run.notes["work"] >= 1.0


@pytest.mark.parametrize("name", ["wan", "flux", "hunyuan-video", "cogvideox", "sd3"])
@torch.no_grad()
def test_in_a_model(name):
    case = CASES[name]
    model, given = case.build(), case.call()

    def by_formula(layer, q, k, v, valid):
        text = q.shape[2] - case.tokens  # a layer may see the grid alone
        return formula(case.grid, text, case.text_first, 2, True, q, k, v, valid)

    bare = model(**given)[0]
    with replaced(model, case.attention, by_formula):
        expected = model(**given)[0]
    with vtr.apply(model, vtr.ToDo(2, bias=True)):
        found = model(**given)[0]
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=5e-5)
    assert (found - bare).abs().max() > 1e-3


def test_gradients_reach_all_that_is_taken():
    qkv = [t.requires_grad_() for t in tensors((1, 5, 7), 3)]
    Run(vtr.ToDo(2), (1, 5, 7), 3)(qkv).square().sum().backward()
    got = qkv[1].grad[0, 0, :35].abs().amax(1)
    assert set(got.nonzero()[:, 0].tolist()) == set(range(35)), "the text sees all of the grid"
    qkv = [t.requires_grad_() for t in tensors((1, 5, 7))]
    Run(vtr.ToDo(2), (1, 5, 7))(qkv).square().sum().backward()
    got = qkv[1].grad[0, 0].abs().amax(1)
    assert got.nonzero()[:, 0].tolist() == taken((1, 5, 7), 2)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"factor": 0}, "factor must be an int >= 1"), ({"factor": 1.5}, "factor must be"),
     ({"bias": 1}, "bias must be")],
)  # fmt: skip
def test_bad_options_say_what_to_do(options, words):
    with pytest.raises(ValueError, match=words):
        vtr.ToDo(**options)


def test_attention_is_the_formula_of_these_tests():
    """The two formulas of the tests agree where both say something."""
    qkv = tensors((1, 4, 6), 4)
    seen = torch.ones(2, 1, 1, 28, dtype=torch.bool)
    wanted = attention(*qkv, seen, 16**-0.5)[0]
    torch.testing.assert_close(formula((1, 4, 6), 4, False, 1, False, *qkv, seen), wanted)
