"""Prompts taken apart into samples, and put together with completions and padding anywhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from vtr.testing.models.vlms import IMAGE, VIDEO, Inputs

TEXT = ("input_ids", "attention_mask", "mm_token_type_ids")


def split(inputs: Inputs) -> list[Inputs]:
    """Every sample on its own, without padding."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    out: list[Inputs] = [
        {k: inputs[k][b : b + 1, mask[b]] for k in TEXT if k in inputs} for b in range(len(ids))
    ]
    if (
        "pixel_values" in inputs
        and inputs["pixel_values"].dim() == 5
        and "image_sizes" not in inputs
    ):
        for b, row in enumerate(out):  # Idefics3: tiles by sample
            row["pixel_values"] = inputs["pixel_values"][b : b + 1]
        return out
    for kind, token, names in (
        ("image", IMAGE, ("pixel_values", "pixel_values_images", "image_sizes")),
        ("video", VIDEO, ("pixel_values_videos", "second_per_grid_ts")),
    ):
        here = [int((row["input_ids"] == token).sum()) for row in out]
        grids, merges = f"{kind}_grid_thw", f"{kind}_merge_sizes"
        patches: list[int] | None = None
        if grids in inputs:
            patches = inputs[grids].prod(1).tolist()
            merge = inputs.get(merges, torch.full((len(patches),), 2)).tolist()
            tokens = [n // m**2 for n, m in zip(patches, merge, strict=True)]
            names = (*names[1:], grids, merges)
        elif any(here):
            pixels = next(inputs[name] for name in names if name in inputs)
            anyres = kind == "image" and "image_sizes" in inputs  # one for every sample
            tokens = [n for n in here if n] if anyres else [sum(here) // len(pixels)] * len(pixels)
        at = first = 0
        for row, n in zip(out, here, strict=True):
            end = at
            while n:
                n, end = n - tokens[end], end + 1
            if end > at:
                row |= {name: inputs[name][at:end] for name in names if name in inputs}
                if patches is not None:
                    name = "pixel_values" if kind == "image" else "pixel_values_videos"
                    last = first + sum(patches[at:end])
                    row[name], first = inputs[name][first:last], last
            at = end
    return out


def with_completion(row: Inputs, completion: Tensor) -> Inputs:
    """A sample with tokens behind its prompt."""
    more = {
        "input_ids": completion,
        "attention_mask": torch.ones_like(completion),
        "mm_token_type_ids": torch.zeros_like(completion),
    }
    return {k: torch.cat([v, more[k][None].to(v)], 1) if k in TEXT else v for k, v in row.items()}


def padded(rows: list[Inputs], left: list[int], width: int) -> Inputs:
    """One batch of ``width`` columns, with so much padding before each row."""
    out: dict[str, Any] = {}
    for name in dict.fromkeys(key for row in rows for key in row):
        found = [row[name] for row in rows if name in row]
        if name in TEXT:
            found = [pad(x, (n, width - n - x.shape[1])) for x, n in zip(found, left, strict=True)]
        out[name] = torch.cat(found)
    return out
