"""DAM: the lines that calibration keeps, and the mask of them, in loops."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import vtr
from tests.methods.prefill_sites import double, probabilities, seen_blocks, site, tensors
from tests.vision.vlm.models import made
from vtr.methods.dam import DAM


def kept_lines(method, samples):
    """The diagonals and columns of one head, from its samples (q (L, D), k (S, D)) in float64."""
    size = method.length
    total, count = np.zeros((size, size)), np.zeros((size, size))
    for q, k in samples:
        n = min(size, len(q))
        total[:n, :n] += probabilities(q, k, range(n))[:, :n]
        count[:n, :n] += 1
    value = np.maximum(total / np.maximum(count, 1), 1e-10)
    value = (value**method.power - 1) / method.power
    strong = value - value.min() >= method.threshold

    def keeps(pairs):
        pairs = [(i, j) for i, j in pairs if i < size and count[i, j]]
        held = sum(strong[i, j] for i, j in pairs)
        return len(pairs) >= method.least and held >= method.match * len(pairs)

    diagonals = [keeps([(i, i - o) for i in range(o, size)]) for o in range(size)]
    return diagonals, [keeps([(i, c) for i in range(c, size)]) for c in range(size)]


def brute_force(method, qkv, table, layer=0):
    """The mask (H, NQ, NK): blocks that hold a causal pair of a kept line."""
    rows, keys = qkv[0].shape[2], qkv[1].shape[2]
    bm, bn = method.sides
    diagonals, columns = (table[name][layer].tolist() for name in ("slash", "vertical"))
    shape = seen_blocks(rows, keys, (bm, bn)).shape
    found = np.zeros((len(diagonals), *shape), bool)
    for h in range(len(diagonals)):
        for i in range(rows):
            for j in range(keys - rows + i + 1):
                away = keys - rows + i - j
                on = away < len(diagonals[h]) and diagonals[h][away]
                if on or (j < len(columns[h]) and columns[h][j]):
                    found[h, i // bm, j // bn] = True
    return found


def structured(length, seed, batch=1):
    """Head 0 looks at key 3, head 1 at the two keys before it, heads 2 and 3 anywhere; 2 key heads."""
    q, k, v = tensors(length, heads=4, key_heads=2, dim=64, seed=seed, batch=batch)
    q, k = 0.3 * q, 0.3 * k
    turn = torch.arange(length) * 0.9
    near = torch.stack([turn.cos(), turn.sin()], -1)
    k[:, 0, :, :2], k[:, 0, 3, 2] = 6 * near, 20.0
    q[:, 0, :, :2], q[:, 0, :, 2] = 0.0, 4.0
    q[:, 1, 1:, :2], q[:, 1, :, 2] = 6 * near[:-1], 0.0
    return q, k, v


def calibrated(method, calls):
    finder = method.calibrator(SimpleNamespace())
    for call in calls:
        finder.see(call)
    return finder.finish()


METHOD = DAM(length=48, block=16)


@pytest.mark.parametrize("method", [
    METHOD,
    DAM(length=64, block=16, power=1.0, threshold=0.02, match=0.5, least=1),
    DAM(length=40, block=16, threshold=0.2, match=0.9, least=4),
], ids=str)  # fmt: skip
def test_the_lines_are_those_of_the_paper(method):
    samples = {layer: [structured(n, seed=7 * layer + n) for n in (40, 70, 52)] for layer in (0, 1)}
    calls = [site(x, layer=n, layers=2) for n, xs in samples.items() for x in xs]
    table = calibrated(method, calls)
    for layer, h in np.ndindex(2, 4):
        pairs = [(double(q[0, h]), double(k[0, h // 2])) for q, k, _ in samples[layer]]
        diagonals, columns = kept_lines(method, pairs)
        assert table["slash"][layer, h].tolist() == diagonals
        assert table["vertical"][layer, h].tolist() == columns


def test_planted_lines_are_kept():
    table = calibrated(METHOD, [site(structured(60, seed), layers=1) for seed in range(4)])
    diagonals, columns = table["slash"][0], table["vertical"][0]
    assert columns[0].nonzero().flatten().tolist() == [3] and not diagonals[0, 4:].any()
    assert diagonals[1, 1] and not columns[1, 6:].any()
    assert table["slash"].shape == table["vertical"].shape == (1, 4, 48)
    assert table["vertical"].dtype == torch.bool


def test_padding_is_left_out():
    """Samples of different lengths in a batch, padded on either side, are those samples."""
    lengths, alone = (40, 64, 52), []
    for left in True, False:
        batch, valid = [torch.zeros(3, h, 64, 64) for h in (4, 2, 2)], torch.zeros(3, 64).bool()
        for b, n in enumerate(lengths):
            part = slice(64 - n, 64) if left else slice(0, n)
            valid[b, part] = True
            for whole, x in zip(batch, structured(n, seed=b), strict=True):
                whole[b, :, part] = x[0]
        padded = calibrated(METHOD, [site(batch, valid=valid, layers=1)])
        alone = [site(structured(n, seed=b), layers=1) for b, n in enumerate(lengths)]
        expected = calibrated(METHOD, alone)
        assert all(padded[name].equal(expected[name]) for name in expected)


@pytest.mark.parametrize("size", [(300, 300), (288, 288), (75, 300), (30, 30)], ids=str)
def test_the_mask_holds_the_lines_in_any_length(size):
    calls = [
        site(structured(60, seed, batch=2), layer=n, layers=3) for n in range(3) for seed in (1, 2)
    ]
    table = calibrated(METHOD, calls)
    qkv = tensors(*size, batch=2, heads=4, key_heads=2)
    blocks = METHOD.blocks(site(qkv, layer=1, layers=3, table=table))
    expected = brute_force(METHOD, qkv, table, layer=1)
    blocks = blocks & torch.from_numpy(seen_blocks(*size, (16, 16)))
    assert blocks.shape == (2, *expected.shape) and not blocks.all()
    assert all((sample.numpy() == expected).all() for sample in blocks)


def test_a_layer_that_is_not_seen_has_no_lines():
    table = calibrated(METHOD, [site(structured(60, 1), layer=1, layers=3)])
    assert table["vertical"].any((1, 2)).tolist() == [False, True, False]


def test_later_calls_are_not_calibrated():
    finder = METHOD.calibrator(SimpleNamespace())
    finder.see(site(tensors(10, 30), layers=1))
    finder.see(site(tensors(1, 30), layers=1))
    with pytest.raises(ValueError, match="no attention of a prompt was seen: calibrate with"):
        finder.finish()


def test_lines_may_be_given():
    method = DAM(vertical=(0, 130, 5000), slash=(3, 40), block=16)
    table = {name: torch.zeros(1, 2, 300).bool() for name in ("vertical", "slash")}
    table["vertical"][..., [0, 130]] = table["slash"][..., [3, 40]] = True
    qkv = tensors(120, 300)
    blocks = method.blocks(site(qkv)) & torch.from_numpy(seen_blocks(120, 300, (16, 16)))
    assert (blocks[0].numpy() == brute_force(method, qkv, table)).all()
    assert not DAM(slash=0, block=16).blocks(site(qkv)).all()


def test_a_model_is_calibrated_and_needs_it():
    """With every pair strong nothing is skipped; with two lines something is."""
    model, inputs = made("llava_next", 2)
    seen = inputs["attention_mask"].bool()
    method = DAM(length=128, threshold=0.0, least=1, block=16, last_rows=1)
    with pytest.raises(vtr.UnsupportedMethodError, match="dam needs numbers that are calibrated"):
        vtr.apply(model, method)
    with torch.no_grad():
        dense = model(**inputs).logits
        for change, same in [({}, True), ({"threshold": 1.9, "match": 1.0}, False)]:
            plan = vtr.calibrate(model, [inputs], method.replace(**change))
            with vtr.apply(model, plan):
                found = model(**inputs).logits
            assert torch.allclose(found[seen], dense[seen], atol=1e-5) == same


def test_bad_options_are_refused():
    for options, message in [
        ({"slash": (3, 1)}, "slash must be strictly ascending"),
        ({"vertical": ()}, "vertical must be an int or a non-empty sequence"),
        ({"length": 0}, "length must be an int >= 1"),
        ({"least": 0}, "least must be an int >= 1"),
        ({"power": 0}, r"power must be a number in \[0.01, 1.0\]"),
        ({"threshold": -1}, r"threshold must be a number in \[0.0, 2.0\]"),
        ({"match": 0}, r"match must be in \(0, 1\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            DAM(**options)
