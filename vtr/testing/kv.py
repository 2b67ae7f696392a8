"""Laws of methods that decide what the KV cache of a language model holds."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from vtr.compat.transformers import cache_of, with_cache
from vtr.core.budget import count
from vtr.core.kv_site import Change
from vtr.core.method import Method
from vtr.core.site import ModelInfo
from vtr.methods.common.kv import EvictionMethod, KVMethod
from vtr.methods.common.language_attention import LanguageAttentionMethod
from vtr.testing.inside import every_row
from vtr.testing.trial import Inputs, Trial, close, equal, instead, require

STEPS = 5  # tokens generated behind a prompt
LOGITS = 1e-4  # float32, behind all layers
ROUNDING = {2: 0.8, 4: 0.2, 8: 0.02}  # of packed entries, relative to their norm


def acts_on_cache(method: type[Method] | Method) -> bool:
    """Tell whether a method decides what a KV cache holds."""
    cls = method if isinstance(method, type) else type(method)
    return issubclass(cls, KVMethod)


# ---- conversations -------------------------------------------------------------------------------


class Entries(NamedTuple):
    """The entries of one layer between two calls.

    Attributes:
        columns: (B, Hk, K) int64, -1 for empty places.
        bits: (B, Hk, K) int64.
        k, v: (B, Hk, K, D).
        merged: (B, Hk, K) bool, True for entries that a method has rewritten.
        made: ``k`` and ``v``, with what the method asked for in the place of entries that it has rewritten.
    """

    columns: Tensor
    bits: Tensor
    k: Tensor
    v: Tensor
    merged: Tensor
    made: tuple[Tensor, Tensor]


class Size(NamedTuple):
    """Bytes of a layer: those that it reports, and those of the memory behind all tensors that it holds."""

    said: int
    real: int


@dataclass
class Talk:
    """A conversation: a prompt, five greedy tokens, a turn of text, the pictures again, and a token.

    Attributes:
        logits: (B, calls, V), the last ones of each call.
        tokens: (B, calls) int64, the greedy token behind each call.
        mask: (B, S) int64, the columns that are tokens.
        visual: (B, S) bool.
        lengths: columns up to the end of each call.
        held: behind each call the entries of each layer; empty without a method at the cache.
        sizes: behind each call the bytes of each layer; empty without a method at the cache.
        cache: the KV cache.
    """

    logits: Tensor
    tokens: Tensor
    mask: Tensor
    visual: Tensor
    lengths: list[int]
    held: list[list[Entries]]
    sizes: list[list[Size]]
    cache: Any


def talk(
    trial: Trial,
    method: Method | None,
    inputs: Inputs,
    tokens: Tensor | None = None,
    model: Any = None,
) -> Talk:
    """Hold a conversation under a method; ``tokens`` (B, calls) are said instead of the greedy ones."""
    model = trial.kind.model if model is None else model
    rewritten: dict[int, Rewritten] = {}
    if method is not None and acts_on_cache(method):
        method = _noting(method, rewritten)
    torch.manual_seed(7)
    with nullcontext() if method is None else trial.applied(method, model), torch.no_grad():
        return _talk(model, inputs, tokens, rewritten)


def told(trial: Trial, method: Method | None, side: str = "left") -> Talk:
    """The conversation of the batch with a side of padding, which laws share."""
    held = trial.kind.talks if method is None else trial.talks
    key = repr(method), side
    if key not in held:
        held[key] = talk(trial, method, trial.kind.batch(trial.kind.samples, side))
    return held[key]  # type: ignore[no-any-return]


def _turns(inputs: Inputs) -> Iterator[Inputs]:
    """The calls of a conversation; those of one token have no inputs, but what was said last."""
    yield inputs
    for _ in range(STEPS):
        yield {}
    batch = inputs["input_ids"].shape[0]
    said = torch.arange(30, 37).expand(batch, -1)
    few = {"input_ids": said[:, :3], "attention_mask": torch.ones_like(said[:, :3])}
    yield few
    again = {**inputs, "input_ids": torch.cat([said, inputs["input_ids"]], 1)}
    again["attention_mask"] = pad(inputs["attention_mask"], (7, 0), value=1)
    if "mm_token_type_ids" in inputs:
        again["mm_token_type_ids"] = pad(inputs["mm_token_type_ids"], (7, 0))
    yield again
    yield {}


def _talk(
    model: Any, inputs: Inputs, given: Tensor | None, rewritten: dict[int, Rewritten]
) -> Talk:
    # Its library is imported when a model is built.
    from vtr.testing.models.vlms import visual
    from vtr.vision.vlm.store import store_of

    mask, cache = inputs["attention_mask"][:, :0], None
    logits: list[Tensor] = []
    tokens: list[Tensor] = []
    seen, lengths, held, sizes = visual(mask), [], [], []
    for turn in _turns(inputs):
        if not turn:
            last = (given if given is not None else torch.stack(tokens, 1))[:, len(tokens) - 1 :]
            last = last[:, :1]
            turn = {"input_ids": last, "attention_mask": torch.ones_like(last)}
        mask = torch.cat([mask, turn["attention_mask"]], 1)
        seen = torch.cat([seen, visual(turn["input_ids"]) & (turn["attention_mask"] > 0)], 1)
        length = turn["input_ids"].shape[1]
        # Tokens are counted, so that padding between two turns changes nothing.
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -length:]
        if "mm_token_type_ids" in inputs:
            positions = positions.expand(3, -1, -1)
        more: dict[str, Any] = {} if cache is None else with_cache(type(model).forward, cache)
        found = model(
            **{**turn, "attention_mask": mask}, position_ids=positions, use_cache=True, **more
        )
        cache = cache_of(found)
        at = (turn["attention_mask"] * torch.arange(length)).argmax(1)
        logits.append(found.logits[torch.arange(len(at)), at])
        tokens.append(logits[-1].argmax(-1))
        lengths.append(mask.shape[1])
        layers = [store_of(cache, i) for i in range(len(cache.layers))]
        if any(layers):
            held.append([_entries(cache, i, mask.shape[1], rewritten) for i in range(len(layers))])
            sizes.append([_size(layer) for layer in cache.layers])
    return Talk(
        torch.stack(logits, 1), torch.stack(tokens, 1), mask, seen, lengths, held, sizes, cache
    )


@dataclass
class Rewritten:
    """Keys and values that a method has put in the place of others, by column: (B, Hk, S, D) and (B, Hk, S)."""

    k: Tensor
    v: Tensor
    where: Tensor


def _noting(method: Method, rewritten: dict[int, Rewritten]) -> Method:
    """The method, whose merged entries are noted."""
    compress = method.compress  # type: ignore[attr-defined]

    def noted(site: Any) -> Change | None:
        change: Change | None = compress(site)
        old = rewritten.get(site.layer)
        if change is None or change.k is None or change.v is None:
            return change
        batch, heads, _, width = site.k.shape
        more = site.length - (0 if old is None else old.where.shape[2])
        if old is None:
            shape = batch, heads, 0
            old = Rewritten(
                site.k.new_empty(*shape, width), site.v.new_empty(*shape, site.v.shape[3]),
                torch.zeros(shape, dtype=torch.bool),
            )  # fmt: skip
        k, v = (pad(x, (0, 0, 0, more + 1)) for x in (old.k, old.v))
        where = pad(old.where, (0, more + 1))
        column = torch.where(change.kept & site.valid, site.columns, site.length)
        k.scatter_(2, column[..., None].expand_as(change.k), change.k.to(k))
        v.scatter_(2, column[..., None].expand_as(change.v), change.v.to(v))
        where.scatter_(2, column, torch.ones_like(column, dtype=torch.bool))
        rewritten[site.layer] = Rewritten(k[:, :, :-1], v[:, :, :-1], where[:, :, :-1])
        return change

    return instead(method, "compress", noted)


def _entries(cache: Any, i: int, length: int, rewritten: dict[int, Rewritten]) -> Entries:
    from vtr.vision.vlm.store import store_of

    store = store_of(cache, i)
    if store is None:  # a layer that the method leaves alone
        layer = cache.layers[i]
        columns = torch.arange(length).expand(*layer.keys.shape[:2], -1)
        none = torch.zeros_like(columns, dtype=torch.bool)
        bits = torch.full_like(columns, 8 * layer.keys.dtype.itemsize)
        return Entries(columns, bits, *(both := (layer.keys, layer.values)), none, both)
    columns, (k, v) = store.columns(), store.read()
    merged, made = torch.zeros_like(columns, dtype=torch.bool), (k, v)
    if i in rewritten:
        old = rewritten[i]
        index = columns.clamp(min=0, max=old.where.shape[2] - 1)
        merged = old.where.gather(2, index) & (columns == index)
        made = _taken(old.k, index, merged, k), _taken(old.v, index, merged, v)
    return Entries(columns, store.bits(), k, v, merged, made)


def _taken(x: Tensor, index: Tensor, where: Tensor, other: Tensor) -> Tensor:
    """Entries (B, Hk, K) of x (B, Hk, S, D) where a mask says so, others elsewhere."""
    found = x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[3]))
    return torch.where(where[..., None], found, other)


def _size(layer: Any) -> Size:
    behind = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in held_by(layer)}
    real = sum(behind.values())
    return Size(getattr(layer, "nbytes", real), real)


def settings(trial: Trial) -> tuple[Method, ...]:
    """The settings that reduce, and one with the budgets of the base that are not the method's defaults."""
    some = trial.settings.some
    if not isinstance(trial.method, EvictionMethod) or len(some) > 1:
        return some
    other = {
        "evict": "all",
        "every": 2,
        "first": 1,
        "recent": 3,
        "heads": "adaptive",
        "depth": "pyramid",
    }
    try:
        return (*some, trial.method.replace(**other))
    except ValueError:
        return some


