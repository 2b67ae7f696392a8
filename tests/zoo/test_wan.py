"""The built-in video generator: its data, its judge, its pipeline and its recipe."""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("sklearn")

import vtr
from recipes import train, train_wan
from vtr.evaluate import judge
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


# ---- judge --------------------------------------------------------------------------------------


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


# ---- recipe -------------------------------------------------------------------------------------

SMALL = train_wan.Recipe(
    stages=(
        train_wan.Stage(2, ((1, 16, 16),), (1e-3, 1e-3)),
        train_wan.Stage(3, ((2, 16, 16),), (1e-3, 1e-4)),
    ),
    tokens=256,
)


def test_a_resumed_run_is_the_same_run():
    whole, first = train_wan.Trainer(SMALL), train_wan.Trainer(SMALL)
    for _ in range(SMALL.steps):
        losses = whole.step()
    for _ in range(3):
        first.step()
    second = train_wan.Trainer(SMALL)
    second.load_state(first.state())
    for _ in range(SMALL.steps - 3):
        assert second.step().keys() == losses.keys()
    for name, tensor in whole.state().items():
        assert torch.equal(tensor, second.state()[name]), name


def test_plain_attention_is_diffusers_attention():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = wan.build().eval()
    plain = copy.deepcopy(model)
    for block in plain.blocks:
        block.attn1.processor = block.attn2.processor = train_wan.PlainAttention()
    inputs = {
        "hidden_states": torch.randn(2, 1, 3, 8, 8, generator=seeded()),
        "timestep": torch.tensor([900.0, 100.0]),
        "encoder_hidden_states": wan.words()[torch.tensor([[1, 11], [2, 12]])],
        "return_dict": False,
    }
    with torch.no_grad():
        torch.testing.assert_close(plain(**inputs)[0], model(**inputs)[0], rtol=1e-4, atol=1e-5)


def test_frames_with_levels_of_their_own_have_a_clean_one_without_loss():
    level, weight = train_wan.levels(SMALL, SMALL.stages[1], 400, 5, True, seeded())
    assert level.shape == weight.shape == (400, 5)
    assert torch.equal(level == 0, weight == 0)
    clean = (level == 0).sum(1)
    assert clean.max() == 1 and 0.5 < clean.float().mean() < 0.7
    assert (level[clean == 1, 0] == 0).float().mean() > 0.5
    level, weight = train_wan.levels(SMALL, SMALL.stages[1], 8, 5, False, seeded())
    assert level.shape == (8, 1) and (weight == 1).all() and (level > 0).all()


def test_rates_and_stages_follow_the_step():
    recipe = train_wan.Recipe()
    assert recipe.at(0)[1] < recipe.at(49)[1]
    start = 0
    for stage in recipe.stages:
        assert recipe.at(start)[0] == stage
        last = recipe.at(start + stage.steps - 1)
        assert last[0] == stage and last[1] == pytest.approx(stage.rates[1], rel=0.2)
        start += stage.steps
    assert start == recipe.steps


def test_a_run_from_the_command_writes_what_load_reads(tmp_path: Path):
    trainer = train.open_run(SMALL, tmp_path / "run", resume=False)
    assert train.run(trainer, "digits-wan", tmp_path / "run")
    pipe = vtr.zoo.load_pipeline(str(tmp_path / "run" / "digits-wan"))
    kept = trainer.result().state_dict()
    for name, tensor in pipe.transformer.state_dict().items():
        torch.testing.assert_close(tensor, kept[name].bfloat16().float(), rtol=0, atol=0)
