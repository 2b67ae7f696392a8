"""The learned gates of VSA (arXiv 2505.13389) out of released models."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn

from vtr.methods.common.learned import LayerModules

_NAME = re.compile(r"blocks\.(\d+)\.(?:attn1\.)?to_gate_compress\.(weight|bias)$")


def fastvideo_gates(
    state: Mapping[str, Tensor], dense_layers: int | tuple[int, ...]
) -> LayerModules:
    """Return the gates of the blocks of a transformer of FastVideo, but of those that stay dense.

    Args:
        state: its state dict (:meth:`vtr.methods.VSA.from_fastvideo`).
        dense_layers: the first n blocks, or these.

    Raises:
        ValueError: blocks have no gates, or gates of other sizes than the rest.
    """
    found: dict[int, dict[str, Tensor]] = {}
    for name, value in state.items():
        match = _NAME.search(name)
        if match:
            found.setdefault(int(match[1]), {})[match[2]] = value.float()
    dense = range(dense_layers) if isinstance(dense_layers, int) else dense_layers
    wanted = [number for number in range(max(found, default=-1) + 1) if number not in dense]
    if not wanted or any("weight" not in found.get(number, {}) for number in wanted):
        raise ValueError(
            "a state dict must have a tensor blocks.N.to_gate_compress.weight for every block N from 0 "
            f"on that is not in dense_layers={dense_layers}; found those of {sorted(found) or 'none'}"
        )
    sizes = {tuple(found[number]["weight"].shape) for number in wanted}
    if len(sizes) != 1 or len(size := sizes.pop()) != 2:
        raise ValueError("the weights of gates must be matrices of one size")
    return LayerModules({number: _gate(size, found[number]) for number in wanted})


def _gate(size: tuple[int, ...], tensors: Mapping[str, Tensor]) -> nn.Module:
    gate = nn.utils.skip_init(nn.Linear, size[1], size[0])
    nn.init.zeros_(gate.bias)
    gate.load_state_dict(tensors, strict="bias" in tensors)
    return gate
