"""Images from folders and tar shards, for training runs that are resumed by position.

The order of the images follows from the seed and the epoch, and random transformations of an image from the seed, the
epoch and the image, however many workers load it. A run that is resumed begins at its position without loading the
images before it. Processes get batches in turn.

::

    data = image_folder("imagenet/train", 256, transform, workers=8)
    data = ShardBatches([f"train-{i:04}.tar" for i in range(1024)], 256, transform, workers=8)
    TokenTuner(model, method, data, "runs/mine", settings).run()
"""

from __future__ import annotations

import io
import random
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vtr.errors import missing

Batch = tuple[Tensor, Tensor]
Mix = Callable[[Tensor, Tensor], Batch]
Reference = tuple[int, Any]
"""Seed of an item, and what it is read from."""

_EPOCH = 1_000_003
_ITEM = 7_919_317


class ImageBatches:
    """Base of the batches of images. A subclass lists the references of each batch and reads one.

    Args:
        batch: images in each.
        seed: of order and transformations.
        workers: processes that load; 0 loads in this one.
        mix: what is done with a whole batch of training, images (B, 3, H, W) and labels (B,) int64, such as
            ``timm.data.Mixup(...)``. It may draw from random, NumPy and torch, which are seeded for it.
    """

    def __init__(self, batch: int, seed: int = 0, workers: int = 0, mix: Mix | None = None) -> None:
        for name, value, least in (("batch", batch, 1), ("workers", workers, 0)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be an int of at least {least}, got {value!r}")
        self.batch, self.seed, self.workers, self.mix = batch, seed, workers, mix

    def read(self, reference: Any) -> tuple[Tensor, int]:
        """Return the transformed image and its class."""
        raise NotImplementedError(f"{type(self).__name__} must define read(reference)")

    def listed(self, first: int, every: int) -> Iterator[list[Reference]]:
        """List the references of the batches ``first``, ``first + every`` and so on, without end."""
        raise NotImplementedError(f"{type(self).__name__} must define listed(first, every)")

    def in_order(self) -> Iterator[list[Reference]]:
        """List those of all images once, in their own order; the last batch may be smaller."""
        raise NotImplementedError(f"{type(self).__name__} must define in_order()")

    def stream(self, first: int = 0, every: int = 1) -> Iterator[Batch]:
        """Load the batches ``first``, ``first + every``, ... of training, without end.

        Args:
            first: number of the first batch, over all processes.
            every: processes that load in turn.
        """
        number = first
        for images, labels in self._load(self.listed(first, every)):
            if self.mix is not None:
                with drawing(self.seed * _EPOCH + number):
                    images, labels = self.mix(images, labels)
            yield images, labels
            number += every

    def once(self) -> Iterator[Batch]:
        """Load all images once, in their own order, for evaluation; nothing is mixed."""
        yield from self._load(self.in_order())

    def _load(self, sampler: Iterator[list[Reference]]) -> Iterator[Batch]:
        loader: DataLoader[Any] = DataLoader(
            _Reader(self),
            batch_sampler=_Once(sampler),
            num_workers=self.workers,
            # Its default draws from the caller's random numbers.
            generator=torch.Generator().manual_seed(self.seed),
        )
        yield from map(tuple, loader)


class DatasetBatches(ImageBatches):
    """Batches of a dataset with a length, whose items are (image tensor, class).

    An epoch is a random order of all items; those that do not fill a last batch are left out of it.

    Args:
        dataset: of torch, torchvision or alike, with its transformation.
        batch, seed, workers, mix: see :class:`ImageBatches`.

    Raises:
        ValueError: the dataset is smaller than a batch.
    """

    def __init__(
        self, dataset: Any, batch: int, *, seed: int = 0, workers: int = 0, mix: Mix | None = None
    ) -> None:
        super().__init__(batch, seed, workers, mix)
        self.dataset = dataset
        self.per_epoch = len(dataset) // batch
        if not self.per_epoch:
            raise ValueError(f"batch is {batch}, and the data set has {len(dataset)} images")

    def read(self, reference: Any) -> tuple[Tensor, int]:
        image, label = self.dataset[reference]
        return image, int(label)

    def listed(self, first: int, every: int) -> Iterator[list[Reference]]:
        number, epoch, order = first, -1, []
        while True:
            now, place = divmod(number, self.per_epoch)
            if now != epoch:
                epoch, order = now, _order(len(self.dataset), self.seed, now)
            chosen = order[place * self.batch : (place + 1) * self.batch]
            yield [(_item_seed(self.seed, epoch, index), index) for index in chosen]
            number += every

    def in_order(self) -> Iterator[list[Reference]]:
        indices = range(len(self.dataset))
        for start in range(0, len(indices), self.batch):
            yield [(self.seed, index) for index in indices[start : start + self.batch]]


def image_folder(
    root: str | Path,
    batch: int,
    transform: Callable[[Any], Tensor],
    *,
    seed: int = 0,
    workers: int = 0,
    mix: Mix | None = None,
) -> DatasetBatches:
    """Open a folder with one folder of images per class (``torchvision.datasets.ImageFolder``).

    Args:
        root: the folder; classes are numbered in the order of their names.
        transform: from a PIL image to a tensor (3, H, W).
        batch, seed, workers, mix: see :class:`ImageBatches`.

    Raises:
        FileNotFoundError: there is no such folder, or it has no images.
        MissingDependencyError: torchvision is not installed.
    """
    try:
        from torchvision.datasets import ImageFolder
    except ImportError as error:
        raise missing("torchvision", "train", "image_folder") from error
    dataset = ImageFolder(str(root), transform)
    return DatasetBatches(dataset, batch, seed=seed, workers=workers, mix=mix)


class ShardBatches(ImageBatches):
    """Batches of tar files of the webdataset format: ``NAME.jpg`` and ``NAME.cls`` next to each other.

    An epoch is a random order of the shards, which are shared out among the processes; images are shuffled
    within a buffer. Images that do not fill a process's last batch are left out, so that all processes have
    as many. To resume, the shards of the running epoch are read again up to the position, without decoding. Another
    number of processes is another order.

    Args:
        shards: paths, or what webdataset opens (``https://...``, ``pipe:...``).
        transform: from a PIL image to a tensor (3, H, W).
        image, label: extensions of the members; the label is an integer in decimal digits.
        buffer: images to draw from. 1 does not shuffle within shards.
        samples: images in each shard; None counts them, which needs local files.
        batch, seed, workers, mix: see :class:`ImageBatches`.

    Raises:
        ValueError: there are no shards, their images cannot be counted, or are fewer than a batch.
        MissingDependencyError: webdataset is not installed.
    """

    def __init__(
        self,
        shards: Sequence[str | Path],
        batch: int,
        transform: Callable[[Any], Tensor],
        *,
        image: Sequence[str] = ("jpg", "jpeg", "png", "webp"),
        label: str = "cls",
        buffer: int = 1000,
        samples: Sequence[int] | None = None,
        seed: int = 0,
        workers: int = 0,
        mix: Mix | None = None,
    ) -> None:
        super().__init__(batch, seed, workers, mix)
        try:
            import webdataset  # noqa: F401
        except ImportError as error:
            raise missing("webdataset", "train", "ShardBatches") from error
        self.shards, self.transform = [str(shard) for shard in shards], transform
        self.image, self.label, self.buffer = tuple(image), label, buffer
        if not self.shards:
            raise ValueError("there are no shards")
        if buffer < 1:
            raise ValueError(f"buffer must be at least 1, got {buffer}")
        if samples is not None and len(samples) != len(self.shards):
            raise ValueError(f"samples has {len(samples)} numbers for {len(self.shards)} shards")
        self.samples = [self._count(s) for s in self.shards] if samples is None else list(samples)
        if sum(self.samples) < batch:
            raise ValueError(f"batch is {batch}, and the shards have {sum(self.samples)} images")

    def read(self, reference: Any) -> tuple[Tensor, int]:
        from PIL import Image

        data, label = reference
        with Image.open(io.BytesIO(data)) as opened:
            return self.transform(opened.convert("RGB")), int(label)

    def listed(self, first: int, every: int) -> Iterator[list[Reference]]:
        if every > len(self.shards):
            raise ValueError(
                f"{len(self.shards)} shards cannot be shared out among {every} processes: write more, smaller shards"
            )
        own, skip, epoch = first % every, first // every, 0
        while True:
            order = _order(len(self.shards), self.seed, epoch)
            parts = [order[p::every] for p in range(every)]
            batches = min(sum(self.samples[i] for i in part) for part in parts) // self.batch
            if batches == 0 and epoch > len(self.shards):
                raise ValueError(
                    f"no process has a batch of {self.batch} images: its shards have fewer"
                )
            if skip < batches:
                yield from self._epoch(parts[own], epoch, batches, skip)
            skip, epoch = max(skip - batches, 0), epoch + 1

    def _epoch(
        self, part: list[int], epoch: int, batches: int, skip: int
    ) -> Iterator[list[Reference]]:
        shuffled = self._shuffled(self._samples(part), epoch)
        for number in range(batches):
            chosen = []
            for _ in range(self.batch):
                found = next(shuffled, None)
                if found is None:
                    raise ValueError(
                        "the shards have fewer images than samples= says, or than when they were counted"
                    )
                chosen.append(found)
            if number >= skip:
                yield chosen

    def _shuffled(self, samples: Iterator[Any], epoch: int) -> Iterator[Reference]:
        drawn, held = random.Random(self.seed * _EPOCH + epoch), []
        numbered = ((_item_seed(self.seed, epoch, i), sample) for i, sample in enumerate(samples))
        for sample in numbered:
            held.append(sample)
            if len(held) >= self.buffer:
                place = drawn.randrange(len(held))
                held[place], held[-1] = held[-1], held[place]
                yield held.pop()
        drawn.shuffle(held)
        yield from held

    def in_order(self) -> Iterator[list[Reference]]:
        chosen: list[Reference] = []
        for sample in self._samples(range(len(self.shards))):
            chosen.append((self.seed, sample))
            if len(chosen) == self.batch:
                yield chosen
                chosen = []
        if chosen:
            yield chosen

    def _samples(self, part: Sequence[int]) -> Iterator[tuple[bytes, bytes]]:
        """Read the undecoded images and labels of shards, in order."""
        import webdataset as wds

        urls = [self.shards[i] for i in part]
        for sample in wds.DataPipeline(wds.SimpleShardList(urls), wds.tarfile_to_samples()):
            kind = next((kind for kind in self.image if kind in sample), None)
            if kind is None or self.label not in sample:
                raise ValueError(
                    f"{sample['__url__']}: the sample {sample['__key__']} has no {'/'.join(self.image)} or no "
                    f"{self.label} (it has: {', '.join(k for k in sample if not k.startswith('__'))}): give image= "
                    "and label="
                )
            yield sample[kind], sample[self.label]

    def _count(self, shard: str) -> int:
        if not Path(shard).is_file():
            raise ValueError(
                f"there is no file {shard} whose images could be counted: give samples=, the number of images in "
                "each shard"
            )
        with tarfile.open(shard) as opened:
            # The extension is all behind the first dot, as webdataset splits names.
            names = (m.name.rpartition("/")[2].partition(".")[2].lower() for m in opened)
            return sum(name in self.image for name in names)


@contextmanager
def drawing(seed: int) -> Iterator[None]:
    """Seed random, NumPy and torch for a while; the caller's random numbers are kept."""
    python, numbers = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)


class _Reader(Dataset[Any]):
    """Reads single images, in a worker or here, each with its own random numbers."""

    def __init__(self, batches: ImageBatches) -> None:
        self.batches = batches

    def __getitem__(self, item: Reference) -> tuple[Tensor, int]:
        seed, reference = item
        with drawing(seed):
            return self.batches.read(reference)


class _Once:
    """A batch sampler that is given its batches, and that DataLoader does not take for a list."""

    def __init__(self, sampler: Iterator[list[Reference]]) -> None:
        self.sampler = sampler

    def __iter__(self) -> Iterator[list[Reference]]:
        return self.sampler


def _order(n: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed * _EPOCH + epoch)
    order: list[int] = torch.randperm(n, generator=generator).tolist()
    return order


def _item_seed(seed: int, epoch: int, item: int) -> int:
    return (seed * _EPOCH + epoch) * _ITEM % 2**48 + item
