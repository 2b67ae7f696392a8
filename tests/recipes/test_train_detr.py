"""The recipe of the built-in detector: it resumes exactly, and its losses are what they say."""

from __future__ import annotations

import json
from itertools import permutations

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("sklearn")

from recipes import detr_losses as losses
from recipes import train, train_detr
from vtr.zoo import detection, detr

SMALL = train_detr.Recipe(steps=4, final=1, batch=1, warmup=2)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_resumed_run_is_the_same_run(tmp_path):
    whole, first = train_detr.Trainer(SMALL), train_detr.Trainer(SMALL)
    for _ in range(SMALL.steps):
        last = whole.step()
    for _ in range(2):
        first.step()
    second = train_detr.Trainer(SMALL)
    second.load_state(first.state())
    for _ in range(SMALL.steps - 2):
        again = second.step()
    assert again == last
    for name, tensor in whole.state().items():
        assert torch.equal(tensor, second.state()[name]), name

    second.export(tmp_path)
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["size"] == {
        "height": 160,
        "width": 160,
    }
    from transformers import DeformableDetrForObjectDetection

    loaded = DeformableDetrForObjectDetection.from_pretrained(tmp_path, dtype=torch.float32).eval()
    wanted = second.result().half().float()
    images = detection.pictures(2, seeded(7)).images
    with torch.no_grad():
        assert torch.equal(loaded(images).logits, wanted(images).logits)
        assert torch.equal(loaded(images).pred_boxes, wanted(images).pred_boxes)


def test_frozen_and_live_normalisation_agree():
    trainer = train_detr.Trainer(SMALL)
    trainer.step()
    images = detection.pictures(1, seeded(3)).images
    with torch.no_grad():
        live = trainer.average.eval()(images)
        frozen = trainer.result()(images)
    torch.testing.assert_close(live.logits, frozen.logits, rtol=1e-4, atol=1e-5)


def test_all_tokens_refreshed_is_the_model_itself():
    trainer = train_detr.Trainer(SMALL)
    model = trainer.model.eval()
    images = detection.pictures(2, seeded(1)).images
    with torch.no_grad():
        plain = model(images)
        trainer._choice["kept"] = torch.arange(detr.TOKENS).flip(0).expand(2, -1)
        every = model(images)
        trainer._choice["kept"] = torch.arange(10).expand(2, -1)
        few = model(images)
    torch.testing.assert_close(every.logits, plain.logits, rtol=1e-4, atol=1e-5)
    entry = trainer._entry[-1]
    changed = (few.encoder_last_hidden_state != entry).any(-1)
    assert changed[:, :10].all() and not changed[:, 10:].any()


def test_the_schedule_before_the_last_steps_does_not_depend_on_their_number():
    short, long = train_detr.Recipe(steps=2000), train_detr.Recipe(steps=9000)
    inside = torch.zeros(1, detr.TOKENS, dtype=torch.bool)
    for step in (0, 57, 799):
        assert short.rate(step) == long.rate(step)
        a = train_detr.choose_tokens(short, step, inside, seeded(step))
        b = train_detr.choose_tokens(long, step, inside, seeded(step))
        assert torch.equal(a, b)
    assert short.rate(1999) == pytest.approx(short.learning_rate * (0.01 + 0.99 / short.final))
    assert train_detr.choose_tokens(short, 1998, inside, seeded()) is None


def test_even_steps_keep_tokens_in_boxes_first():
    recipe = train_detr.Recipe()
    inside = torch.rand(2, detr.TOKENS, generator=seeded()) < 0.1
    for step in range(0, 20, 2):
        kept = train_detr.choose_tokens(recipe, step, inside, seeded(step))
        share = kept.shape[1] / detr.TOKENS
        assert recipe.keep[0] - 0.01 <= share <= 1
        hit = inside.gather(1, kept).sum(1)
        assert (hit == torch.clamp(inside.sum(1), max=kept.shape[1])).all()