# ---- laws ----------------------------------------------------------------------------------------


def reduces(trial: Trial) -> bool:
    """Tell whether the method drops entries, or stores some otherwise."""
    found = told(trial, trial.method)
    return any(
        held.columns.shape[2] < length
        or bool((held.columns < 0).any())
        or bool((held.bits < 16).any() | held.merged.any())
        for length, layers in zip(found.lengths, found.held, strict=False)
        for held in layers
    )


def everything(trial: Trial) -> None:
    """Keep everything is the model, bit by bit, in every call of a conversation and in generate."""
    for method in trial.settings.everything:
        equal(trial.run(method, trial.batch).out, trial.native, f"{method}, generate")
        for side in trial.kind.sides or ("left",):
            found, wanted = (told(trial, m, side) for m in (method, None))
            equal(found.logits, wanted.logits, f"{method}, a conversation, padding {side}")


def masked(trial: Trial) -> None:
    """Attention over what a cache holds is attention over a full cache in which the rest is masked.

    The full cache is that of the model without the method. Merged entries are put into it; packed ones are
    taken as they are read, and must be near.
    """
    for method in settings(trial):
        for side in trial.kind.sides or ("left",):
            found = told(trial, method, side)
            full, inputs = Full(found), trial.kind.batch(trial.kind.samples, side)
            wanted = talk(trial, full, inputs, found.tokens)
            what = f"{method}, padding {side}"
            close(found.logits, wanted.logits, LOGITS, f"{what}: the full cache with a mask")
            _compare(what, found, full)


