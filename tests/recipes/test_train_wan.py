"""The recipe of the built-in generator: it resumes exactly, and its loss and levels are what it says."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("sklearn")

import vtr
from recipes import train, train_wan
from vtr.zoo import wan


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


SMALL = train_wan.Recipe(
    stages=(
        train_wan.Stage(2, ((1, 16, 16),), (1e-3, 1e-3)),
        train_wan.Stage(3, ((2, 16, 16),), (1e-3, 1e-4)),
    ),
    tokens=256,
)


def test_a_resumed_run_is_the_same_run():
    whole, first = train_wan.Trainer(SMALL), train_wan.Trainer(SMALL)
    for _ in range(SMALL.steps):
        losses = whole.step()
    for _ in range(3):
        first.step()
    second = train_wan.Trainer(SMALL)
    second.load_state(first.state())
    for _ in range(SMALL.steps - 3):
        assert second.step().keys() == losses.keys()
    for name, tensor in whole.state().items():
        assert torch.equal(tensor, second.state()[name]), name


def test_plain_attention_is_diffusers_attention():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = wan.build().eval()
    plain = copy.deepcopy(model)
    for block in plain.blocks:
        block.attn1.processor = block.attn2.processor = train_wan.PlainAttention()
    inputs = {
        "hidden_states": torch.randn(2, 1, 3, 8, 8, generator=seeded()),
        "timestep": torch.tensor([900.0, 100.0]),
        "encoder_hidden_states": wan.words()[torch.tensor([[1, 11], [2, 12]])],
        "return_dict": False,
    }
    with torch.no_grad():
        torch.testing.assert_close(plain(**inputs)[0], model(**inputs)[0], rtol=1e-4, atol=1e-5)


def test_frames_with_levels_of_their_own_have_a_clean_one_without_loss():
    level, weight = train_wan.levels(SMALL, SMALL.stages[1], 400, 5, True, seeded())
    assert level.shape == weight.shape == (400, 5)
    assert torch.equal(level == 0, weight == 0)
    clean = (level == 0).sum(1)
    assert clean.max() == 1 and 0.5 < clean.float().mean() < 0.7
    assert (level[clean == 1, 0] == 0).float().mean() > 0.5
    level, weight = train_wan.levels(SMALL, SMALL.stages[1], 8, 5, False, seeded())
    assert level.shape == (8, 1) and (weight == 1).all() and (level > 0).all()


def test_rates_and_stages_follow_the_step():
    recipe = train_wan.Recipe()
    assert recipe.at(0)[1] < recipe.at(49)[1]
    start = 0
    for stage in recipe.stages:
        assert recipe.at(start)[0] == stage
        last = recipe.at(start + stage.steps - 1)
        assert last[0] == stage and last[1] == pytest.approx(stage.rates[1], rel=0.2)
        start += stage.steps
    assert start == recipe.steps


def test_a_run_from_the_command_writes_what_load_reads(tmp_path: Path):
    trainer = train.open_run(SMALL, tmp_path / "run", resume=False)
    assert train.run(trainer, "digits-wan", tmp_path / "run")
    pipe = vtr.zoo.load_pipeline(str(tmp_path / "run" / "digits-wan"))
    kept = trainer.result().state_dict()
    for name, tensor in pipe.transformer.state_dict().items():
        torch.testing.assert_close(tensor, kept[name].bfloat16().float(), rtol=0, atol=0)
