"""The plain check of the built-in LLaVA: it asks the same model the same thing as generate does."""

from __future__ import annotations

import pytest
import torch

from recipes import evaluate_llava
from vtr.zoo import load_vlm, questions
from vtr.zoo.questions import KINDS, prompt, vqa


@pytest.fixture(scope="module")
def built_in():
    return load_vlm("digits-llava")


def test_keeping_every_patch_is_generate(built_in):
    model, processor = built_in
    for kind in KINDS:
        samples = [s for s in vqa(6 * len(KINDS), seed=21) if s.kind == kind]
        inputs = prompt(processor, samples)
        ids = inputs["input_ids"]
        seen = evaluate_llava.look(model, inputs["pixel_values"])
        everything = torch.arange(144).expand(len(samples), -1)
        by_hand = evaluate_llava.answer(model, ids, seen.visual, everything)
        with torch.no_grad():
            wanted = model.generate(**inputs, max_new_tokens=5, do_sample=False)[:, ids.shape[1] :]
        assert torch.equal(by_hand, wanted)


def test_cls_attention_is_that_of_the_tower():
    model, processor = load_vlm("digits-llava")
    pixels = prompt(processor, vqa(3, seed=22))["pixel_values"]
    seen = evaluate_llava.look(model, pixels)
    model.set_attn_implementation("eager")  # the only one that returns its weights
    with torch.no_grad():
        out = model.model.vision_tower(pixels, output_attentions=True, output_hidden_states=True)
    torch.testing.assert_close(seen.cls, out.attentions[-2].mean(1)[:, 0, 1:], atol=1e-6, rtol=1e-4)
    visual = model.model.multi_modal_projector(out.hidden_states[-2][:, 1:])
    torch.testing.assert_close(seen.visual, visual, atol=1e-4, rtol=1e-4)


def test_a_cut_is_the_full_sequence_with_the_rest_masked(built_in):
    """Which holds only if what stays keeps its own positions."""
    model, processor = built_in
    samples = [s for s in vqa(12 * len(KINDS), seed=23) if s.kind == "digit at a place"]
    inputs = prompt(processor, samples)
    ids = inputs["input_ids"]
    seen = evaluate_llava.look(model, inputs["pixel_values"])
    kept = seen.cls.topk(9, 1).indices.sort(1).values
    first = int((ids[0] == questions.VOCABULARY["<image>"]).nonzero()[0])
    mask = torch.ones_like(ids)
    mask[:, first : first + 144] = torch.zeros(len(ids), 144, dtype=ids.dtype).scatter(1, kept, 1)
    full = ids
    with torch.no_grad():
        for _ in range(4):
            places = torch.arange(full.shape[1]).expand_as(full)
            seeing = torch.cat([mask, mask.new_ones(len(ids), full.shape[1] - ids.shape[1])], 1)
            out = model(
                input_ids=full,
                pixel_values=inputs["pixel_values"],
                attention_mask=seeing,
                position_ids=places,
                use_cache=False,
            )
            full = torch.cat([full, out.logits[:, -1:].argmax(-1)], 1)
    got = evaluate_llava.answer(model, ids, seen.visual, kept)
    wanted = full[:, ids.shape[1] :]
    assert torch.equal(got[:, : wanted.shape[1]], wanted[:, : got.shape[1]])


def test_rows_of_the_evaluation(built_in):
    rows = evaluate_llava.evaluate(*built_in, images=30, seed=24, keeps=(17,))
    by = {row["score"]: row for row in rows}
    assert [row["kept"] for row in rows] == [144, 17, 17, 17]
    assert by["-"]["ink"] == 1
    assert by["cls"]["ink"] > 3 * by["random"]["ink"]
    assert by["cls"]["accuracy"] > by["random"]["accuracy"]
    for row in rows:
        assert row["accuracy"] == pytest.approx(sum(row[k] for k in KINDS) / len(KINDS), abs=1e-3)


def test_command_prints_json(capsys):
    import json

    evaluate_llava.main(["--images", "2", "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert {row["score"] for row in rows} == {"-", "cls", "random", "ink"}
    assert set(questions.KINDS) < set(rows[0])


def test_questions_and_their_evaluation_are_public():
    import vtr.zoo

    assert vtr.zoo.vqa is questions.vqa
    assert vtr.zoo.evaluate_vlm is questions.evaluate_vlm
    with pytest.raises(AttributeError, match="vqaa"):
        _ = vtr.zoo.vqaa


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json"):
        evaluate_llava.load_folder(tmp_path)
