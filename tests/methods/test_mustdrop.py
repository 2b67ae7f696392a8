"""MustDrop: windows, key tokens, drops by the text and freed caches, against a model run by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vtr
from tests.vision.vlm.models import IMAGE, llava, qwen2_vl
from vtr.compat.transformers import cache_of

from .slow import Seen, Sequence, Tower, best, features, run, samples


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a.double() @ b.double() / (a.double().norm() * b.double().norm()))


def slow_tower(
    model: Any, image: Tensor, method: vtr.MustDrop
) -> tuple[list[int], Tensor, list[int]]:
    """The patches left of an image (4 x 4), their projected features, and which of them are key tokens."""
    tower = Tower(model)
    x = tower.start(image)
    left = list(range(16))
    for layer in range(tower.last + 1):
        x, maps, _, _ = tower.step(layer, x)
        if layer == 0 and method.window is not None:
            side, rows, drop = method.window, x[1:].clone(), set()
            for r in range(0, 4, side):
                for c in range(0, 4, side):
                    cells = [4 * (r + i) + c + j for i in range(side) for j in range(side)]
                    pairs = [cosine(rows[a], rows[b]) for a in cells for b in cells if a != b]
                    if sum(pairs) / len(pairs) >= method.alike:
                        rows[cells[-1]] = rows[cells].mean(0)
                        drop |= set(cells[:-1])
            left = [i for i in left if i not in drop]
            x = torch.cat([x[:1], rows[left]])
    key = best(maps[:, 0, 1:].mean(0), -(-int(100 * method.key) * len(left) // 100))
    return left, tower.project(x[1:]), key


def slow_drop(seen: Seen, key: list[int], overall: float, single: float) -> list[int]:
    """The visual tokens that stay behind a layer, among those alive; ``key`` are numbers among them."""
    maps = seen.attention().mean(0)
    places = seen.visual.nonzero()[:, 0].tolist()
    text = [t for t in range(places[0], len(seen.x)) if not seen.visual[t]]
    total = [sum(float(maps[t, j]) for t in text) for j in places]
    most = [max(float(maps[t, j]) for t in text) for j in places]
    return [
        n
        for n in range(len(places))
        if n in key or total[n] >= overall * sum(total) or most[n] >= single
    ]


INSIDE = {"overall": 0.065, "single": 0.12, "layers": (0, 2)}


@pytest.mark.parametrize(
    "options",
    [{"window": None}, {"window": 2, "alike": 0.1}, {"window": 2, "alike": -1.0, "key": 0.5}],
)
def test_equals_the_model_by_hand(options: dict[str, Any]) -> None:
    model, inputs = llava(2)
    method = vtr.MustDrop(**INSIDE, **options)
    with torch.no_grad(), vtr.apply(model, method) as handle:
        logits = model(**inputs).logits
    pixels, at, counts = inputs["pixel_values"], 0, []
    for b, ids in enumerate(samples(inputs)):
        left: list[int] = []
        key: list[int] = []
        parts = []
        number = int((ids == IMAGE).sum()) // 16
        for n in range(number):
            mine, projected, keys = slow_tower(model, pixels[at + n], method)
            key += [len(left) + k for k in keys]
            left += [16 * n + i for i in mine]
            parts.append(projected)
        at += number
        # The prompt without the placeholders of merged tokens.
        places = (ids == IMAGE).nonzero()[:, 0]
        stays = torch.ones(len(ids), dtype=torch.bool)
        stays[places] = False
        stays[places[left]] = True

        def cut(
            sequence: Sequence, seen: dict[int, Seen], layer: int, key: list[int] = key
        ) -> None:
            here = [n for n, token in enumerate(sequence.alive.tolist()) if token in key]
            sequence.keep(slow_drop(seen[layer], here, 0.065, 0.12), compact=True)

        expected, alive = run(
            model,
            ids[stays],
            torch.cat(parts),
            {layer + 1: lambda s, x, layer=layer: cut(s, x, layer) for layer in (0, 2)},  # type: ignore[misc]
        )
        kept = handle.trace.kept[b]
        assert kept[kept >= 0].tolist() == [left[n] for n in alive]
        counts.append((len(left), len(alive)))
        torch.testing.assert_close(logits[b, -1], expected, atol=2e-5, rtol=1e-4)
    assert any(alive < entered for entered, alive in counts), counts


def test_key_tokens_stay_where_everything_else_is_dropped() -> None:
    model, inputs = llava(1)
    method = vtr.MustDrop(overall=1.0, single=1.0, layers=(0,), key=0.2, window=None)
    with torch.no_grad(), vtr.apply(model, method) as handle:
        model(**inputs)
    _, _, key = slow_tower(model, inputs["pixel_values"][0], method)
    assert handle.trace.kept[0].tolist() == key and len(key) == 4


def test_earlier_layers_free_what_was_dropped() -> None:
    model, inputs = llava(1)
    method = vtr.MustDrop(overall=1.0, single=1.0, layers=(1, 2), key=0.3, window=None)
    caches = []
    for trim in (True, False):
        with torch.no_grad(), vtr.apply(model, method.replace(trim=trim)):
            out = model.generate(
                **inputs, max_new_tokens=1, do_sample=False, return_dict_in_generate=True
            )
        caches.append([layer.keys for layer in cache_of(out).layers])
    length = inputs["input_ids"].shape[1]
    assert [k.shape[2] for k in caches[1]] == [length, length, length - 11, length - 11]
    assert [k.shape[2] for k in caches[0]] == [length, *[length - 11] * 3]
    first = int((inputs["input_ids"][0] == IMAGE).nonzero()[0])
    _, _, key = slow_tower(model, inputs["pixel_values"][0], method)
    stays = [*range(first), *(first + k for k in key), *range(first + 16, length)]
    assert torch.equal(caches[0][1], caches[1][1][:, :, stays])


def test_towers_that_cannot_be_cut_need_window_none() -> None:
    model, inputs = qwen2_vl(2)
    with pytest.raises(vtr.UnsupportedMethodError, match="use window=None"):
        vtr.apply(model, vtr.MustDrop(layers=(0, 2)))
    with torch.no_grad(), vtr.apply(model, vtr.MustDrop(**INSIDE, window=None)) as handle:
        model(**inputs)
    assert int((handle.trace.kept >= 0).sum()) < int((inputs["input_ids"] == IMAGE).sum())


def test_windows_must_divide_the_grid() -> None:
    model, inputs = llava(1)
    with (
        torch.no_grad(),
        vtr.apply(model, vtr.MustDrop(layers=(0, 2))),
        pytest.raises(ValueError, match=r"window=3 must divide the grid of 4 x 4"),
    ):
        model(**inputs)


def test_a_prompt_that_ends_with_its_image_is_refused() -> None:
    model, inputs = llava(1)
    last = int((inputs["input_ids"][0] == IMAGE).nonzero()[-1]) + 1
    short = {**inputs, **{k: inputs[k][:, :last] for k in ("input_ids", "attention_mask")}}
    with (
        torch.no_grad(),
        vtr.apply(model, vtr.MustDrop(layers=(0, 2), window=None)),
        pytest.raises(ValueError, match="put the question after the image"),
    ):
        model(**short)


def test_rows_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = llava(2)
    kept = []
    for rows in (64, 3):
        monkeypatch.setattr("vtr.methods.mustdrop.ROWS", rows)
        with torch.no_grad(), vtr.apply(model, vtr.MustDrop(**INSIDE, window=None)) as handle:
            model(**inputs)
        kept.append(handle.trace.kept)
    assert torch.equal(*kept)
    assert len(features(model, inputs)[1]) > int((kept[0][1] >= 0).sum())


@pytest.mark.parametrize(
    "options",
    [
        {"overall": -0.1},
        {"single": 2},
        {"key": 0},
        {"window": 1},
        {"alike": 1.5},
        {"trim": 1},
        {"layers": (2, 2)},
    ],
)
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        vtr.MustDrop(**options)
