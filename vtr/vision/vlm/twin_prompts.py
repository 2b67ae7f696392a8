"""Prompts with pictures for tiny twins: what a model of an unknown class must be given is found by trying.

Classes differ in how they are given pictures: whole or cut into patches, with or without their sizes. The names of the
arguments of ``get_image_features`` say which forms are possible; the first one that gives features is taken.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vtr.compat.twins import PATCH, SIDE, STRIDE, VOCABULARY
from vtr.errors import UnsupportedModelError
from vtr.vision.vlm.features import visual_features
from vtr.vision.vlm.placeholders import visual_ids
from vtr.vision.vlm.twin import SMALL_IDS

Inputs = dict[str, Any]
#: Rows and columns of the pictures, in patches; those of a class that takes one size alone are all square.
GRIDS = ((SIDE, SIDE), (SIDE // 2, SIDE), (SIDE, SIDE // 2))
#: Names of the number of frames that a patch has.
FRAMES = ("temporal_patch_size", "patch_temporal")
#: Names of ids that open and close a picture.
AROUND = (
    ("vision_start_token_id", "vision_end_token_id"),
    ("image_start_token_id", "image_end_token_id"),
)
#: Argument with the patches that each visual token is pooled from, by their numbers.
POOLS = "image_token_pooling"


class Album(NamedTuple):
    """Pictures as a class takes them.

    Attributes:
        given: the arguments of each picture alone; along their first dimension they are put together.
        counts: visual tokens of each.
    """

    given: list[Inputs]
    counts: list[int]


def pictures(inner: Any) -> Album:
    """Find the form in which a model takes pictures.

    Raises:
        UnsupportedModelError: no known form gives features.
    """
    names = list(inspect.signature(inner.get_image_features).parameters)
    failed = ""
    for form in _FORMS:
        given = form(inner, names)
        if given is None:
            continue
        try:
            counts = [_tokens(inner, one) for one in given]
            together = _tokens(inner, joined(given))
        except Exception as error:  # another form may be right
            failed = failed or f"{type(error).__name__}: {error}"
            continue
        if together == sum(counts) and min(counts) > 1:
            return Album(given, counts)
        failed = failed or f"pictures of {counts} visual tokens have {together} together"
    raise UnsupportedModelError(
        f"{type(inner).__name__} takes pictures in no form that is known here ({failed})"
    )


def prompt(model: Any, inner: Any, found: Album, samples: tuple[tuple[int, ...], ...]) -> Inputs:
    """Build a batch of prompts, padded on the left.

    Args:
        samples: the pictures of each sample, by their numbers.
    """
    config = inner.config
    ids = [i for i, kind in visual_ids(config).items() if kind == 1]
    if len(ids) != 1:
        raise UnsupportedModelError(
            f"the configuration of {type(inner).__name__} names {len(ids)} placeholders of images, 1 expected"
        )
    around = [(getattr(config, a, None), getattr(config, b, None)) for a, b in AROUND]
    opening, closing = next((pair for pair in around if None not in pair), (None, None))
    generator = torch.Generator().manual_seed(1)
    rows = []
    for b, images in enumerate(samples):
        row = words(3 + b, generator)
        for i in images:
            row += [] if opening is None else [opening]
            row += [ids[0]] * found.counts[i]
            row += ([] if closing is None else [closing]) + words(2 + b, generator)
        rows.append(row)
    width = max(map(len, rows))
    tokens = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    out: Inputs = {"input_ids": tokens, "attention_mask": mask}
    taken = {
        *inspect.signature(type(inner).forward).parameters,
        *inspect.signature(type(model).forward).parameters,
    }
    for name in ("mm_token_type_ids", "token_type_ids", "moe_mm_token_type_ids"):
        if name in taken:
            out[name] = (tokens == ids[0]).int()
    return out | joined([found.given[i] for images in samples for i in images])


def words(number: int, generator: torch.Generator) -> list[int]:
    """Random ids of text."""
    found: list[int] = torch.randint(
        SMALL_IDS, VOCABULARY - 120, (number,), generator=generator
    ).tolist()
    return found


def joined(given: list[Inputs]) -> Inputs:
    """Put pictures together; pools of patches count those of all pictures."""
    out = {name: torch.cat([one[name] for one in given]) for name in given[0]}
    if POOLS in out:
        starts, pools = 0, []
        for one in given:
            pools.append(torch.where(one[POOLS] < 0, -1, one[POOLS] + starts))
            starts += one["pixel_values"].shape[:2].numel()
        out[POOLS] = torch.cat(pools)
    return out


def _tokens(inner: Any, given: Inputs) -> int:
    with torch.no_grad():
        out = inner.get_image_features(**given, return_dict=True)
    found = visual_features(out)
    if found is None:
        raise ValueError("get_image_features returns no features of pictures")
    return sum(x.shape[:-1].numel() for x in found)


# ---- forms ------------------------------------------------------------------------------------


def _noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _vision(inner: Any) -> Any:
    return getattr(inner.config, "vision_config", None) or inner.config


def _pair(size: Any) -> tuple[int, int]:
    return (size[0], size[1]) if isinstance(size, (list, tuple)) else (size, size)


def _patched(inner: Any, names: list[str], flat: bool) -> list[Inputs] | None:
    """Patches of all pictures behind one another, with the grids of the pictures."""
    grid = next((n for n in names if n in ("image_grid_thw", "image_grid_hw", "target_sizes")), "")
    if not grid:
        return None
    vision = _vision(inner)
    side = _pair(getattr(vision, "patch_size", PATCH))
    channels = getattr(vision, "in_channels", None) or getattr(vision, "num_channels", None) or 3
    frames = next(filter(None, (getattr(vision, n, None) for n in FRAMES)), 1)
    made = []
    for seed, (rows, columns) in enumerate(GRIDS):
        shape = (channels * frames * side[0] * side[1],) if flat else (channels, *side)
        size = [1, rows, columns] if grid.endswith("thw") else [rows, columns]
        one = {
            "pixel_values": _noise(rows * columns, *shape, seed=seed),
            grid: torch.tensor([size]),
        }
        if "image_merge_sizes" in names:
            one["image_merge_sizes"] = torch.tensor([2])
        made.append(one)
    return made


def _packed(inner: Any, names: list[str]) -> list[Inputs] | None:
    return _patched(inner, names, True)


def _packed_in_squares(inner: Any, names: list[str]) -> list[Inputs] | None:
    return _patched(inner, names, False)


def _whole(inner: Any, names: list[str]) -> list[Inputs]:
    """Pictures of the size of the configuration."""
    height, width = _pair(getattr(_vision(inner), "image_size", None) or PATCH * SIDE)
    return [{"pixel_values": _noise(1, 3, height, width, seed=i)} for i in range(3)]


def _large(inner: Any, names: list[str]) -> list[Inputs]:
    """Pictures of which a tower of convolutions makes a map of a few features."""
    side = PATCH * STRIDE
    return [{"pixel_values": _noise(1, 3, side, side, seed=i)} for i in range(3)]


def _twice(inner: Any, names: list[str]) -> list[Inputs] | None:
    """Pictures for a tower of low and one of high resolution."""
    if "high_res_pixel_values" not in names:
        return None
    high = _pair(inner.config.high_res_vision_config.image_size)
    return [
        {**one, "high_res_pixel_values": _noise(1, 3, *high, seed=i + 3)}
        for i, one in enumerate(_whole(inner, names))
    ]


def _pooled(inner: Any, names: list[str]) -> list[Inputs] | None:
    """Patches of a picture, with the patches of each visual token and the sizes of two grids (Molmo 2)."""
    if POOLS not in names:
        return None
    made = []
    for seed, (rows, columns) in enumerate(GRIDS):
        patch = _vision(inner).patch_size
        places = torch.arange(SIDE * SIDE).reshape(SIDE, SIDE)[:rows, :columns]
        pools = places.unfold(0, 2, 2).unfold(1, 2, 2).reshape(-1, 4)
        made.append(
            {
                "pixel_values": _noise(1, SIDE * SIDE, 3 * patch**2, seed=seed),
                POOLS: pools,
                "image_grids": torch.tensor([[0, 0, rows // 2, columns // 2]]),
            }
        )
    return made


def _placed(inner: Any, names: list[str]) -> list[Inputs] | None:
    """Patches of each picture padded to the longest, with their places in it (Gemma 4)."""
    if "image_position_ids" not in names:
        return None
    vision, made = _vision(inner), []
    pool = 1 if hasattr(vision, "model_patch_size") else vision.pooling_kernel_size
    for seed, (rows, columns) in enumerate(((4, 4), (2, 4), (4, 2))):
        rows, columns = rows * pool, columns * pool
        ids = torch.full((1, 16 * pool * pool, 2), -1)
        y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        ids[0, : rows * columns] = torch.stack([x, y], -1).reshape(-1, 2)
        side = getattr(vision, "model_patch_size", vision.patch_size)
        pixels = torch.zeros(1, ids.shape[1], 3 * side**2)
        pixels[:, : rows * columns] = _noise(rows * columns, pixels.shape[2], seed=seed)
        made.append({"pixel_values": pixels, "image_position_ids": ids})
    return made


def _sized(inner: Any, names: list[str]) -> list[Inputs] | None:
    """Pictures padded to one size, with their own sizes."""
    if "image_sizes" not in names:
        return None
    made = []
    for seed, (rows, columns) in enumerate(GRIDS):
        side = _pair(getattr(_vision(inner), "patch_size", PATCH))
        height, width = rows * side[0], columns * side[1]
        pixels = torch.zeros(1, 3, SIDE * side[0], SIDE * side[1])
        pixels[..., :height, :width] = _noise(1, 3, height, width, seed=seed)
        made.append({"pixel_values": pixels, "image_sizes": torch.tensor([[height, width]])})
    return made


def _tiled(inner: Any, names: list[str]) -> list[Inputs]:
    """Pictures in tiles: one, or the whole picture and its halves with the size."""
    side, sizes = PATCH * SIDE, "image_sizes" in names
    size = {"image_sizes": torch.tensor([[side, 2 * side]])} if sizes else {}
    tiles = 3 if sizes else 1
    return [{"pixel_values": _noise(1, tiles, 3, side, side, seed=i), **size} for i in range(3)]


def _marked(inner: Any, names: list[str]) -> list[Inputs] | None:
    """Pictures in tiles, with a mask of real tiles (Granite Docling)."""
    if "pixel_attention_mask" not in names:
        return None
    given = _tiled(inner, names)
    real = [torch.ones(one["pixel_values"].shape[:2], dtype=torch.bool) for one in given]
    return [{**one, "pixel_attention_mask": r} for one, r in zip(given, real, strict=True)]


def _shaped(inner: Any, names: list[str]) -> list[Inputs] | None:
    """Patches of each picture padded to the longest, with a mask and their grids (SigLIP 2)."""
    if "spatial_shapes" not in names:
        return None
    vision, made = _vision(inner), []
    length = 3 * vision.patch_size**2
    for seed, (rows, columns) in enumerate(GRIDS):
        mask = torch.zeros(1, SIDE * SIDE, dtype=torch.long)
        mask[:, : rows * columns] = 1
        made.append(
            {
                "pixel_values": _noise(1, SIDE * SIDE, length, seed=seed) * mask[..., None],
                "pixel_attention_mask": mask,
                "spatial_shapes": torch.tensor([[rows, columns]]),
            }
        )
    return made


_FORMS: tuple[Callable[[Any, list[str]], list[Inputs] | None], ...] = (
    _shaped,
    _pooled,
    _placed,
    _twice,
    _packed,
    _packed_in_squares,
    _whole,
    _large,
    _sized,
    _tiled,
    _marked,
)


def forms() -> Iterator[str]:
    """List the names of the forms."""
    yield from (form.__name__.strip("_") for form in _FORMS)
