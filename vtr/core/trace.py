"""The record of the last call of a wrapped model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from vtr.core.language_site import Frames
from vtr.core.stopwatch import seconds
from vtr.core.tokens import TokenMap


@dataclass(eq=False)
class StageRecord:
    """One reduction.

    Attributes:
        site: ``image``, ``encoder``, ``prompt``, ``decoder`` or ``block``.
        layer: 0-based layer of the cut (after it or inside it).
        method: name of the method.
        tokens_in, tokens_out: visual tokens before and after (per sample; the largest of the batch).
        map: from the tokens before this stage to those after it.
        total: from the tokens of the model's input to those after this stage.
        grid: (height, width) or (frames, height, width) of the model's input in tokens, if known.
        grids: the same per sample if samples may differ (vision-language models: None for a
            sample without exactly one image), or None if ``grid`` is that of all.
        frames: place and time of each visual token of the prompt (vision-language models), or None.
    """

    site: str
    layer: int
    method: str
    tokens_in: int
    tokens_out: int
    map: TokenMap
    total: TokenMap
    grid: tuple[int, ...] | None = None
    grids: tuple[tuple[int, ...] | None, ...] | None = None
    frames: Frames | None = None

    def grid_of(self, sample: int) -> tuple[int, ...] | None:
        """The grid of one sample, if known."""
        return self.grid if self.grids is None else self.grids[sample]


@dataclass(eq=False)
class PolicyRecord:
    """A policy that a method has given the tokens of an encoder in training.

    Attributes:
        layer, place: 0-based block, and ``middle`` or ``end``: from there on the policy holds, until the
            next record.
        method: name of the method.
        policy: (B, N) weights in [0, 1] of the tokens of the model's input, with gradients; None if from here
            on all count again.
    """

    layer: int
    place: str
    method: str
    policy: Tensor | None


@dataclass(eq=False)
class Trace:
    """Everything that happened in one call of a wrapped model.

    Attributes:
        stages: one record per reduction, in order.
        tokens: per site and layer, the (visual) tokens that went through its first half (attention)
            and its second half (MLP): ``tokens["encoder"][layer] == (before, after)``. At ``"kv"``, the entries
            of the KV head that holds most, before and after a choice.
        batch: samples in the call.
        policies: what methods decided in training, when every token goes through every block, in order.
            Their tensors hold the graph of the call until the next one.
    """

    stages: list[StageRecord] = field(default_factory=list)
    tokens: dict[str, dict[int, tuple[int, int]]] = field(default_factory=dict)
    batch: int = 0
    notes: dict[str, Any] = field(default_factory=dict)
    policies: list[PolicyRecord] = field(default_factory=list)

    def count(self, site: str, layer: int, before: int, after: int) -> None:
        self.tokens.setdefault(site, {})[layer] = (before, after)

    @property
    def finding(self) -> float | None:
        """Seconds that finding the masks of sparse attention took in the last call, all layers together;
        None without such masks. On a GPU it waits until they are found."""
        layers = self.notes.get("attention", {}).values()
        found = [seconds(note["finding"]) for note in layers if "finding" in note]
        return sum(found) if found else None

    @property
    def decoding(self) -> dict[int, float]:
        """Share of the keys that decoding steps since the last prompt have read, by layer: 1 is dense. Of layers
        with an attention method. On a GPU it waits for the steps."""
        layers = self.notes.get("decoding", {}).items()
        return {i: float(note["work"]) / max(float(note["pairs"]), 1.0) for i, note in layers}

    @property
    def kept(self) -> Tensor | None:
        """(B, N_out) indices, in the model's input, of the tokens left after the last stage."""
        return self.stages[-1].total.kept if self.stages else None

    def summary(self) -> str:
        """One line per stage, per attention layer with a density, and per layer of a KV cache whose entries were
        chosen, as text."""
        lines = [
            f"{s.site}[{s.layer}] {s.method}: {s.tokens_in} -> {s.tokens_out} tokens"
            for s in self.stages
        ]
        lines += [
            f"attention[{layer}]: {100 * note['density']:.1f} % of {self.tokens['attention'][layer][0]}"
            " tokens' pairs"
            for layer, note in self.notes.get("attention", {}).items()
            if "density" in note
        ]
        lines += [
            f"decoding[{layer}]: {100 * share:.1f} % of the keys"
            for layer, share in self.decoding.items()
            if share < 1
        ]
        lines += [
            f"kv[{layer}]: {before} -> {after} entries"
            for layer, (before, after) in self.tokens.get("kv", {}).items()
        ]
        return "\n".join(lines) or "no reduction took place"