def _compare(what: str, found: Talk, full: Full) -> None:
    """Compare the entries that are held at the end with those of the full cache."""
    for i, held in enumerate(found.held[-1]):
        k, v = full.last[i]
        index = held.columns.clamp(min=0)[..., None]
        some = (held.columns >= 0) & (found.mask > 0).gather(
            1, held.columns.clamp(min=0).flatten(1)
        ).view_as(held.columns)
        for name, x, whole, made in zip(
            ("keys", "values"), (held.k, held.v), (k, v), held.made, strict=True
        ):
            want = whole.gather(2, index.expand(-1, -1, -1, whole.shape[3]))
            want = torch.where(held.merged[..., None], made, want)
            native = some & (held.bits >= 16)
            close(x[native], want[native], LOGITS, f"{what}, layer {i}: the {name} that are held")
            for bits, most in ROUNDING.items():
                packed = some & (held.bits == bits) & ~held.merged
                if bool(packed.any()):
                    far = (x[packed] - want[packed]).norm() / want[packed].norm()
                    require(
                        far < most,
                        f"{what}, layer {i}: {name} of {bits} bits are off by {float(far):.2g} of their norm",
                    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Full(LanguageAttentionMethod):
    """Attends over a full cache, of which each KV head sees what it held in a conversation.

    Attributes:
        of: the conversation.
        last: layer -> keys and values of the last call.
    """

    name: ClassVar[str] = "full"
    paper: ClassVar[str] = "none"

    of: Talk = field(kw_only=False)
    last: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def attend(self, site: Any) -> Tensor:
        columns = site.k.shape[2]
        call = self.of.lengths.index(columns)
        sees = site.sees(every_row(site))[:, None]
        k, v = site.k.clone(), site.v.clone()
        if call:
            held = self.of.held[call - 1][site.layer]
            before = site.offset
            batch, heads = held.columns.shape[:2]
            index = torch.where(held.columns < 0, columns, held.columns)
            live = torch.zeros(batch, heads, columns + 1, dtype=torch.bool)
            live = live.scatter(2, index, True)[..., :columns]
            live[..., before:] = True
            sees = sees & live[:, :, None]
            # Merged and packed entries are not those of the model.
            other = held.merged | (held.bits < 16)
            at = torch.where(other, index, columns)[..., None]
            for x, made in zip((k, v), held.made, strict=True):
                wide = pad(x, (0, 0, 0, 1)).scatter(2, at.expand_as(made), made)
                x.copy_(wide[:, :, :columns])
        self.last[site.layer] = site.k, site.v
        group = site.q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(group, 1).double() for x in (k, v))
        score = (site.q.double() @ k.transpose(2, 3)) * site.scale
        sees = sees.expand(-1, site.k.shape[1], -1, -1).repeat_interleave(group, 1)
        none = ~sees.any(3, keepdim=True)
        weight = score.masked_fill(~(sees | none), -torch.inf).softmax(3).masked_fill(none, 0)
        return (weight @ v).to(site.q.dtype)


