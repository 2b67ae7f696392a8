"""The recipe of the built-in video model: its questions, its facts, and that it runs and resumes."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from recipes.train_video import NOTHING, UNCLEAR, Recipe, Trainer, facts, look, owners
from vtr.zoo import clips as video
from vtr.zoo import data, video_llava, video_questions
from vtr.zoo.clips import COLOURS, QUADRANTS, clips
from vtr.zoo.video_questions import KINDS, QUARTERS, TIMES, VOCABULARY, ask, text

SMALL = Recipe(steps=4, settling=2, batch=4, clips=8)


@pytest.fixture(scope="module")
def batch():
    return clips(60, torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_what_the_clip_shows(batch, kind):
    turn = ask(batch, kind, torch.Generator().manual_seed(2))
    assert (turn.answer[:, -1] == video_questions.END).all()
    assert turn.decisive.any() and not turn.decisive[-1]
    first, last, times = batch.first(), batch.last(), batch.times()
    for i in range(60):
        asked, said = text(turn.asked[i]).split(), text(turn.answer[i]).split()
        key = said[0]
        if kind == "what":
            slot = batch.colours[i].tolist().index(COLOURS.index(key))
            right = [str(int(batch.digits[i, slot]))]
            assert asked[4:6] == [key, "?"]
        else:
            slot = batch.digits[i].tolist().index(int(key))
            assert key in asked
        if kind == "colour":
            right = [COLOURS[batch.colours[i, slot]]]
        elif kind.startswith("where"):
            end = int(kind == "where last")
            right = [kind.split()[1], *QUADRANTS[batch.places[i, slot, end]].split()]
        elif kind == "when":
            right = [QUARTERS[first[i, slot] // 2]]
        elif kind == "how often":
            right = [TIMES[times[i, slot]]]
        elif kind == "which came first":
            other = batch.digits[i].tolist().index(int(said[2]))
            assert other != slot and last[i, other] >= 0
            winner = slot if first[i, slot] < first[i, other] else other
            right = ["or", said[2], "first", str(int(batch.digits[i, winner]))]
        assert said[1:] == right


def test_an_unknown_kind_is_named(batch):
    with pytest.raises(ValueError, match="how often"):
        ask(batch, "why", torch.Generator())


def test_questions_survive_the_tokenizer():
    processor = video_llava.processor()
    for sample in video_questions.video_qa(7, seed=4):
        words = processor.tokenizer(sample.question)["input_ids"]
        assert VOCABULARY["<unk>"] not in words
        assert processor.tokenizer.decode(words) == sample.question
    prompt = video_questions.prompt(processor, video_questions.video_qa(2, seed=4))
    assert (prompt["input_ids"] == VOCABULARY["<video>"]).sum(1).tolist() == [289, 289]


def test_processor_sees_the_pixels_that_training_saw():
    sample = video_questions.video_qa(1, seed=5)[0]
    seen = video_questions.prompt(video_llava.processor(), [sample])["pixel_values_videos"][0]
    wanted = data.normalise(sample.frames.permute(0, 3, 1, 2).float() / 255)
    torch.testing.assert_close(seen, wanted, atol=1e-4, rtol=0)


def test_training_computes_what_the_model_computes():
    """Features, pooling and the order of tokens by hand are those of transformers."""
    trainer = Trainer(SMALL)
    some = clips(2, torch.Generator().manual_seed(6))
    bank = look(trainer.tower, some, torch.Generator().manual_seed(7))
    frames, _ = video.render(some, video.seconds(), torch.Generator().manual_seed(7))
    with torch.no_grad():
        wanted = trainer.model.model.get_video_features(data.normalise(frames), return_dict=True)
        projected = trainer.model.model.multi_modal_projector(bank.features.float())
    mine = projected[:, :, video_llava.pool_order()].mean(3).flatten(1, 2)
    wanted = wanted.pooler_output[:, : mine.shape[1]]  # some versions add the newline here
    off = (mine - wanted).norm() / wanted.norm()
    assert off < 0.03  # the tower ran in bfloat16


def test_facts_of_tokens_are_those_of_their_digits(batch):
    owner, ink = owners(batch)
    known = facts(batch, owner)
    assert owner.shape == ink.shape == (60, 8, 36)
    clear = (owner != NOTHING) & (owner != UNCLEAR)
    assert (ink[clear] > 0.05).all() and (ink[owner == NOTHING] < 0.01).all()
    flat = clear.flatten(1)
    for value in (known.times, known.first, known.place):
        assert (value[~flat] == UNCLEAR).all() and (value[flat] >= 0).all()
    assert (known.first[flat] <= known.second[flat]).all()
    for i in range(20):
        for slot in range(int(batch.number[i])):
            mine = (owner[i] == slot).flatten()
            assert (known.first[i][mine] == batch.first()[i, slot]).all()
            at_last = mine & (known.second[i] == batch.last()[i, slot])
            assert (known.times[i][at_last] == batch.times()[i, slot] - 1).all()
            at_first = mine & (known.second[i] == batch.first()[i, slot])
            assert (known.times[i][at_first] == 0).all()


def test_recipe_runs_and_resumes_where_it_left(tmp_path):
    whole, first = Trainer(SMALL), Trainer(SMALL)
    before = {k: v.clone() for k, v in whole.model.state_dict().items()}
    losses = [whole.step()["loss"] for _ in range(4)]
    assert all(0 < loss < 20 for loss in losses)
    first._bank = whole._bank
    for _ in range(2):
        first.step()
    second = Trainer(SMALL)
    second._bank = whole._bank
    second.load_state(first.state())
    for _ in range(2):
        second.step()
    assert second.position == SMALL.steps
    after = whole.model.state_dict()
    for key, value in after.items():
        torch.testing.assert_close(second.model.state_dict()[key], value, rtol=0, atol=0)
        moved = not torch.equal(value, before[key])
        assert moved == ("vision_tower" not in key), "the tower stays, the rest learns"
    whole.export(tmp_path)
    from vtr.zoo import load_vlm

    model, processor = load_vlm(str(tmp_path))
    assert type(processor).__name__ == "LlavaOnevisionProcessor"
    samples = video_questions.video_qa(7, seed=8)
    assert video_questions.evaluate_video_vlm(model, processor, samples)["mean"] <= 0.5


def test_the_newline_goes_in_the_last_steps(monkeypatch):
    trainer = Trainer(Recipe(steps=24, settling=12, batch=2, clips=4))
    seen = []
    language = trainer.model.model.language_model
    forward = language.forward

    def spy(*arguments, **options):
        seen.append(bool((options["position_ids"] == video_llava.TOKENS + 1).any()))
        return forward(*arguments, **options)

    monkeypatch.setattr(language, "forward", spy)
    for _ in range(24):
        trainer.step()
    assert all(seen[:12]) and 0 < sum(seen[12:]) < 12
    with pytest.raises(ValueError, match="settling"):
        Trainer(Recipe(steps=100))


def test_the_bank_is_a_function_of_the_seed():
    one, two = (Trainer(Recipe(clips=4, steps=1, settling=0, batch=2)).bank() for _ in range(2))
    assert torch.equal(one.features, two.features) and torch.equal(one.clips.seen, two.clips.seen)
    assert (one.clips.number[:1] == 2).all()


@pytest.mark.parametrize("name", ["digits-video", "digits-llava"])
def test_tower_is_that_of_a_built_in_model(name):
    from vtr.zoo import load_vlm

    tower = Trainer(dataclasses.replace(SMALL, tower=name)).tower
    model, _ = load_vlm(name)
    pixels = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        mine = video_llava.features(tower, pixels)
    read = states[model.config.vision_feature_layer]
    torch.testing.assert_close(mine, read[:, 1:], atol=1e-4, rtol=1e-4)
