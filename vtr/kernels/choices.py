"""The tile sizes that tuning chose, kept on disk, so that all processes on a machine use the same.

Other tiles sum in another order, so with its own choice each process could round differently.
``python -m vtr.kernels.choices`` prints the choices, and the verdicts of :mod:`vtr.kernels.hopper_verdict`; to tune or check
again, delete the file that it names.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import torch

_VERSION = 2  # of the file; a new number forgets what was chosen for other kernels
_log = logging.getLogger(__name__)

Choice = tuple[int, int, int, int, int]
Choices = dict[str, dict[str, Choice]]


def path() -> Path:
    """The file of choices: in ``$VTR_CACHE``, else in ``vtr`` in the user's cache folder."""
    root = os.environ.get("VTR_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = Path(root).expanduser() if root else Path(base).expanduser() / "vtr"
    return home / f"kernels-{_VERSION}.json"


def machine(device: torch.device) -> str:
    """The machine that choices are valid for: name of the device, versions of torch and Triton."""
    import triton  # whose distribution has other names too: pytorch-triton, triton-rocm

    name = torch.cuda.get_device_name(device)
    return f"{name}, torch {torch.__version__}, triton {triton.__version__}"


def load() -> Choices:
    """Read all choices, by machine and kind of call: rows and columns of a tile, warps, stages,
    persistent programs per multiprocessor.

    A file that cannot be read counts as empty, with a warning in the log.
    """
    file = path()
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {m: {k: _choice(c) for k, c in kinds.items()} for m, kinds in found.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        _log.warning("kernel choices in %s are ignored: %s", file, error)
        return {}


def _choice(values: Sequence[int]) -> Choice:
    m, n, warps, stages, persistent = values
    if not all(type(value) is int for value in values):
        raise ValueError(f"a choice is five integers, not {values!r}")
    return m, n, warps, stages, persistent


def find(machine: str, kind: str) -> Choice | None:
    """Return the choice for a kind of call, None if it has none."""
    return load().get(machine, {}).get(kind)


def keep(machine: str, kind: str, choice: Choice, candidates: Collection[Choice]) -> Choice:
    """Write a choice; returns the one to use, which is another process's if that came first and is
    one of the candidates."""
    with alone(path()):
        found = load()
        kinds = found.setdefault(machine, {})
        if kinds.get(kind) in candidates:
            return kinds[kind]
        kinds[kind] = choice
        write(path(), found)
    return choice


@contextlib.contextmanager
def alone(file: Path) -> Iterator[None]:
    """A context in which one process at a time reads and writes a file, if its folder can hold a lock."""
    with contextlib.ExitStack() as held:
        # Windows has no locks of this kind, nor have some file systems of clusters, nor a folder that cannot be written.
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            file.parent.mkdir(parents=True, exist_ok=True)
            lock = held.enter_context(file.with_suffix(".lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def write(file: Path, content: object) -> None:
    """Write JSON. A file that cannot be written is left alone, with a warning in the log."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # Written aside and renamed: no other process reads half a file.
        with tempfile.NamedTemporaryFile(
            "w", dir=file.parent, prefix=file.name, delete=False, encoding="utf-8"
        ) as aside:
            json.dump(content, aside, indent=1, sort_keys=True)
        os.replace(aside.name, file)
    except OSError as error:
        _log.warning("kernel choices cannot be written to %s: %s", file, error)


# ---- verdicts on kernels ----------------------------------------------------------------------


def verdict_path() -> Path:
    """The file of verdicts (:mod:`vtr.kernels.hopper_verdict`), beside the choices."""
    return path().with_name("proofs-1.json")


def verdicts() -> dict[str, dict[str, str]]:
    """Read all verdicts, by machine and version of the kernel. A file that cannot be read counts as empty,
    with a warning in the log."""
    file = verdict_path()
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {m: {k: str(v) for k, v in said.items()} for m, said in found.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError) as error:
        _log.warning("verdicts on kernels in %s are ignored: %s", file, error)
        return {}


def keep_verdict(machine: str, version: str, verdict: str) -> None:
    """Write a verdict."""
    found = verdicts()
    found.setdefault(machine, {})[version] = verdict
    write(verdict_path(), found)


def report() -> str:
    """List the file and its choices, one per line, and the same for verdicts if there are any."""
    lines = [str(path())]
    for name, kinds in sorted(load().items()):
        lines.append(name)
        for kind, (m, n, warps, stages, persistent) in sorted(kinds.items()):
            tile = f"{m} x {n}, {warps} warps, {stages} stages" if m else "the Hopper kernel"
            each = f", {persistent} persistent a multiprocessor" if persistent else ""
            lines.append(f"  {kind}: {tile}{each}")
    said = verdicts()
    lines += [str(verdict_path())] if said else []
    for name, kernels in sorted(said.items()):
        lines += [name, *(f"  {kernel}: {verdict}" for kernel, verdict in sorted(kernels.items()))]
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