def alone(trial: Trial) -> None:
    """A sample alone equals the sample in a padded batch of two, and of eight, in every call."""
    samples = trial.kind.samples
    said = told(trial, trial.method).tokens
    eight = trial.kind.batch(samples * 4)
    batches = {side: told(trial, trial.method, side) for side in trial.kind.sides or ("left",)}
    several = [*batches.items(), ("left", talk(trial, trial.method, eight, said.repeat(4, 1)))]
    for b, sample in enumerate(samples):
        own = talk(trial, trial.method, sample, said[b : b + 1])
        for side, both in several:
            for n in range(b, len(both.logits), len(samples)):
                what = f"sample {n} of {len(both.logits)}, padding {side}"
                # The tokens that were said are those of the first batch: up to the first other one.
                same = (both.tokens[n] == said[b]).long().cumprod(0)
                calls = min(1 + int(same.sum()), len(same))
                close(both.logits[n, :calls], own.logits[0, :calls], trial.kind.tolerance, what)


def pair(trial: Trial) -> None:
    """The laws that depend on how a family batches and numbers its tokens, with padding at the left alone: a
    full cache with a mask, and a sample alone."""
    found = told(trial, trial.method)
    full = Full(found)
    wanted = talk(trial, full, trial.batch, found.tokens)
    close(found.logits, wanted.logits, LOGITS, f"{trial.method}: the full cache with a mask")
    _compare(f"{trial.method}", found, full)
    for b, sample in enumerate(trial.kind.samples):
        own = talk(trial, trial.method, sample, found.tokens[b : b + 1])
        close(found.logits[b], own.logits[0], trial.kind.tolerance, f"sample {b} of 2")


