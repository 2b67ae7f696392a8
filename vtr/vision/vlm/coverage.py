"""The support matrix: what works on each vision-language model of the installed transformers, and why not."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch

from vtr.compat.transformers import answering_classes, quiet
from vtr.compat.twins import OWN
from vtr.core.registry import registry
from vtr.errors import UnsupportedMethodError, UnsupportedModelError
from vtr.vision.vlm.families import REFUSED, family_of, inner_of
from vtr.vision.vlm.generic import is_vlm, lacking
from vtr.vision.vlm.proof import proof_of
from vtr.vision.vlm.twin import twin
from vtr.vision.vlm.wrapping import VLMWrapping

State = Literal["works", "partly", "refused"]
#: Sites of a vision-language model, and what each of them is for.
SITES = ("image", "pixels", "encoder", "prompt", "decoder", "attention", "kv", "logits")


class ModelSupport(NamedTuple):
    """One class of transformers that answers questions about images.

    Attributes:
        name: of the class.
        state: ``"works"``: cuts at the prompt and in the decoder give what they must, and methods read the
            attention of its layers; ``"partly"``: cuts do, and something else is closed; ``"refused"``.
        title: of its family, empty if it is refused.
        sites: those where methods work.
        methods: how many of the registered methods do.
        about: what is closed, or why the class is refused.
    """

    name: str
    state: State
    title: str = ""
    sites: tuple[str, ...] = ()
    methods: int = 0
    about: str = ""


def model_support(names: list[str] | None = None) -> Iterator[ModelSupport]:
    """Try every class on a tiny twin; about a second for each.

    Args:
        names: of classes; None is all that the installed transformers has.

    Raises:
        ImportError: transformers is not installed.
    """
    for cls in answering_classes():
        if names is None or cls.__name__ in names:
            with warnings.catch_warnings(), quiet():
                warnings.simplefilter("ignore")
                yield _support(cls)


def tiny(cls: Any) -> Any:
    """Build the twin of a class from its default configuration, completed if that is not that of a whole model."""
    config = cls.config_class(**OWN.get(cls.__name__, {}))
    return twin(cls, config)


def _support(cls: Any) -> ModelSupport:
    name = cls.__name__
    try:
        model = tiny(cls)
    except Exception as error:  # any error of a default configuration
        return ModelSupport(
            name, "refused", about=f"no tiny model of it can be built: {_short(error)}"
        )
    inner = inner_of(model)
    if inner is None:
        return ModelSupport(
            name, "refused", about="it holds no language model that is given embeddings"
        )
    try:
        family = family_of(inner, model)
    except UnsupportedModelError as error:
        known = type(inner).__name__ in REFUSED
        reason = "" if known else lacking(inner) or proof_of(model, inner).refused
        return ModelSupport(
            name, "refused", about=reason or REFUSED.get(type(inner).__name__, _short(error))
        )
    if family is None:
        lacks = "placeholder for visual tokens" if not is_vlm(inner) else "known structure"
        return ModelSupport(name, "refused", about=f"its prompt has no {lacks}")
    proof = proof_of(model, inner)
    if proof.refused:
        return ModelSupport(name, "refused", family.title, about=proof.refused)
    owner = VLMWrapping(model, inner, family)
    sites, methods = _methods(owner)
    closed = _closed(owner)
    state: State = "partly" if closed else "works"
    return ModelSupport(name, state, family.title, sites, methods, "; ".join(closed))


def _methods(owner: VLMWrapping) -> tuple[tuple[str, ...], int]:
    """The sites at which registered methods work, and how many do."""
    sites: set[str] = set()
    number = 0
    for cls in registry().values():
        try:
            method = cls()
            owner.check(method, dict(owner.options))
        except (UnsupportedMethodError, ValueError, TypeError):
            continue
        number += 1
        sites |= {stage.site for stage in method.stages(owner.info)}
    return tuple(site for site in SITES if site in sites), number


def _closed(owner: VLMWrapping) -> list[str]:
    """Say what does not work in the language model, though cuts do."""
    out = []
    if owner.closed:
        out.append(f"no attention is read ({owner.closed})")
    by_reason: dict[str, list[str]] = {}
    for site in ("attention", "kv", "logits"):
        reason = owner.info.closed.get(site, "")
        if not reason and site == "kv" and owner.sliding:
            reason = "caches of layers with sliding windows hold their window alone"
        if reason:
            by_reason.setdefault(reason, []).append(site)
    out += [f"no methods at {', '.join(sites)} ({reason})" for reason, sites in by_reason.items()]
    return out


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:240]


def markdown() -> str:
    """Write the matrix as a table for ``docs/models.md``: working classes first."""
    order: tuple[State, ...] = ("works", "partly", "refused")
    with torch.random.fork_rng(devices=[]):
        rows = sorted(model_support(), key=lambda row: order.index(row.state))
    lines = [
        "| class of transformers | state | sites | methods | what is closed, or why |",
        "| --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        about = " ".join(r.about.split()).replace("|", "\\|")
        lines.append(
            f"| `{r.name}` | {r.state} | {', '.join(r.sites)} | {r.methods or ''} | {about} |"
        )
    return "\n".join(lines)
