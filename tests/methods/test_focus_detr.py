"""Focus-DETR: scores from coarse to fine, the cascade, the attention of objects and the targets, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from tests.methods.detector_sites import LEVELS, info, padded, site
from tests.methods.test_sparse_detr import TWO, N, linear, normed, predicted, wide
from vtr import FocusDETR, UnsupportedMethodError
from vtr.core.detector_site import DetectorCall
from vtr.core.trace import Trace
from vtr.methods.common.foreground import focal, foreground
from vtr.methods.common.pyramid import cascade_at

CLASSES = torch.randn(16, 5, generator=torch.Generator().manual_seed(9))


def classes(x: torch.Tensor) -> torch.Tensor:
    return x @ CLASSES


def trained(method: FocusDETR, levels: int = 3, seed: int = 1) -> nn.Module:
    built = method.build(info(levels=levels))
    draw = torch.Generator().manual_seed(seed)
    for parameter in built.parameters():
        parameter.data.normal_(std=0.4, generator=draw)
    built.count()
    return built


def enlarged(x: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear, the corners of both maps at the same places."""
    made = np.zeros((height, width))
    for i in range(height):
        for j in range(width):
            y = i * (x.shape[0] - 1) / (height - 1) if height > 1 else 0.0
            u = j * (x.shape[1] - 1) / (width - 1) if width > 1 else 0.0
            top, left = int(y), int(u)
            low, right = min(top + 1, x.shape[0] - 1), min(left + 1, x.shape[1] - 1)
            a, c = y - top, u - left
            made[i, j] = (1 - a) * ((1 - c) * x[top, left] + c * x[top, right]) + a * (
                (1 - c) * x[low, left] + c * x[low, right]
            )
    return made


@pytest.mark.parametrize(
    "levels", [LEVELS, ((5, 7),), LEVELS[::-1]], ids=["three", "one", "coarse"]
)
def test_scores_from_coarse_to_fine_by_hand(levels):
    method = FocusDETR(keep=0.4, objects=0, cascade=(1.0, 0.8, 0.5))
    modules = trained(method, len(levels))
    place = site(levels=levels, modules=modules)
    made = method.reduce(place)
    for b in range(2):
        x = wide(place.first[b] + place.positions[b])
        x = normed(linear(x, modules.scorer.project), modules.scorer.norm)
        parts, start = {}, 0
        for number, (height, width) in enumerate(levels):
            parts[number] = x[start : start + height * width]
            start += height * width
        coarse_first = sorted(parts, key=lambda number: len(parts[number]))
        scores, above = {}, None
        for step, number in enumerate(coarse_first):
            f = parts[number]
            if above is not None:
                up = enlarged(above, *levels[number]).reshape(-1, 1)
                f = f + float(modules.fusion.alpha[step - 1]) * f * up
            scores[number] = predicted(f, modules.scorer.predictor)
            above = scores[number].reshape(levels[number])
        whole = np.concatenate([scores[number] for number in range(len(levels))])
        assert np.allclose(wide(place.notes["focus-detr"][b]), whole, atol=1e-5)
        best = np.sort(np.argsort(-whole, kind="stable")[: math.ceil(0.4 * len(whole))])
        assert made.map.kept[b].tolist() == best.tolist()


def test_the_cascade_is_nested_and_counts_each_image():
    method = FocusDETR(keep=0.5, objects=0, cascade=(1.0, 0.7, 0.2))
    modules, memory, notes = trained(method), {}, {}
    before = [set(row.nonzero()[:, 0].tolist()) for row in TWO]
    for layer, share in enumerate((1.0, 0.7, 0.2)):
        place = site(layer, valid=TWO, modules=modules, memory=memory, notes=notes, seed=layer)
        kept = method.reduce(place).map.kept
        for b in range(2):
            now = {j for j in kept[b].tolist() if j >= 0}
            whole = math.ceil(0.5 * int(TWO[b].sum()))
            assert len(now) == math.ceil(share * whole - 1e-9) and now <= before[b]
            before[b] = now


