"""Merging tokens inside a block of a diffusion transformer: merge, compute, give each token its result.

The map is chosen from the block's input. Around attention the tokens are merged before the
projections and restored after the output projection; a merged token has the rotary position of its
representative (of its destination, if a method merges by a matrix). Around the MLP likewise. Residual
connections stay at full length, and text is not touched.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from vtr.compat.diffusers import batch_parts_of
from vtr.core.method import Method, Reduction
from vtr.core.tokens import take
from vtr.core.trace import StageRecord
from vtr.diffusion.families import stream_of
from vtr.diffusion.wrapped import WrappedTransformer


def parts_of(method: Method) -> frozenset[str]:
    """Around what a method merges: ``"attention"``, ``"cross"``, ``"mlp"``."""
    parts: frozenset[str] = getattr(method, "parts", lambda: frozenset({"attention"}))()
    return parts


def enter(
    wrapping: WrappedTransformer, number: int, block: nn.Module, args: Any, kwargs: Any
) -> None:
    """Let the method choose the map, at the input of a block."""
    call = wrapping.call
    if call is None:
        return
    call.reduced.pop(number, None)
    entry = wrapping.by_block[number]
    hidden, alone = _input(wrapping, number, block, args, kwargs)
    grid = call.facts_at(number).grid
    frames, height, width = grid
    tokens = frames * height * width
    text = hidden.shape[1] - tokens
    if text > 0 and not alone and wrapping.family.joint and not call.facts.extra:
        hidden = hidden[:, text:] if wrapping.family.text_first else hidden[:, :tokens]
    if hidden.shape[1] != tokens:
        raise RuntimeError(
            f"block {number} of {wrapping.family.name} has {hidden.shape[1]} tokens, and the grid is "
            f"{frames} x {height} x {width} = {tokens}: {entry.method.name} cannot merge if "
            "something else is in the sequence, or if it is split between devices"
        )
    site: Any = wrapping.block_site(number, hidden)
    if call.again and site.state:
        raise RuntimeError(
            f"{entry.method.name} carries its state from step to step of a generation, which activation "
            "checkpointing cannot go back to: call disable_gradient_checkpointing() on the transformer, or "
            "train() if it is in training"
        )
    reduction = entry.token_method.reduce(site)
    if reduction is None or reduction.map is None:
        return
    if reduction.map.has_padding or reduction.map.n_in != tokens:
        raise RuntimeError(
            f"{entry.method.name} returned {reduction.map!r} for {tokens} tokens; the map at a block must "
            "start at all of them and have as many slots for every sample"
        )
    call.reduced[number] = reduction
    made = reduction.map
    record = StageRecord("block", number, entry.method.name, tokens, made.n_out, made, made, grid)
    call.trace.stages.append(record)


def _input(
    wrapping: WrappedTransformer, number: int, block: nn.Module, args: Any, kwargs: Any
) -> tuple[Tensor, bool]:
    """The tokens that a block attends to, and whether text is apart from them."""
    given = inspect.signature(type(block).forward).bind(block, *args, **kwargs).arguments
    first, name = next(n for n in given if n != "self"), ""
    if wrapping.family.streams:
        name = stream_of(wrapping.family, wrapping.members[0], number)
    return given[name or first], given.get("encoder_hidden_states") is not None


def _reduction(wrapping: WrappedTransformer, number: int) -> Reduction | None:
    """Return the merging of a block's tokens in this call, or None."""
    return None if wrapping.call is None else wrapping.call.reduced.get(number)


def _merge(wrapping: WrappedTransformer, reduction: Reduction, x: Tensor) -> Tensor:
    """(B, N, C), or joint (B, T + N, C), with the image or video tokens merged."""
    map = reduction.map
    assert map is not None
    text, x = _split(wrapping, x, map.n_in)
    if reduction.merging is not None:
        made = reduction.merging.merge(x)
    elif reduction.weights is None:
        made = map.gather(x)
    else:
        made = map.merge(x, reduction.weights, reduction.normalize, reduction.keep_norm)
    return _join(wrapping, text, made.to(x.dtype))


def _restore(wrapping: WrappedTransformer, reduction: Reduction, x: Tensor) -> Tensor:
    assert reduction.map is not None
    text, x = _split(wrapping, x, reduction.map.n_out)
    return _join(wrapping, text, (reduction.merging or reduction.map).restore(x))


