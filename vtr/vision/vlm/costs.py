"""FLOPs and KV bytes of a language model's prefill, from the shapes of its layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from vtr.vision.blocks import linear_flops

if TYPE_CHECKING:
    from vtr.vision.vlm.language import Last
    from vtr.vision.vlm.wrapping import VLMWrapping


Lengths = list[tuple[Tensor, Tensor]]  # per layer, (B,) tokens in the attention, and in the MLP


def language_costs(owner: VLMWrapping, last: Last) -> dict[str, Any]:
    """``language`` FLOPs and ``kv_bytes`` of the last prefill, dense and reduced, per sample.

    Per layer and sample with n tokens after p cached ones: two per multiply-add of every linear layer,
    and 4 n (p + n) per head dimension for the attention (its causal half is not taken off, as PyTorch's
    counter does); the vocabulary is read out for one token. Bytes are those of keys and values in the
    model's dtype.
    """
    dense: Lengths = [(last.live.sum(1),) * 2] * len(owner.layers)
    reduced: Lengths = [
        (live.sum(1), last.halved.get(i, live).sum(1)) for i, live in enumerate(last.entered)
    ] or dense
    held = [(last.held.get(i, n), m) for i, (n, m) in enumerate(reduced)]
    root: Any = owner.root
    head = root.get_output_embeddings()
    vocabulary = 0 if head is None else linear_flops(head)
    return {
        "language": tuple(
            round(_flops(owner, lengths, last.past) + vocabulary) for lengths in (dense, reduced)
        ),
        "kv_bytes": tuple(round(_bytes(owner, lengths)) for lengths in (dense, held)),
    }


def _flops(owner: VLMWrapping, lengths: Lengths, past: Tensor) -> float:
    total = 0.0
    width = owner.info.extra["lm_heads"] * owner.info.extra["lm_head_dim"]
    for layer, (n, m) in zip(owner.layers, lengths, strict=True):
        number = n.double()
        square = 4 * number * (number + past.to(number)) * width
        mlp = linear_flops(layer.mlp)
        linear = (linear_flops(layer) - mlp) * number + mlp * m.double()
        total += float((linear + square).mean())
    return total


def _bytes(owner: VLMWrapping, lengths: Lengths) -> float:
    extra = owner.info.extra
    # Of the embedding, whose dtype is that of the keys also where linear layers are quantised.
    size = owner.lm.get_input_embeddings().weight.element_size()
    per_token = 2 * extra["lm_kv_heads"] * extra["lm_head_dim"] * size
    return sum(float(n.double().mean()) * per_token for n, _ in lengths)
