"""Graphs of wrapped encoders: what ``torch.export``, ``torch.jit`` and ``torch.fx`` cannot hold is refused."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vtr.compat.torch import graph_maker, is_symbolic
from vtr.core.wrapping import Entry
from vtr.errors import UnsupportedMethodError, UnsupportedModelError


def refuse_symbolic(x: Any) -> None:
    """Raise ``UnsupportedModelError`` for the symbol that ``torch.fx`` passes in place of a tensor."""
    if is_symbolic(x):
        raise UnsupportedModelError(
            "torch.fx cannot trace a wrapped encoder, whose methods choose tokens by values (symbolic_trace, "
            "and the feature extraction of timm and torchvision that is built on it): trace the model without "
            "a method, make the graph with torch.export, or take features by forward_intermediates, "
            "output_hidden_states or forward hooks"
        )


def check_graph(entries: Iterable[Entry]) -> None:
    """Raise ``UnsupportedMethodError`` if a graph is traced that would be wrong for other images."""
    maker = graph_maker()
    for entry in entries if maker else ():
        if getattr(entry.method, "data_dependent", False):
            raise UnsupportedMethodError(
                f"{entry.method} leaves a number of tokens that depends on the image, which a graph of {maker} "
                "cannot hold: use a method with a fixed budget (EViT, ToMe, CLSAttention, Random, ToFe), or "
                "torch.compile, which may leave the graph"
            )
        modules = entry.modules if maker == "torch.jit.trace" else None
        if modules is not None and any(p.requires_grad for p in modules.parameters()):
            raise UnsupportedMethodError(
                f"the modules of {entry.method} are constants in a graph of {maker}, which may not require "
                "gradients: call handle.modules.requires_grad_(False) before"
            )
