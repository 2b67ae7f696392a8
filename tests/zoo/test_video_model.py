"""The built-in video model answers held-out questions; and about a file as about its frames."""

from __future__ import annotations

import pytest
import torch

import vtr
from vtr.zoo import load_vlm, video_questions
from vtr.zoo.video_questions import KINDS, VideoSample, video_qa


@pytest.fixture(scope="module")
def built_in():
    return load_vlm("digits-video")


@pytest.fixture(scope="module")
def samples():
    return video_qa(12 * len(KINDS), seed=31)


def test_answers_held_out_questions_freely(built_in, samples):
    scores = video_questions.evaluate_video_vlm(*built_in, samples)
    assert scores["mean"] >= 0.80
    assert set(scores) == {*KINDS, "mean"}


def test_padding_changes_nothing(built_in, samples):
    together = video_questions.answers(*built_in, samples[:7], batch_size=7)
    alone = video_questions.answers(*built_in, samples[:7], batch_size=1)
    assert together == alone


def test_a_file_is_answered_like_its_frames(built_in, tmp_path):
    pytest.importorskip("av")
    from vtr.zoo.clips import write

    asked = video_qa(len(KINDS), seed=32, per_second=4)
    file = write(tmp_path / "clip.mp4", asked[0].frames, rate=4)
    seen = vtr.video.load(file, frames=8)
    assert len(seen) == 8
    frames = torch.from_numpy(seen.frames)
    read = [VideoSample(frames, s.question, s.answer, s.kind) for s in asked]
    plain = [VideoSample(s.frames[1::4], s.question, s.answer, s.kind) for s in asked]
    same = [
        a == b
        for a, b in zip(
            *(video_questions.answers(*built_in, x) for x in (read, plain)), strict=True
        )
    ]
    assert sum(same) >= 6, "the codec may cost an answer, not more"
