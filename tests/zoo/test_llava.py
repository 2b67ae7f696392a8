"""The built-in LLaVA: it loads and it answers."""

from __future__ import annotations

import pytest
import torch

import vtr
from vtr.zoo import llava, load_vlm, questions, scenes


@pytest.fixture(scope="module")
def built_in():
    return load_vlm("digits-llava")


def test_answers_held_out_questions_freely(built_in):
    scores = questions.evaluate_vlm(*built_in, questions.vqa(200, seed=11))
    assert scores["mean"] >= 0.95
    assert min(scores.values()) >= 0.90


def test_selection_beats_chance_at_few_tokens(built_in):
    model, processor = built_in
    samples = questions.vqa(150, seed=12)
    dense = questions.evaluate_vlm(model, processor, samples)["mean"]
    scores = {}
    for keep in (17, 9):
        for method in (
            vtr.VTCCLS(keep=keep, window=3),
            vtr.Random(keep=keep, site="prompt", seed=3),
        ):
            with vtr.apply(model, method, positions="original") as handle:
                scores[method.name, keep] = questions.evaluate_vlm(model, processor, samples)[
                    "mean"
                ]
                assert handle.trace.stages[-1].tokens_out == keep
    assert dense - scores["vtc-cls", 17] <= 0.02
    assert dense - scores["random", 17] >= 0.05
    assert dense - scores["random", 9] >= 0.15
    assert scores["vtc-cls", 9] > scores["random", 9]


def test_the_time_of_the_questions_is_not_that_of_counting(built_in, monkeypatch):
    from vtr.evaluate import vlm

    clock, counted = [0.0], []

    def count(model, processor, sample):
        clock[0] += 1000
        counted.append(sample)
        return 7

    monkeypatch.setattr(vlm, "_prefill", count)
    monkeypatch.setattr(vlm.time, "perf_counter", lambda: clock[0])
    random = vtr.Random(keep=9, site="prompt")
    dense, cut = vlm.evaluate(*built_in, [random], questions.vqa(1, seed=1), seeds=(0, 1))
    assert dense.seconds == cut.seconds == 0 and cut.flops == (7, 7)
    assert len(counted) == 2 and cut.seeds == 2


def test_prompt_has_one_placeholder_per_patch_and_padding_changes_nothing(built_in):
    model, processor = built_in
    samples = questions.vqa(4, seed=3)
    batch = questions.prompt(processor, samples)
    assert (batch["input_ids"] == questions.VOCABULARY["<image>"]).sum(1).tolist() == [144] * 4
    assert batch["pixel_values"].shape == (4, 3, 96, 96)
    together = questions.evaluate_vlm(model, processor, samples, batch_size=4)
    alone = questions.evaluate_vlm(model, processor, samples, batch_size=1)
    assert together == alone


def test_processor_sees_the_pixels_that_training_saw():
    batch = scenes.scenes(2, torch.Generator().manual_seed(4), "heldout")
    from PIL import Image

    from vtr.zoo import data

    pixels = (data.denormalise(batch.images) * 255).round().to(torch.uint8)
    pictures = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pixels]
    text = ["<image>USER: is there a 1 ? ASSISTANT:"] * 2
    out = llava.processor()(text=text, images=pictures, return_tensors="pt")
    wanted = data.normalise(pixels.float() / 255)
    torch.testing.assert_close(out["pixel_values"], wanted, atol=1e-4, rtol=0)


def test_questions_fit_their_scenes():
    generator = torch.Generator().manual_seed(0)
    batch = scenes.scenes(50, generator)
    for kind in questions.KINDS:
        asked, answers = questions.ask(batch, kind, generator)
        assert asked.shape[0] == answers.shape[0] == 50
        assert (answers[:, -1] == questions.END).all()
    asked, answers = questions.ask(batch, "digit of a colour", generator)
    for i in range(50):
        colour, digit = questions.text(answers[i]).split()
        slot = scenes.COLOURS.index(colour)
        column = batch.colours[i].tolist().index(slot)
        assert int(digit) == batch.digits[i, column]
        assert colour in questions.text(asked[i])
    asked, answers = questions.ask(batch, "is there", generator)
    for i in range(50):
        digit, said = questions.text(answers[i]).split()
        assert (said == "yes") == (int(digit) in batch.digits[i, : batch.number[i]].tolist())
    asked, answers = questions.ask(batch, "how many", generator)
    for i in range(50):
        assert questions.text(answers[i]) == f"digits {batch.number[i]}"
    with pytest.raises(ValueError, match="kind must be one of"):
        questions.ask(batch, "how old", generator)


def test_tower_is_the_vit_under_other_names():
    from safetensors.torch import load_file

    from vtr.zoo import load, weights_path

    weights = load_file(str(weights_path("digits-vit")))
    tower = llava.build("eager").model.vision_tower
    missing, unexpected = tower.load_state_dict(llava.tower_from_vit(weights), strict=False)
    assert not unexpected and all("position_ids" in key for key in missing)
    with torch.no_grad():
        tower.pre_layrnorm = torch.nn.Identity()  # the one part that the ViT does not have
        images = torch.randn(2, 3, 96, 96)
        state = llava.tower_states(tower, images, None, 6)[-1]
        # Their layer norms differ: eps is 1e-5 in CLIP and 1e-6 in timm.
        wanted = load("digits-vit").forward_features(images)
        torch.testing.assert_close(tower.post_layernorm(state), wanted, atol=5e-3, rtol=0)


def test_unknown_model_is_named():
    with pytest.raises(ValueError, match="digits-llava"):
        load_vlm("llava-7b")
