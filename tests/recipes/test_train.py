"""The recipe: it learns, it is the same run again from the same seed, and it resumes exactly."""

import json

import pytest
import torch
from safetensors.torch import load_file

from recipes import train
from recipes.train_vit import Recipe, Trainer, choose_patches
from vtr.zoo import data, vit

SMALL = Recipe(steps=6, batch=4, dropping=0.7, warmup=2)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_steps_change_the_weights_and_lower_the_loss():
    trainer = Trainer(Recipe(steps=60, batch=16, warmup=5, learning_rate=1e-3))
    start = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    losses = [trainer.step()["patch_loss"] for _ in range(16)]
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])
    assert all(not torch.equal(start[k], v) for k, v in trainer.model.named_parameters())
    assert trainer.position == 16


def test_resume_goes_on_bit_for_bit(tmp_path):
    whole = Trainer(SMALL)
    for _ in range(SMALL.steps):
        whole.step()

    first = train.open_run(SMALL, tmp_path, resume=False)
    for _ in range(3):
        first.step()
    train.save_state(first, tmp_path)
    second = train.open_run(SMALL, tmp_path, resume=True)
    assert second.position == 3
    assert train.run(second, "digits-vit", tmp_path)

    state, resumed = whole.state(), second.state()
    assert state.keys() == resumed.keys()
    assert any("exp_avg_sq" in key for key in state)
    for key, value in state.items():
        assert torch.equal(value, resumed[key]), key
    weights = load_file(tmp_path / "digits-vit.safetensors")
    assert weights.keys() == vit.build().state_dict().keys()
    for key, value in whole.result().state_dict().items():
        assert torch.equal(weights[key], value.to(torch.bfloat16))


def test_command_runs_stops_and_resumes(tmp_path, capsys, monkeypatch):
    out = str(tmp_path / "run")
    common = ["digits-vit", "--steps", "2", "--out", out]
    train.main([*common, "--minutes", "0"])
    assert "stopped at step 0 of 2" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        train.main(common)
    assert "--resume" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train.main([*common, "--seed", "5", "--resume"])
    assert "seed differ" in capsys.readouterr().err
    train.main([*common, "--resume"])
    assert "weights: " in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["steps"] == 2


def test_resume_without_a_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="without --resume"):
        train.open_run(SMALL, tmp_path, resume=True)


def test_half_of_the_dropping_batches_are_uniformly_random():
    recipe = Recipe(steps=1000, dropping=0.8)
    batch = data.digits(16, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    ink = batch.ink > data.INK
    kept = {s: choose_patches(recipe, s, batch.ink, generator) for s in range(0, 1000)}
    assert all((index is None) == (step >= 800) for step, index in kept.items())

    biased = [index for step, index in kept.items() if index is not None and step % 2 == 0]
    uniform = [index for step, index in kept.items() if index is not None and step % 2 == 1]
    assert len(biased) == len(uniform) == 400
    for index in biased[:20]:
        assert index.shape == (16, 40)
        assert torch.equal(ink.gather(1, index).sum(1), ink.sum(1).clamp(max=40))
    sizes = torch.tensor([index.shape[1] for index in uniform])
    assert sizes.min() >= 36 and sizes.max() <= 144 and sizes.min() < 45 and sizes.max() > 130
    # No favour for ink: it survives as often as any other patch.
    survived = sum(ink.gather(1, index).sum().item() for index in uniform)
    expected = ink.sum().item() * (sizes / 144).sum().item()
    assert survived == pytest.approx(expected, rel=0.03)


def test_features_of_all_patches_are_the_models_own():
    model = vit.build().eval()
    images, _, _ = data.digits(3, torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model.forward_features(images)
        everything, early = vit.features(model, images, early=(1, 5))
        ordered, _ = vit.features(model, images, torch.arange(144).expand(3, -1))
        shuffled, _ = vit.features(model, images, torch.randperm(144).expand(3, -1))
    assert torch.equal(everything, wanted) and torch.equal(ordered, wanted)
    assert len(early) == 2 and torch.equal(model.norm(early[1]), wanted[:, 0])
    # Each patch takes its own position along, so their order cannot matter to CLS.
    assert torch.allclose(shuffled[:, 0], wanted[:, 0], atol=1e-5)


def test_averaged_result_is_what_ships():
    trainer = Trainer(SMALL)
    trainer.step()
    trainer.step()
    result = trainer.result()
    assert not result.training and result.blocks[0].attn.fused_attn
    assert not torch.equal(result.head.weight, trainer.model.head.weight)
    assert torch.equal(result.head.weight, trainer.average.head.weight)