def _split(wrapping: WrappedTransformer, x: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    text = x.shape[1] - tokens
    if text < 0:
        raise RuntimeError(
            f"{x.shape[1]} tokens instead of the {tokens} that were merged: the sequence is split between "
            "processes inside the block, and merging needs all of it"
        )
    if wrapping.family.text_first:
        return x[:, :text], x[:, text:]
    return x[:, tokens:], x[:, :tokens]


def _join(wrapping: WrappedTransformer, text: Tensor, x: Tensor) -> Tensor:
    if text.shape[1] == 0:
        return x
    return torch.cat([text, x] if wrapping.family.text_first else [x, text], 1)


def attention(
    wrapping: WrappedTransformer, layer: int, function: Any, args: Any, kwargs: Any
) -> Any:
    """A processor's ``function`` on merged tokens, its result for all of them."""
    number = wrapping.block_of[layer]
    reduction = _reduction(wrapping, number)
    if reduction is None or "attention" not in parts_of(wrapping.by_block[number].method):
        return function(*args, **kwargs)
    given = inspect.signature(function).bind(*args, **kwargs)
    values = given.arguments
    map = reduction.map
    assert map is not None
    text = values.get("encoder_hidden_states")
    alike = text is values["hidden_states"]  # given twice: its keys are of the same tokens
    text = None if alike else text
    length = values["hidden_states"].shape[1] + (0 if text is None else text.shape[1])
    values["hidden_states"] = _merge(wrapping, reduction, values["hidden_states"])
    if alike:
        values["encoder_hidden_states"] = values["hidden_states"]
    mask = values.get("attention_mask")
    if wrapping.family.masked and isinstance(mask, Tensor):
        values["attention_mask"] = _narrowed(wrapping, mask, length, map.n_in - map.n_out)
    name = wrapping.family.rope or ""
    rope, kept = values.get(name), (reduction.merging or map).kept
    if rope is None:
        out = function(*given.args, **given.kwargs)
    elif (batched := _batched(wrapping, rope, map.n_in, kept)) is not None:
        values[name] = batched
        out = function(*given.args, **given.kwargs)
    else:
        out = _by_sample(wrapping, function, given, name, map.n_in, kept)
    if isinstance(out, tuple):
        return (_restore(wrapping, reduction, out[0]), *out[1:])
    return _restore(wrapping, reduction, out)


def _narrowed(wrapping: WrappedTransformer, mask: Tensor, length: int, less: int) -> Tensor:
    """A mask (B, S) or (B, 1, 1 or S, S) of the whole sequence for the merged one; all image or video tokens
    are seen, so that ``less`` at its end may go. A mask of the text alone stays."""
    for axis in (-1, -2) if mask.ndim == 4 else (-1,):
        if mask.shape[axis] == length:
            start = 0 if wrapping.family.text_first else less
            mask = mask.narrow(axis, start, length - less)
    return mask


def _batched(wrapping: WrappedTransformer, rope: Any, tokens: int, kept: Tensor) -> Any:
    """Rotary factors with an axis for samples, (1 or B, N, ...) or (1 or B, H, N, ...), of the tokens ``kept``
    (B, M), or None. A joint sequence has those of the text beside them."""
    if isinstance(rope, Tensor):
        made = _batched(wrapping, (rope,), tokens, kept)
        return None if made is None else made[0]
    (batch, _), joint, found = kept.shape, wrapping.family.joint, []
    for f in rope:
        axes = [a for a in (1, 2) if a < f.ndim - 1 and f.shape[a] >= tokens]
        axes = [a for a in axes if joint or f.shape[a] == tokens]
        if not axes or f.shape[0] not in (1, batch):
            return None
        f = f.expand(batch, *f.shape[1:]).movedim(axes[0], 1)
        text, x = _split(wrapping, f, tokens)
        found.append(_join(wrapping, text, take(x, kept)).movedim(1, axes[0]))
    return tuple(found)


def _positions(
    wrapping: WrappedTransformer, rope: Any, tokens: int, kept: Tensor
) -> tuple[Tensor, ...]:
    """Rotary factors (N, ...) or joint (T + N, ...) of one sample's tokens ``kept`` (M,)."""
    made = []
    for number, f in enumerate(rope):
        text = f.shape[0] - tokens
        if wrapping.family.split_rope and number:
            made.append(f)  # the text's own
            continue
        if text < 0:
            raise RuntimeError(
                f"the rotary factors of {wrapping.family.name} are {tuple(f.shape)} for {tokens} "
                "tokens: those of some tokens cannot be gathered"
            )
        first = text if wrapping.family.text_first else 0
        made.append(torch.cat([f[:first], f[first + kept], f[first + tokens :]]))
    return tuple(made)


def _by_sample(
    wrapping: WrappedTransformer, function: Any, given: Any, name: str, tokens: int, kept: Tensor
) -> Any:
    """One call per sample: rotary factors without an axis for samples cannot differ between them.

    A processor that treats parts of the batch differently gets the sample once for each part, and
    its result for the sample's part is taken.
    """
    values = dict(given.arguments)
    outs: list[Any] = []
    parts, batch = batch_parts_of(values.get("self")), kept.shape[0]
    for b in range(batch):
        for key in _PER_SAMPLE & values.keys():
            held = values[key]
            if isinstance(held, Tensor):
                given.arguments[key] = held[b : b + 1].expand(parts, *held.shape[1:])
        given.arguments[name] = _positions(wrapping, values[name], tokens, kept[b])
        made = function(*given.args, **given.kwargs)
        own = slice(b * parts // batch, b * parts // batch + 1)
        outs.append(tuple(x[own] for x in made) if isinstance(made, tuple) else made[own])
    if isinstance(outs[0], tuple):
        return tuple(torch.cat(pieces) for pieces in zip(*outs, strict=True))
    return torch.cat(outs)


_PER_SAMPLE = frozenset(
    {
        "hidden_states",
        "encoder_hidden_states",
        "attention_mask",
        "encoder_hidden_states_mask",
    }
)


def before(wrapping: WrappedTransformer, number: int, args: tuple[Any, ...]) -> Any:
    """The arguments of an MLP, or of cross-attention, with merged tokens."""
    reduction = _reduction(wrapping, number)
    if reduction is None:
        return None
    return (_merge(wrapping, reduction, args[0]), *args[1:])


def after(wrapping: WrappedTransformer, number: int, out: Tensor) -> Any:
    """Its result for all tokens."""
    reduction = _reduction(wrapping, number)
    return None if reduction is None else _restore(wrapping, reduction, out)
