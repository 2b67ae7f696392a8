"""The judge of generated videos is right about real ones, and sees what is wrong."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("sklearn")

from vtr.evaluate import digit_judge as judge
from vtr.zoo.videos import videos


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_judge_is_nearly_right_on_real_held_out_videos():
    verdict = judge.accuracy(360, seed=3)
    assert verdict.digit > 0.95 and verdict.direction == verdict.halfway == 1.0


def test_the_judge_sees_a_wrong_digit_a_wrong_way_and_no_way():
    batch = videos(60, seeded(4), split="heldout")
    wrong = judge.judge(batch.pixels, (batch.digits + 1) % 10, batch.directions)
    assert wrong.digit < 0.1 and wrong.direction == 1.0
    backwards = judge.judge(batch.pixels.flip(2), batch.digits, batch.directions)
    assert backwards.direction == 0.0 and backwards.digit > 0.9
    still = batch.pixels[:, :, :1].expand(-1, -1, 5, -1, -1)
    assert judge.judge(still, batch.digits, batch.directions).halfway == 0.0
    with pytest.raises(ValueError, match="two frames"):
        judge.judge(batch.pixels[:, :, :1], batch.digits, batch.directions)


def test_faint_noise_does_not_move_the_window():
    batch = videos(200, seeded(5), split="heldout")
    noisy = batch.pixels + 0.2 * torch.rand(batch.pixels.shape, generator=seeded(6))
    assert judge.judge(noisy, batch.digits, batch.directions).per_frame > 0.9
