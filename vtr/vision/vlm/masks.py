"""Masks and rotary tables of layers of several kinds: full attention, sliding windows, two-way pictures, recurrence.

A cut must leave what every token sees as it was: all that it saw, without what was dropped. So a window is counted in
the columns that the caller gave, and not in those that are left, and a mask that lets the tokens of a picture see one
another is cut in rows and columns. Layers with a recurrent state run on what is left, as on a shorter prompt.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vtr.compat.transformers import (
    CHUNKED,
    FULL,
    RECURRENT,
    SLIDING,
    attention_implementation,
    causal_mask,
    chunk_of,
    columns_seen,
    window_of,
)
from vtr.core.tokens import take
from vtr.vision.vlm.sequence import SequenceLayout, between, follow

if TYPE_CHECKING:
    from vtr.vision.vlm.call import LanguageCall
    from vtr.vision.vlm.language import LanguageSession
    from vtr.vision.vlm.wrapping import VLMWrapping

Masks = dict[str, Tensor | None]


def unknown_kinds(kinds: list[str]) -> str:
    """Say which kinds of layers a cut cannot be followed through; empty if all are known."""
    odd = sorted({kind for kind in kinds if kind not in (*FULL, *SLIDING, *CHUNKED, *RECURRENT)})
    return f"its language model has layers of the kind {', '.join(odd)}" if odd else ""


def recurrent_layers(kinds: list[str]) -> str:
    """Say which kinds of layers of a language model have no attention; empty if all have it."""
    odd = sorted({kind for kind in kinds if kind in RECURRENT})
    return f"layers of the kind {', '.join(odd)} have no attention" if odd else ""


def check_cache(owner: VLMWrapping, cache: Any) -> None:
    """Raise ``RuntimeError`` if a cache has places for a window alone, of which a cut would fill others."""
    if owner.sliding and getattr(cache, "is_compileable", False):
        raise RuntimeError(
            "a prompt cannot be cut beside a static cache if layers have sliding windows: use a dynamic cache"
        )


def two_way(owner: VLMWrapping, call: LanguageCall, mask: Any) -> Masks | None:
    """The (B, 1, L, K) masks that a prompt was given, by the kind of layer; None if it has no such masks.

    Raises:
        RuntimeError: they are those of a later turn with pictures.
    """
    if not owner.family.two_way or call.visual is None:
        return None
    given = mask if isinstance(mask, dict) else dict.fromkeys(owner.kinds, mask)
    found = {k: m if m is not None and m.dim() == 4 else None for k, m in given.items()}
    if all(m is None for m in found.values()):
        return None
    if call.past:
        raise RuntimeError(
            f"{owner.info.family} lets the tokens of a picture see one another, and pictures of a later turn "
            "cannot be cut beside a KV cache: give the whole conversation as one prompt"
        )
    return found


def entry(call: LanguageCall, given: Any) -> Any:
    """Cut the masks of a full prompt for the language model, whose layers get theirs one by one."""
    assert call.masks is not None
    cut = {k: None if m is None else _gathered(m, call.layout) for k, m in call.masks.items()}
    return cut if isinstance(given, dict) else next(iter(cut.values()))


def sync(session: LanguageSession, call: LanguageCall, i: int, given: Any, hidden: Tensor) -> None:
    """Mask and rotary tables for the tokens that enter layer ``i``.

    Args:
        given: (cos, sin) that the language model gave its layer.
    """
    if call.synced is not call.layout:
        call.segments.append((i, call.layout))
        call.synced = call.layout
        call.by_kind = {}
    elif i in call.boundaries():
        call.by_kind = {}
    kind, shares = session.owner.kinds[i], session.owner.shares
    source = session.owner.sources[i]
    if shares and source == i and kind not in call.by_kind:
        call.shown[kind] = _keys(call, i)
    if not call.changed and call.cuts is None:
        call.rope = given
        return
    if source != i and call.masks is None:
        seen = _seen_elsewhere(session, call, i).to(hidden.device)
        call.override = {
            "attention_mask": _as_added(session, seen, hidden),
            "position_embeddings": _rope(session, call, i, given, hidden),
            "position_ids": None,
        }
        call.rope = call.override["position_embeddings"]
        return
    if kind not in call.by_kind:
        call.by_kind[kind] = {
            "attention_mask": _mask(session, call, i, hidden),
            "position_embeddings": _rope(session, call, i, given, hidden),
            "position_ids": None,
        }
    call.override = call.by_kind[kind]
    call.rope = call.override["position_embeddings"]


def visible(call: LanguageCall, layer: int, rows: Tensor, causal: Tensor) -> Tensor:
    """(B, R, K) bool: the columns that tokens see in a layer, of those that they see in a causal one.

    Args:
        rows: (B, R) int64, places of the tokens in the sequence of this call; -1 for none.
        causal: (B, R, K) bool.
    """
    kind = call.owner.kinds[layer]
    full = None if call.masks is None else call.masks.get(kind)
    if full is not None:
        length = call.layout.valid.shape[1]
        seen = full if full.dtype == torch.bool else full == 0
        seen = _gathered(seen, call.layout)[:, 0, :, :length]
        found = take(seen, rows.clamp(min=0).to(seen.device)).to(causal.device)
        return found & (rows >= 0)[..., None]
    if kind not in (*SLIDING, *CHUNKED):
        return causal
    keys = call.columns(layer)
    queries = keys[:, -call.layout.valid.shape[1] :].gather(1, rows.clamp(min=0))
    return causal & _near(call, layer, queries[..., None], keys[:, None])


def _mask(session: LanguageSession, call: LanguageCall, i: int, hidden: Tensor) -> Any:
    kind = session.owner.kinds[i]
    if kind in RECURRENT:
        valid = call.layout.valid
        return valid.to(hidden.device).long() if valid.shape[1] > 1 else None
    full = None if call.masks is None else call.masks.get(kind)
    if full is not None:
        return _gathered(full, call.layout).to(hidden.device)
    config = session.module.config
    if kind in FULL:
        return causal_mask(config, hidden, call.mask(i), call.cache, i)
    return _as_added(session, _nearby(call, i).to(hidden.device), hidden)


def _near(call: LanguageCall, i: int, queries: Tensor, keys: Tensor) -> Tensor:
    """(B, L', K) bool: whether columns (B, 1, K) lie in the window or the chunk of others (B, L', 1), both counted in
    the sequence as it was given."""
    kind, config = call.owner.kinds[i], call.owner.lm.config
    if kind in SLIDING:
        return queries - keys < window_of(config)
    if kind not in CHUNKED:
        return torch.ones_like(queries - keys, dtype=torch.bool)
    given, chunk = call.valid, chunk_of(config)
    if call.history is not None:
        given = torch.cat([call.history, given], 1)
    elif call.offset:  # columns without a mask are tokens
        given = given.new_ones(given.shape[0], 1)
    start = (given.long().cumsum(1) == 0).sum(1)[
        :, None, None
    ]  # chunks begin behind padding on the left
    return (queries - start) // chunk == (keys - start) // chunk


def _nearby(call: LanguageCall, i: int) -> Tensor:
    """(B, 1, L', K) bool of a layer whose tokens see the columns of their window or chunk."""
    keys, valid = _keys(call, i)
    queries = call.columns(i)[:, -call.layout.valid.shape[1] :, None]
    keys = keys[:, None]
    seen = (keys <= queries) & _near(call, i, queries, keys) & valid[:, None]
    return _never_blind(seen)[:, None]


def _keys(call: LanguageCall, i: int) -> tuple[Tensor, Tensor]:
    """(B, K) int64 and bool: the columns that a layer attends to, of its cache and of this call, and whether each
    is a token."""
    number = columns_seen(call.cache, call.layout.valid.shape[1], i)
    keys, valid = call.columns(i), call.mask(i).bool()
    return (keys, valid) if number is None else (keys[:, -number:], valid[:, -number:])


def _never_blind(seen: Tensor) -> Tensor:
    """Let rows of padding see something, or their softmax would be NaN."""
    return seen | ~seen.any(-1, keepdim=True)


def _seen_elsewhere(session: LanguageSession, call: LanguageCall, i: int) -> Tensor:
    """(B, 1, L', K) bool of a layer that attends to the keys of an earlier one: those that are left here."""
    keys, valid = call.shown[session.owner.kinds[i]]
    columns, here = call.columns(i), call.mask(i).bool()
    batch, last = keys.shape[0], int(max(keys.max(), columns.max())) + 1
    left = torch.zeros(batch, last + 1, dtype=torch.bool, device=keys.device)
    left = left.scatter(1, torch.where(here, columns, last), True)
    valid = valid & left.gather(1, keys)
    queries = columns[:, -call.layout.valid.shape[1] :, None]
    keys = keys[:, None]
    seen = (keys <= queries) & _near(call, i, queries, keys) & valid[:, None]
    return _never_blind(seen)[:, None]


def _gathered(mask: Tensor, layout: SequenceLayout) -> Tensor:
    """The rows and columns of a (B, 1, L, K) mask that are left; what a static cache has room for stays behind."""
    room = mask.shape[3] - mask.shape[2]
    hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    for dimension in (2, 3):
        mask = follow(mask, layout.index, layout.valid, hidden, 0, dimension)
    if mask.dtype == torch.bool:
        mask = mask | ~mask.any(-1, keepdim=True)
    return torch.nn.functional.pad(mask, (0, room), value=hidden) if room else mask


def _as_added(session: LanguageSession, seen: Tensor, hidden: Tensor) -> Tensor:
    """A bool mask as the attention of the language model takes it."""
    if attention_implementation(session.module) != "eager":
        return seen
    return torch.zeros_like(seen, dtype=hidden.dtype).masked_fill(
        ~seen, torch.finfo(hidden.dtype).min
    )


def _rope(session: LanguageSession, call: LanguageCall, i: int, given: Any, hidden: Tensor) -> Any:
    if given is None:
        return None
    if call.moves(i):
        rotary, positions = session.module.rotary_emb, call.moved(i)
        if session.owner.mrope:
            positions = positions[-3:] if positions.dim() == 3 else positions.expand(3, -1, -1)
        kind = session.owner.kinds[i]
        typed = "layer_type" in inspect.signature(rotary.forward).parameters
        made = rotary(hidden, positions, kind) if typed else rotary(hidden, positions)
        if isinstance(made, Tensor):
            return made.to(hidden.device)
        return made[0].to(hidden.device), made[1].to(hidden.device)
    if call.layout is call.entered:
        return given
    index, valid = between(call.entered, call.layout)
    if isinstance(given, Tensor):  # complex numbers
        return follow(given, index, valid, 1)
    cos, sin = given
    return follow(cos, index, valid, 1), follow(sin, index, valid)
