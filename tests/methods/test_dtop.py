"""DToP: who leaves, against a loop over classes; what comes out, and how its heads are trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import vtr
from tests.tiny import images, vit
from vtr.methods.dtop import finished


def by_loop(
    chance: Tensor, label: Tensor, confidence: float, context: int, valid: Tensor
) -> list[int]:
    """The tokens of one image that leave."""
    gone = []
    for c in set(label.tolist()):
        own = [
            i
            for i in range(len(label))
            if valid[i] and label[i] == c and float(chance[i]) > confidence
        ]
        own.sort(key=lambda i: (-float(chance[i]), i))
        gone += own[context:]
    return sorted(gone)


def test_who_leaves() -> None:
    draw = torch.Generator().manual_seed(0)
    for context in (1, 2, 5):
        # Few values, so that there are ties.
        chance = torch.randint(5, 11, (4, 40), generator=draw) / 10
        label = torch.randint(0, 3, (4, 40), generator=draw)
        valid = torch.rand(4, 40, generator=draw) > 0.2
        found = finished(chance, label, 0.65, context, valid)
        for i in range(4):
            wanted = by_loop(chance[i], label[i], 0.65, context, valid[i])
            assert found[i].nonzero()[:, 0].tolist() == wanted
            assert wanted


def sharp(modules: nn.Module) -> None:
    draw = torch.Generator().manual_seed(3)
    for head in modules.children():
        head.linear.weight.data = torch.randn(head.linear.weight.shape, generator=draw)


METHOD = vtr.DToP(classes=3, confidence=0.8, context=2, layers=(1, 3))


def test_finished_tokens_keep_their_class() -> None:
    model, x = vit(), images(3)
    with vtr.apply(model, METHOD, output="restored") as handle, torch.no_grad():
        dense = model.forward_features(x)  # heads that know nothing: nobody leaves
        assert not handle.trace.stages
        sharp(handle.modules[0])
        features = model.forward_features(x)
        trace, heads = handle.trace, handle.modules[0]
        prefix = features.shape[1] - trace.stages[0].map.n_in
        final = torch.full(features[:, prefix:].shape[:2], 7)
        classes = METHOD.finish(trace, final)
        left = trace.stages[-1].total
        for i in range(3):
            stays = set(left.kept[i][left.kept[i] >= 0].tolist())
            assert {t for t, c in enumerate(classes[i].tolist()) if c == 7} == stays
            assert 0 < len(stays) < left.n_in
        # One image alone is cut alike.
        alone = model.forward_features(x[1:2])
        torch.testing.assert_close(features[1:2], alone, atol=2e-5, rtol=1e-4)
        assert torch.equal(METHOD.finish(handle.trace, final[1:2]), classes[1:2])
        # The first cut reads what the dense model has there.
        at = []
        hook = model.blocks[1].register_forward_hook(lambda m, a, out: at.append(out))
        handle.pause()
        assert torch.equal(model.forward_features(x), dense)
        hook.remove()
        chance, label = heads[0](at[0][:, prefix:]).softmax(-1).max(-1)
        gone = finished(chance, label, 0.8, 2, torch.ones_like(label, dtype=torch.bool))
        assert torch.equal(trace.stages[0].map.source < 0, gone)
        assert torch.equal(classes[gone], label[gone])


def test_heads_are_trained_by_their_loss() -> None:
    model, x = vit().train().requires_grad_(False), images(4)
    with vtr.apply(model, METHOD) as handle:
        labels = torch.randint(0, 3, (4, handle._wrapping.info.tokens or 0))
        labels[0, :5] = -100
        optimizer = torch.optim.AdamW(handle.modules.parameters(), lr=1e-2)
        losses = []
        for _ in range(5):
            model(x)
            loss = METHOD.token_loss(handle.trace, labels)
            logits = handle.trace.notes["dtop_logits"]
            wanted = [
                -x.log_softmax(-1)[labels >= 0].gather(1, labels[labels >= 0, None]).mean()
                for x in logits
            ]
            torch.testing.assert_close(loss, torch.stack(wanted).mean())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        assert not handle.trace.stages  # every token is there in training


def test_weights_come_from_a_file(tmp_path: Path) -> None:
    model, x = vit(), images(2)
    with vtr.apply(model, METHOD, output="restored") as handle, torch.no_grad():
        sharp(handle.modules[0])
        wanted = model.forward_features(x)
        save_file(dict(handle.modules[0].state_dict()), tmp_path / "heads.safetensors")
    loaded = METHOD.replace(weights=str(tmp_path / "heads.safetensors"))
    with vtr.apply(model, loaded, output="restored"), torch.no_grad():
        assert torch.equal(model.forward_features(x), wanted)
    with pytest.raises(ValueError, match="another width or number of stages"):
        vtr.apply(model, loaded.replace(classes=4))


def test_errors() -> None:
    with pytest.raises(ValueError, match="classes must be"):
        vtr.DToP(classes=1)
    with pytest.raises(ValueError, match="context must be"):
        vtr.DToP(context=0)
    with pytest.raises(ValueError, match="confidence must be"):
        vtr.DToP(confidence=1.5)
