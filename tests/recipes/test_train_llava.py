"""The recipe of the built-in LLaVA: what its turns see, how it chooses patches, and that it resumes."""

from __future__ import annotations

import dataclasses

import torch

from recipes.train_llava import Recipe, Trainer, choose, presence, turn_mask
from vtr.zoo import scenes

SMALL = Recipe(tower_steps=2, language_steps=3, batch=4, pictures=100)


def test_turns_see_the_picture_and_themselves_only():
    mask = turn_mask(3, [2, 2])[0, 0] == 0
    assert mask[4:6, :4].all() and mask[6:, :4].all()
    assert not mask[6:, 4:6].any()
    assert not mask[0, 1:].any()


def test_uniform_choice_does_not_look_at_the_ink():
    ink = torch.zeros(200, 144)
    ink[:, :20] = 1
    generator = torch.Generator().manual_seed(0)
    biased = choose(ink, 20, False, generator)
    uniform = choose(ink, 20, True, generator)
    assert (biased < 20).all()
    assert 0.08 < (uniform < 20).float().mean() < 0.2


def test_presence_counts_only_digits_that_are_there():
    batch = scenes.scenes(30, torch.Generator().manual_seed(1))
    assert torch.equal(presence(batch)[:, :10].sum(1).long(), batch.number)
    assert torch.equal(presence(batch)[:, 10:].sum(1).long(), batch.number)


def test_recipe_runs_and_resumes_where_it_left():
    whole, first = Trainer(SMALL), Trainer(SMALL)
    for _ in range(5):
        whole.step()
    for _ in range(3):
        first.step()
    second = Trainer(SMALL)
    second.load_state(first.state())
    for _ in range(2):
        second.step()
    assert second.position == SMALL.steps
    for key, value in whole.model.state_dict().items():
        torch.testing.assert_close(second.model.state_dict()[key], value, rtol=0, atol=0)
    assert dataclasses.asdict(SMALL)["batch"] == 4
