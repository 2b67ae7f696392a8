"""Handwritten digits on photographs: the data of the built-in models, made from what scikit-learn
ships (``load_digits`` and its two sample photographs), so that nothing is downloaded.

A picture is a random crop of a photograph, darkened and made noisy, with one handwritten digit
drawn over it at a random place, size and angle. Most patches are clutter and about a tenth carry
the answer, which is what makes the choice of tokens matter.

The 1797 digits are split 80/20, stratified by class. Pictures of the ``"heldout"`` split are drawn
only from digits that the ``"train"`` split never shows. The photographs are shared by both.

Everything is a function of the seeded ``torch.Generator`` handed in.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.zoo.packaged import check

Split = Literal["train", "heldout"]

IMAGE = 96  # pixels
PATCH = 8  # pixels
GRID = IMAGE // PATCH
MEAN = 0.35  # of the pixels in [0, 1], all channels; the same for every built-in vision model
STD = 0.25
INK = 0.02  # a patch with more than this share of digit in it is said to have ink

_GLYPH = 40  # pixels of a stored digit, its one-pixel border of the 8 x 8 original included
_CROP = (48, 192)  # side of the square crop of a photograph, pixels, both ends included
_NOISE = 0.06  # standard deviation, in units of the [0, 1] pixel
# Half a box of the digit's size, less the empty border: what must stay inside the picture.
HALF_EXTENT = 0.42


class Digits(NamedTuple):
    """A batch of pictures with one digit each.

    Attributes:
        images: ``(n, 3, 96, 96)`` float32, normalised with :data:`MEAN` and :data:`STD`.
        labels: ``(n,)`` int64, 0 to 9.
        ink: ``(n, 144)`` float32 in [0, 1], the share of each 8 x 8 patch that the digit covers,
            patches in row-major order.
    """

    images: Tensor
    labels: Tensor
    ink: Tensor


class _Sources(NamedTuple):
    glyphs: Tensor  # (1797, 1, 40, 40) in [0, 1]
    labels: Tensor  # (1797,)
    photos: Tensor  # (2 * height * width, 3) in [0, 1]: rows are pixels, so a crop is one gather
    size: tuple[int, int]  # height, width of one photograph
    split: dict[str, Tensor]  # indices into glyphs


def scikit_learn() -> Any:
    """scikit-learn with its data sets imported, or an error that says what to install."""
    try:
        import sklearn.datasets
        import sklearn.model_selection
    except ImportError as error:
        raise ImportError(
            "the digits and photographs of vtr.zoo come from scikit-learn, which is not installed: "
            "pip install 'vtr[vision]' (or pip install scikit-learn pillow)"
        ) from error
    return sklearn


@lru_cache(maxsize=1)
def _sources() -> _Sources:
    sklearn = scikit_learn()
    digits = sklearn.datasets.load_digits()
    raw = torch.tensor(digits.images / 16.0, dtype=torch.float32)[:, None]
    # The border keeps strokes that touch the edge of the 8 x 8 original whole when rotated.
    glyphs = F.interpolate(
        F.pad(raw, (1, 1, 1, 1)), size=(_GLYPH, _GLYPH), mode="bicubic", align_corners=False
    ).clamp(0, 1)
    train, heldout = sklearn.model_selection.train_test_split(
        range(len(raw)), test_size=0.2, stratify=digits.target, random_state=0
    )
    photos = torch.stack(
        [torch.tensor(photo) for photo in sklearn.datasets.load_sample_images().images]
    )
    return _Sources(
        glyphs=glyphs,
        labels=torch.tensor(digits.target, dtype=torch.int64),
        photos=photos.reshape(-1, 3).float() / 255,
        size=(photos.shape[1], photos.shape[2]),
        split={"train": torch.tensor(train), "heldout": torch.tensor(heldout)},
    )


def split_indices(split: Split) -> Tensor:
    """Indices into scikit-learn's ``load_digits`` that a split draws from, ``(m,)`` int64.

    Raises:
        ValueError: ``split`` is neither ``"train"`` nor ``"heldout"``.
        ImportError: scikit-learn is not installed.
    """
    if split not in ("train", "heldout"):
        raise ValueError(f"split must be 'train' or 'heldout', got {split!r}")
    return _sources().split[split]


def digit_labels() -> Tensor:
    """Classes of all 1797 digits, ``(1797,)`` int64, in scikit-learn's order."""
    return _sources().labels


def _randint(low: Tensor | int, high: Tensor | int, n: int, generator: torch.Generator) -> Tensor:
    """``(n,)`` int64, uniform over ``low`` to ``high`` with both ends; ends may differ by row."""
    span = high - low + 1
    return (low + (torch.rand(n, generator=generator, dtype=torch.float64) * span)).long()