def iou(a: list[float], b: list[float]) -> tuple[float, float]:
    """IoU and generalised IoU of (centre x, centre y, width, height), by their definitions."""
    a, b = (
        [
            centre + sign * size / 2
            for sign in (-1, 1)
            for centre, size in zip(x[:2], x[2:], strict=True)
        ]
        for x in (a, b)
    )
    wide = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    tall = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    both = wide * tall
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return both / union, both / union - (hull - union) / hull


def test_overlaps():
    boxes = 0.1 + 0.4 * torch.rand(20, 2, 4, generator=seeded(), dtype=torch.float64)
    for (first, second), found in zip(
        boxes.tolist(), zip(*losses.overlaps(boxes[:, 0], boxes[:, 1]), strict=True), strict=True
    ):
        assert [float(x) for x in found] == pytest.approx(iou(first, second))


def test_match_is_the_cheapest_assignment():
    generator = seeded(3)
    logits = torch.randn(1, 4, 10, generator=generator)
    boxes = 0.2 + 0.3 * torch.rand(1, 4, 4, generator=generator)
    targets = 0.2 + 0.3 * torch.rand(1, 5, 4, generator=generator)
    labels = torch.tensor([[3, 8, -1, -1, -1]])
    p = logits.sigmoid()[0].double()

    def cost(query: int, column: int) -> float:
        q = p[query, labels[0, column]]
        gain = 0.25 * (1 - q) ** 2 * -(q + 1e-8).log() - 0.75 * q**2 * -(1 - q + 1e-8).log()
        box, target = boxes[0, query].tolist(), targets[0, column].tolist()
        away = sum(abs(x - y) for x, y in zip(box, target, strict=True))
        return 2 * float(gain) + 5 * away - 2 * iou(box, target)[1]

    best = min(permutations(range(4), 2), key=lambda pair: cost(pair[0], 0) + cost(pair[1], 1))
    found = losses.match(logits, boxes, labels, targets)
    assert {(q, t) for _, q, t in found.tolist()} == {(best[0], 0), (best[1], 1)}


def test_tokens_of_digits_lie_about_their_centres():
    found = detection.pictures(50, seeded(2))
    column, inside = losses.assign(found.labels, found.boxes)
    centres, strides = losses.token_grid()
    assert len(centres) == detr.TOKENS
    for picture in range(50):
        for k in range(int((found.labels[picture] >= 0).sum())):
            left, top, right, bottom = found.boxes[picture, k].tolist()
            tokens = (column[picture] == k).nonzero().flatten().tolist()
            stride = 8 if max(right - left, bottom - top) <= 32 else None
            stride = stride or (16 if max(right - left, bottom - top) <= 48 else 32)
            assert {strides[t].item() for t in tokens} <= {stride} and len(tokens) <= 9
            for t in tokens:
                x, y = centres[t].tolist()
                assert max(abs(x - (left + right) / 2), abs(y - (top + bottom) / 2)) <= stride
        covered = [
            any(
                a <= x <= c and b <= y <= d
                for (a, b, c, d), digit in zip(
                    found.boxes[picture].tolist(), found.labels[picture].tolist(), strict=True
                )
                if digit >= 0
            )
            for x, y in centres.tolist()
        ]
        assert covered == inside[picture].tolist()
    # Nearly every digit has its own tokens; two of one size side by side may share the nearest one.
    has = torch.stack([(column == k).any(1) for k in range(5)], 1)
    assert has[found.labels >= 0].float().mean() > 0.98


def test_scores_learn_the_overlap():
    """The varifocal loss has its minimum where the score is the IoU, and falls to it on both sides."""
    quality = torch.tensor([0.7])
    loss = [float(losses.graded(torch.tensor([x]).logit(), quality)) for x in (0.5, 0.7, 0.9)]
    assert loss[1] < loss[0] and loss[1] < loss[2]
    low, high = (float(losses.graded(torch.tensor([x]), torch.zeros(1))) for x in (-3.0, 1.0))
    p = torch.tensor(1.0).sigmoid()
    assert low < high == pytest.approx(float(0.75 * p**2 * -(1 - p).log()))


def test_it_is_registered():
    assert train.RECIPES["digits-detr"] == "recipes.train_detr"
