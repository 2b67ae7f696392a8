"""Run methods at the site ``windows``: in the blocks of one windowed encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vtr.compat.torch import in_backward
from vtr.core.method import Merging, Reduction
from vtr.core.site import ModelInfo
from vtr.core.trace import StageRecord, Trace
from vtr.core.window_site import WindowGrid, WindowSite
from vtr.core.wrapping import Bound, Entry, PerThread, Wrapping
from vtr.errors import UnsupportedMethodError
from vtr.vision.encoders.blocks import place_forward
from vtr.vision.encoders.graphs import check_graph, refuse_symbolic


@dataclass
class MergedTokens:
    """Merged tokens that blocks compute with, and the way back.

    Attributes:
        windows: of all tokens.
        small: of merged tokens.
        merging: restores all windows of all images.
    """

    windows: WindowGrid
    small: WindowGrid
    merging: Merging


@dataclass
class WindowCall:
    """One call of the model.

    Attributes:
        trace: what is done in it.
        work: block -> its dense and its reduced FLOPs, per sample.
        memory: of each method.
        held: merged tokens, None while the blocks see all tokens.
    """

    trace: Trace
    work: dict[int, tuple[int, int]] = field(default_factory=dict)
    memory: dict[int, dict[str, Any]] = field(default_factory=dict)
    held: MergedTokens | None = None


class WindowRunner(Protocol):
    """Computes one block of a windowed encoder.

    Attributes:
        block: the module.
        stage: its 0-based stage.
    """

    block: nn.Module
    stage: int

    def run(
        self, owner: WindowWrapping, call: WindowCall, layer: int, x: Tensor, args: Any, kwargs: Any
    ) -> Any:
        """Compute the block; returns what its own forward does."""


class WindowWrapping(Wrapping):
    """A wrapped encoder whose blocks work in windows.

    Args:
        root: the module that is patched.
        family: name for messages.
        runners: one per block, in order.
        signal: ``"whole_windows"`` or ``"window_tokens"``.
        window: side of the windows in tokens, if all have the same.
        closed: sites that methods cannot use, with the reason.
    """

    call = PerThread[WindowCall | None]()

    def __init__(
        self,
        root: nn.Module,
        family: str,
        runners: Sequence[WindowRunner],
        *,
        signal: str,
        window: int | None = None,
        closed: dict[str, str] | None = None,
    ) -> None:
        depths = [0] * (1 + max(r.stage for r in runners))
        for runner in runners:
            depths[runner.stage] += 1
        info = ModelInfo(
            family,
            {"windows": len(runners)},
            {"windows": frozenset({"hidden", signal})},
            stage_depths=tuple(depths),
            window=window,
            closed=closed or {},
        )
        super().__init__(root, info)
        self.runners = list(runners)
        self.visits: dict[tuple[int, str], list[Entry]] = {}
        self.latest: WindowCall | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "latest": None}

    def install(self) -> None:
        self.forget()
        self.visits, self.latest = {}, None
        for entry, stage in self.stages():
            self.visits.setdefault((stage.layer, stage.place), []).append(entry)
        for layer, runner in enumerate(self.runners):
            place_forward(self, runner.block, Bound(self, "block", layer))

    # ---- one block ----------------------------------------------------------------------------

    def block(self, layer: int, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Compute a block, with what methods decide at it."""
        refuse_symbolic(x)
        if not torch.compiler.is_compiling() and in_backward():
            raise UnsupportedMethodError(
                f"activation checkpointing runs the blocks of {self.info.family} again in the backward pass, where "
                "the choice of windows is not repeated: switch it off (gradient_checkpointing_disable(), or "
                "set_grad_checkpointing(False))"
            )
        call = self._begin(x) if layer == 0 else self.call
        if call is None:
            raise RuntimeError(
                "a wrapped encoder was entered in the middle: call the model from its first block"
            )
        out = self.runners[layer].run(self, call, layer, x, args, kwargs)
        if layer == len(self.runners) - 1:
            call.memory.clear()
        return out

    def _begin(self, x: Tensor) -> WindowCall:
        check_graph(self.active)
        self.call = self.latest = call = WindowCall(Trace(batch=len(x)))
        self.trace = call.trace
        return call

    def visit(
        self, call: WindowCall, layer: int, place: str, hidden: Tensor, windows: WindowGrid
    ) -> Reduction | None:
        """Ask the methods at a place of a block, and record what the one that decides says.

        Args:
            hidden: (B, rows, columns, C), the block's input.
            windows: how the block cuts it.
        """
        for entry in self.visits.get((layer, place), ()):
            memory = call.memory.setdefault(id(entry), {})
            site = WindowSite(
                layer=layer,
                info=self.info,
                stage=self.runners[layer].stage,
                hidden=hidden,
                windows=windows,
                memory=memory,
                notes=call.trace.notes,
                training=self.root.training,
                modules=entry.modules_like(hidden),
            )
            found = entry.token_method.reduce(site)
            if found is None:
                continue
            made = found.map
            if made is not None:
                name = entry.method.name
                grid = windows.count if place == "whole" else windows.padded
                record = StageRecord(
                    "windows", layer, name, made.n_in, made.n_out, made, made, grid
                )
                call.trace.stages.append(record)
            return found
        return None

    def costs(self) -> dict[str, Any] | None:
        work = {} if self.latest is None else self.latest.work
        if not work:
            return None
        return {"encoder": (sum(d for d, _ in work.values()), sum(r for _, r in work.values()))}
