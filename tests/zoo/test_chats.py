"""Chats show what their description says, and answers are what the pictures show."""

from __future__ import annotations

import pytest
import torch

from vtr.zoo import chat_llava, chat_questions, chats, data
from vtr.zoo.chat_questions import KINDS, NAMES, VOCABULARY, ask, chat_qa, text
from vtr.zoo.chat_questions import PLACES as WORDS
from vtr.zoo.chats import PICTURES, PLACES, TASKS
from vtr.zoo.scenes import COLOURS, PALETTE
from vtr.zoo.slides import IMAGE


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def drawn():
    return {task: chats.chats(60, task, generator(1)) for task in TASKS}


def test_every_picture_shows_one_digit_and_no_pair_of_digit_and_colour_comes_twice(drawn):
    batch = drawn["pictures"]
    there = batch.digits >= 0
    assert there.sum(2).tolist() == [[1] * PICTURES] * 60
    for column in (batch.colours, batch.glyphs, batch.since):
        assert torch.equal(column >= 0, there)
    at = torch.arange(PICTURES)[None, :, None].expand_as(there)
    assert torch.equal(batch.since[there], at[there]), "each is new"
    for i in range(60):
        pairs = torch.stack([batch.digits[i][there[i]], batch.colours[i][there[i]]], 1)
        assert len(pairs.unique(dim=0)) == PICTURES


def test_from_one_screen_to_the_next_a_single_button_changes(drawn):
    batch = drawn["screens"]
    assert (batch.digits >= 0).all() and batch.screens.all()
    for i in range(60):
        for at in range(PICTURES):
            assert len(set(batch.digits[i, at].tolist())) == PLACES
            for place in range(PLACES):
                start = int(batch.since[i, at, place])
                for column in (batch.digits, batch.colours, batch.glyphs):
                    assert column[i, at, place] == column[i, start, place]
                assert start in (at, int(batch.since[i, at - 1, place]) if at else 0)
    changed = (batch.digits[:, 1:] != batch.digits[:, :-1]).sum(2)
    assert changed.tolist() == [[1] * (PICTURES - 1)] * 60


def test_glyphs_are_of_their_class_and_split(drawn):
    for task, batch in drawn.items():
        there = batch.digits >= 0
        assert torch.equal(data.digit_labels()[batch.glyphs[there]], batch.digits[there])
        other = chats.chats(60, task, generator(1), "heldout").glyphs
        assert not set(batch.glyphs[there].tolist()) & set(other[other >= 0].tolist())


@pytest.mark.parametrize("task", TASKS)
def test_pixels_show_the_description(drawn, task):
    some = drawn[task].take(slice(0, 5))
    frames, opacity = chats.render(some, generator(2))
    assert frames.shape == (5, PICTURES, 3, IMAGE, IMAGE)
    assert opacity.shape == (5, PICTURES, PLACES, IMAGE, IMAGE)
    assert frames.min() >= 0 and frames.max() <= 1
    half = IMAGE // 2
    palette = torch.tensor(PALETTE)
    for i in range(5):
        for at in range(PICTURES):
            for place in range(PLACES):
                row, column = place // 2 * half, place % 2 * half
                mask = opacity[i, at, place]
                inside = mask[row : row + half, column : column + half]
                assert mask.sum() == pytest.approx(float(inside.sum()))
                if some.digits[i, at, place] < 0:
                    assert not mask.any()
                    continue
                paint = frames[i, at][:, mask > 0.9].mean(1)
                near = (palette - paint / paint.max()).norm(dim=1).argmin()
                assert int(near) == int(some.colours[i, at, place])


def test_all_but_the_changed_button_stays_pixel_by_pixel(drawn):
    some = drawn["screens"].take(slice(0, 5))
    frames, _ = chats.render(some, generator(3))
    half = IMAGE // 2
    quadrants = frames.view(5, PICTURES, 3, 2, half, 2, half).transpose(4, 5).flatten(3, 4)
    differ = (quadrants[:, 1:] != quadrants[:, :-1]).any(-1).any(-1).any(2)
    assert torch.equal(differ, some.digits[:, 1:] != some.digits[:, :-1])


