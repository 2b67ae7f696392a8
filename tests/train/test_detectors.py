"""Training of the scores of a detector's tokens: losses of a call, one step, and the file."""

from __future__ import annotations

import pytest
import torch

import vtr
from vtr.testing.models.detectors import deformable_detr, pictures
from vtr.train import detectors

LABELS = [
    {
        "boxes": torch.tensor([[0.3, 0.4, 0.3, 0.3], [0.7, 0.6, 0.2, 0.2]]),
        "class_labels": torch.tensor([1, 2]),
    },
    {"boxes": torch.tensor([[0.5, 0.5, 0.8, 0.9]]), "class_labels": torch.tensor([3])},
]
METHODS = [vtr.SparseDETR(keep=0.3), vtr.FocusDETR(keep=0.5, objects=4)]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_steps_lower_the_loss_and_the_file_gives_the_same_model(method, tmp_path):
    torch.manual_seed(0)
    network, path = deformable_detr().requires_grad_(False), str(tmp_path / "scores.safetensors")
    handle = vtr.apply(network, method)
    optimizer = torch.optim.AdamW(handle.modules.parameters(), lr=1e-2)
    found = []
    for _ in range(9):
        out = network.train()(**pictures(), labels=LABELS)
        terms = detectors.losses(handle)
        loss = out.loss + sum(terms.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(next(iter(terms.values())).detach()))
    assert list(terms) == [
        f"{method.name}/{'foreground' if 'focus' in method.name else 'decoder_attention'}"
    ]
    assert found[-1] < 0.85 * found[0]
    assert all(p.grad is not None and p.grad.any() for p in _scored(handle))
    assert all(p.grad is None for p in network.parameters())
    detectors.save(handle, path)
    with torch.no_grad():
        wanted = network.eval()(**pictures()).logits
    handle.remove()
    with vtr.apply(network, method.replace(weights=path)), torch.no_grad():
        assert torch.equal(network(**pictures()).logits, wanted)


def _scored(handle):
    """The weights that the loss of the scores reaches, but for the last bias of the projection of keys."""
    return [
        p
        for name, p in handle.modules.named_parameters()
        if ".scorer." in name or (name.endswith(("alpha", "weight")) and "objects" not in name)
    ]


def test_the_dual_attention_learns_from_the_detector_alone():
    network = deformable_detr().requires_grad_(False).train()
    handle = vtr.apply(network, METHODS[1])
    network(**pictures(), labels=LABELS).loss.backward()
    for name, parameter in handle.modules.named_parameters():
        assert (parameter.grad is not None) == ("objects" in name), name


def test_losses_need_a_call_in_training():
    network = deformable_detr()
    silent = pytest.raises(RuntimeError, match="sparse-detr has scored nothing")
    with vtr.apply(network, METHODS[0]) as handle, silent:
        detectors.losses(handle)
    with vtr.apply(network, vtr.Random(keep=0.5)) as handle:
        network(**pictures())
        assert detectors.losses(handle) == {}
        with pytest.raises(ValueError, match="must have one method that learns, it has 0"):
            detectors.save(handle, "nowhere.safetensors")


def test_boxes_are_asked_for():
    network = deformable_detr().train()
    with vtr.apply(network, METHODS[1]) as handle:
        network(**pictures())
        with pytest.raises(ValueError, match="needs boxes"):
            detectors.losses(handle)
