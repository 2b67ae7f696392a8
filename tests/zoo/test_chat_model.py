"""The built-in model for chats answers held-out questions, and its answers are in the visual tokens."""

from __future__ import annotations

import pytest
import torch

import vtr
from vtr.zoo import chat_qa, load_vlm
from vtr.zoo.chat_questions import KINDS, converse, prompt, score
from vtr.zoo.chats import TASKS
from vtr.zoo.packaged import vlm_path


@pytest.fixture(scope="module")
def built_in():
    return load_vlm("digits-chat")


@pytest.mark.parametrize("task", TASKS)
def test_answers_held_out_questions_freely(built_in, task):
    samples = chat_qa(12, task, seed=31)
    out = converse(*built_in, samples)
    scores = score(samples, out.answers)
    assert scores["mean"] >= 0.9
    assert set(scores) == {*KINDS[task], "mean"}


def test_a_batch_answers_as_each_chat_alone(built_in):
    samples = chat_qa(4, "screens", seed=32)
    together = converse(*built_in, samples).answers
    assert together == [converse(*built_in, [sample]).answers[0] for sample in samples]


def test_later_turns_are_those_of_the_chat_template(built_in):
    """A chat on one cache says what the model says about the whole chat as the processor writes it."""
    model, processor = built_in
    (sample,) = samples = chat_qa(1, "pictures", seed=33)
    said = converse(model, processor, samples).answers[0]
    inputs = prompt(processor, samples)
    first = processor.tokenizer.decode(inputs["input_ids"][0])
    chat = [{"role": "user", "content": "first"}]
    for turn, answer in zip(sample.turns[1:], said, strict=False):
        chat += [{"role": "assistant", "content": answer}]
        chat += [{"role": "user", "content": turn.question}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    later = text.removeprefix("<s>USER: first ASSISTANT: ")
    ids = processor.tokenizer(f"{first} {later}", return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        out = model.generate(
            **ids,
            pixel_values=inputs["pixel_values"],
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=processor.tokenizer.eos_token_id,
        )
    new = processor.tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert new == said[-1]


@pytest.mark.parametrize("task", TASKS)
def test_without_the_visual_tokens_a_later_question_is_a_guess(built_in, task):
    model, processor = built_in
    samples = chat_qa(12, task, seed=34)
    with vtr.apply(model, vtr.RandomKV(keep=1e-9)):
        lost = score(samples, converse(model, processor, samples).answers)
    later = [share for kind, share in lost.items() if kind not in ("mean", "digit now")]
    assert sum(later) / len(later) < 0.45, "one of two to four in most kinds"


def test_it_is_small():
    size = sum(f.stat().st_size for f in vlm_path("digits-chat").iterdir())
    assert size < 1.6e6
