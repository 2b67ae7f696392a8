"""The built-in video generator: its data and its pipeline."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("sklearn")

from vtr.zoo import wan
from vtr.zoo.videos import DIRECTIONS, SPEED, STEPS, fitting, glyphs, videos


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- data ---------------------------------------------------------------------------------------


def test_a_frame_is_the_one_before_moved_by_a_patch():
    batch = videos(40, seeded(), frames=4, height=16, width=32)
    assert batch.pixels.shape == (40, 1, 4, 16, 32)
    for clip, direction in zip(batch.pixels[:, 0], batch.directions, strict=True):
        x, y = (STEPS[direction] * SPEED).tolist()
        for before, after in pairwise(clip):
            # Nothing wraps around: what leaves at one side would come back at the other.
            torch.testing.assert_close(after, torch.roll(before, (y, x), (0, 1)))
        assert (clip.sum((1, 2)) == clip[0].sum()).all()


def test_every_digit_and_direction_is_drawn_and_the_seed_decides():
    batch = videos(400, seeded(1))
    assert set(batch.digits.tolist()) == set(range(10))
    assert set(batch.directions.tolist()) == set(range(4))
    again = videos(400, seeded(1))
    assert torch.equal(batch.pixels, again.pixels)
    assert not torch.equal(batch.pixels, videos(400, seeded(2)).pixels)


def test_held_out_digits_are_in_no_training_video():
    trained = {tuple(g.flatten().tolist()) for g in glyphs("train")[0]}
    heldout = [tuple(g.flatten().tolist()) for g in glyphs("heldout")[0]]
    assert len(trained) > 1400 and len(heldout) == 360
    assert not trained.intersection(heldout)


def test_long_videos_move_only_where_they_fit_or_not_at_all():
    assert [DIRECTIONS[i] for i in fitting(10, 16, 32)] == ["right", "left"]
    assert set(videos(30, seeded(), 10).directions.tolist()) == {0, 1}
    with pytest.raises(ValueError, match="fewer frames or a larger picture"):
        videos(1, seeded(), 20)


# ---- pipeline -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_pipe():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe = wan.pipeline(wan.build().eval())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_prompts_are_words_with_fixed_vectors():
    words = wan.Words()
    tokens = words(["a 7 moving right", "up, 0.", "the digit 3", ""])
    nothing = wan.NOTHING
    assert tokens.tolist() == [[7, 10], [0, 13], [3, nothing], [nothing, nothing]]
    with pytest.raises(ValueError, match="does not know 'cat'"):
        words(["a cat"])
    with pytest.raises(ValueError, match="two digits"):
        words(["7 3"])


def test_shapes_of_every_output(tiny_pipe):
    call = {"num_inference_steps": 1, "generator": seeded()}
    frames = tiny_pipe(["a 7 moving right", "3 up"], **call).frames
    assert frames.shape == (2, 5, 16, 32, 3) and isinstance(frames, np.ndarray)
    assert frames.min() >= 0 and frames.max() <= 1
    assert tiny_pipe("7", output_type="latent", **call).frames.shape == (1, 1, 5, 16, 32)
    picture = tiny_pipe("7", num_frames=1, height=16, width=16, output_type="pil", **call)
    assert picture.frames[0][0].size == (16, 16) and len(picture.frames[0]) == 1
    assert len(tiny_pipe("7", num_videos_per_prompt=2, **call).frames) == 2


def test_it_is_diffusers_loop_with_guidance_in_two_calls(tiny_pipe):
    from diffusers import WanPipeline

    assert isinstance(tiny_pipe, WanPipeline)
    seen = []
    hook = tiny_pipe.transformer.register_forward_hook(
        lambda module, args, kwargs, out: seen.append(kwargs["encoder_hidden_states"]),
        with_kwargs=True,
    )
    tiny_pipe("a 7 moving right", num_inference_steps=2, generator=seeded())
    hook.remove()
    table = wan.words()
    assert len(seen) == 4  # two steps, with and without the prompt
    torch.testing.assert_close(seen[0], table[[7, 10]][None])
    torch.testing.assert_close(seen[1], table[[wan.NOTHING, wan.NOTHING]][None])