def backgrounds(
    n: int, generator: torch.Generator, *, brightness: float = 0.5, size: int = IMAGE
) -> Tensor:
    """Random square crops of the photographs, scaled to the picture's size, with noise.

    Args:
        n: number of pictures.
        generator: source of all randomness.
        brightness: the photograph's [0, 1] is mapped to [0, ``brightness``], which keeps the
            clutter darker than the digits.
        size: side of a picture in pixels.

    Returns:
        ``(n, 3, size, size)`` float32, not normalised; noise may leave [0, 1].
    """
    source = _sources()
    height, width = source.size
    photo = _randint(0, len(source.photos) // (height * width) - 1, n, generator)
    side = _randint(*_CROP, n, generator)
    top = _randint(0, height - side, n, generator)
    left = _randint(0, width - side, n, generator)
    steps = torch.linspace(0, 1, size)
    offset = (steps * (side[:, None] - 1)).long()  # (n, size)
    rows = (photo * height + top)[:, None] + offset
    columns = left[:, None] + offset
    pixels = (rows[:, :, None] * width + columns[:, None, :]).flatten()
    crops = source.photos.index_select(0, pixels).view(n, size, size, 3).permute(0, 3, 1, 2)
    noise = torch.randn(n, 3, size, size, generator=generator)
    return torch.add(crops * brightness, noise, alpha=_NOISE)


def digit_masks(
    index: Tensor, x: Tensor, y: Tensor, box: Tensor, angle: Tensor, *, size: int = IMAGE
) -> Tensor:
    """Opacity of digits drawn into empty pictures.

    Args:
        index: ``(n,)`` int64, which digits (indices into scikit-learn's ``load_digits``).
        x, y: ``(n,)`` float32, centre in pixels from the left and the top.
        box: ``(n,)`` float32, side of the digit's square box in pixels, its empty border (a tenth
            on every side) included.
        angle: ``(n,)`` float32, rotation in radians.
        size: side of a picture in pixels.

    Returns:
        ``(n, 1, size, size)`` float32 in [0, 1].
    """
    scale = size / box
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    centre_x, centre_y = x / size * 2 - 1, y / size * 2 - 1
    # Rows of the affine map from the picture's [-1, 1] square to the digit's.
    theta = torch.stack(
        [
            torch.stack([cos, sin, -(cos * centre_x + sin * centre_y)], 1),
            torch.stack([-sin, cos, sin * centre_x - cos * centre_y], 1),
        ],
        1,
    )
    grid = F.affine_grid(theta, [len(index), 1, size, size], align_corners=False)
    return F.grid_sample(_sources().glyphs[index], grid, align_corners=False)


def coverage(mask: Tensor) -> Tensor:
    """Share of every 8 x 8 patch covered by ``mask`` ``(n, 1, 96, 96)``: ``(n, 144)`` float32."""
    return F.avg_pool2d(mask, PATCH).flatten(1)


def normalise(pixels: Tensor) -> Tensor:
    """``(pixels - MEAN) / STD``: from [0, 1] pixels to what the built-in models read."""
    return (pixels - MEAN) / STD


def denormalise(images: Tensor) -> Tensor:
    """The inverse of :func:`normalise`, clamped to [0, 1] for showing."""
    return (images * STD + MEAN).clamp(0, 1)


def digits(
    n: int,
    generator: torch.Generator,
    split: Split = "train",
    *,
    box: tuple[float, float] = (30.0, 44.0),
) -> Digits:
    """Pictures with one digit each.

    Args:
        n: number of pictures, at least 1.
        generator: source of all randomness; the same state gives the same pictures.
        split: which handwritten digits to draw from.
        box: smallest and largest side of the digit's box in pixels.

    Raises:
        ValueError: ``n`` or ``split`` or ``box`` is out of range.
        ImportError: scikit-learn is not installed.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    if not 8 <= box[0] <= box[1] <= IMAGE:
        raise ValueError(f"box must be (low, high) with 8 <= low <= high <= {IMAGE}, got {box}")
    choices = split_indices(split)
    index = choices[_randint(0, len(choices) - 1, n, generator)]
    side, u, v, w = torch.rand(4, n, generator=generator)
    side = box[0] + (box[1] - box[0]) * side
    margin = side * HALF_EXTENT
    room = IMAGE - 2 * margin
    mask = digit_masks(index, margin + room * u, margin + room * v, side, 0.4 * (w - 0.5))
    colour = 0.75 + 0.25 * torch.rand(n, 3, 1, 1, generator=generator)
    pixels = torch.lerp(backgrounds(n, generator), colour, mask)
    return Digits(normalise(pixels), _sources().labels[index], coverage(mask))


def samples(name: str, n: int, seed: int = 0, split: str = "heldout") -> tuple[Tensor, Tensor]:
    """Inputs that a built-in model understands, with the right answers.

    Args:
        name: one of the names of :func:`vtr.zoo.models`.
        n: how many.
        seed: the same seed gives the same samples.
        split: ``"heldout"`` draws from digits that training never showed, ``"train"`` from the
            others.

    Returns:
        images ``(n, 3, 96, 96)`` float32, normalised, and labels ``(n,)`` int64. For
        ``"digits-vit"``, :func:`digits` gives the place of the digit as well.

    Raises:
        ValueError: there is no model of this name, or ``n`` or ``split`` is out of range.
        ImportError: scikit-learn is not installed.
    """
    check(name)
    if split not in ("train", "heldout"):
        raise ValueError(f"split must be 'train' or 'heldout', got {split!r}")
    batch = digits(n, torch.Generator().manual_seed(seed), split)  # type: ignore[arg-type]
    return batch.images, batch.labels
