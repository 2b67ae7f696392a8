"""Methods on the built-in video model: they keep what was asked for, whole frames whole."""

from __future__ import annotations

import pytest
import torch

import vtr
from vtr.evaluate.clips import SHARES, RandomFrames, methods_at
from vtr.zoo import load_vlm, video_questions
from vtr.zoo.video_questions import KINDS, video_qa


@pytest.fixture(scope="module")
def built_in():
    return load_vlm("digits-video")


@pytest.fixture(scope="module")
def samples():
    return video_qa(12 * len(KINDS), seed=31)


def site_of(built_in, method, sample):
    model, processor = built_in
    with vtr.apply(model, method, positions="original") as handle:
        video_questions.answers(model, processor, [sample])
        return handle.trace.stages[-1]


def test_whole_frames_stay_or_go(built_in, samples):
    torch.manual_seed(0)
    chosen = []
    for _ in range(3):
        stage = site_of(built_in, RandomFrames(keep=80), samples[0])
        numbers, counts = stage.frames.frame[0][stage.total.kept[0]].unique(return_counts=True)
        assert counts.tolist() == [1, 36, 36] and numbers[0] == -1, "two frames, and the newline"
        chosen.append(tuple(numbers[1:].tolist()))
    assert len(set(chosen)) > 1
    stage = site_of(built_in, vtr.UniformFrames(keep=80), samples[0])
    assert stage.total.kept.shape[1] == 73


@pytest.mark.parametrize("share", SHARES)
def test_methods_keep_what_was_asked_for(built_in, samples, share):
    """In the mean over layers; whole frames, one frame at least, and the newline aside."""
    for name, method in methods_at(share).items():
        with vtr.apply(built_in[0], method, positions="original") as handle:
            video_questions.answers(*built_in, samples[:2])
            layers = handle.trace.tokens["decoder"].values()
            tokens = sum(entering for entering, _ in layers) / len(layers)
        assert tokens <= max(share * 289 + 7, 37), (name, tokens)
        assert tokens >= 0.3 * share * 289 or "frames" in name, (name, tokens)
