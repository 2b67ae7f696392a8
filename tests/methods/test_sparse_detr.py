"""Sparse DETR: its scores, its choice and its target, recomputed token by token."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from tests.methods.detector_sites import LEVELS, info, padded, site
from vtr import FocusDETR, SparseDETR, UnsupportedMethodError
from vtr.core.detector_site import DetectorCall
from vtr.core.trace import Trace
from vtr.methods.common.foreground import attention_map, best_tokens, centers, has_proposal

N = sum(height * width for height, width in LEVELS)
TWO = torch.stack([torch.ones(N, dtype=torch.bool), padded(LEVELS, 0.5, 0.7)])


def trained(method: SparseDETR, seed: int = 1) -> nn.Module:
    """Modules of a method with random numbers."""
    built = method.build(info())
    draw = torch.Generator().manual_seed(seed)
    for parameter in built.parameters():
        parameter.data.normal_(std=0.4, generator=draw)
    built.count()
    return built


def gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def normed(x: np.ndarray, norm: nn.LayerNorm) -> np.ndarray:
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + norm.eps) * wide(norm.weight) + wide(norm.bias)


def wide(x: torch.Tensor) -> np.ndarray:
    return x.detach().double().numpy()


def linear(x: np.ndarray, layer: nn.Linear) -> np.ndarray:
    return x @ wide(layer.weight).T + wide(layer.bias)


def predicted(x: np.ndarray, predictor: nn.Module) -> np.ndarray:
    """The predictor on the valid tokens x (N, C) of one image."""
    norm, first, _ = predictor.embed
    h = gelu(linear(normed(x, norm), first))
    half = h.shape[1] // 2
    h = np.concatenate([h[:, :half], np.broadcast_to(h[:, half:].mean(0), (len(h), half))], 1)
    for layer in list(predictor.head)[:-1:2]:
        h = gelu(linear(h, layer))
    return linear(h, predictor.head[-1])[:, 0]


@pytest.mark.parametrize("valid", [None, TWO], ids=["whole", "padded"])
def test_scores_and_choice_by_hand(valid):
    method = SparseDETR(keep=0.3)
    modules = trained(method)
    place = site(valid=valid, modules=modules)
    made = method.reduce(place)
    proposed = has_proposal(LEVELS, place.valid_mask)
    for b in range(2):
        seen = place.valid_mask[b].numpy()
        x = wide(place.first[b] + place.positions[b]) * proposed[b].numpy()[:, None]
        x = normed(linear(x, modules.scorer.project), modules.scorer.norm)
        scores = predicted(x[seen], modules.scorer.predictor)
        assert np.allclose(wide(place.notes["sparse-detr"][b])[seen], scores, atol=1e-5)
        number = math.ceil(0.3 * seen.sum())
        best = np.flatnonzero(seen)[np.sort(np.argsort(-scores, kind="stable")[:number])]
        kept = made.map.kept[b]
        assert kept[kept >= 0].tolist() == best.tolist()


def test_centers_and_proposals_by_hand():
    """A level of 120 columns has tokens too near to the border; a picture with padding, others."""
    levels = ((2, 120), (1, 60))
    valid = torch.stack([torch.ones(300, dtype=torch.bool), padded(levels, 1.0, 0.5)])
    found, boxes = centers(levels, valid), has_proposal(levels, valid)
    for b, share in enumerate((1.0, 0.5)):
        start = 0
        for height, width in levels:
            for y in range(height):
                for x in range(width):
                    at = start + y * width + x
                    cx, cy = (x + 0.5) / (share * width), (y + 0.5) / height
                    assert found[b, at].tolist() == pytest.approx([cx, cy])
                    inside = 0.01 < cx < 0.99 and 0.01 < cy < 0.99 and x < share * width
                    assert boxes[b, at] == inside
            start += height * width


def test_a_level_whose_boxes_are_larger_than_the_picture_has_no_proposals():
    levels = tuple((2 ** (5 - i), 2 ** (5 - i)) for i in range(6))  # the last side is 1.6
    valid = torch.ones(1, sum(h * w for h, w in levels), dtype=torch.bool)
    assert has_proposal(levels, valid)[0, :-1].any() and not has_proposal(levels, valid)[0, -1]
    backwards = levels[::-1]  # as in the pixel decoder of Mask2Former
    assert not has_proposal(backwards, valid)[0, 0] and has_proposal(backwards, valid)[0, 1:].any()


def points(queries: int = 5, seed: int = 0):
    """Points, some of them outside, and their weights."""
    draw = torch.Generator().manual_seed(seed)
    at = (
        torch.rand(2, queries, 4, len(LEVELS), 3, 2, generator=draw, dtype=torch.float64) * 1.6
        - 0.3
    )
    weights = torch.rand(2, queries, 4, len(LEVELS) * 3, generator=draw, dtype=torch.float64)
    return at, weights.softmax(-1).view(2, queries, 4, len(LEVELS), 3)


def test_the_map_of_the_decoder_point_by_point():
    at, weights = points()
    found = attention_map(LEVELS, at, weights)
    wanted = np.zeros((2, N))
    for b, q, h, level, p in np.ndindex(*weights.shape):
        height, width = LEVELS[level]
        start = sum(a * c for a, c in LEVELS[:level])
        x, y = (float(v) for v in at[b, q, h, level, p] * torch.tensor([width, height]) - 0.5)
        for column in (math.floor(x), math.floor(x) + 1):
            for row in (math.floor(y), math.floor(y) + 1):
                if 0 <= column < width and 0 <= row < height:
                    share = (1 - abs(x - column)) * (1 - abs(y - row))
                    wanted[b, start + row * width + column] += share * float(
                        weights[b, q, h, level, p]
                    )
    assert np.allclose(found.numpy(), wanted, atol=1e-6)


def test_the_map_is_the_weight_with_which_sampling_reads_each_token():
    """The gradient of torch's grid_sample, which deformable attention runs, in the values."""
    at, weights = points(seed=1)
    found, start = attention_map(LEVELS, at, weights), 0
    for level, (height, width) in enumerate(LEVELS):
        values = torch.zeros(2, 1, height, width, dtype=torch.float64, requires_grad=True)
        grid = 2 * at[:, :, :, level].flatten(1, 2) - 1
        read = F.grid_sample(values, grid, mode="bilinear", align_corners=False)[:, 0]
        (read * weights[:, :, :, level].flatten(1, 2)).sum().backward()
        end = start + height * width
        assert torch.allclose(found[:, start:end].double(), values.grad.flatten(1), atol=1e-6)
        start = end


