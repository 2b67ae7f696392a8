"""The two forms of a plan's file: JSON with small tables inside, and safetensors with the rest as metadata."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vtr.core.calibration import Table, digest

ENDING = ".safetensors"
KEY = "vtr_plan"
"""Name of the metadata of a safetensors file that has the plan without its tables, as JSON."""

LIMIT = 100_000
"""Numbers of the tables that a JSON file takes at most, about a megabyte."""

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}


def tables_hash(tables: Sequence[Table]) -> str:
    """Compute one SHA-256 of tables: names, dtypes, shapes and numbers, in hexadecimal."""
    described = [
        [[name, t.dtype, t.shape, digest([t])] for name, t in sorted(table.items())]
        for table in tables
    ]
    return hashlib.sha256(repr(described).encode()).hexdigest()


# ---- JSON ---------------------------------------------------------------------------------------


def listed(table: Table) -> dict[str, Any]:
    """Return a table as plain JSON values: dtype, shape and numbers, those that are not finite as words."""
    return {
        name: {
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            "numbers": [_plain(x) for x in tensor.reshape(-1).tolist()],
        }
        for name, tensor in table.items()
    }


def _plain(number: float) -> float | str:
    return number if math.isfinite(number) else str(number)


def tensors(table: Any) -> dict[str, Tensor]:
    """Take back what :func:`listed` returned. Raises ``ValueError`` for anything else."""
    if not isinstance(table, Mapping):
        raise ValueError(f"a table must be an object, got {table!r}")
    return {name: _tensor(name, entry) for name, entry in table.items()}


def _tensor(name: str, entry: Any) -> Tensor:
    try:
        dtype = DTYPES[entry["dtype"]]
        # Python's numbers: bfloat16 and float32 are exact in them, and come back as they were.
        numbers = [float(x) if isinstance(x, str) else x for x in entry["numbers"]]
        return torch.tensor(numbers, dtype=dtype, device="cpu").reshape(entry["shape"])
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(
            f"the entry {name!r} of a table needs dtype ({', '.join(DTYPES)}), shape and as many numbers: "
            f"{type(error).__name__}: {error}"
        ) from error


def write_json(path: str | Path, plain: Callable[[], Any], tables: Sequence[Table]) -> None:
    """Write a plan with its tables as JSON."""
    count = sum(tensor.numel() for table in tables for tensor in table.values())
    if count > LIMIT:
        raise ValueError(
            f"{path}: the tables have {count} numbers, and a JSON file takes {LIMIT}: name the file "
            f"{Path(path).stem}{ENDING}"
        )
    text = json.dumps(plain(), indent=None if count else 2)
    Path(path).write_text(text + "\n", encoding="utf-8")


def read_json(path: str | Path) -> dict[str, Any]:
    """Read what :func:`write_json` wrote."""
    return _object(Path(path).read_text(encoding="utf-8"))


def _object(text: str) -> dict[str, Any]:
    data = json.loads(text)
    if not isinstance(data, dict):
        raise ValueError("the file holds no JSON object")
    return data


# ---- safetensors --------------------------------------------------------------------------------


def write_tensors(path: str | Path, plain: Mapping[str, Any], tables: Sequence[Table]) -> None:
    """Write a plan as safetensors: entry ``e`` of the table of method ``n`` is the tensor ``n.e``."""
    from safetensors.torch import save_file

    named = {f"{n}.{name}": t for n, table in enumerate(tables) for name, t in table.items()}
    save_file(named, path, {KEY: json.dumps(plain)})


def read_tensors(path: str | Path) -> tuple[dict[str, Any], list[dict[str, Tensor]]]:
    """Read what :func:`write_tensors` wrote: the plan without its tables, and one table per method."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(KEY)
            named = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"no safetensors file ({error})") from error
    if text is None:
        raise ValueError(f"a safetensors file without {KEY!r} in its metadata is no plan")
    plain = _object(text)
    methods = plain.get("methods")
    tables: list[dict[str, Tensor]] = [{} for _ in methods] if isinstance(methods, list) else []
    for key, tensor in named.items():
        number, _, name = key.partition(".")
        if not number.isdecimal() or int(number) >= len(tables):
            raise ValueError(f"the tensor {key!r} belongs to no method of the plan")
        tables[int(number)][name] = tensor
    return plain, tables if named else []
