"""The support matrix: what works on each class of models of the installed libraries, found by running the laws.

Rows are those of vision-language models (:mod:`vtr.vision.vlm.coverage`), of encoders (:mod:`.towers`), and of
diffusion transformers and UNets (:mod:`.generators`). ``vtr models`` prints them, and ``docs/models.md`` has them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch

from vtr.testing.matrix.row import Row

KindName = Literal["vlm", "tower", "dit", "unet"]


def _vlms(names: Sequence[str] | None) -> Iterator[Row]:
    from vtr.vision.vlm.coverage import model_support

    for found in model_support(None if names is None else list(names)):
        yield Row(
            "vlm",
            "transformers",
            found.name,
            found.state,
            found.sites,
            found.methods,
            found.about,
        )


def _towers(names: Sequence[str] | None) -> Iterator[Row]:
    from vtr.testing.matrix.towers import tower_rows

    return tower_rows(names)


def _generators(kind: str) -> Callable[[Sequence[str] | None], Iterator[Row]]:
    def rows(names: Sequence[str] | None) -> Iterator[Row]:
        from vtr.testing.matrix.generators import generator_rows

        return generator_rows(kind, names)

    return rows


#: Kind -> its rows, of all classes or of those named.
KINDS_OF_ROWS: dict[str, Callable[[Sequence[str] | None], Iterator[Row]]] = {
    "vlm": _vlms,
    "tower": _towers,
    "dit": _generators("dit"),
    "unet": _generators("unet"),
}


def matrix(kind: str, names: Sequence[str] | None = None) -> Iterator[Row]:
    """Try every class of a kind on a tiny random model; up to two seconds for each.

    Args:
        kind: ``"vlm"``, ``"tower"``, ``"dit"`` or ``"unet"``.
        names: of classes; None is all that the installed libraries have.

    Raises:
        ImportError: the library of the kind is not installed (of towers, none of its three).
        ValueError: another kind.
    """
    if kind not in KINDS_OF_ROWS:
        raise ValueError(f"kind must be one of {', '.join(KINDS_OF_ROWS)}, got {kind!r}")
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield from KINDS_OF_ROWS[kind](names)


def table(rows: Sequence[Row]) -> str:
    """Write rows of one kind as a table of ``docs/models.md``: those that work first."""
    order = ("works", "partly", "refused")
    lines = [
        "| library | class | state | sites | methods | what is closed, or why |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for r in sorted(rows, key=lambda row: order.index(row.state)):
        about = " ".join(r.about.split()).replace("|", "\\|")
        cells: Sequence[Any] = (
            r.library, f"`{r.name}`", r.state, ", ".join(r.sites), r.methods or "", about,
        )  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


__all__ = ["KINDS_OF_ROWS", "KindName", "Row", "matrix", "table"]