def test_the_loss_by_hand():
    """Binary cross-entropy of the valid tokens against the best of the decoder's map, image by image."""
    method = SparseDETR(keep=0.25)
    draw = torch.Generator().manual_seed(3)
    logits = torch.randn(2, N, generator=draw, requires_grad=True)
    call = DetectorCall(LEVELS, TWO, TWO.sum(1).tolist(), sampling=[points(seed=s) for s in (4, 5)])
    trace = Trace(notes={"detector": call, "sparse-detr": logits})
    loss = method.training_losses(trace, None)["decoder_attention"]
    seen = sum(attention_map(LEVELS, *layer) for layer in call.sampling).numpy()
    rows = []
    for b in range(2):
        places = np.flatnonzero(TWO[b].numpy())
        number = math.ceil(0.25 * len(places))
        best = set(places[np.argsort(-seen[b][places], kind="stable")[:number]].tolist())
        z = wide(logits[b])
        terms = [math.log1p(math.exp(-z[j] if j in best else z[j])) for j in places]
        rows.append(sum(terms) / len(terms))
    assert float(loss.detach()) == pytest.approx(sum(rows) / 2, abs=1e-5)
    loss.backward()
    assert not logits.grad[~TWO].any() and logits.grad[TWO].all()


def test_best_tokens_leaves_padding_out():
    scores = torch.arange(float(N)).expand(2, -1)
    found = best_tokens(scores, torch.tensor([3, 3]), TWO)
    assert found[0].nonzero()[:, 0].tolist() == [N - 3, N - 2, N - 1]
    assert found[1].nonzero()[:, 0].tolist() == TWO[1].nonzero()[-3:, 0].tolist()


def test_new_modules_are_refused_outside_of_training():
    method = SparseDETR(keep=0.3)
    modules = method.build(info())
    with pytest.raises(UnsupportedMethodError, match="modules that are trained, and these are new"):
        method.reduce(site(modules=modules))
    assert method.replace(untrained=True).reduce(site(modules=modules)) is not None
    assert method.reduce(site(modules=modules, training=True)) is not None
    assert method.reduce(site(modules=modules)) is not None


def test_trained_modules_come_back_from_a_file(tmp_path):
    method, path = SparseDETR(keep=0.3), tmp_path / "scorer.safetensors"
    modules = trained(method)
    save_file(modules.state_dict(), path)
    loaded = method.replace(weights=str(path))
    made = loaded.reduce(site(modules=loaded.build(info())))
    assert torch.equal(made.map.kept, method.reduce(site(modules=modules)).map.kept)
    with pytest.raises(ValueError, match="trained for another width"):
        FocusDETR(weights=str(path)).build(info())


def test_everything_may_stay_but_is_scored_in_training():
    method, place = SparseDETR(keep=1.0), site(training=True)
    place.modules = method.build(info())
    assert method.reduce(place) is None and place.notes["sparse-detr"].requires_grad
    assert method.reduce(site()) is None


def test_the_loss_needs_the_decoder():
    call = DetectorCall(LEVELS, None, [N, N])
    trace = Trace(notes={"detector": call, "sparse-detr": torch.zeros(2, N)})
    with pytest.raises(ValueError, match="needs the attention of the decoder"):
        SparseDETR().training_losses(trace, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0}, "keep must be"),
        ({"weights": 3}, "weights must be a path"),
        ({"untrained": 1}, "untrained must be True or False"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        SparseDETR(**options)
