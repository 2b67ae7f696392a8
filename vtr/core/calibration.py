"""The identity of a model whose attention was calibrated, and the calibrated numbers of its methods.

A method that needs numbers measured on data (thresholds, heads, masks) gets them from :func:`vtr.calibrate`.
They are right for one model alone, so that a plan records which it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vtr.compat.diffusers import SIZES as DIFFUSION_SIZES
from vtr.compat.peft import ADAPTED
from vtr.compat.torch import kind_of
from vtr.compat.transformers import SIZES
from vtr.errors import UnsupportedModelError

Table = Mapping[str, Tensor]
"""The calibrated numbers of one method: name to tensor."""


@dataclass(frozen=True)
class Fingerprint:
    """The identity of a model: what calibrated numbers belong to.

    Attributes:
        model: name of the model's class.
        sizes: sizes in its configuration, ``{"text_config.hidden_size": 4096}``; a list for heights and widths.
        weight: name of the weight that is hashed, a matrix of the last layer of the language model.
        shape: of that weight.
        sha256: of that weight, in hexadecimal (:func:`weight_hash`); empty if the weight has no numbers,
            because it is on the meta device.
    """

    model: str
    sizes: Mapping[str, Any]
    weight: str
    shape: tuple[int, ...]
    sha256: str

    def difference(self, other: Fingerprint) -> str:
        """Say in what another model differs from this one, in words; empty if in nothing.

        Sizes that only one of the two configurations has are not compared, because releases of transformers
        add entries. A weight without numbers equals every other.
        """
        if self.model != other.model:
            return f"it is of the class {self.model}, and this model is a {other.model}"
        for name in sorted(self.sizes.keys() & other.sizes.keys()):
            if self.sizes[name] != other.sizes[name]:
                return f"its {name} is {self.sizes[name]}, and this model's is {other.sizes[name]}"
        if self.shape != other.shape:
            return f"its weight {self.weight} has the shape {self.shape}, and this model's {other.shape}"
        if self.sha256 and other.sha256 and self.sha256 != other.sha256:
            return f"its weight {self.weight} has other numbers than this model's: it is another checkpoint"
        return ""

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return {**asdict(self), "sizes": dict(self.sizes), "shape": list(self.shape)}

    @classmethod
    def from_dict(cls, data: Any) -> Fingerprint:
        """Take back what :meth:`to_dict` returned. Raises ``ValueError`` for anything else."""
        wanted = {"model": str, "sizes": Mapping, "weight": str, "shape": list, "sha256": str}
        if not isinstance(data, Mapping) or not all(
            isinstance(data.get(name), kind) for name, kind in wanted.items()
        ):
            raise ValueError(f"model must be an object with {', '.join(wanted)}, got {data!r}")
        parts = {name: data[name] for name in wanted}
        return cls(**{**parts, "sizes": dict(data["sizes"]), "shape": tuple(data["shape"])})


def fingerprint(root: nn.Module, part: nn.Module) -> Fingerprint:
    """Compute the fingerprint of a model.

    Args:
        root: the model, with a configuration of transformers or diffusers.
        part: the part of it whose first matrix is hashed. LoRA adapters leave that matrix as it was.

    Raises:
        UnsupportedModelError: ``part`` has no matrix.
    """
    name, weight = next(((n, p) for n, p in part.named_parameters() if p.dim() > 1), ("", None))
    if weight is None:
        raise UnsupportedModelError(
            f"a {type(part).__name__} has no weight by which a calibrated model could be told from others"
        )
    inside = next((n for n, m in root.named_modules() if m is part), "")
    name = ".".join(part for part in f"{inside}.{name}".split(".") if part not in ("", ADAPTED))
    return Fingerprint(
        kind_of(root).__name__, sizes(root), name, tuple(weight.shape), weight_hash(weight)
    )


def sizes(root: Any) -> dict[str, Any]:
    """The sizes in the configuration of a model, those of its parts with the part's name in front."""
    config: Any = getattr(root, "config", None)
    entries = config.to_dict() if hasattr(config, "to_dict") else config
    entries = entries if isinstance(entries, Mapping) else {}
    parts = {"": entries} | {f"{k}.": v for k, v in entries.items() if isinstance(v, dict)}
    known = SIZES | DIFFUSION_SIZES
    return {
        prefix + name: list(value) if isinstance(value, (list, tuple)) else value
        for prefix, found in parts.items()
        for name, value in found.items()
        if name in known and isinstance(value, (int, list, tuple))
    }


def weight_hash(weight: Tensor) -> str:
    """SHA-256 of a weight, the same on every device and in every floating-point dtype.

    Hashed are the signs of the numbers in row-major order, eight to a byte, the first in the highest bit (1 is
    negative). Rounding to another dtype changes no sign, and training changes thousands of them in a matrix
    of a real model. Of quantised weights, which are integers, the bytes are hashed.

    Returns:
        64 hexadecimal digits, or nothing if the weight is on the meta device.
    """
    if weight.is_meta:
        return ""
    whole = getattr(weight, "full_tensor", None)  # a part of it is here, as FSDP has it
    weight = weight.detach() if whole is None else whole().detach()
    if not weight.is_floating_point():
        return digest([weight])
    wide = weight if weight.itemsize > 1 else weight.float()  # of 8 bits, few operations exist
    return hashlib.sha256(np.packbits(torch.signbit(wide).to("cpu").numpy()).data).hexdigest()


def digest(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of the bytes of tensors, one after the other, in hexadecimal."""
    found = hashlib.sha256()
    for tensor in tensors:
        absorb(found, tensor)
    return found.hexdigest()


def absorb(found: Any, tensor: Tensor) -> None:
    """Add the bytes of a tensor on any device to a hash."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    found.update(flat.view(torch.uint8).numpy().data)
