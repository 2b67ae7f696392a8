"""Prompts: both layouts of lmms-eval's requests, generation options, and keys that see the pixels."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from PIL import Image

from vtr.evaluate.prompts import cut, make_prompt, prompt_of

RED = Image.new("RGB", (4, 4), "red")
DATA = {"gqa": {"test": [{"q": "which ?", "image": RED}]}}
OPTIONS = {"max_new_tokens": 5, "temperature": 0, "do_sample": False, "until": ["."], "image_x": 1}


def simple(**options):
    args = ("which ?", {**OPTIONS, **options}, lambda doc: [doc["image"]], 0, "gqa", "test")
    return SimpleNamespace(args=args, metadata={})


def turns(doc):
    return [
        {
            "role": "user",
            "content": [
                {"type": "image", "url": doc["image"]},
                {"type": "text", "text": doc["q"]},
            ],
        }
    ]


def chat(first=("which ?",)):
    return SimpleNamespace(args=(*first, turns, OPTIONS, 0, "gqa", "test"), metadata={})


def test_all_layouts_are_the_same_question():
    prompts = [prompt_of(r, DATA) for r in (simple(), chat(), chat(()))]
    assert len({p.key for p in prompts}) == 1
    for p in prompts:
        assert p.messages[0]["content"] == [{"type": "image"}, {"type": "text", "text": "which ?"}]
        assert [i.size for i in p.images] == [(4, 4)] and p.until == (".",)
        assert p.generation["max_new_tokens"] == 5 and p.generation["do_sample"] is False
        assert p.generation["temperature"] is None and "image_x" not in p.generation
        assert not p.samples


def test_keys_see_words_pixels_and_options():
    blue = {"gqa": {"test": [{"q": "which ?", "image": Image.new("RGB", (4, 4), "blue")}]}}
    keys = [
        prompt_of(simple(), DATA).key,
        prompt_of(simple(), blue).key,
        prompt_of(simple(max_new_tokens=6), DATA).key,
        prompt_of(simple(until=[]), DATA).key,
        make_prompt([{"role": "user", "content": "which ?"}], OPTIONS).key,
    ]
    assert len(set(keys)) == 5
    grey = Image.new("L", (4, 4), 0)
    assert (
        make_prompt([{"role": "user", "content": [{"type": "image", "url": grey}]}], {})
        .images[0]
        .mode
        == "RGB"
    )


def test_drawn_answers_keep_their_options():
    drawn = make_prompt([], {"temperature": 0.7, "top_p": 0.9})
    assert drawn.samples and drawn.generation["temperature"] == 0.7
    assert not make_prompt([], {"do_sample": True, "temperature": 0}).samples
    assert make_prompt([], {"until": "x"}).until == ("x",)


def test_what_a_processor_cannot_take_is_refused():
    for kind, url, message in (
        ("audio", {}, "audio"),
        ("video", {"video_start": 1}, "only paths"),
        ("image", 3, "PIL image or a path"),
    ):
        with pytest.raises(ValueError, match=message):
            make_prompt([{"role": "user", "content": [{"type": kind, "url": url}]}], {})


def test_stop_words():
    assert cut("yes. It is", (".", "It")) == "yes"
    assert cut("yes", (".",)) == "yes"
    assert cut("yes", ()) == "yes"
