"""Clips of slides are what their description says, and answers are what the clip shows."""

from __future__ import annotations

import pytest
import torch

from vtr.zoo import data, slide_questions, slides, video_llava, video_questions
from vtr.zoo.scenes import COLOURS, PALETTE, QUADRANTS
from vtr.zoo.slide_questions import KINDS, ask, slides_qa
from vtr.zoo.slides import DIGITS, FAR, FRAMES, IMAGE, TWICE
from vtr.zoo.video_questions import TIMES, VOCABULARY, text


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def batch():
    return slides.slides(200, generator())


def test_description_is_consistent(batch):
    there = batch.frames >= 0
    assert there[..., 0].all() and there[:, :TWICE, 1].all() and not there[:, TWICE:, 1].any()
    assert ((batch.frames[:, :TWICE, 1] - batch.frames[:, :TWICE, 0]) >= FAR).all()
    for column in (batch.colours, batch.places):
        assert torch.equal(column >= 0, there)
        assert (column[:, :TWICE, 0] != column[:, :TWICE, 1]).all(), "it comes back as another"
    for i in range(200):
        assert len(set(batch.digits[i].tolist())) == DIGITS
        frames = batch.frames[i][there[i]].tolist()
        assert len(set(frames)) == len(frames) == 2 * TWICE + DIGITS - TWICE
        assert len(set(batch.colours[i, :TWICE, 1].tolist())) == TWICE, "the key of a question"
    assert set(batch.frames[there].tolist()) == set(range(FRAMES))
    assert torch.equal(data.digit_labels()[batch.glyphs], batch.digits)


def test_frames_show_the_description(batch):
    some = batch.take(slice(0, 12))
    frames = slides.render(some, generator(1))
    assert frames.shape == (12, FRAMES, 3, IMAGE, IMAGE)
    assert frames.min() >= 0 and frames.max() <= 1
    half = IMAGE // 2
    bright = frames.amax(2) > 0.75  # backgrounds stay below
    quadrants = bright.view(12, FRAMES, 2, half, 2, half).sum((3, 5)).flatten(2)
    assert (quadrants > 0).any(-1).sum(1).tolist() == [10] * 12, "ten slides show a digit"
    for i in range(12):
        for slot in range(DIGITS):
            for turn in range(2 if slot < TWICE else 1):
                at = int(some.frames[i, slot, turn])
                assert int(quadrants[i, at].argmax()) == int(some.places[i, slot, turn])
                pixels = frames[i, at][:, bright[i, at]].mean(1)
                palette = torch.tensor(PALETTE)
                near = (palette - pixels / pixels.max()).norm(dim=1).argmin()
                assert int(near) == int(some.colours[i, slot, turn])


def test_a_seed_gives_the_same_clips_and_questions():
    one, two, other = (slides_qa(8, seed=seed) for seed in (3, 3, 4))
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a.frames, b.frames) and (a.question, a.answer) == (b.question, b.answer)
    assert [s.kind for s in one] == [*KINDS, *KINDS[:2]]
    assert any(a.answer != b.answer for a, b in zip(one, other, strict=True))
    assert one[0].frames.shape == (FRAMES, IMAGE, IMAGE, 3)
    assert one[0].frames.dtype == torch.uint8


def test_heldout_digits_are_never_those_of_training():
    train, heldout = (slides.slides(150, generator(2), s).glyphs for s in ("train", "heldout"))
    assert not set(train.flatten().tolist()) & set(heldout.flatten().tolist())


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_what_the_clip_shows(batch, kind):
    turn = ask(batch, kind, generator(2))
    assert (turn.answer[:, -1] == video_questions.END).all()
    assert turn.decisive.any() and not turn.decisive[-1]
    assert turn.answer.shape[1] <= video_questions.NEW_TOKENS
    asked_once = 0
    for i in range(200):
        asked, said = text(turn.asked[i]).split(), text(turn.answer[i]).split()
        key = said[0]
        assert key in asked
        if kind == "which twice":
            slot = batch.colours[i, :TWICE, 1].tolist().index(COLOURS.index(key))
            assert said[1:] == [str(int(batch.digits[i, slot]))]
            continue
        slot = batch.digits[i].tolist().index(int(key))
        end = int(kind.endswith("last"))
        if kind.startswith("colour"):
            assert said[1:] == [kind.split()[1], COLOURS[batch.colours[i, slot, end]]]
        elif kind.startswith("where"):
            place = QUADRANTS[batch.places[i, slot, end]].split()
            assert said[1:] == [kind.split()[1], *place]
        else:
            assert said[1:] == [TIMES[int((batch.frames[i, slot] >= 0).sum())]]
            asked_once += slot >= TWICE
        assert slot < TWICE or kind == "how often"
    assert kind != "how often" or 60 < asked_once < 140


def test_questions_survive_the_tokenizer():
    processor = video_llava.processor(video_llava.SLIDES)
    samples = slides_qa(len(KINDS), seed=4)
    for sample in samples:
        words = processor.tokenizer(sample.question)["input_ids"]
        assert VOCABULARY["<unk>"] not in words
        assert processor.tokenizer.decode(words) == sample.question
    prompt = video_questions.prompt(processor, samples[:2])
    assert (prompt["input_ids"] == VOCABULARY["<video>"]).sum(1).tolist() == [1025, 1025]
    wanted = data.normalise(samples[0].frames.permute(0, 3, 1, 2).float() / 255)
    seen = prompt["pixel_values_videos"][0]
    torch.testing.assert_close(seen, wanted, atol=1e-4, rtol=0)


def test_bad_arguments_are_named(batch):
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        slides.slides(0, generator())
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        slides_qa(0)
    with pytest.raises(ValueError, match="split"):
        slides_qa(1, split="test")
    with pytest.raises(ValueError, match="which twice"):
        slide_questions.ask(batch, "why", generator())
    with pytest.raises(ValueError, match="which twice"):
        slide_questions.ask(batch, "colour of", generator())