@pytest.mark.parametrize(("task", "kind"), [(t, k) for t in TASKS for k in KINDS[t]])
def test_answers_are_what_the_pictures_show(drawn, task, kind):
    batch = drawn[task]
    turn = ask(batch, kind, generator(4))
    assert turn.decisive.any() and not turn.decisive[-1]
    assert (turn.answer[:, -1] == VOCABULARY["</s>"]).all()
    asked_about = set()
    for i in range(60):
        asked, said = text(turn.asked[i]).split(), text(turn.answer[i]).split()
        end = " ".join(said)
        shows = []  # (name of the picture, words that say it) for all that a chat shows
        for at in range(PICTURES):
            for place in range(PLACES):
                digit = int(batch.digits[i, at, place])
                if digit >= 0:
                    colour = COLOURS[batch.colours[i, at, place]]
                    shows.append((at, str(digit), colour, WORDS[place]))
        if kind == "which":
            found = [NAMES[at] for at, d, c, _ in shows if [c, d] == said[:2]]
            assert found == said[2:] and asked[-4:-2] == said[:2]
            asked_about.add(found[0])
            continue
        now = kind.endswith("now")
        at = PICTURES - 1 if now else next(n for n, name in enumerate(NAMES) if name in asked)
        key = "now" if now and task == "screens" else NAMES[at]
        assert key in asked and key in said
        asked_about.add(key)
        here = [(d, c, q) for n, d, c, q in shows if n == at]
        if task == "pictures":
            digit, colour, place = here[0]
            value = {"digit": digit, "colour": colour, "place": place}[kind.split()[0]]
            assert end == f"{key} {value}"
            continue
        spoken = {
            "digit": [f"{q} {key} {d}" for d, _, q in here if q in " ".join(asked)],
            "colour": [f"{d} {key} {c}" for d, c, _ in here if d in asked],
            "place": [f"{d} {key} {q}" for d, _, q in here if d in asked],
        }[kind.split()[0]]
        assert spoken == [end]
        if not now:
            (slot,) = [n for n in range(PLACES) if WORDS[n] in end or here[n][0] == said[0]]
            changed = (batch.digits[i, at] != batch.digits[i, -1]).tolist()
            assert changed[slot] or not any(changed), "it shows another digit now"
    assert len(asked_about) == (1 if kind.endswith("now") else PICTURES - 1)


def test_a_seed_gives_the_same_chats():
    one, two, other = (chat_qa(3, "screens", seed=seed) for seed in (3, 3, 4))
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a.pictures, b.pictures) and a.turns == b.turns
    assert any(a.turns != b.turns for a, b in zip(one, other, strict=True))
    assert one[0].pictures.shape == (PICTURES, IMAGE, IMAGE, 3)
    assert one[0].pictures.dtype == torch.uint8
    assert [turn.kind for turn in one[0].turns] == list(KINDS["screens"])


def test_a_prompt_names_its_pictures_and_keeps_their_pixels():
    processor = chat_llava.processor()
    samples = chat_qa(2, "pictures", seed=5)
    inputs = chat_questions.prompt(processor, samples)
    words = ["<s>", "USER:"]
    for name in NAMES:
        words += [name, *["<image>"] * chat_llava.TOKENS]
    words += [*samples[0].turns[0].question.split(), "ASSISTANT:"]
    assert inputs["input_ids"][0].tolist() == [VOCABULARY[word] for word in words]
    wanted = torch.cat([sample.pictures for sample in samples]).permute(0, 3, 1, 2)
    wanted = data.normalise(wanted.float() / 255)
    torch.testing.assert_close(inputs["pixel_values"], wanted, atol=1e-4, rtol=0)


def test_bad_arguments_are_named(drawn):
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        chats.chats(0, "screens", generator())
    with pytest.raises(ValueError, match="task must be one of pictures, screens, got 'videos'"):
        chat_qa(1, "videos")
    with pytest.raises(ValueError, match="pictures must be 1 to 12, got 13"):
        chats.chats(1, "screens", generator(), pictures=13)
    with pytest.raises(ValueError, match="split"):
        chat_qa(1, "screens", split="test")
    with pytest.raises(ValueError, match=r"kind must be one of digit now, .* in screens"):
        ask(drawn["screens"], "which", generator())
    both = [*chat_qa(1, "screens"), *chat_qa(1, "pictures")]
    with pytest.raises(ValueError, match="same kinds of questions"):
        chat_questions.converse(None, None, both)
