"""Rows of the support matrix: the diffusion transformers and UNets of the installed diffusers.

A class that is wrapped is tried on its tiny models (:mod:`vtr.testing.models`): a full mask is dense attention, a
sparse one equals torch's attention under that mask (:mod:`vtr.testing.masked`), a dense run and the model after
``remove()`` are the bare model bit for bit. UNets, whose tokens are merged: merging nothing is the bare model bit
for bit, and a sample gets alone what it gets in a batch.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import vtr
from vtr.compat.diffusers import transformer_classes
from vtr.core.method import Method
from vtr.core.registry import registry
from vtr.diffusion.families import family_of
from vtr.testing.kinds import Diffusion, predicted
from vtr.testing.masked import FixedMask, eager
from vtr.testing.matrix.row import Row, State, broken, refusal, working
from vtr.testing.models.diffusion import CASES, Case
from vtr.testing.models.diffusion_more import MORE
from vtr.testing.models.unets import UNETS
from vtr.testing.trial import close, equal, require

TOLERANCE = 2e-6


def generator_rows(kind: str, names: Sequence[str] | None = None) -> Iterator[Row]:
    """Try the classes of diffusers of a kind, ``"dit"`` or ``"unet"``.

    Raises:
        ImportError: diffusers is not installed.
    """
    for name in transformer_classes():
        unet = "UNet" in name or name == "MotionAdapter"
        if (kind == "unet") == unet and (names is None or name in names):
            yield _row(kind, name)


@functools.cache
def cases() -> dict[str, dict[str, Case]]:
    """The tiny models of each class."""
    found: dict[str, dict[str, Case]] = {}
    for name, case in {**CASES, **MORE, **UNETS}.items():
        with torch.device("meta"):
            made = type(case.make()).__name__
        found.setdefault(made, {})[name] = case
    return found


def _row(kind: str, name: str) -> Row:
    import diffusers

    cls: Any = getattr(diffusers, name)
    tiny = cases().get(name, {})
    if not tiny:
        bare = cls.__new__(cls)  # a refusal goes by the class
        torch.nn.Module.__init__(bare)
        return Row(kind, "diffusers", name, "refused", about=refusal(bare))
    sites: dict[str, None] = {}
    methods: set[str] = set()
    faults, closed = [], []
    for case_name, case in tiny.items():
        model = case.build()
        closed.append(_closed(model))
        found = working(model)
        sites.update(dict.fromkeys(found[0]))
        methods.update(found[1])
        faults.append(broken(_laws(model, case, case_name)))
    fault = "; ".join(filter(None, dict.fromkeys(faults)))
    if fault:
        return Row(kind, "diffusers", name, "refused", about=fault)
    state: State = "partly" if closed[0] else "works"
    return Row(kind, "diffusers", name, state, tuple(sites), len(methods), closed[0])


def _laws(model: Any, case: Case, name: str) -> dict[str, Any]:
    family = family_of(model)
    given = case.call()
    dense = predicted(model(**given))

    def run() -> Tensor:
        return predicted(model(**given))

    def off() -> None:
        keys = list(model.state_dict())
        handle = vtr.apply(model, first)
        try:
            changed = run()
        finally:
            handle.remove()
        require(not torch.equal(changed, dense), "the method changes nothing")
        equal(run(), dense, "the model after remove")
        require(list(model.state_dict()) == keys, "keys of state_dict changed")

    def full() -> None:
        with vtr.apply(model, FixedMask(density=2.0)):
            close(run(), dense, TOLERANCE, "a full mask")

    def sparse() -> None:
        with eager(model, case.attention, 0.4, case):
            want = run()
        with vtr.apply(model, FixedMask()):
            close(run(), want, TOLERANCE, "a sparse mask")

    def nothing_merged() -> None:
        for method in merging(0.0):
            with vtr.apply(model, method):
                equal(run(), dense, f"{method}")

    def alone() -> None:
        kind = Diffusion(name, "diffusers", case=name)
        for method in merging(0.5):
            with vtr.apply(model, method):
                whole = predicted(model(**kind.whole))
                for row, sample in enumerate(kind.samples):
                    close(predicted(model(**sample)), whole[row : row + 1], 3e-5, f"{method}")

    first: Method = FixedMask()
    if family is not None and family.unet:
        first = merging(0.5)[0]
        return {
            "nothing merged is the model": nothing_merged,
            "a sample alone equals the sample in a batch": alone,
            "off is bit-identical": off,
        }
    return {
        "a full mask is dense attention": full,
        "a sparse mask is attention under that mask": sparse,
        "off is bit-identical": off,
    }


MERGING = ("tomesd", "sito", "toma", "optiprune")


def merging(ratio: float) -> list[Method]:
    """The methods that merge tokens, at every resolution of a UNet."""
    return [registry()[name](ratio, max_downsample=8) for name in MERGING]  # type: ignore[call-arg]


def _closed(model: Any) -> str:
    """Say what is closed on a wrapped model: methods for generators that it refuses for more than a missing signal."""
    reasons: dict[str, list[str]] = {}
    for row in vtr.supported(model):
        method = registry()[row.name]
        others = {"prompt", "patches"} & {need for needs in method.needs.values() for need in needs}
        if row.supported or others or not {"attention", "block"} & set(method.sites):
            continue
        if "does not show" not in row.reason:
            reasons.setdefault(row.reason.removeprefix(f"{row.name} "), []).append(row.name)
    return "; ".join(f"{', '.join(names)}: {reason}" for reason, names in reasons.items())