def test_objects_attend_to_each_other_by_hand():
    """The dual attention on one image with padding: who takes part, and the numbers of each head."""
    method = FocusDETR(keep=0.5, objects=4, cascade=(1.0, 1.0, 1.0))
    modules = trained(method)
    place = site(1, valid=TWO, modules=modules, classes=classes)
    made = method.reduce(place)
    layer = modules.objects[1]
    for b in range(2):
        kept = [j for j in made.map.kept[b].tolist() if j >= 0]
        x = wide(place.hidden[b])
        fore = wide(place.notes["focus-detr"][b])
        logit = (x @ wide(CLASSES)).max(1)
        chance = 1 / (1 + np.exp(-logit)) / (1 + np.exp(-fore))
        ranked = sorted(kept, key=lambda j: -chance[j])
        chosen = sorted(ranked[:4])
        q, k, v = (wide(part) for part in layer.attention.in_proj_weight.chunk(3))
        bq, bk, bv = (wide(part) for part in layer.attention.in_proj_bias.chunk(3))
        placed = x[chosen] + wide(place.positions[b])[chosen]
        heads = []
        for h in range(4):
            rows = slice(4 * h, 4 * h + 4)
            logits = (placed @ q.T + bq)[:, rows] @ (placed @ k.T + bk)[:, rows].T / 2
            weights = np.exp(logits - logits.max(1, keepdims=True))
            weights /= weights.sum(1, keepdims=True)
            heads.append(weights @ (x[chosen] @ v.T + bv)[:, rows])
        out = linear(np.concatenate(heads, 1), layer.attention.out_proj)
        wanted = x.copy()
        wanted[chosen] = normed(x[chosen] + out, layer.norm)
        assert np.allclose(wide(made.tokens[b])[: len(kept)], wanted[kept], atol=1e-4)


def test_sigmoids_where_raw_logits_rank_two_negative_ones_first():
    """Raw logits -3 and -4 give 12, and 2 and 1.5 give 3."""
    method = FocusDETR(keep=1.0, objects=1, cascade=(1.0, 1.0, 1.0))
    modules = trained(method)
    place = site(0, modules=modules)
    place._classes = lambda x: torch.where(torch.arange(N) == 7, 2.0, -3.0).expand(2, N)[..., None]
    place.memory["scores"] = torch.where(torch.arange(N) == 7, 1.5, -4.0).expand(2, N)
    made = method.reduce(place)
    changed = (made.tokens != place.hidden).any(-1)
    assert changed.nonzero()[:, 1].tolist() == [7, 7]


def test_original_memory_gives_the_layers_what_entered_the_encoder():
    method = FocusDETR(keep=0.5, objects=0, memory="original")
    place = site(2, modules=trained(method))
    assert method.reduce(place).values is place.first
    assert method.replace(memory="updated").reduce(place).values is None
    whole = method.replace(keep=1.0, cascade=(1.0, 1.0, 1.0)).reduce(site(2))
    assert whole.map is None and whole.values is not None


def test_foreground_box_by_box():
    """Tokens in a box whose farthest side is in the range of their level, on levels that do not divide the picture."""
    levels, size = ((10, 14), (5, 7), (3, 4)), (80, 110)
    draw = torch.Generator().manual_seed(2)
    boxes = [torch.rand(6, 4, generator=draw) * 0.8 + 0.1, torch.zeros(0, 4)]
    n = sum(h * w for h, w in levels)
    seen = torch.tensor([[64.0, 88.0], [80.0, 110.0]])
    call = DetectorCall(levels, None, [n, n], size, seen, boxes)
    found, start = foreground(call), 0
    strides = [size[0] / h for h, _ in levels]
    ranges = [(-1, 8 * strides[0]), (8 * strides[0], 8 * strides[1]), (8 * strides[1], math.inf)]
    for (height, width), (low, high) in zip(levels, ranges, strict=True):
        for i in range(height):
            for j in range(width):
                y, x = (i + 0.5) * size[0] / height, (j + 0.5) * size[1] / width
                hit = False
                for cx, cy, w, h in (boxes[0] * torch.tensor([88.0, 64.0, 88.0, 64.0])).tolist():
                    sides = (x - cx + w / 2, y - cy + h / 2, cx + w / 2 - x, cy + h / 2 - y)
                    hit |= min(sides) > 0 and low < max(sides) <= high
                assert bool(found[0, start + i * width + j]) == hit
        start += height * width
    assert found[0].any() and not found[1].any()
    backwards = DetectorCall(levels[::-1], None, [n, n], size, seen, boxes)
    parts = found.split([h * w for h, w in levels], 1)[::-1]
    assert torch.equal(foreground(backwards), torch.cat(parts, 1))


