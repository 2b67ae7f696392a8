"""The generator: the same pictures from the same seed, and no held-out digit in training."""

import sys

import pytest
import torch

from vtr.zoo import data, scenes


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("make", [data.digits, scenes.scenes])
def test_same_seed_same_pictures(make):
    first, again, other = make(6, seeded(3)), make(6, seeded(3)), make(6, seeded(4))
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.images, other.images)


@pytest.mark.parametrize("make", [data.digits, scenes.scenes])
def test_does_not_touch_global_random_numbers(make):
    before = torch.get_rng_state()
    make(2, seeded(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_splits_are_disjoint_complete_and_stratified():
    train, heldout = data.split_indices("train"), data.split_indices("heldout")
    everything = torch.cat([train, heldout]).sort().values
    assert torch.equal(everything, torch.arange(len(data.digit_labels())))
    for split in (train, heldout):
        share = torch.bincount(data.digit_labels()[split], minlength=10) / len(split)
        assert (share - 0.1).abs().max() < 0.01


@pytest.mark.parametrize("make", [data.digits, scenes.scenes])
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_pictures_show_only_digits_of_their_split(monkeypatch, make, split):
    """What is drawn is seen where it is drawn: in the indices handed to the renderer."""
    drawn = []
    render = data.digit_masks

    def spy(index, *rest):
        drawn.append(index)
        return render(index, *rest)

    monkeypatch.setattr(data, "digit_masks", spy)
    batch = make(300, seeded(1), split)
    index = torch.cat(drawn)
    assert torch.isin(index, data.split_indices(split)).all()
    other = "train" if split == "heldout" else "heldout"
    assert not torch.isin(index, data.split_indices(other)).any()
    if make is data.digits:
        assert torch.equal(data.digit_labels()[index], batch.labels)


def test_shapes_and_normalisation():
    batch = data.digits(128, seeded(5))
    assert batch.images.shape == (128, 3, 96, 96) and batch.images.dtype == torch.float32
    assert batch.labels.shape == (128,) and batch.labels.unique().numel() == 10
    pixels = batch.images * data.STD + data.MEAN
    assert torch.allclose(data.normalise(pixels), batch.images, atol=1e-5)
    # Clutter stays dark, so bright pixels are ink: the two views of the picture must agree.
    assert pixels.mean() < 0.5 and pixels.amax((1, 2, 3)).min() > 0.6


def test_ink_is_where_the_digit_is(monkeypatch):
    """Without background the picture is the digit times its colour; ink must be its patch mean."""
    monkeypatch.setattr(
        data, "backgrounds", lambda n, generator, brightness=0.5: torch.zeros(n, 3, 96, 96)
    )
    batch = data.digits(32, seeded(6))
    red = (batch.images * data.STD + data.MEAN)[:, 0]  # opacity times a constant per picture
    patches = red.unfold(1, 8, 8).unfold(2, 8, 8).mean((-1, -2)).flatten(1)
    colour = patches.sum(1) / batch.ink.sum(1)
    assert ((colour >= 0.75) & (colour <= 1.0)).all()
    assert torch.allclose(patches, batch.ink * colour[:, None], atol=1e-4)
    touched = (batch.ink > data.INK).float().sum(1)
    assert 8 < touched.mean() < 20 and touched.max() < 48


def test_a_digit_is_drawn_at_its_centre_and_whole():
    index = torch.arange(10)
    x, y = torch.linspace(30, 66, 10), torch.linspace(60, 36, 10)
    upright = data.digit_masks(index, x, y, torch.full((10,), 40.0), torch.zeros(10))[:, 0]
    turned = data.digit_masks(index, x, y, torch.full((10,), 40.0), torch.full((10,), 3.14159265))
    total = upright.sum((1, 2))
    pixel = torch.arange(96) + 0.5
    # A half turn about the centre mirrors the centre of mass: their mean is the centre itself.
    for mass, axis, wanted in ((upright, 1, x), (upright, 2, y)):
        centre = (mass.sum(axis) @ pixel) / total
        mirror = (turned[:, 0].sum(axis) @ pixel) / turned.sum((1, 2, 3))
        assert torch.allclose((centre + mirror) / 2, wanted, atol=0.05)
    assert torch.allclose(turned.sum((1, 2, 3)), total, rtol=0.01)


def test_scenes_have_distinct_digits_in_their_quadrants():
    batch = scenes.scenes(200, seeded(7))
    assert batch.number.unique().tolist() == [1, 2, 3]
    column, row = torch.arange(144) % 12 // 6, torch.arange(144) // 12 // 6
    for i in range(200):
        k = int(batch.number[i])
        for names in (batch.digits, batch.colours, batch.quadrants):
            assert names[i, :k].unique().numel() == k and (names[i, :k] >= 0).all()
            assert (names[i, k:] == -1).all()
        for digit, colour, quadrant in zip(
            batch.digits[i, :k], batch.colours[i, :k], batch.quadrants[i, :k], strict=True
        ):
            mine = batch.patch_digits[i] == digit
            assert mine.sum() >= 2
            assert (batch.patch_colours[i][mine] == colour).all()
            assert ((row * 2 + column)[mine] == quadrant).all()
        assert (batch.ink[i][batch.patch_digits[i] == scenes.NO_DIGIT] < 0.01).all()


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0,), {}, "n must be at least 1"),
        ((1,), {"split": "test"}, "'train' or 'heldout'"),
        ((1,), {"box": (40, 30)}, "low <= high"),
    ],
)
@pytest.mark.parametrize("make", [data.digits, scenes.scenes])
def test_bad_arguments_are_refused(make, arguments, options, message):
    with pytest.raises(ValueError, match=message):
        make(*arguments, generator=seeded(0), **options)


def test_without_sklearn_the_error_says_what_to_install(monkeypatch):
    data._sources.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    try:
        with pytest.raises(ImportError, match="scikit-learn"):
            data.digits(1, seeded(0))
    finally:
        data._sources.cache_clear()
