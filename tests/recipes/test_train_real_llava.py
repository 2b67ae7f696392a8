"""The recipe of the projector between published models, on tiny random parts: no network."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from recipes import train
from tests.recipes.real_parts import tiny

pytest.importorskip("transformers")

SETTINGS = {"steps": 4, "batch": 3, "captions": 1, "at_once": 2, "questions": 2}


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    from recipes import train_real_llava as module

    monkeypatch.setenv("VTR_CACHE", str(tmp_path / "cache"))
    (tmp_path / "pictures").mkdir()
    monkeypatch.setattr(module, "parts", lambda: tiny(module, tmp_path / "pictures"))
    return module


def test_a_packed_turn_is_the_question_alone(recipe):
    """The loss of several questions in one sequence is the mean of what the whole model gives for each."""
    trainer = recipe.Trainer(recipe.Recipe(**SETTINGS))
    trainer.words.float(), trainer.head.float()
    generator = torch.Generator().manual_seed(0)
    rows = [trainer._row(i, generator) for i in (0, 4)]
    assert [len(r.lengths) for r in rows] == [2, 1]
    loss, hits = trainer._loss([0, 4], rows)
    wanted, right = [], []
    for index in (0, 4):
        picture = trainer.pictures[index]
        losses = []
        for question, answer in picture.turns:
            content = [{"type": "image"}, {"type": "text", "text": question}]
            text = trainer.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True
            )
            inputs = trainer.processor(text=text, images=picture.image(112), return_tensors="pt")
            asked, said = trainer.turn(question, answer)
            assert inputs["input_ids"][0, -len(asked) :].equal(asked)
            ids = torch.cat([inputs["input_ids"][0], said])[None]
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                out = trainer.model(
                    input_ids=ids,
                    pixel_values=inputs["pixel_values"],
                    attention_mask=torch.ones_like(ids),
                ).logits[0, -len(said) - 1 : -1]
            losses.append(torch.nn.functional.cross_entropy(out, said))
            if index == 0:
                right.append(bool(out[0].argmax() == said[0]))
        wanted.append(torch.stack(losses).mean())
    # The cached features are of 16 bits.
    torch.testing.assert_close(loss, torch.stack(wanted).sum(), rtol=2e-2, atol=2e-2)
    assert sorted(hits) == sorted(right)


def test_only_the_projector_learns(recipe):
    trainer = recipe.Trainer(
        recipe.Recipe(**SETTINGS | {"steps": 40, "batch": 4, "captions": 0, "rate": 1e-2})
    )
    frozen = {k: v.clone() for k, v in trainer.model.state_dict().items() if "projector" not in k}
    losses = [trainer.step()["loss"] for _ in range(40)]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    now = trainer.model.state_dict()
    assert all(torch.equal(now[k], v) for k, v in frozen.items())


def test_it_stops_resumes_and_writes_the_projector(recipe, tmp_path):
    settings = recipe.Recipe(**SETTINGS)
    whole = recipe.Trainer(settings)
    for _ in range(settings.steps):
        whole.step()
    first = train.open_run(settings, tmp_path / "run", resume=False)
    for _ in range(2):
        first.step()
    train.save_state(first, tmp_path / "run")
    second = train.open_run(settings, tmp_path / "run", resume=True)
    assert train.run(second, "real-llava", tmp_path / "run")
    for key, value in whole.state().items():
        assert torch.equal(second.state()[key], value), key
    written = load_file(tmp_path / "run" / "real-llava.safetensors")
    assert {t.dtype for t in written.values()} == {torch.float16}
    read = recipe.llava.projector(tmp_path / "run" / "state.safetensors")
    assert read.keys() == recipe.llava.projector(tmp_path / "run" / "real-llava.safetensors").keys()
    torch.testing.assert_close(read["linear_1.weight"], whole.projector.linear_1.weight.detach())
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["batch"] == 3


def test_features_are_computed_once(recipe, monkeypatch):
    parts = recipe.parts()
    first = recipe.features(parts.model, parts.processor, parts.asked)
    assert first.shape == (4, 64, 16 * len(recipe.llava.LAYERS))
    monkeypatch.setattr(parts.model.model, "vision_tower", None)
    assert torch.equal(recipe.features(parts.model, parts.processor, parts.asked), first)


def test_without_a_projector_it_says_how_to_train_one(recipe, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"recipes\.train real-llava"):
        recipe.llava.projector(tmp_path / "none.safetensors")
