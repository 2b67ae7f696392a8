"""Methods on diffusers' pipelines a second time, without the adapter of vtr: what the matrix compares with.

The method itself chooses (its ``attend(site)`` or ``reduce(site)`` is called). Everything around it is written
again and differently: attention is eager, in float64, under the mask that the method chose; merging is a loop over
samples; run and step are counted by the scheduler's own calls; the attention of a module is seen where it
calls torch's function.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.diffusion.models import Case
from vtr.core.site import ModelInfo
from vtr.diffusion.site import BlockSite, CallFacts, DiffusionAttentionSite

PLAIN = torch.nn.functional.scaled_dot_product_attention


class Clock:
    """Counts runs and steps by the calls of schedulers."""

    def __init__(self) -> None:
        self.run, self.step, self.steps, self.scheduler = -1, 0, 0, None

    def watch(self, kind: type, patch: pytest.MonkeyPatch) -> None:
        """Count the calls of a class of schedulers."""
        begin, move = kind.set_timesteps, kind.step
        if hasattr(begin, "__wrapped__"):
            return

        @functools.wraps(begin)
        def set_timesteps(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
            self.run, self.step, self.scheduler = self.run + 1, 0, scheduler
            return begin(scheduler, *args, **kwargs)

        @functools.wraps(move)
        def step(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
            self.step += 1
            return move(scheduler, *args, **kwargs)

        patch.setattr(kind, "set_timesteps", set_timesteps)
        patch.setattr(kind, "step", step)

    def length(self) -> int:
        scheduler: Any = self.scheduler
        return len(scheduler.timesteps) - (getattr(scheduler, "begin_index", None) or 0)


CLOCK = Clock()
_RUNNING: list[tuple[Any, str]] = []


class EagerSite(DiffusionAttentionSite):
    """Attention of the whole map in float64."""

    def _attend(self, mask: Any, row_scale: Tensor | None, return_lse: bool, **more: Any) -> Any:
        added = more.pop("added", None)
        assert not more, more
        seen = mask.to_dense().to(self.q.device) & self.valid_mask[:, None, None]
        group = self.q.shape[1] // self.k.shape[1]
        q, k, v = (
            self.q.double(),
            *(t.double().repeat_interleave(group, 1) for t in (self.k, self.v)),
        )
        scores = (q @ k.mT * self.scale).masked_fill(~seen, -float("inf"))
        lse = scores.logsumexp(-1)
        out = (scores - lse.nan_to_num(neginf=0.0)[..., None]).exp() @ v
        if row_scale is not None:
            out = out * row_scale.double()[..., None]
        if added is not None:
            out = out + added.double().repeat_interleave(mask.block[0], 2)[:, :, : out.shape[2]]
        share = seen.double().mean()
        self.notes["work"] = self.notes.get("work", 0.0) + share
        out = out.to(self.q.dtype)
        return (out, lse.float()) if return_lse else out


class Outside:
    """A method around the named attention modules of one transformer."""

    def __init__(self, model: Any, case: Case, expert: int = 0) -> None:
        self.case, self.expert, self.names = case, expert, case.attention
        self.numbers = [n.split(".")[0] + n.split(".")[1] for n in self.names]
        self.number = {n: i for i, n in enumerate(dict.fromkeys(self.numbers))}
        self.method: Any = None
        self.entry: Any = None
        self.call, self.at = 0, (-1, -1)
        self.first: dict[int, int] = {}
        self.states: dict[Any, tuple[int, dict[str, Any]]] = {}
        self.shared: dict[Any, Any] = {}
        self.maps: dict[int, Any] = {}
        self.memory: dict[str, Any] = {}
        self.samples: dict[str, int] = {}
        self.hidden: Tensor | None = None
        model.__dict__["outside"] = self
        model.register_forward_pre_hook(self.enter)
        for name in self.names:
            self._around(model.get_submodule(name), "attention", name)
        for name, number in zip(self.names, self.numbers, strict=True):
            block = model.get_submodule(name.rpartition(".")[0])
            if "outside_block" not in block.__dict__:
                block.__dict__["outside_block"] = self.number[number]
                block.register_forward_pre_hook(self.block, with_kwargs=True)
                for part in ("ffn", "ff", "img_mlp"):
                    if hasattr(block, part):
                        self._around(getattr(block, part), "mlp", self.number[number])

    def _around(self, module: Any, kind: str, place: Any) -> None:
        # Bound methods are copied together with what they are bound to.
        module.__dict__["outside_place"] = (self, kind, place)
        module.__dict__["forward"] = MethodType(_forward, module)

    # ---- a call ---------------------------------------------------------------------------

    def enter(self, model: Any, args: Any) -> None:
        at = (CLOCK.run, CLOCK.step)
        if at[0] != self.at[0]:
            self.states.clear()
            self.first.clear()
        self.call = self.call + 1 if at == self.at else 0
        self.first.setdefault(self.expert, at[1])
        self.at, self.memory, self.samples = at, {}, {}

    def facts(self, valid: Tensor | None = None, branch: str | None = None) -> CallFacts:
        return CallFacts(
            run=CLOCK.run, step=CLOCK.step, steps=CLOCK.length(), timestep=0.0,
            branch=str(self.call) if branch is None else branch, grid=self.case.grid,
            text_first=self.case.text_first, text_valid=valid, expert=self.expert,
            expert_step=CLOCK.step - self.first[self.expert],
        )  # fmt: skip

    def state(self, batch: int, *place: Any) -> dict[str, Any]:
        """Empty for another number of samples: nobody knows which of them are left."""
        held = self.states.get(place)
        if held is None or held[0] != batch:
            held = self.states[place] = (batch, {})
        return held[1]

    def layers(self, site: str) -> set[int]:
        if self.method is None:
            return set()
        depth = {"attention": len(self.names), "block": len(self.number)}
        info = ModelInfo("", depth, {}, heads=2)
        return {s.layer for s in self.method.stages(info) if s.site == site}

    def attention(
        self, name: str, q: Tensor, k: Tensor, v: Tensor, seen: Any, scale: Any
    ) -> Tensor:
        """The method's result for one call of torch's attention function."""
        layer = self.names.index(name)
        tokens = self.case.tokens
        text, valid, branch = q.shape[2] - tokens, None, str(self.call)
        if seen is not None:
            part = slice(0, text) if self.case.text_first else slice(tokens, None)
            valid = seen.expand(q.shape[0], 1, 1, -1)[:, 0, 0, part].bool()
            if not text or bool(valid.all()):
                valid = None
        site = EagerSite(
            call=self.facts(valid, branch), layer=layer, layers=len(self.names), q=q, k=k, v=v,
            scale=q.shape[-1] ** -0.5 if scale is None else scale,
            dense=lambda: PLAIN(q, k, v, seen, scale=scale),
            state=self.state(q.shape[0], layer, branch), shared=self.shared, memory=self.memory,
            notes={}, table=self.entry.table if self.entry else {},
            modules=self.entry.modules if self.entry else None, backend="reference", hidden=self.hidden,
        )  # fmt: skip
        with _running(None, name):
            out: Tensor = site.dense() if self.method.is_dense(site) else self.method.attend(site)
        return out

    # ---- merging --------------------------------------------------------------------------

    def block(self, module: Any, args: Any, kwargs: Any) -> None:
        number = module.outside_block
        self.maps.pop(number, None)
        if number not in self.layers("block"):
            return
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        site: Any = BlockSite(
            call=self.facts(), layer=number, layers=len(self.number), hidden=hidden,
            state=self.state(hidden.shape[0], "block", number, self.call), shared=self.shared,
            memory=self.memory, notes={},
        )  # fmt: skip
        self.maps[number] = self.method.reduce(site)

    def merged(self, x: Tensor, number: int, run: Callable[[int, Tensor], Tensor]) -> Tensor:
        """``run(sample, tokens)`` on each sample's merged tokens, its rows for all tokens."""
        made = self.maps[number]
        map, text = made.map, x.shape[1] - made.map.n_in
        words, tokens = (
            (x[:, :text], x[:, text:])
            if self.case.text_first
            else (x[:, map.n_in :], x[:, : map.n_in])
        )
        smaller = made.merging.merge(tokens) if made.merging is not None else _slots(made, tokens)
        pieces = [words, smaller] if self.case.text_first else [smaller, words]
        joined = torch.cat(pieces, 1)
        out = torch.cat([run(b, joined[b : b + 1]) for b in range(x.shape[0])])
        if self.case.text_first:
            words, out = out[:, :text], out[:, text:]
        else:
            words, out = out[:, map.n_out :], out[:, : map.n_out]
        if made.merging is not None:
            rows = made.merging.restore(out)
        else:
            rows = torch.stack([o[slots] for o, slots in zip(out, map.source, strict=True)])
        return torch.cat([words, rows] if self.case.text_first else [rows, words], 1)