def text(trial: Trial) -> None:
    """Text and generated tokens stay in every head, unless the option ``evict`` is "all": then those at both
    ends stay."""
    for method in settings(trial):
        everywhere = getattr(method, "evict", "visual") == "all"
        for side in trial.kind.sides or ("left",):
            found = told(trial, method, side)
            for call, (length, layers) in enumerate(zip(found.lengths, found.held, strict=True)):
                tokens = found.mask[:, :length] > 0
                stays = tokens & ~found.visual[:, :length]
                if everywhere and isinstance(method, EvictionMethod):
                    before = tokens.cumsum(1) - 1
                    behind = tokens.sum(1, keepdim=True) - 1 - before
                    stays = tokens & ((before < method.first) | (behind < method.recent))
                for i, held in enumerate(layers):
                    gone = stays[:, None] & ~_live(held, length)
                    b, h, column = gone.nonzero()[0].tolist() if bool(gone.any()) else (0, 0, 0)
                    require(
                        not bool(gone.any()),
                        f"{method}, call {call}, layer {i}: head {h} of sample {b} lost column {column}, which "
                        f"is {'an end of the sample' if everywhere else 'text'} (padding {side}); "
                        f"{int(gone.sum())} such entries",
                    )


def _live(held: Entries, length: int) -> Tensor:
    """(B, Hk, length) bool, the columns that heads hold."""
    index = torch.where(held.columns < 0, length, held.columns)
    batch, heads = index.shape[:2]
    live = torch.zeros(batch, heads, length + 1, dtype=torch.bool).scatter(2, index, True)
    return live[..., :length]


def budgets(trial: Trial) -> None:
    """No head keeps more visual tokens than ``keep`` allows; heads and layers that share budgets keep no more
    together."""
    asked = (*settings(trial), *trial.settings.counted)
    for method in dict.fromkeys(m for m in asked if isinstance(m, EvictionMethod)):
        if method.bytes is not None:
            continue
        keep = method.DEFAULT if method.keep is None else method.keep
        for side in trial.kind.sides or ("left",):
            found = told(trial, method, side)
            length = found.lengths[0]
            info = ModelInfo("", {"kv": len(found.held[0])}, {})
            working = method.working_layers(info, "kv")
            live = torch.stack([_live(found.held[0][i], length) for i in working], 1)
            for b, sample in enumerate(trial.kind.samples):
                if method.evict == "all":
                    tokens = int(found.mask[b, :length].sum())
                    ends = min(tokens, method.first + method.recent)
                    allowed = max(count(keep, tokens), ends)
                    allowed += ends * (method.depth != "uniform")  # of layers with a smaller budget
                    kept = (live[b] & (found.mask[b, :length] > 0)).sum(-1)
                else:
                    images = [n for n, _ in trial.kind.images(sample)]
                    allowed = (
                        count(keep, sum(images)) if isinstance(keep, float)
                        else sum(count(keep, n) for n in images)
                    )  # fmt: skip
                    kept = (live[b] & found.visual[b, :length]).sum(-1)
                shares = method.heads, method.depth, method.whole
                most = float(kept.max())
                if shares != ("uniform", "uniform", False):
                    most = float(kept.float().mean()) - 0.5  # budgets of layers are rounded
                require(
                    most <= allowed,
                    f"{method}, padding {side}: sample {b} keeps {kept.tolist()} (layers, KV heads), and "
                    f"{allowed} are allowed",
                )


