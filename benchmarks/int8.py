"""The error of attention with queries and keys of 8 bits (``quantize="int8"``) against exact attention.

    python benchmarks/int8.py [FILE.csv]

Random queries, keys and values in float32, 1,024 tokens, 4 heads of 128 channels, blocks of 128 x 64, a
quarter of them live. Keys with an offset have channels whose mean is far from 0, which smoothing takes away; keys
with wide channels have channels of a larger standard deviation, which it cannot. A minute on one core.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import torch
from torch import Tensor

from vtr.kernels import block_sparse_attention, masks
from vtr.kernels.int8_reference import int8_attention_reference

TOKENS, HEADS, DIM, BLOCK = 1024, 4, 128, (128, 64)
# How many channels of the keys have an offset of how many standard deviations, or are how many times as wide.
KEYS = {
    "Gaussian": (0, 0.0, 1.0),
    "4 channels with an offset of 5": (4, 5.0, 1.0),
    "4 channels with an offset of 20": (4, 20.0, 1.0),
    "16 channels with an offset of 20": (16, 20.0, 1.0),
    "4 channels 5 times as wide": (4, 0.0, 5.0),
    "4 channels 20 times as wide": (4, 0.0, 20.0),
}


def draw(name: str) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, TOKENS, DIM, generator=generator) for _ in range(3))
    channels, offset, width = KEYS[name]
    k[..., :channels] = k[..., :channels] * width + offset
    return q, k, v


def main() -> None:
    mask = masks.random(TOKENS, 0.25, block=BLOCK)
    lines = []
    for name in KEYS:
        q, k, v = draw(name)
        exact, exact_lse = block_sparse_attention(
            q, k, v, mask, return_lse=True, backend="reference"
        )
        low = block_sparse_attention(
            *(t.bfloat16() for t in (q, k, v)), mask, backend="reference"
        ).float()
        line: dict[str, object] = {"keys": name, "bfloat16": relative(low, exact)}
        for smooth in (True, False):
            out, lse = int8_attention_reference(q, k, v, mask, smooth=smooth)
            suffix = "" if smooth else " without smoothing"
            line[f"int8{suffix}"] = relative(out, exact)
            cosine = torch.cosine_similarity(out.flatten(), exact.flatten(), dim=0)
            line[f"cosine{suffix}"] = float(cosine)
            line[f"lse{suffix}"] = float((lse - exact_lse).abs().max())
        lines.append(line)
        print(
            "| " + " | ".join(x if isinstance(x, str) else f"{x:.4f}" for x in line.values()) + " |"
        )
    if len(sys.argv) > 1:
        with Path(sys.argv[1]).open("w", newline="") as file:
            writer = csv.DictWriter(file, list(lines[0]))
            writer.writeheader()
            writer.writerows(lines)


def relative(found: Tensor, exact: Tensor) -> float:
    """The norm of the difference over that of the exact output."""
    return float((found - exact).norm() / exact.norm())


if __name__ == "__main__":
    main()
