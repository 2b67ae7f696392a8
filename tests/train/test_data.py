"""Folders and shards: their order, random transformations, resuming, processes and refusals."""

from __future__ import annotations

import io
import random
import tarfile
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

import vtr
from tests.train.tiny_run import METHOD, classifier
from vtr.train.data import DatasetBatches, ImageBatches, ShardBatches, drawing, image_folder
from vtr.train.losses import TokenLoss
from vtr.train.tokens import TokenSettings, TokenTuner


def picture(number):
    """A picture whose colour says which it is."""
    return Image.fromarray(np.full((8, 8, 3), number, np.uint8))


def grey(image):
    return torch.tensor(np.asarray(image).copy()).permute(2, 0, 1).float()


def noisy(image):
    """A random transformation that draws from all three sources."""
    return grey(image) + random.random() + float(np.random.rand()) + torch.rand(())


@pytest.fixture
def folder(tmp_path):
    for number in range(11):
        place = tmp_path / "images" / f"class{number % 3}"
        place.mkdir(parents=True, exist_ok=True)
        picture(number).save(place / f"{number:02}.png")
    return tmp_path / "images"


@pytest.fixture
def shards(tmp_path):
    paths, number = [], 0
    for index, size in enumerate((5, 4, 6, 5)):
        path = tmp_path / f"{index}.tar"
        with tarfile.open(path, "w") as written:
            for _ in range(size):
                buffer = io.BytesIO()
                picture(number).save(buffer, "png")
                for kind, data in (("png", buffer.getvalue()), ("cls", str(number % 3).encode())):
                    member = tarfile.TarInfo(f"{number:04}.{kind}")
                    member.size = len(data)
                    written.addfile(member, io.BytesIO(data))
                number += 1
        paths.append(path)
    return paths


def take(data, n, first=0, every=1):
    stream = data.stream(first, every)
    return [next(stream) for _ in range(n)]


def ids(batches):
    """Numbers of the pictures of each batch."""
    return [images[:, 0, 0, 0].round().long().tolist() for images, _ in batches]


def flat(batches):
    return [number for batch in batches for number in batch]


def same(one, other):
    return all(
        torch.equal(a, b)
        for x, y in zip(one, other, strict=True)
        for a, b in zip(x, y, strict=True)
    )


def test_an_epoch_of_a_folder_has_every_picture_once_in_another_order(folder):
    data = image_folder(folder, 2, grey, seed=5)
    batches = take(data, 10)
    for images, labels in batches:
        assert images.shape == (2, 3, 8, 8) and labels.dtype == torch.int64
        assert (images[:, 0, 0, 0] % 3 == labels).all()
    first, second = (flat(ids(batches[i : i + 5])) for i in (0, 5))
    assert len(set(first)) == len(set(second)) == 10, "11 pictures fill five batches"
    assert first != second
    assert ids(take(image_folder(folder, 2, grey, seed=5), 10)) == ids(batches)
    assert ids(take(image_folder(folder, 2, grey, seed=6), 10)) != ids(batches)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_stream_has_the_same_pictures_and_noise(folder, workers):
    whole = take(image_folder(folder, 2, noisy), 12)
    rest = take(image_folder(folder, 2, noisy, workers=workers), 5, first=7)
    assert same(rest, whole[7:])
    flat = torch.cat([images[:, 0, 0, 0] for images, _ in whole])
    assert len(set((flat % 1).tolist())) > 20, "each picture has its own noise in each epoch"


def test_processes_take_batches_in_turn(folder):
    data = image_folder(folder, 2, noisy)
    whole = take(data, 12)
    for own in range(3):
        assert same(take(data, 4, first=own, every=3), whole[own::3])


def test_all_pictures_once_for_evaluation(folder):
    batches = list(image_folder(folder, 4, grey).once())
    assert [len(images) for images, _ in batches] == [4, 4, 3]
    by_class = [0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8]
    assert flat(ids(batches)) == by_class


def test_batches_are_mixed_with_their_own_random_numbers(folder):
    def mix(images, labels):
        share = float(np.random.rand()) + random.random() + float(torch.rand(()))
        return images, torch.nn.functional.one_hot(labels, 3) * share

    whole = take(image_folder(folder, 2, grey, mix=mix), 8)
    assert whole[0][1].shape == (2, 3)
    assert same(take(image_folder(folder, 2, grey, mix=mix), 3, first=5), whole[5:])
    assert len({float(labels.max()) for _, labels in whole}) == 8


def test_timms_mixup_fits(folder):
    timm_data = pytest.importorskip("timm.data")
    mix = timm_data.Mixup(mixup_alpha=0.8, num_classes=3)
    whole = take(image_folder(folder, 2, grey, mix=mix), 4)
    assert torch.allclose(whole[0][1].sum(1), torch.ones(2))
    assert same(take(image_folder(folder, 2, grey, mix=mix), 2, first=2), whole[2:])


def test_the_callers_random_numbers_are_kept(folder):
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    take(image_folder(folder, 2, noisy), 3)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()
    with pytest.raises(KeyError), drawing(3):
        raise KeyError
    assert torch.equal(torch.get_rng_state(), states[0])