def test_the_loss_by_hand():
    draw = torch.Generator().manual_seed(3)
    logits = (3 * torch.randn(2, N, generator=draw)).requires_grad_()
    target = torch.rand(2, N, generator=draw) < 0.2
    found = focal(logits, target, TWO, 2.0, 0.25)
    rows = []
    for b in range(2):
        total, positive = 0.0, 0
        for j in range(N):
            if TWO[b, j]:
                p = 1 / (1 + math.exp(-float(logits[b, j])))
                p, a = (p, 0.25) if target[b, j] else (1 - p, 0.75)
                total -= a * (1 - p) ** 2 * math.log(p)
                positive += int(target[b, j])
        rows.append(total / max(1, positive))
    assert float(found.detach()) == pytest.approx(sum(rows) / 2, rel=1e-5)
    found.backward()
    assert not logits.grad[~TWO].any()
    none = torch.zeros_like(target)
    assert focal(torch.full((2, N), 100.0), none, TWO, 2.0, 0.25).isfinite()


def test_the_method_weighs_its_loss_and_asks_for_boxes():
    logits = torch.zeros(2, N, requires_grad=True)
    boxes = [torch.tensor([[0.5, 0.5, 0.6, 0.6]])] * 2
    call = DetectorCall(
        LEVELS, TWO, TWO.sum(1).tolist(), (48, 64), torch.tensor([[48.0, 64.0]] * 2), boxes
    )
    trace = Trace(notes={"detector": call, "focus-detr": logits})
    terms = FocusDETR().training_losses(trace, None)
    wanted = 1.5 * focal(logits, foreground(call), TWO, 2.0, 0.25)
    assert list(terms) == ["foreground"] and torch.equal(terms["foreground"], wanted)
    call.boxes = None
    with pytest.raises(
        ValueError, match="needs boxes: call the model with pixel_values and labels"
    ):
        FocusDETR().training_losses(trace, None)


def test_the_published_cascade_is_read_at_every_depth():
    assert FocusDETR().shares(info(6)) == (1.0, 0.8, 0.6, 0.6, 0.4, 0.2)
    assert cascade_at((1.0, 0.8, 0.6, 0.6, 0.4, 0.2), 3) == pytest.approx((1.0, 0.6, 0.2))
    assert cascade_at((1.0, 0.8, 0.6, 0.6, 0.4, 0.2), 1) == (1.0,)
    four = cascade_at((1.0, 0.8, 0.6, 0.6, 0.4, 0.2), 4)
    assert four == pytest.approx((1.0, 0.8 - 0.2 * 2 / 3, 0.6 - 0.2 / 3, 0.2))
    with pytest.raises(ValueError, match="cascade has 2 entries for 3 layers"):
        FocusDETR(cascade=(1.0, 0.5)).stages(info(3))


def test_everything_may_stay():
    method = FocusDETR(keep=1.0, cascade=(1.0, 1.0, 1.0), objects=0)
    assert all(method.reduce(site(layer, valid=TWO)) is None for layer in range(3))
    place = site(training=True, modules=method.build(info()))
    assert method.reduce(place) is None and place.notes["focus-detr"].requires_grad


def test_new_modules_are_refused_outside_of_training():
    method = FocusDETR(objects=0)
    with pytest.raises(UnsupportedMethodError, match="focus-detr scores tokens by modules"):
        method.reduce(site(modules=method.build(info())))


def test_a_model_without_class_head_is_refused_unless_objects_is_0():
    bare = info()
    bare.signals["detector"] = frozenset({"hidden"})
    with pytest.raises(UnsupportedMethodError, match="focus-detr needs class_logits"):
        FocusDETR().check(bare)
    FocusDETR(objects=0).check(bare)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 1.5}, "keep must be"),
        ({"cascade": ()}, "cascade must be a sequence of shares"),
        ({"cascade": 0.5}, "cascade must be a sequence of shares"),
        ({"cascade": (0.5, 0.8)}, "cascade must hold falling shares"),
        ({"cascade": (1.0, 0.0)}, "cascade must hold falling shares"),
        ({"objects": -1}, "objects must be an int >= 0"),
        ({"objects": True}, "objects must be an int >= 0"),
        ({"memory": "new"}, "memory must be 'updated' or 'original'"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        FocusDETR(**options)


def test_padding_moves_no_score():
    """Other numbers in the padding give the same scores on a model of one level."""
    levels = ((6, 8),)
    valid = torch.stack([torch.ones(48, dtype=torch.bool), padded(levels, 0.5, 0.7)])
    method = FocusDETR(keep=0.5, objects=0)
    modules = trained(method, 1)
    found = []
    for factor in (1.0, 7.0):
        place = site(levels=levels, valid=valid, modules=modules)
        place.first = torch.where(valid[..., None], place.first, factor * place.first)
        method.reduce(place)
        found.append(place.notes["focus-detr"][valid])
    assert torch.equal(*found)