def in_bytes(trial: Trial) -> None:
    """With ``bytes`` a cache is never larger than that, behind any call."""
    method = trial.method
    if not isinstance(method, EvictionMethod):
        return
    dense = sum(x.nbytes for x in held_by(told(trial, None).cache.layers))
    budget = int(0.7 * dense)
    try:
        other = method.replace(keep=None, bytes=budget)
    except ValueError:  # such as heads="adaptive"
        return
    try:
        found = talk(trial, other, trial.batch)
    except RuntimeError as error:
        require("must stay" in str(error), f"{other}: {error}")
        return
    for call, sizes in enumerate(found.sizes):
        real = sum(size.real for size in sizes)
        require(real <= budget, f"{other}: {real} bytes are held behind call {call}")


def nbytes(trial: Trial) -> None:
    """The bytes that a layer reports are those of the memory behind the tensors that it holds."""
    for method in settings(trial):
        for call, sizes in enumerate(told(trial, method).sizes):
            for i, (said, real) in enumerate(sizes):
                require(
                    said == real,
                    f"{method}, call {call}: layer {i} reports {said} bytes, and the memory behind the tensors "
                    f"that it holds has {real}",
                )


def memory(trial: Trial) -> None:
    """Memory is back when a cache is deleted: neither the wrapping nor the trace holds keys or values."""
    for method in settings(trial):
        with trial.applied(method), torch.no_grad():
            gc.freeze()  # what is there already is neither searched nor freed
            try:
                found = _talk(trial.kind.model, trial.batch, None, {})
                refs = [weakref.ref(x) for x in held_by(found.cache.layers)]
                require(refs, f"{method}: the cache holds nothing")
                del found
                gc.collect()
                left = [x for x in (ref() for ref in refs) if x is not None]
                left += [x for x in gc.get_objects() if type(x) is Tensor and x.ndim == 4]
                shapes = ", ".join(sorted({str(tuple(x.shape)) for x in left}))
                del left
            finally:
                gc.unfreeze()
            require(not shapes, f"{method}: behind a deleted cache tensors {shapes} are held")


def held_by(thing: Any, seen: set[int] | None = None) -> list[Tensor]:
    """The tensors that can be reached from an object through attributes and containers."""
    seen = set() if seen is None else seen
    if id(thing) in seen or isinstance(thing, (str, bytes, int, float, type, torch.dtype)):
        return []
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        return [thing]
    parts: list[Any] = []
    if isinstance(thing, dict):
        parts += thing.values()
    elif isinstance(thing, (list, tuple, set)):
        parts += thing
    elif type(thing).__module__.startswith(("vtr", "transformers")):
        parts += getattr(thing, "__dict__", {}).values()
    return [x for part in parts for x in held_by(part, seen)]


def precision(trial: Trial) -> None:
    """bfloat16 and float16: finite, of that type, and near float32 as long as the same entries are held."""
    wanted = told(trial, trial.method)
    for dtype, model in trial.kind.lowered.items():
        inputs = trial.kind.cast(trial.batch, dtype)
        found = talk(trial, trial.method, inputs, wanted.tokens, model)
        require(bool(found.logits.isfinite().all()), f"{dtype}: logits are not finite")
        for i, held in enumerate(found.held[-1]):
            require(
                held.k.dtype == held.v.dtype == dtype, f"{dtype}: layer {i} holds {held.k.dtype}"
            )
        for call in range(len(found.lengths)):
            if call and not _same(found.held[call - 1], wanted.held[call - 1]):
                break
            a, b = found.logits[:, call].float(), wanted.logits[:, call]
            error = float((a - b).norm() / b.norm())
            require(error < 0.15, f"{dtype}: the relative error of call {call} is {error:.2g}")


def _same(a: list[Entries], b: list[Entries]) -> bool:
    return all(torch.equal(x.columns, y.columns) for x, y in zip(a, b, strict=True))
