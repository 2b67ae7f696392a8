"""The learned gates of VSA (arXiv 2505.13389), one linear layer per attention layer."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn

_GATE = "to_gate_compress"


class Gates(nn.Module):
    """The learned part of VSA: a linear layer per attention layer, zero at the start.

    Args:
        dim: channels C of the hidden states.
        width: channels of all heads together, H D.
        layers: attention layers, of all transformers of a pipeline in turn.
    """

    def __init__(self, dim: int, width: int, layers: int) -> None:
        super().__init__()
        # Named as in FastVideo's models. No random numbers are drawn.
        self.blocks = nn.ModuleList(
            nn.ModuleDict({_GATE: nn.utils.skip_init(nn.Linear, dim, width)}) for _ in range(layers)
        )
        for parameter in self.parameters():
            nn.init.zeros_(parameter)
        self._trained = False

    def layer(self, number: int) -> nn.Linear:
        """Return the linear layer of an attention layer."""
        found: nn.Linear = self.blocks[number][_GATE]  # type: ignore[index]
        return found

    def trained(self) -> bool:
        """Tell whether any gate is not zero."""
        if not self._trained:
            self._trained = any(bool(parameter.any()) for parameter in self.parameters())
        return self._trained

    @classmethod
    def from_fastvideo(cls, *states: Mapping[str, Tensor]) -> Gates:
        """Take the gates out of released models.

        Args:
            states: the state dict of each transformer of the pipeline, in order, with the tensors
                ``blocks.N.to_gate_compress.weight`` and ``.bias`` among others (prefixes and
                ``attn1.`` are allowed). A missing bias is zero.

        Raises:
            ValueError: a state dict has no gates, or lacks those of a block, or their sizes differ.
        """
        found = [gate for state in states for gate in _gates_of(state)]
        sizes = {tuple(gate["weight"].shape) for gate in found}
        if len(sizes) != 1 or any(len(size) != 2 for size in sizes):
            raise ValueError(
                f"the weights of gates are matrices of one size, found {sorted(sizes)}"
            )
        width, dim = sizes.pop()
        gates = cls(dim, width, len(found))
        for number, gate in enumerate(found):
            gates.layer(number).load_state_dict({"bias": gates.layer(number).bias, **gate})
        return gates

    def load(self, weights: str) -> None:
        """Load a safetensors file of these modules, or of one FastVideo transformer, of which the gates
        alone are read.

        Raises:
            ValueError: the file has no gates, or those of another model.
        """
        from safetensors import safe_open

        from vtr.zoo import weights_path

        with safe_open(str(weights_path(weights)), framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys() if _GATE in name}  # noqa: SIM118
        try:
            self.load_state_dict(Gates.from_fastvideo(state).state_dict())
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"{weights}: not the gates of a model of {len(self.blocks)} layers with "
                f"{self.layer(0).in_features} channels ({error})"
            ) from error


def _gates_of(state: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The gates of the blocks of one transformer, in order."""
    found: dict[int, dict[str, Tensor]] = {}
    for name, value in state.items():
        match = re.search(rf"blocks\.(\d+)\.(?:attn1\.)?{_GATE}\.(weight|bias)$", name)
        if match:
            found.setdefault(int(match[1]), {})[match[2]] = value.float()
    if (
        not found
        or sorted(found) != list(range(len(found)))
        or not all("weight" in g for g in found.values())
    ):
        raise ValueError(
            f"a state dict must have a tensor blocks.N.{_GATE}.weight for every block N from 0 on; "
            f"found those of {sorted(found) or 'none'}"
        )
    return [found[n] for n in range(len(found))]
