"""Class-attention pruning and VTC-CLS' ensemble, written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import vtr
from tests.tiny import images, vit


def rows_and_states(
    model: torch.nn.Module, x: Tensor, cuts: dict[int, list[list[int]]]
) -> list[Tensor]:
    """Class rows (B, N_l) of every block of a network that is cut as given (positions before the cut)."""
    h = model._pos_embed(model.patch_embed(x))  # type: ignore[operator]
    rows = []
    for i, block in enumerate(model.blocks):  # type: ignore[arg-type]
        normed = block.norm1(h)
        batch, tokens, width = normed.shape
        q, k, v = block.attn.qkv(normed).reshape(batch, tokens, 3, 3, -1).permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(-1, -2) * (width // 3) ** -0.5).softmax(-1)
        rows.append(attention[:, :, 0, 1:].mean(1))
        h = h + block.attn.proj((attention @ v).transpose(1, 2).reshape(batch, tokens, width))
        if i in cuts:
            h = torch.stack([h[b][[0, *[j + 1 for j in cuts[i][b]]]] for b in range(batch)])
        h = h + block.mlp(block.norm2(h))
    return rows


@pytest.mark.parametrize("ensemble", [1, 2, 3])
def test_kept_tokens_over_several_layers(ensemble: int) -> None:
    model, x = vit(), images(3)
    method = vtr.CLSAttention(keep=(40, 12), layers=(2, 4), ensemble=ensemble)
    with vtr.apply(model, method) as handle, torch.no_grad():
        model(x)
    stages = handle.trace.stages
    assert [(s.layer, s.tokens_out) for s in stages] == [(2, 40), (4, 12)]
    cuts = {s.layer: s.map.kept.tolist() for s in stages}
    with torch.no_grad():
        rows = rows_and_states(model, x, cuts)
    for b in range(3):
        alive = list(range(64))  # original indices of the tokens of each layer
        at = {}
        for layer in range(6):
            at[layer] = {j: float(rows[layer][b, i]) for i, j in enumerate(alive)}
            if layer in cuts:
                number = {2: 40, 4: 12}[layer]
                used = range(max(0, layer - ensemble + 1), layer + 1)
                mean = {j: sum(at[m][j] for m in used) / len(used) for j in alive}
                best = sorted(sorted(alive, key=lambda j: -mean[j])[:number])
                assert [alive[i] for i in cuts[layer][b]] == best
                alive = best
        assert stages[-1].total.kept[b].tolist() == alive


def test_the_ensemble_changes_the_choice() -> None:
    model, x = vit(), images(3)
    kept = []
    for ensemble in (1, 3):
        with vtr.apply(model, vtr.CLSAttention(keep=10, layers=(3,), ensemble=ensemble)) as handle:
            model(x)
        kept.append(handle.trace.kept)
    assert not torch.equal(kept[0], kept[1])  # type: ignore[arg-type]


def test_the_ensemble_ends_at_the_first_layer() -> None:
    model, x = vit(), images()
    outs = []
    for ensemble in (2, 9):
        with (
            vtr.apply(model, vtr.CLSAttention(keep=10, layers=(1,), ensemble=ensemble)),
            torch.no_grad(),
        ):
            outs.append(model(x))
    assert torch.equal(outs[0], outs[1])


def test_default_layer_and_geometric_budget() -> None:
    model = vit(depth=8)
    with vtr.apply(model, vtr.CLSAttention()) as handle, torch.no_grad():
        model(images())
        assert [(s.layer, s.tokens_out) for s in handle.trace.stages] == [(2, 32)]
    with vtr.apply(model, vtr.CLSAttention(keep=4, layers=(1, 2, 3, 4))) as handle, torch.no_grad():
        model(images())
        assert [s.tokens_out for s in handle.trace.stages] == [32, 16, 8, 4]
