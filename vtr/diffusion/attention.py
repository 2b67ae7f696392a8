"""One attention call of a wrapped transformer: what the processor asked for, as a site."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.compat.diffusers import DISPATCHED, parallel_of
from vtr.compat.torch import in_backward
from vtr.diffusion.parallel import Ulysses
from vtr.diffusion.site import Call
from vtr.kernels.precision import lowered

if TYPE_CHECKING:
    from vtr.diffusion.adapter import DiffusionWrapping


def compute(
    wrapping: DiffusionWrapping,
    index: int,
    layer: int,
    function: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Tensor:
    """Attention of layer ``layer`` of transformer ``index``, by its method or as it was.

    ``function`` is diffusers' dispatch, with (B, S, H, D), or torch's, with (B, H, S, D); the
    result is in its layout.
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
    if entry is None:
        wrapping.record(layer, q, k, {})
        return function(*args, **kwargs)
    frames, height, width = call.grid
    parallel = parallel_of(given.get("parallel_config"))
    ulysses = None
    if parallel is not None:
        ulysses = Ulysses(parallel, frames * height * width, q.shape[2], wrapping.family.text_first)
        q, k, v = (ulysses.gather(t) for t in (q, k, v))
    q, k, v = lowered(q, k, v)
    _check(wrapping, layer, call, q, given)
    # Only a backward pass may have another call's text; to look at a mask waits for the device.
    late = call.training and not wrapping.again and in_backward()
    if late and ulysses is None and given.get("attn_mask") is not None:
        call = _own_text(wrapping, call, given["attn_mask"])
    if wrapping.family.loops:
        number = wrapping.sample.get(layer, 0)
        wrapping.sample[layer] = number + 1
        sample = wrapping.batch - wrapping.rows + number % max(wrapping.rows, 1)
        call = dataclasses.replace(call, branch=f"{call.branch}/{sample}", text_valid=None)

    def dense() -> Tensor:
        if ulysses is None:
            out: Tensor = function(*args, **kwargs)
            return out if heads_first else out.transpose(1, 2)
        # The exchange is done: what is left is the plain call on all tokens of these heads.
        mask = _padding(call, q) if given.get("attn_mask") is not None else None
        rest = {
            **given,
            **dict(zip(DISPATCHED, (t.transpose(1, 2) for t in (q, k, v)), strict=False)),
        }
        out = function(**{**rest, "attn_mask": mask, "parallel_config": None})
        return out.transpose(1, 2)

    scale = given.get("scale")
    site = wrapping.site(
        index, layer, entry, call, (q, k, v),
        1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale), dense,
    )  # fmt: skip
    site.notes.pop("work", None)
    method: Any = entry.method
    out = site.dense() if method.is_dense(site) else method.attend(site)
    if wrapping.again and site.state:
        raise RuntimeError(
            f"{method.name} carries its state from step to step of a generation, which activation "
            "checkpointing cannot go back to: call disable_gradient_checkpointing() on the transformer"
        )
    if out.shape != q.shape or out.dtype != q.dtype:
        raise RuntimeError(
            f"{method.name} made {out.dtype} {tuple(out.shape)} of {q.dtype} {tuple(q.shape)}"
        )
    if call.steps is not None and call.step == call.steps - 1:
        # The run is over for this layer and branch, and not every pipeline says so at its end.
        wrapping.release(index, layer, entry, call)
    wrapping.record(layer, q, k, site.notes)
    if ulysses is not None:
        out = ulysses.scatter(out)
    return out if heads_first else out.transpose(1, 2)


def _own_text(wrapping: DiffusionWrapping, call: Call, mask: Tensor) -> Call:
    """The call with the padded text of ``mask`` (B, 1, 1, S), which this layer was given.

    Activation checkpointing runs a layer again in the backward pass; by then the transformer may have
    been called with another text.
    """
    frames, height, width = call.grid
    text = mask.shape[-1] - frames * height * width
    valid: Tensor | None = mask[:, 0, 0, :text] if call.text_first else mask[:, 0, 0, -text:]
    if text <= 0 or bool(mask.all()):
        valid = None
    return dataclasses.replace(call, text_valid=wrapping.same_text(valid))


def _padding(call: Call, q: Tensor) -> Tensor:
    """(B, 1, 1, S) bool: which keys are not padded text."""
    seen = q.new_ones(q.shape[0], 1, 1, q.shape[2], dtype=torch.bool)
    if call.text_valid is not None:
        text = call.text_valid.shape[1]
        part = slice(0, text) if call.text_first else slice(q.shape[2] - text, None)
        seen[:, 0, 0, part] = call.text_valid
    return seen


def _check(
    wrapping: DiffusionWrapping, layer: int, call: Call, q: Tensor, given: dict[str, Any]
) -> None:
    """Raise where the call is not what the family's calls are."""
    family = wrapping.family
    frames, height, width = call.grid
    text = q.shape[2] - frames * height * width
    if text > 0 and family.joint and not family.loops:
        wrapping.text = text if wrapping.text is None else wrapping.text
    other = wrapping.text is not None and text not in (0, wrapping.text)
    if call.training and (other or text < 0 or (text and not family.joint)):
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
            f"attention layer {layer} of {family.name} was given an attention mask of its own, which "
            "a sparse mask does not know: call the model without it, or name this layer in dense_layers"
        )
    if given.get("is_causal") or given.get("dropout_p"):
        raise RuntimeError(
            f"attention layer {layer} of {family.name} is causal or has dropout; set dropout to 0"
        )
