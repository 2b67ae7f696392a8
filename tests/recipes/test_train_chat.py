"""The recipe of the built-in model for chats: what it computes, and that it runs and resumes."""

from __future__ import annotations

import pytest
import torch

from recipes import train_chat
from recipes.train_chat import CLEAR, NOTHING, UNCLEAR, Recipe, Trainer, labels, mask, start_weights
from vtr.zoo import chat_llava, chat_questions, chats, data, load_vlm, video_questions
from vtr.zoo.chats import PICTURES, PLACES, TASKS
from vtr.zoo.slides import IMAGE

SMALL = Recipe(tower_steps=2, language_steps=3, growing=1, pictures=8, batch=1)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("task", TASKS)
def test_labels_of_tokens_are_those_of_their_digits(task):
    batch = chats.chats(3, task, generator(1))
    _, opacity = chats.render(batch, generator(2))
    digit, colour, place = (c.view(3, PICTURES, -1) for c in labels(batch, opacity))
    side = IMAGE // chat_llava.GRID
    seen = 0
    for i in range(3):
        for at in range(PICTURES):
            for token in range(chat_llava.TOKENS):
                row, column = (side * x for x in divmod(token, chat_llava.GRID))
                shares = [
                    float(opacity[i, at, q, row : row + side, column : column + side].mean())
                    for q in range(PLACES)
                ]
                owner = max(range(PLACES), key=lambda q: shares[q])
                found = [int(c[i, at, token]) for c in (digit, colour, place)]
                if shares[owner] > CLEAR:
                    shown = (batch.digits[i, at, owner], batch.colours[i, at, owner], owner)
                    assert found == [int(x) for x in shown]
                    seen += 1
                else:
                    empty = NOTHING if shares[owner] < 0.01 else UNCLEAR
                    assert found == [empty, UNCLEAR, UNCLEAR]
    assert seen > 100


def test_it_starts_with_the_words_and_layers_of_the_model_for_long_videos():
    model = chat_llava.build()
    made = start_weights(model.state_dict())
    other, _ = load_vlm(train_chat.START)
    theirs, mine = other.state_dict(), model.state_dict() | made
    assert set(mine) - set(made) == {
        "model.vision_tower.embeddings.patch_embedding.weight",
        "model.vision_tower.embeddings.position_embedding.weight",
        "lm_head.weight",  # tied to the words
    }
    name = "model.language_model.embed_tokens.weight"
    for word in ("red", "7", "which", "</s>"):
        row = theirs[name][video_questions.VOCABULARY[word]]
        assert torch.equal(mine[name][chat_questions.VOCABULARY[word]], row)
    for key in made:
        if key != name:
            assert torch.equal(made[key], theirs[key])


def test_the_mask_hides_names_and_visual_tokens_from_words_alone():
    n, count, text = 200, 2, 3
    made = mask(n, count, text, generator(3))
    tokens = 1 + chat_llava.TOKENS
    before = 2 + count * tokens
    assert made.shape == (n, 1, before + text, before + text)
    causal = torch.ones(before + text, before + text).tril().bool()
    seen = made[:, 0] == 0
    assert torch.equal(seen[:, :before], causal[:before].expand(n, -1, -1))
    assert torch.equal(seen[:, before:, before:], causal[before:, before:].expand(n, -1, -1))
    assert seen[:, before:, :2].all()
    words = seen[:, before:, 2:before]
    assert (words == words[:, :1]).all(), "every word sees the same of them"
    parts = words[:, 0].view(n, count, tokens)
    assert (parts[..., 0] == parts[:, :1, 0]).all(), "all names of a chat or none"
    assert 0.65 < (~parts[:, 0, 0]).float().mean() < 0.85
    lost = (~parts[..., 1:]).float().mean((1, 2))
    assert 0.15 < (lost == 0).float().mean() < 0.4 and 0.5 < lost.max() < 0.8


def test_training_computes_what_the_model_computes(monkeypatch):
    """The sequence that training puts together is the one of the processor and transformers."""
    trainer = Trainer(SMALL)
    trainer.model.eval()
    trainer.position = SMALL.steps - 1
    seen = {}
    inner = trainer.model.model.language_model
    real = inner.forward

    def look(**given):
        seen.update(given)
        return real(**given)

    monkeypatch.setattr(inner, "forward", look)
    drawn = []
    for name in ("chats", "render", "ask"):
        own = getattr(train_chat, name)

        def note(*args, own=own, **options):
            drawn.append(own(*args, **options))
            return drawn[-1]

        monkeypatch.setattr(train_chat, name, note)
    trainer._language_loss(SMALL.growing, generator(4))
    (frames, _), turns = drawn[1], drawn[2:]
    words = ["<s>", "USER:"]
    for name in chat_questions.NAMES:
        words += [name, *["<image>"] * chat_llava.TOKENS]
    ids = [chat_questions.VOCABULARY[word] for word in words]
    ids += torch.cat([t[0] for turn in turns for t in (turn.asked, turn.answer)])[1:].tolist()
    wanted = {}
    monkeypatch.setattr(inner, "forward", lambda **given: wanted.update(given) or real(**given))
    with torch.no_grad():
        trainer.model(
            input_ids=torch.tensor([ids]),
            pixel_values=data.normalise(frames[0]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        )
    mine, theirs = seen["inputs_embeds"].float(), wanted["inputs_embeds"]
    assert mine.shape == theirs.shape
    assert (mine - theirs).norm() / theirs.norm() < 0.03  # the tower ran in bfloat16


def test_recipe_runs_and_resumes_where_it_left(tmp_path):
    whole, first = Trainer(SMALL), Trainer(SMALL)
    losses = [whole.step()["loss"] for _ in range(5)]
    assert all(0 < loss < 30 for loss in losses)
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
    model, processor = load_vlm(str(tmp_path))
    assert type(processor).__name__ == "LlavaProcessor"
    samples = chat_questions.chat_qa(1, "screens", seed=8)
    assert len(chat_questions.converse(model, processor, samples).answers[0]) == 5


def test_chats_grow_to_twelve_pictures():
    trainer = Trainer(Recipe(growing=90))
    counts = [trainer._pictures(step) for step in range(0, 200, 10)]
    assert counts == [*range(3, 12), *[PICTURES] * 11]
