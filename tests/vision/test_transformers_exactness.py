"""transformers' vision towers: pruned physically is masked as keys."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

import vtr
from tests.tiny import ours
from tests.vision.towers import (
    MODELS,
    attention_of,
    build,
    layers_of,
    masked,
    pixels,
    result,
    tower_of,
)
from vtr.core.method import Method
from vtr.core.wrapping import wrapping_of

MEANS = ["clip-classes", "siglip-classes", "ijepa-classes", "dinov2-classes", "registers-classes"]


# ---- exactness -----------------------------------------------------------------------------------


@pytest.mark.compat
@pytest.mark.parametrize("name", MODELS)
def test_pruning_equals_masking(name: str) -> None:
    """Physically short equals the full sequence with the others masked, in float64."""
    model, (_, prefix, methods) = build(name), MODELS[name]
    attention = type(attention_of(layers_of(model)[0]))
    if "attention_mask" not in inspect.signature(attention.forward).parameters:
        pytest.skip(
            f"{attention.__name__} of this transformers version takes no mask to compare with"
        )
    model = copy.deepcopy(model).double()
    x = pixels().double()
    method: Method
    if "cls-attention" in methods:
        method = vtr.CLSAttention(keep=20, layers=(1,))
    else:
        method = vtr.Random(keep=20, layers=(1,), seed=3)
    with vtr.apply(model, method) as handle, torch.no_grad():
        short = tower_of(model)(x)
        answer = result(model(x))
    record = handle.trace.stages[-1]
    assert record.tokens_out == 20 and record.layer == 1
    whole = record.total.with_prefix(prefix)
    with torch.no_grad(), masked(model, 1, whole.source >= 0):
        full, reference = tower_of(model)(x), result(model(x))
    torch.testing.assert_close(
        short.last_hidden_state, whole.gather(full.last_hidden_state), atol=1e-9, rtol=1e-9
    )
    if prefix and name not in MEANS:  # what the class token says
        torch.testing.assert_close(answer, reference, atol=1e-9, rtol=1e-9)
    if "cls-attention" in methods:  # the choice itself, from the model's own eager attention
        eager = copy.deepcopy(model)
        eager.set_attn_implementation("eager")
        with torch.no_grad():
            maps = tower_of(eager)(x, output_attentions=True).attentions
        row = maps[1][:, :, 0, prefix:].mean(1)
        assert torch.equal(row.topk(20, 1).indices.sort(1).values, record.total.kept)


def level_positions(model: Any) -> None:
    """Give all patches one position, so that equal patches are equal tokens."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("position_embedding.weight"):
                p[-64:] = p[-64:].mean(0, keepdim=True)
            elif name.endswith("position_embeddings"):
                p[:, -64:] = p[:, -64:].mean(1, keepdim=True)


def twins() -> Tensor:
    """Images whose patches 4i and 4i + 1 are equal, all others different: 16 pairs."""
    patches = torch.randn(2, 64, 3, 4, 4)
    patches[:, 1::4] = patches[:, 0::4]
    return patches.reshape(2, 8, 8, 3, 4, 4).permute(0, 3, 1, 4, 2, 5).reshape(2, 3, 32, 32)


MERGED = [(n, "sdpa") for n in MODELS if n != "dinov3"]  # whose rotation tells all patches apart


MERGED += [(n, "eager") for n in ("clip", "siglip", "dinov2-classes", "internvl")]


@pytest.mark.parametrize(("name", "implementation"), MERGED)
def test_merging_equal_tokens_changes_nothing(name: str, implementation: str) -> None:
    """Sizes in attention and pooling: 16 merged pairs count like the 32 tokens they were."""
    model, x = build(name).double(), twins().double()
    level_positions(model)
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        dense = model(x)
        with vtr.apply(model, vtr.ToMe(r=(16, 0, 0, 0))) as handle:
            short = model(x)
        assert handle.trace.stages[-1].tokens_out == 48
        assert set(handle.trace.stages[-1].total.size.unique().tolist()) == {1.0, 2.0}
        with vtr.apply(model, vtr.ToMe(r=(16, 0, 0, 0), prop_attn=False)):
            wrong = model(x)
        with vtr.apply(model, vtr.ToMe(r=(16, 0, 0, 0)), output="restored"):
            restored = model(x)
    # Sizes enter as float32 logarithms, which bounds the agreement of float64 models.
    torch.testing.assert_close(result(short), result(dense), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(
        restored.last_hidden_state if hasattr(restored, "last_hidden_state") else result(restored),
        dense.last_hidden_state if hasattr(dense, "last_hidden_state") else result(dense),
        atol=1e-6,
        rtol=1e-6,
    )
    assert (result(wrong) - result(dense)).abs().max() > 1e-3


@pytest.mark.parametrize("name", MEANS)
def test_classifiers_weigh_the_mean_of_merged_tokens(name: str) -> None:
    model, x = build(name), pixels()
    caught: list[Tensor] = []
    hook = model.classifier.register_forward_hook(lambda m, a, o: caught.append(a[0]))
    prefix = MODELS[name][1]
    with vtr.apply(model, vtr.ToMe(r=12)) as handle, torch.no_grad():
        model(x)
        short = tower_of(model)(x).last_hidden_state[:, prefix:]
        size = handle.trace.stages[-1].total.size[..., None]
    hook.remove()
    mean = (short * size).sum(1) / 64
    torch.testing.assert_close(caught[0][:, -48:], mean, atol=1e-5, rtol=1e-5)
    assert (short.mean(1) - mean).abs().max() > 1e-3
    assert wrapping_of(model) is None and ours(model) == []
