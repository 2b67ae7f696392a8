"""One attention call of a wrapped transformer: what the processor asked for, as a site."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.compat.diffusers import DISPATCHED, is_perturbed, parallel_of
from vtr.compat.torch import in_backward
from vtr.diffusion.parallel import Ulysses
from vtr.diffusion.run import DiffusionCall
from vtr.diffusion.site import CallFacts
from vtr.diffusion.wrapped import WrappedTransformer
from vtr.kernels.precision import lowered


def compute(
    wrapping: WrappedTransformer,
    layer: int,
    function: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    hidden: Tensor | None = None,
) -> Tensor:
    """Compute the attention of a layer, by its method or as it was.

    ``function`` is diffusers' dispatch, with (B, S, H, D), or torch's, with (B, H, S, D); the
    result is in its layout. ``hidden`` is what the processor was given, if the method looks at it.
    """
    given = {**dict(zip(DISPATCHED, args, strict=False)), **kwargs}
    heads_first = function is F.scaled_dot_product_attention
    q, k, v = (given[name] for name in DISPATCHED[:3])
    if not heads_first:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    call = wrapping.call
    if call is None or q.shape[2] != k.shape[2]:
        # No call of the whole transformer, or attention to something else (image prompts).
        return function(*args, **kwargs)

    entry = wrapping.by_layer.get(layer)
    if entry is None or is_perturbed():
        _record(wrapping, call, layer, q, k)
        return function(*args, **kwargs)
    facts = call.facts
    frames, height, width = facts.grid
    parallel = parallel_of(given.get("parallel_config"))
    ulysses = None
    if parallel is not None:
        ulysses = Ulysses(parallel, frames * height * width, q.shape[2], wrapping.family.text_first)
        q, k, v = (ulysses.gather(t) for t in (q, k, v))
    q, k, v = lowered(q, k, v)
    # Tokens on the other side of the grid than the text go to the text: the grid is at one end.
    shift = facts.extra if facts.text_first else -facts.extra
    if q.shape[2] == frames * height * width:
        shift = 0  # a block that sees the image alone
    if shift and ulysses is not None:
        raise RuntimeError(
            f"{facts.extra} tokens of reference images or history are in the sequence, which context "
            "parallelism splits: run this pipeline without it, or without the references"
        )
    q, k, v = (_rolled(t, shift) for t in (q, k, v))
    _check(wrapping, layer, call, q, given)
    # Only a backward pass may have another call's text; to look at a mask waits for the device.
    late = facts.training and not call.again and in_backward()
    if late and ulysses is None and given.get("attn_mask") is not None:
        facts = _own_text(wrapping, facts, given["attn_mask"])
    if hidden is not None and ulysses is not None:
        raise RuntimeError(
            f"{entry.method.name} reads the hidden states of a layer, which context parallelism splits "
            "between processes: leave one of the two out"
        )
    if wrapping.family.loops:
        sample = call.next_sample(layer)
        facts = dataclasses.replace(facts, branch=f"{facts.branch}/{sample}", text_valid=None)
        if hidden is not None:
            hidden = hidden[sample - call.batch + call.rows :][:1]

    def dense() -> Tensor:
        if ulysses is None:
            out: Tensor = function(*args, **kwargs)
            return _rolled(out if heads_first else out.transpose(1, 2), shift)
        # The exchange is done: what is left is the plain call on all tokens of these heads.
        mask = _seen(facts, q) if given.get("attn_mask") is not None else None
        rest = {
            **given,
            **dict(zip(DISPATCHED, (t.transpose(1, 2) for t in (q, k, v)), strict=False)),
        }
        out = function(**{**rest, "attn_mask": mask, "parallel_config": None})
        return out.transpose(1, 2)

    scale = given.get("scale")
    site = wrapping.attention_site(
        layer, entry, facts, (q, k, v),
        1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale), dense, hidden,
    )  # fmt: skip
    if ulysses is not None:
        site.first_head, site.all_heads = ulysses.rank * q.shape[1], ulysses.world * q.shape[1]
    site.notes.pop("work", None)
    method: Any = entry.method
    out = site.dense() if method.is_dense(site) else method.attend(site)
    if call.again and site.state:
        raise RuntimeError(
            f"{method.name} carries its state from step to step of a generation, which activation "
            "checkpointing cannot go back to: call disable_gradient_checkpointing() on the transformer"
        )
    if out.shape != q.shape or out.dtype != q.dtype:
        raise RuntimeError(
            f"{method.name}: attend() returned {out.dtype} {tuple(out.shape)}, and the attention of "
            f"this call is {q.dtype} {tuple(q.shape)} (batch, heads, tokens, head dim)"
        )
    if facts.steps is not None and facts.step == facts.steps - 1:
        # The run is over for this layer and branch, and not every pipeline says so at its end.
        wrapping.release(layer, entry, facts)
    _record(wrapping, call, layer, q, k)
    out = _rolled(out, -shift)
    if ulysses is not None:
        out = ulysses.scatter(out)
    return out if heads_first else out.transpose(1, 2)


def _rolled(x: Tensor, shift: int) -> Tensor:
    """(B, H, S, D) with the tokens rotated by ``shift`` places, as it is for 0."""
    return x.roll(shift, 2) if shift else x


def _record(
    wrapping: WrappedTransformer, call: DiffusionCall, layer: int, q: Tensor, k: Tensor
) -> None:
    call.record(layer, q, k, call.reduced.get(wrapping.block_of[layer]))


def _own_text(wrapping: WrappedTransformer, facts: CallFacts, mask: Tensor) -> CallFacts:
    """The facts with the padding of text of ``mask`` (B, 1, 1, S), which this layer was given.

    Activation checkpointing runs a layer again in the backward pass; by then the transformer may have
    been called with another text.
    """
    frames, height, width = facts.grid
    mask = mask.roll(facts.extra if facts.text_first else -facts.extra, -1)
    text = mask.shape[-1] - frames * height * width
    valid: Tensor | None = mask[:, 0, 0, :text] if facts.text_first else mask[:, 0, 0, -text:]
    if text <= 0 or bool(mask.all()):
        valid = None
    return dataclasses.replace(facts, text_valid=wrapping.same_text(valid))


def _seen(facts: CallFacts, q: Tensor) -> Tensor:
    """(B, 1, 1, S) bool: which keys are not padding of the text."""
    seen = q.new_ones(q.shape[0], 1, 1, q.shape[2], dtype=torch.bool)
    if facts.text_valid is not None:
        text = facts.text_valid.shape[1]
        part = slice(0, text) if facts.text_first else slice(q.shape[2] - text, None)
        seen[:, 0, 0, part] = facts.text_valid
    return seen


def _check(
    wrapping: WrappedTransformer,
    layer: int,
    call: DiffusionCall,
    q: Tensor,
    given: dict[str, Any],
) -> None:
    """Raise ``RuntimeError`` if the call is not what the calls of the family are."""
    family = wrapping.family
    frames, height, width = call.facts.grid
    text = q.shape[2] - frames * height * width
    if text > 0 and family.joint and not family.loops:
        call.text = text if call.text is None else call.text
    other = call.text is not None and text not in (0, call.text)
    if call.facts.training and (other or text < 0 or (text and not family.joint)):
        raise RuntimeError(
            f"attention layer {layer} of {family.name} has {q.shape[2]} tokens, which are not those of "
            f"the last call of the transformer ({frames} x {height} x {width}). Under activation "
            "checkpointing a layer runs again in the backward pass: go backward after each call, or "
            "give all calls before it one size"
        )
    if text < 0 or (text and not family.joint):
        raise RuntimeError(
            f"attention layer {layer} of {family.name} has {q.shape[2]} tokens, and the grid is "
            f"{frames} x {height} x {width} = {frames * height * width}: something else is in the "
            "sequence, so that the place of a token is not known. Remove the handle, or run this "
            "pipeline without what adds tokens (conditions, references)"
        )
    if given.get("attn_mask") is not None and not family.masked:
        raise RuntimeError(
            f"attention layer {layer} of {family.name} was given another attention mask, which "
            "a sparse mask does not know: call the model without it, or name this layer in dense_layers"
        )
    if given.get("is_causal") or given.get("dropout_p"):
        raise RuntimeError(
            f"attention layer {layer} of {family.name} is causal or has dropout; set dropout to 0"
        )
