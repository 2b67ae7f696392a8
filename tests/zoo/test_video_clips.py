"""Clips are what their description says, as pixels and as a file."""

from __future__ import annotations

import pytest
import torch

from vtr.zoo import clips as video
from vtr.zoo import data
from vtr.zoo.clips import MOST, SECONDS, clips, masks, render, reverse


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def batch():
    return clips(300, generator())


def test_description_is_consistent(batch):
    present = torch.arange(MOST) < batch.number[:, None]
    assert set(batch.number.tolist()) == {2, 3}
    assert torch.equal(batch.seen.any(-1), present)
    assert (batch.times()[present] >= 1).all() and (batch.times()[present] <= 3).all()
    assert set(batch.times()[present].tolist()) == {1, 2, 3}
    for column in (batch.digits, batch.colours, batch.first(), batch.last()):
        for row, number in zip(column, batch.number, strict=True):
            values = row[:number].tolist()
            assert len(set(values)) == number, "digits of a clip differ"
    assert (batch.first()[~present] == SECONDS).all() and (batch.last()[~present] == -1).all()
    assert (batch.digits[~present] == -1).all() and (batch.places[~present] == -1).all()


def test_every_second_and_every_place_is_somebodys(batch):
    present = torch.arange(MOST) < batch.number[:, None]
    assert set(batch.first()[present].tolist()) >= set(range(6))
    assert set(batch.places[present].flatten().tolist()) == {0, 1, 2, 3}
    moved = batch.places[..., 0] != batch.places[..., 1]
    assert 0.2 < moved[present].float().mean() < 0.7


def test_digits_are_where_and_when_the_description_says(batch):
    some = batch.take(slice(0, 40))
    opacity = masks(some, video.seconds())
    there = opacity.amax((-1, -2)) > 0.3
    assert torch.equal(there.transpose(1, 2), some.seen)
    rows = torch.arange(data.IMAGE)
    for i in range(40):
        for slot in range(int(some.number[i])):
            for end, second in enumerate((some.first()[i, slot], some.last()[i, slot])):
                ink = opacity[i, second, slot]
                x = (ink.sum(0) * rows).sum() / ink.sum() >= data.IMAGE / 2
                y = (ink.sum(1) * rows).sum() / ink.sum() >= data.IMAGE / 2
                assert int(some.places[i, slot, end]) == 2 * int(y) + int(x)


def test_rest_in_the_first_and_last_second_and_move_in_between(batch):
    far = (batch.path[:, :, 0] - batch.path[:, :, 1]).norm(dim=-1)
    i, slot = (far > 30).nonzero()[0].tolist()
    one = batch.take(slice(i, i + 1))
    first, last = int(one.first()[0, slot]), int(one.last()[0, slot])
    assert last - first >= 2
    moments = torch.tensor([first, first + 0.9, (first + last + 1) / 2, last + 0.1, last + 0.9])
    path = video._along(one.path, one.seen, moments)[0, slot]
    assert torch.allclose(path[0], path[1]) and torch.allclose(path[3], path[4])
    assert torch.allclose(path[0], one.path[0, slot, 0])
    assert torch.allclose(path[4], one.path[0, slot, 1])
    assert torch.allclose(path[2], (path[0] + path[4]) / 2, atol=1e-4)


def test_backwards_is_the_same_clip_in_the_other_direction(batch):
    some = batch.take(slice(0, 12))
    which = torch.arange(12) % 2 == 0
    turned = reverse(some, which)
    forward, backward = (masks(b, video.seconds()) for b in (some, turned))
    assert torch.allclose(backward[which], forward[which].flip(1), atol=1e-5)
    assert torch.equal(backward[~which], forward[~which])
    assert torch.equal(turned.first()[which], SECONDS - 1 - some.last()[which].clamp(min=-1))
    assert torch.equal(turned.times(), some.times())


def test_frames_differ_only_by_digits_and_noise(batch):
    some = batch.take(slice(0, 10))
    frames, ink = render(some, video.seconds(), generator(1))
    assert frames.shape == (10, 8, 3, 96, 96) and ink.shape == (10, 8, 144)
    assert frames.min() >= 0 and frames.max() <= 1
    empty = masks(some, video.seconds()).amax(2, keepdim=True)[:, :, 0, None] < 1e-3
    off = (frames - some.backgrounds[:, None].float().clamp(0, 1)).abs() * empty
    assert off.amax() < 6 * 0.03
    same, _ = render(some, video.seconds(), generator(1))
    assert torch.equal(frames, same)


def test_heldout_digits_are_never_those_of_training():
    train, heldout = (clips(200, generator(2), split).glyphs for split in ("train", "heldout"))
    assert not set(train.flatten().tolist()) & set(heldout.flatten().tolist())


def test_a_file_holds_the_frames(batch, tmp_path):
    av = pytest.importorskip("av")
    frames = video.pictures(batch.take(slice(3, 4)), generator(3), 4)[0]
    path = video.write(tmp_path / "clip.mp4", frames, rate=4)
    with av.open(str(path)) as container:
        decoded = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
        assert container.streams.video[0].average_rate == 4
    assert len(decoded) == 32 and decoded[0].shape == (384, 384, 3)
    small = torch.tensor(decoded[5]).float().view(96, 4, 96, 4, 3).mean((1, 3))
    assert (small - frames[5].float()).abs().mean() < 8


@pytest.mark.parametrize(
    "arguments", [{"n": 0}, {"most": 1}, {"most": 4}, {"box": (40, 60)}, {"split": "test"}]
)
def test_bad_arguments_are_named(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        clips(**{"n": 1, "generator": generator(), **arguments})


def test_bad_moments_and_frames_are_named(batch, tmp_path):
    with pytest.raises(ValueError, match="between 0 and 8"):
        render(batch.take([0]), [9.0], generator())
    with pytest.raises(ValueError, match="uint8"):
        video.write(tmp_path / "a.mp4", torch.zeros(2, 96, 96, 3))
