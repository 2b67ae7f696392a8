"""Methods that choose in every crop (FasterVLM, VisPruner, HiRED), recomputed crop by crop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vtr
from tests.vision.vlm.models import internvl, llava, llava_next, llava_onevision
from vtr.methods.common.crops import proportional
from vtr.methods.hired import content_of_tiles
from vtr.methods.vispruner import different

from .slow import Sequence, Tower, best, features, run, samples


def attention(model: Any, pixels: Tensor) -> tuple[list[Tensor], Tensor]:
    """Class attention (N,) of every layer up to the one that is used, and that one's features (N, C)."""
    tower = Tower(model)
    x, found = tower.start(pixels), []
    for layer in range(tower.last + 1):
        x, maps, _, _ = tower.step(layer, x)
        found.append(maps[:, 0, 1:].mean(0))
    return found, x[1:]


def slow_different(x: Tensor, order: list[int], number: int) -> list[int]:
    """The rounds of VisPruner, on indices into x."""
    x = x.double() / x.double().norm(dim=-1, keepdim=True)
    left = list(order)
    while len(left) > number > 0:
        a, b = left[::2], left[1::2]
        removed = min(8, len(left) - number, len(a))
        likeness = {i: max(float(x[i] @ x[j]) for j in b) for i in a}
        left = sorted(a, key=lambda i: -likeness[i])[removed:] + b
    return left[:number]


@pytest.mark.parametrize(("size", "number"), [(40, 7), (41, 8), (9, 1), (6, 6), (5, 0)])
def test_rounds_remove_the_most_similar(size: int, number: int) -> None:
    x = torch.randn(2, size, 5, generator=torch.Generator().manual_seed(size))
    got = different(x, number)
    for b in range(2):
        assert got[b].tolist() == slow_different(x[b], list(range(size)), number)


def fastervlm(maps: list[Tensor], x: Tensor) -> list[int]:
    return best(maps[-1], 5)


def vispruner(maps: list[Tensor], x: Tensor) -> list[int]:
    order = sorted(range(len(x)), key=lambda i: -float(maps[-1][i]))
    return sorted(order[:2] + slow_different(x, order[2:], 3))


CASES = {
    "fastervlm": (vtr.FasterVLM(keep=5), fastervlm),
    "vispruner": (vtr.VisPruner(keep=5), vispruner),
    "hired": (vtr.HiRED(keep=5), fastervlm),
}


