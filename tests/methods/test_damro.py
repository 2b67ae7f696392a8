"""DAMRO against its formula: outliers from the tower's own projections, and the contrast of two runs."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch

import vtr
from tests.vision.vlm.contrasts import Reference
from tests.vision.vlm.models import FAMILIES
from tests.vision.vlm.picks import generate
from vtr.testing import check_method
from vtr.testing.models.prompts import split

pytestmark = pytest.mark.usefixtures("without_gradients")


@functools.cache
def sharp() -> tuple[Any, dict[str, Any]]:
    """A LLaVA whose class token attends to few patches: one head and the mean over heads differ."""
    model, inputs = FAMILIES["llava"](2)
    for layer in model.model.vision_tower.encoder.layers:
        layer.self_attn.q_proj.weight.mul_(30)
    return model, inputs


def projected(model: Any, inputs: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Queries and keys (images, 1 + N, C) float64 of the tower's layer that the projector reads."""
    layers = model.model.vision_tower.encoder.layers
    attention = layers[len(layers) + model.config.vision_feature_layer].self_attn
    seen: dict[str, np.ndarray] = {}
    hooks = [
        getattr(attention, name).register_forward_hook(
            lambda module, args, out, name=name: seen.update({name: out.double().numpy()})
        )
        for name in ("q_proj", "k_proj")
    ]
    model(**inputs)
    for hook in hooks:
        hook.remove()
    return seen["q_proj"], seen["k_proj"]


def brute_force(q: np.ndarray, k: np.ndarray, number: int, heads: int) -> list[list[int]]:
    """Outliers of each image: the patches with the largest attention of the class token, (images, number)."""
    out = []
    for image in range(len(q)):
        width = q.shape[2] // heads
        score = np.zeros(q.shape[1] - 1)
        for h in range(heads):
            part = slice(h * width, (h + 1) * width)
            logits = np.array([q[image, 0, part] @ key[part] / width**0.5 for key in k[image]])
            row = np.exp(logits - logits.max())
            score += (row / row.sum())[1:] / heads
        out.append(sorted(np.argsort(-score, kind="stable")[:number].tolist()))
    return out


@pytest.mark.parametrize("heads", ["joined", "mean"])
def test_the_outliers_and_every_step_are_those_of_the_paper(heads: str) -> None:
    """The second of two samples has two images, with outliers of each."""
    model, inputs = sharp()
    q, k = projected(model, inputs)
    several = model.config.vision_config.num_attention_heads
    outliers = brute_force(q, k, 3, 1 if heads == "joined" else several)
    assert brute_force(q, k, 3, 1) != brute_force(q, k, 3, several) and several > 1
    method = vtr.DAMRO(3, heads=heads, beta=0.02)
    with vtr.apply(model, method) as handle:
        out = generate(model, inputs, output_scores=True)
        kept = handle.trace.notes["logits"]["kept"].tolist()
    wanted = [outliers[0], [*outliers[1], *(16 + i for i in outliers[2])]]
    assert [[i for i in row if i >= 0] for row in kept] == wanted
    for b, sample in enumerate(split(inputs)):
        reference = Reference(model, method, sample, compact=True, kept=wanted[b])
        text = out.sequences[b, inputs["input_ids"].shape[1] :].tolist()
        for step, scores in enumerate(out.scores):
            found, right = scores[b].double().log_softmax(-1).numpy(), reference.scores(text[:step])
            both = np.isfinite(found) & np.isfinite(right)
            assert both.sum() >= np.isfinite(right).sum() - 1
            np.testing.assert_allclose(found[both], right[both], atol=2e-5)


def test_towers_without_a_class_token_need_the_substitute() -> None:
    model, inputs = FAMILIES["qwen2_5_vl"](1)
    with pytest.raises(vtr.UnsupportedMethodError, match=r"no class token.*signal='received'"):
        vtr.apply(model, vtr.DAMRO())
    with vtr.apply(model, vtr.DAMRO(3, signal="received")) as handle:
        generate(model, inputs)
        kept = handle.trace.notes["logits"]["kept"]
    assert (kept >= 0).sum() == 3


@pytest.mark.filterwarnings("ignore")
def test_the_laws_hold_for_the_substitute() -> None:
    assert check_method(vtr.DAMRO(3, signal="received"), ["qwen2.5-vl"]) == ("qwen2.5-vl",)


def test_the_report_counts_the_second_run() -> None:
    model, inputs = FAMILIES["llava"](1)
    with vtr.apply(model, vtr.DAMRO(3)) as handle:
        generate(model, inputs)
        report = handle.report()
    dense, both = report.flops["language"]
    assert 1.2 * dense < both < 2 * dense
    assert report.kv_bytes is not None
    length = inputs["input_ids"].shape[1]
    assert report.kv_bytes[1] / report.kv_bytes[0] == pytest.approx(1 + (length - 13) / length)


def test_options_are_checked() -> None:
    for wrong in ({"k": 0}, {"heads": "two"}, {"signal": "cls"}, {"alpha": -1}, {"beta": 2}):
        (name,) = wrong
        with pytest.raises(ValueError, match=f"{name} must be"):
            vtr.DAMRO(**wrong)
    assert torch.tensor(vtr.DAMRO().alpha) == 2
