"""A model that holds its whole KV cache, with entries masked by loops: what eviction has to equal."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from tests.vision.vlm.models import visual

from .test_h2o import Held

Choose = Callable[[Any, Held, int, int], set[int]]
"""(layer, held, sample, KV head) -> the columns that stay."""


class Reference:
    """A copy of a LLaVA model with eager attention; entries that went are masked in their layer and KV head.

    Args:
        choose: what stays, by a layer's attention maps (:class:`Layer`).
        due: tells by the columns since entries were chosen, and whether the call brought images, whether they
            are chosen now.
    """

    def __init__(self, model: Any, choose: Choose, due: Callable[[int, bool], bool]) -> None:
        self.model = copy.deepcopy(model)
        self.choose, self.due = choose, due
        language = self.model.model.language_model
        language.config._attn_implementation = "eager"
        self.layers = [Layer(self) for _ in language.layers]
        for layer, block in zip(self.layers, language.layers, strict=True):
            block.self_attn.register_forward_pre_hook(layer.before, with_kwargs=True)
            block.self_attn.register_forward_hook(layer.after, with_kwargs=True)

    def generate(self, **inputs: Any) -> Any:
        ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
        self.tokens = torch.cat([mask, torch.ones(len(mask), 20, dtype=torch.bool)], 1)
        kind = visual(ids).long()
        kind = torch.cat([kind, torch.zeros(len(ids), 20, dtype=torch.long)], 1)
        self.marks = SimpleNamespace(kind=kind)
        with torch.no_grad():
            return self.model.generate(**inputs)


class Layer:
    """The attention maps of one layer, and what it holds; has what :class:`.kv_sites.Cache` has for loops."""

    def __init__(self, owner: Reference) -> None:
        self.owner = owner
        self.rows: dict[int, Any] = {}  # column of a row: its attention [sample][head][column]
        self.length = self.fresh = 0
        self.held: list[list[set[int]]] = []  # columns, by sample and KV head
        self.history: list[Held] = []

    tokens = property(lambda self: self.owner.tokens)
    marks = property(lambda self: self.owner.marks)
    group = 2

    def heads_of(self, head: int) -> range:
        return range(head * self.group, (head + 1) * self.group)

    def attention(self, sample: int, head: int, row: int, columns: Any) -> dict[int, float]:
        seen = [c for c in columns if c <= row and self.tokens[sample, c]]
        return {c: self.rows[row][sample][head][c] for c in seen}

    def before(self, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        batch, rows = hidden.shape[:2]
        start, self.length = self.length, self.length + rows
        heads = module.config.num_key_value_heads
        if not self.held:
            self.held = [[set() for _ in range(heads)] for _ in range(batch)]
            self.history = [[] for _ in range(batch)]
        mask = torch.full((batch, heads, rows, self.length), torch.finfo(hidden.dtype).min)
        for b in range(batch):
            for h in range(heads):
                self.held[b][h] |= set(range(start, self.length))
                for i in range(rows):
                    seen = [
                        c for c in self.held[b][h] if c <= start + i and bool(self.tokens[b, c])
                    ]
                    mask[b, h, i, seen or slice(None)] = 0
            now = {h: sorted(held) for h, held in enumerate(self.held[b])}
            self.history[b].append((start, self.length, now))
        kwargs["attention_mask"] = mask.repeat_interleave(self.group, 1)
        return args, kwargs

    def after(self, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        maps, (start, end, _) = output[1].double(), self.history[0][-1]
        for row in range(start, end):
            self.rows[row] = maps[:, :, row - start].tolist()
        self.fresh += end - start
        pictures = bool(self.marks.kind[:, start:end].any())
        if self.owner.due(self.fresh, pictures):
            self.fresh = 0
            for b, of_sample in enumerate(self.held):
                for h in range(len(of_sample)):
                    of_sample[h] = self.owner.choose(self, self.history[b], b, h)
