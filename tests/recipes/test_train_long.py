"""The recipe of the built-in model for long videos: its facts, and that it runs and resumes."""

from __future__ import annotations

import pytest
import torch

from recipes.train_long import CLEAR, PER_FRAME, TOKENS, UNCLEAR, Recipe, Trainer, facts, token_ink
from vtr.zoo import data, video_llava, video_questions
from vtr.zoo.slide_questions import slides_qa
from vtr.zoo.slides import DIGITS, FRAMES, IMAGE, TWICE, Looks, backgrounds, draw, slides

SMALL = Recipe(tower_steps=2, language_steps=3, hiding=1, settling=1, frames=4, batch=2, looks=1)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_facts_of_tokens_are_those_of_their_digits():
    batch = slides(20, generator(1))
    ink = torch.rand(20, TOKENS, generator=generator(2)) * 2 * CLEAR
    known = facts(batch, ink)
    seen = 0
    for i in range(20):
        for token in range(0, TOKENS, 5):
            frame = token // PER_FRAME
            slot, turn = (batch.frames[i] == frame).nonzero().unbind(1)
            facts_here = [int(column[i, token]) for column in known]
            if not len(slot) or ink[i, token] <= CLEAR:
                assert facts_here == [UNCLEAR] * 6
                continue
            s, t = int(slot), int(turn)
            then = [UNCLEAR, UNCLEAR]
            if t == 1:
                then = [int(batch.colours[i, s, 0]), int(batch.places[i, s, 0])]
            now = [int(c[i, s, t]) for c in (batch.colours, batch.places)]
            assert facts_here == [int(batch.digits[i, s]), *now, t, *then]
            seen += 1
    assert seen > 100


def test_clips_are_put_together_from_the_right_frames():
    trainer = Trainer(SMALL)
    batch = slides(3, generator(3))
    frames = trainer._compose(batch, generator(4))
    ink = trainer.bank().ink[frames]
    there = torch.zeros(3, FRAMES, dtype=torch.bool)
    for i in range(3):
        for slot in range(DIGITS):
            for turn in range(2 if slot < TWICE else 1):
                at = int(batch.frames[i, slot, turn])
                there[i, at] = True
                look = int(frames[i, at])  # one frame for each look
                assert look // 16 == batch.digits[i, slot]
                assert look // 4 % 4 == batch.colours[i, slot, turn]
                assert look % 4 == batch.places[i, slot, turn]
                quadrant = ink[i, at].view(2, 2, 2, 2).sum((1, 3)).argmax()
                assert quadrant == batch.places[i, slot, turn]
    assert torch.equal(ink.sum(-1) > 0, there)
    more = Trainer(Recipe(looks=3))
    chosen = more._compose(batch, generator(4)).gather(1, batch.frames[:, :TWICE].flatten(1)) % 3
    hands = chosen.view(3, TWICE, 2)
    assert torch.equal(hands[..., 0], hands[..., 1]), "a digit comes back in the same hand"


def test_training_computes_what_the_model_computes():
    """Features, pooling and the order of tokens by hand are those of transformers."""
    trainer = Trainer(SMALL)
    one = torch.tensor([5, 6])
    shown = Looks(data.split_indices("train")[one], one % 4, one % 4)
    frames, opacity = draw(shown, backgrounds(2, generator(5)), generator(6))
    assert token_ink(opacity).shape == (2, PER_FRAME)
    assert frames.shape == (2, 3, IMAGE, IMAGE)
    with torch.no_grad():
        pixels = data.normalise(frames)[None]
        wanted = trainer.model.model.get_video_features(pixels, return_dict=True).pooler_output
        seen = trainer._see(frames).float()
        projected = trainer.model.model.multi_modal_projector(seen)
    mine = projected[:, video_llava.pool_order(video_llava.SLIDES)].mean(2).flatten(0, 1)
    wanted = wanted.flatten(0, -2)[: len(mine)]  # some versions add the newline here
    off = (mine - wanted).norm() / wanted.norm()
    assert off < 0.03  # the tower ran in bfloat16


def test_recipe_runs_and_resumes_where_it_left(tmp_path):
    whole, first = Trainer(SMALL), Trainer(SMALL)
    losses = [whole.step()["loss"] for _ in range(5)]
    assert all(0 < loss < 20 for loss in losses)
    for _ in range(3):
        first.step()
    second = Trainer(SMALL)
    second.load_state(first.state())
    for _ in range(2):
        second.step()
    assert second.position == SMALL.steps
    for key, value in whole.model.state_dict().items():
        torch.testing.assert_close(second.model.state_dict()[key], value, rtol=0, atol=0)
    whole.export(tmp_path)
    from vtr.zoo import load_vlm

    model, processor = load_vlm(str(tmp_path))
    assert type(processor).__name__ == "LlavaOnevisionProcessor"
    samples = slides_qa(2, seed=8)
    assert video_questions.evaluate_video_vlm(model, processor, samples)["mean"] <= 0.5


def test_the_first_appearance_is_hidden_from_text_and_newline_alone():
    trainer = Trainer(Recipe(tower_steps=1, language_steps=40, hiding=10, settling=4))
    batch = slides(40, generator(7))
    keep, lengths = 30, [3, 4]
    kept = torch.rand(40, TOKENS, generator=generator(8)).topk(keep).indices.sort(1).values
    open_to_all = trainer._mask(batch, kept, lengths, generator(9))
    assert open_to_all.shape == (1, 1, 39, 39)
    trainer.position = 11
    mask = trainer._mask(batch, kept, lengths, generator(9))
    hides = 0
    for i in range(40):
        closed = (mask[i, 0] != open_to_all[0, 0]).nonzero().tolist()
        first = set(batch.frames[i, :TWICE, 0].tolist())
        columns = [1 + j for j, token in enumerate(kept[i].tolist()) if token // PER_FRAME in first]
        rows = range(keep + 1, 39)
        wanted = [[r, c] for r in rows for c in columns if open_to_all[0, 0, r, c] == 0]
        assert closed in ([], wanted)
        hides += bool(closed)
    assert 15 < hides < 38, "in three clips of four, of those that have such a token"


def test_the_last_steps_see_all_tokens():
    trainer = Trainer(Recipe(tower_steps=1, language_steps=40, settling=4))
    sizes = []
    for trainer.position in range(1, 41):
        sizes.append(trainer._keep((trainer.position - 1) / 40))
    assert max(sizes[:20]) < 100 and TOKENS not in sizes[:36]
    assert sizes[36:].count(TOKENS) == 2
    with pytest.raises(ValueError, match="settling"):
        Trainer(Recipe(language_steps=60))