@pytest.mark.parametrize("name", CASES)
def test_pictures_of_one_crop_equal_the_model_by_hand(name: str) -> None:
    method, slow = CASES[name]
    model, inputs = llava(2)
    with torch.no_grad(), vtr.apply(model, method) as handle:
        logits = model(**inputs).logits
    images, pixels, at = features(model, inputs), inputs["pixel_values"], 0
    for b, ids in enumerate(samples(inputs)):
        wanted = []
        for n in range(len(images[b]) // 16):
            wanted += [16 * n + i for i in slow(*attention(model, pixels[at + n]))]
        at += len(images[b]) // 16
        kept = handle.trace.kept[b]
        assert kept[kept >= 0].tolist() == wanted

        def cut(sequence: Sequence, seen: object, wanted: list[int] = wanted) -> None:
            sequence.keep(wanted, compact=True)

        expected, _ = run(model, ids, images[b], {0: cut})
        torch.testing.assert_close(logits[b, -1], expected, atol=2e-5, rtol=1e-4)


class Tiled:
    """The crops of each image of a LLaVA-NeXT, laid out by the model's own packing of numbered features."""

    def __init__(self) -> None:
        self.model, self.inputs = llava_next(2)
        sizes, pixels = self.inputs["image_sizes"], self.inputs["pixel_values"]
        self.counts = [5, 3]  # the whole picture with 2 x 2 tiles, and with 1 x 2
        self.pixels = [p[:n] for p, n in zip(pixels, self.counts, strict=True)]
        numbers = [torch.arange(n * 16, dtype=torch.float32).view(n, 16, 1) for n in self.counts]
        packed, _ = self.model.model.pack_image_features(
            numbers, sizes, "default", image_newline=torch.tensor([-1.0])
        )
        self.token = [x[:, 0].round().long().tolist() for x in packed]  # crop * 16 + patch, or -1

    def seen(self, image: int) -> list[tuple[list[Tensor], Tensor]]:
        return [attention(self.model, p) for p in self.pixels[image]]

    def kept(self, method: vtr.Method) -> list[list[int]]:
        with torch.no_grad(), vtr.apply(self.model, method) as handle:
            self.model(**self.inputs)
        return [row[row >= 0].tolist() for row in handle.trace.kept]


def in_proportion(total: int, sizes: list[int]) -> list[int]:
    ends = [total * sum(sizes[: i + 1]) // sum(sizes) for i in range(len(sizes))]
    return [b - a for a, b in zip([0, *ends], ends, strict=False)]


@pytest.mark.parametrize("keep", [11, 30])
@pytest.mark.parametrize("name", ["fastervlm", "vispruner"])
def test_every_crop_keeps_its_share(name: str, keep: int) -> None:
    tiled = Tiled()
    kept = tiled.kept(vtr.create(name, keep=keep))
    for image, numbers in enumerate(tiled.token):
        seen, wanted = tiled.seen(image), []
        crops = [[i for i, t in enumerate(numbers) if t // 16 == c] for c in range(len(seen))]
        assert min(map(len, crops)) > 0
        for c, share in enumerate(in_proportion(keep, [len(crop) for crop in crops])):
            score = {i: float(seen[c][0][-1][numbers[i] % 16]) for i in crops[c]}
            order = sorted(crops[c], key=lambda i: -score[i])
            first = share if name == "fastervlm" else share // 2
            x = torch.zeros(len(numbers), 32)
            x[crops[c]] = seen[c][1][[numbers[i] % 16 for i in crops[c]]]
            wanted += order[:first] + slow_different(x, order[first:], share - first)
        assert kept[image] == sorted(wanted)


@pytest.mark.parametrize(("keep", "alpha"), [(11, 0.5), (20, 0.25), (30, 0.8)])
def test_the_whole_picture_says_what_its_tiles_keep(keep: int, alpha: float) -> None:
    tiled = Tiled()
    kept = tiled.kept(vtr.HiRED(keep=keep, alpha=alpha))
    for image, numbers in enumerate(tiled.token):
        seen = tiled.seen(image)
        crops = [[i for i, t in enumerate(numbers) if t // 16 == c] for c in range(len(seen))]
        rows, columns = ((2, 2), (1, 2))[image]
        content = [0] * (rows * columns)
        for patch in best(seen[0][0][0], int(16 * (1 - alpha) + 1e-9)):
            content[patch // 4 * rows // 4 * columns + patch % 4 * columns // 4] += 1
        own = min(int(keep * alpha + 1e-9), 16)
        own = max(own, keep - sum(map(len, crops[1:])))
        numbers_of = [own, *proportional(keep - own, content, [len(c) for c in crops[1:]])]
        wanted = []
        for c, number in enumerate(numbers_of):
            order = sorted(crops[c], key=lambda i, c=c: -float(seen[c][0][-1][numbers[i] % 16]))
            wanted += order[:number]
        assert kept[image] == sorted(wanted) and len(wanted) == keep


def test_content_is_counted_in_rectangles() -> None:
    row = torch.zeros(16)
    row[[0, 1, 5, 3, 12]] = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
    assert content_of_tiles(row, (2, 2), 1 - 5 / 16) == [3, 1, 1, 0]
    assert content_of_tiles(row, (1, 2), 1 - 4 / 16) == [3, 1]
    assert content_of_tiles(row, (4, 1), 1 - 3 / 16) == [2, 1, 0, 0]


def test_shares_are_proportional_within_their_rooms() -> None:
    assert proportional(10, [1, 1, 2], [9, 9, 9]) == [
        3,
        2,
        5,
    ]  # 2.5, 2.5 and 5: the first gets the rest
    assert proportional(10, [1, 1, 8], [9, 9, 4]) == [3, 3, 4]
    assert proportional(7, [0, 0, 1], [5, 5, 4]) == [3, 0, 4]
    assert proportional(99, [1, 2], [5, 4]) == [5, 4]
    assert proportional(0, [1, 2], [5, 4]) == [0, 0]


def test_tiles_whose_places_are_not_known_share_by_their_size() -> None:
    model, inputs = internvl(1)
    with torch.no_grad(), vtr.apply(model, vtr.HiRED(keep=0.5)) as handle:
        model(**inputs)
    kept, entry = handle.trace.kept[0], int((inputs["input_ids"] == 150).sum())
    assert len(kept) == -(-entry // 2)


@pytest.mark.parametrize("method", [vtr.FasterVLM(), vtr.HiRED()])
def test_a_tower_without_a_class_token_is_refused(method: vtr.Method) -> None:
    model, _ = llava_onevision(1)
    with pytest.raises(vtr.UnsupportedMethodError, match="no class token"):
        vtr.apply(model, method)


def test_vispruner_takes_received_attention_without_a_class_token() -> None:
    model, inputs = llava_onevision(2)
    with torch.no_grad(), vtr.apply(model, vtr.VisPruner(keep=6)) as handle:
        model(**inputs)
    assert (handle.trace.kept >= 0).sum(1).tolist() == [6, 6]


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (vtr.FasterVLM, {"keep": 0}),
        (vtr.VisPruner, {"keep": 1.5}),
        (vtr.VisPruner, {"important": -0.1}),
        (vtr.HiRED, {"alpha": 1.1}),
        (vtr.HiRED, {"keep": True}),
    ],
)
def test_bad_options_are_refused(cls: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        cls(**options)
