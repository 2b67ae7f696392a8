"""Videos of the built-in generator: which are asked for, how they are measured, and that they show digits."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("sklearn")

import vtr
from vtr.evaluate import generator
from vtr.zoo import wan


@pytest.fixture(scope="module")
def pipe():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = wan.pipeline(wan.build().eval())
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def trained():
    made = vtr.zoo.load_pipeline("digits-wan", torch.bfloat16)
    made.set_progress_bar_config(disable=True)
    return made


def test_prompts_are_balanced_and_videos_depend_on_their_place_only(pipe):
    digits, directions = generator.asked(120)
    pairs = torch.stack([digits, directions], 1).unique(dim=0, return_counts=True)[1]
    assert len(pairs) == 40 and (pairs == 3).all()
    assert set(generator.asked(40, 10)[1].tolist()) == {0, 1}
    few = generator.generate(pipe, digits[:1], directions[:1], steps=1, frames=2)
    again = generator.generate(pipe, digits[:1], directions[:1], steps=1, frames=2)
    assert torch.equal(few, again) and few.shape == (1, 1, 2, 16, 32)


def test_psnr_is_of_pixels_in_the_unit_interval():
    videos = torch.zeros(2, 1, 5, 16, 32)
    assert generator.psnr(videos, videos) == pytest.approx(90)
    assert generator.psnr(videos + 0.2, videos) == pytest.approx(-20 * math.log10(0.1), abs=1e-3)


def test_the_packaged_generator_draws_digits(trained):
    row, videos = generator.measure(trained, None, 10, None, steps=8)
    assert videos.shape == (10, 1, 5, 16, 32)
    assert row["digit"] >= 0.6 and row["direction"] >= 0.6
    with pytest.raises(ValueError, match="there is: digits-wan"):
        vtr.zoo.load_pipeline("digits-vit")