# ---- shards -----------------------------------------------------------------------------------------


def test_an_epoch_of_shards_has_every_picture_once(shards):
    data = ShardBatches(shards, 5, grey)
    assert data.samples == [5, 4, 6, 5]
    batches = take(data, 8)
    for images, labels in batches:
        assert (images[:, 0, 0, 0] % 3 == labels).all()
    for start in (0, 4):
        assert Counter(flat(ids(batches[start : start + 4]))) == Counter(range(20))
    assert ids(batches[:4]) != ids(batches[4:])
    assert [len(images) for images, _ in ShardBatches(shards, 6, grey).once()] == [6, 6, 6, 2]
    assert flat(ids(ShardBatches(shards, 6, grey).once())) == list(range(20))


def test_shards_without_a_buffer_keep_the_order_within(shards):
    batches = ids(take(ShardBatches(shards, 1, grey, buffer=1), 20))
    numbers = flat(batches)
    starts = {0: 5, 5: 4, 9: 6, 15: 5}
    while numbers:
        n = starts.pop(numbers[0])
        assert numbers[:n] == list(range(numbers[0], numbers[0] + n))
        numbers = numbers[n:]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("every", [1, 2])
def test_a_resumed_stream_of_shards(shards, workers, every):
    whole = take(ShardBatches(shards, 2, noisy, buffer=4), 14, every - 1, every)
    data = ShardBatches(shards, 2, noisy, buffer=4, workers=workers)
    assert same(take(data, 5, every - 1 + 9 * every, every), whole[9:])


def test_processes_share_out_the_shards(shards):
    data = ShardBatches(shards, 2, grey, buffer=3)
    # One of the two halves of 20 pictures in shards of 4 to 6 has 9 at least: 4 batches.
    parts = [flat(ids(take(data, 4, own, 2))) for own in (0, 1)]
    assert not set(parts[0]) & set(parts[1])
    with pytest.raises(ValueError, match="4 shards cannot be shared out among 5 processes"):
        next(data.stream(0, 5))


# ---- refusals ---------------------------------------------------------------------------------------


def test_data_that_cannot_be_batches(shards, tmp_path):
    with pytest.raises(ValueError, match="batch must be an int of at least 1"):
        ImageBatches(0)
    with pytest.raises(ValueError, match="workers must be an int of at least 0"):
        ImageBatches(1, workers=-1)
    small = TensorDataset(torch.zeros(3, 1), torch.zeros(3))
    with pytest.raises(ValueError, match="batch is 4, and the data set has 3 images"):
        DatasetBatches(small, 4)
    with pytest.raises(FileNotFoundError):
        image_folder(tmp_path / "none", 2, grey)
    with pytest.raises(ValueError, match="there are no shards"):
        ShardBatches([], 2, grey)
    with pytest.raises(ValueError, match="buffer must be at least 1"):
        ShardBatches(shards, 2, grey, buffer=0)
    with pytest.raises(ValueError, match=r"give samples=, the number of images"):
        ShardBatches(["https://example.org/0.tar"], 2, grey)
    with pytest.raises(ValueError, match="samples has 1 numbers for 4 shards"):
        ShardBatches(shards, 2, grey, samples=[5])
    with pytest.raises(ValueError, match="batch is 21, and the shards have 20 images"):
        ShardBatches(shards, 21, grey)
    with pytest.raises(ValueError, match="no process has a batch of 16"):
        next(ShardBatches(shards, 16, grey).stream(0, 2))
    with pytest.raises(ValueError, match="fewer images than samples= says"):
        take(ShardBatches(shards, 5, grey, samples=[9, 9, 9, 9]), 5)
    with pytest.raises(ValueError, match=r"has no jpg or no cls \(it has: png, cls\)"):
        next(iter(ShardBatches(shards, 2, grey, image=("jpg",), samples=[5] * 4).once()))


def test_a_library_that_is_not_installed(monkeypatch, folder, shards):
    import sys

    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(vtr.MissingDependencyError, match=r"vtr\[train\]"):
        ShardBatches(shards, 2, grey)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(vtr.MissingDependencyError, match=r"vtr\[train\]"):
        image_folder(folder, 2, grey)


# ---- training from them ---------------------------------------------------------------------------------


def test_a_run_on_a_folder_is_resumed_by_position(folder, tmp_path):
    def transform(image):
        return noisy(image.resize((32, 32))) / 100

    data = image_folder(folder, 3, transform)
    settings = TokenSettings(steps=4, accumulate=2, loss=TokenLoss(target=0.5))

    def run(out, **more):
        return TokenTuner(classifier(), METHOD, data, out, settings, **more)

    with run(tmp_path / "whole") as one:
        losses = [one.step()["loss"] for _ in range(4)]
    with run(tmp_path / "parts") as one:
        one.step()
        one.save()
    with run(tmp_path / "parts", resume=True) as one:
        assert [one.step()["loss"] for _ in range(3)] == losses[1:]
