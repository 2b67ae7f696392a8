"""The built-in model for long videos answers held-out questions."""

from __future__ import annotations

import pytest

from vtr.zoo import load_vlm, video_questions
from vtr.zoo.packaged import vlm_path
from vtr.zoo.slide_questions import KINDS, slides_qa


@pytest.fixture(scope="module")
def built_in():
    return load_vlm("digits-long")


def test_answers_held_out_questions_freely(built_in):
    samples = slides_qa(10 * len(KINDS), seed=31)
    scores = video_questions.evaluate_video_vlm(*built_in, samples, batch_size=12)
    assert scores["mean"] >= 0.85
    assert set(scores) == {*KINDS, "mean"}


def test_padding_changes_nothing(built_in):
    samples = slides_qa(len(KINDS), seed=32)
    together = video_questions.answers(*built_in, samples, batch_size=6)
    alone = video_questions.answers(*built_in, samples, batch_size=1)
    assert together == alone


def test_it_is_small():
    size = sum(f.stat().st_size for f in vlm_path("digits-long").iterdir())
    assert size < 1.6e6