def _slots(made: Any, x: Tensor) -> Tensor:
    """The tokens of each slot of a map as one, in loops."""
    rows = []
    for b in range(x.shape[0]):
        if made.weights is None:
            rows.append(x[b, made.map.kept[b]])
            continue
        one = []
        for slot in range(made.map.n_out):
            members = x[b, made.map.source[b] == slot]
            weights = made.weights[b, made.map.source[b] == slot, None]
            row = (members * weights).sum(0)
            if made.normalize:
                row = row / weights.sum()
            if made.keep_norm and len(members) > 1:
                row = row * members.norm(dim=-1).max() / row.norm()
            one.append(row)
        rows.append(torch.stack(one))
    return torch.stack(rows)


def _forward(module: Any, *args: Any, **kwargs: Any) -> Any:
    """In place of the forward of an attention module or MLP, as the innermost of all that is put around it."""
    outside, kind, place = module.outside_place
    plain = functools.partial(type(module).forward, module)
    if outside.method is None:
        return plain(*args, **kwargs)
    if kind == "mlp":
        wants = "mlp" in getattr(outside.method, "parts", lambda: ())()
        if not wants or outside.maps.get(place) is None:
            return plain(*args, **kwargs)
        return outside.merged(args[0], place, lambda b, x: plain(x, *args[1:], **kwargs))
    outside.hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    number = outside.number[outside.numbers[outside.names.index(place)]]
    with _running(outside, place):
        parts = getattr(outside.method, "parts", lambda: {"attention"})()
        if outside.maps.get(number) is None or "attention" not in parts:
            return plain(*args, **kwargs)
        names = list(inspect.signature(plain).parameters)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        texts: list[Tensor] = []

        def run(b: int, x: Tensor) -> Tensor:
            values = {k: _sample(v, b) for k, v in given.items()}
            for rope in ("rotary_emb", "image_rotary_emb"):
                if values.get(rope) is not None:
                    made = outside.maps[number]
                    kept = (made.merging or made.map).kept[b]
                    axis = 1 if values[rope][0].ndim == 4 else 0
                    words = values[rope][0].shape[axis] - made.map.n_in
                    if words:  # of the text, which is in front
                        kept = torch.cat([torch.arange(words), words + kept])
                    values[rope] = tuple(
                        f.index_select(axis, kept)
                        if f.shape[axis] > kept.max()
                        else f  # the text's own
                        for f in values[rope]
                    )
            out = plain(**{**values, "hidden_states": x})
            if isinstance(out, tuple):
                texts.append(out[1])
                return out[0]
            return out

        out = outside.merged(given["hidden_states"], number, run)
        return (out, torch.cat(texts)) if texts else out


def _sample(value: Any, b: int) -> Any:
    return value[b : b + 1] if isinstance(value, Tensor) and value.ndim > 1 else value


@contextlib.contextmanager
def _running(outside: Outside | None, name: str) -> Iterator[None]:
    _RUNNING.append((outside, name))
    try:
        yield
    finally:
        _RUNNING.pop()


def _perturbed() -> bool:
    """Whether diffusers' guidance wants the values in place of attention."""
    count = torch._C._len_torch_function_stack()
    modes = [torch._C._get_function_stack_at(i) for i in range(count)]
    return any(type(m).__name__ == "AttentionScoreSkipFunctionMode" for m in modes)


def _call(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, **kwargs: Any,
) -> Tensor:  # fmt: skip
    if _perturbed() and query.shape[-2] == value.shape[-2]:
        return value
    if _RUNNING and query.shape[-2] == key.shape[-2]:
        outside, name = _RUNNING[-1]
        if outside is not None and outside.names.index(name) in outside.layers("attention"):
            return outside.attention(name, query, key, value, attn_mask, scale)
    return PLAIN(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **kwargs)


@contextlib.contextmanager
def eager_attention() -> Iterator[None]:
    """Lead torch's attention function through :class:`Outside`, while it lasts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", _call)
        yield
