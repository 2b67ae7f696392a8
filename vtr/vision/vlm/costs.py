"""FLOPs and KV bytes of a language model's prefill, from the shapes of its layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from vtr.compat.transformers import layer_config
from vtr.vision.encoders.blocks import linear_flops

if TYPE_CHECKING:
    from vtr.vision.vlm.call import PrefillRecord
    from vtr.vision.vlm.wrapping import VLMWrapping


def tower_costs(owner: VLMWrapping, last: PrefillRecord) -> tuple[int, int] | None:
    """FLOPs of towers and projectors for the pictures as they were given and as the towers saw them, per
    sample; None if they were the same.

    In a tower with windows (Qwen2.5-VL) a patch attends to as many patches as a window has, also if
    windows at the edge have fewer.
    """
    totals = [0.0, 0.0]
    for kind, capture in last.captures.of.items():
        made: dict[tuple[int, int], float] = {}
        for before, after, patches in [] if capture.coarse is None else capture.coarse.sizes:
            for i, tokens in enumerate((before, after)):
                key = (tokens, patches)
                if key not in made:
                    made[key] = _picture_flops(owner, kind, *key)
                totals[i] += made[key]
    if not totals[0]:
        return None
    batch = last.valid.shape[0]
    return round(totals[0] / batch), round(totals[1] / batch)


def _picture_flops(owner: VLMWrapping, kind: str, tokens: int, patches: int) -> float:
    """Of a picture of so many visual tokens, of so many patches each."""
    inner, tower = owner.inner, cast(Any, owner.family.tower(owner.inner, kind))
    session, n = owner.towers.get(kind), tokens * patches
    if session is not None:
        total = float(session.picture_flops(n))
    else:
        layers, width = tower.encoder.layers, tower.config.hidden_size
        total = float(sum(n * linear_flops(layer) + 4 * n * n * width for layer in layers))
    convolutions = (m for m in tower.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d)))
    embedding = next(convolutions, None)
    total += 0 if embedding is None else 2 * embedding.weight.numel() * n
    # In some families the merger of patches is a part of the tower.
    joins = [m for name, m in tower.named_children() if "merger" in name]
    towers = {owner.family.tower(inner, k) for k in ("image", "video")}
    joins += [m for m in inner.children() if m not in towers and m is not owner.lm]
    return total + tokens * sum(map(linear_flops, joins))


Lengths = list[tuple[Tensor, Tensor]]  # per layer, (B,) tokens in the attention, and in the MLP


def language_costs(owner: VLMWrapping, last: PrefillRecord) -> dict[str, Any]:
    """``language`` FLOPs and ``kv_bytes`` of the last prefill, dense and reduced, per sample.

    Per layer and sample with n tokens after p cached ones: two per multiply-add of every linear layer,
    and 4 n (p + n) per head dimension for the attention (its causal half is not taken off, as PyTorch's
    counter does); the vocabulary is read out for one token. In a layer with sparse attention the square
    is multiplied by the density, the share of the causal pairs that was computed, and what finding the
    mask cost is added, and so is the second run of a contrast. Bytes are those of keys and values in the
    model's dtype; in a layer in which a method chose the entries of the cache, those of all tensors that it
    holds, and the dense bytes then count earlier turns as well.

    Returns ``finding`` as well if masks were found: the FLOPs of that, a part of ``language``.
    """
    dense: Lengths = [(last.valid.sum(1),) * 2] * len(owner.layers)
    reduced: Lengths = [
        (valid.sum(1), last.halved.get(i, valid).sum(1)) for i, valid in enumerate(last.entered)
    ] or dense
    held = [(last.held.get(i, n), m) for i, (n, m) in enumerate(reduced)]
    entries = dense
    if last.stored:  # what is chosen among has the columns of earlier turns
        entries = [(n + last.past.to(n), m) for n, m in dense]
        held = [(n + last.past.to(n), m) for n, m in held]
    root: Any = owner.root
    head = root.get_output_embeddings()
    vocabulary = 0 if head is None else linear_flops(head)
    notes = owner.trace.notes.get("attention", {})
    found = any("finding" in note for note in notes.values())
    spent = sum(float(note.get("spent", 0)) for note in notes.values()) / last.valid.shape[0]
    whole = _flops(owner, dense, last.past, {}) + vocabulary
    part = _flops(owner, reduced, last.past, notes) + vocabulary + spent
    batch = last.valid.shape[0]
    sizes = [last.stored.get(i, batch * size) / batch for i, size in enumerate(_bytes(owner, held))]
    kv = [sum(_bytes(owner, entries)), sum(sizes)]
    second = owner.trace.notes.get("logits", {}).get("tokens")
    if second is not None:  # a contrast runs the prompt a second time
        again: Lengths = [(second, second)] * len(owner.layers)
        part += _flops(owner, again, last.past, {}) + vocabulary
        kv[1] += sum(_bytes(owner, again))
    costs: dict[str, Any] = {
        "language": (round(whole), round(part)),
        "kv_bytes": tuple(map(round, kv)),
    }
    return costs | ({"finding": round(spent)} if found else {})


def _flops(
    owner: VLMWrapping, lengths: Lengths, past: Tensor, notes: Mapping[int, Mapping[str, Any]]
) -> float:
    """Compute those of the layers; ``notes`` have the ``density`` of layers with sparse attention."""
    total, sizes = 0.0, owner.info.language
    assert sizes is not None
    for i, (layer, (n, m)) in enumerate(zip(owner.layers, lengths, strict=True)):
        own, number = layer_config(owner.lm.config, i), n.double()
        width = own.num_attention_heads * (getattr(own, "head_dim", None) or sizes.head_dim)
        share = torch.as_tensor(notes.get(i, {}).get("density", 1.0)).to(number)
        square = 4 * number * (number + past.to(number)) * width * share
        mlp = linear_flops(layer.mlp) if hasattr(layer, "mlp") else 0
        linear = (linear_flops(layer) - mlp) * number + mlp * m.double()
        total += float((linear + square).mean())
    return total


def _bytes(owner: VLMWrapping, lengths: Lengths) -> list[float]:
    """Compute those of each layer, per sample."""
    sizes = owner.info.language
    assert sizes is not None
    # Of the embedding, whose dtype is that of the keys even if linear layers are quantised.
    size = owner.lm.get_input_embeddings().weight.element_size()
    out = []
    for i, (n, _) in enumerate(lengths):
        own = layer_config(owner.lm.config, i)
        heads = getattr(own, "num_key_value_heads", None) or sizes.kv_heads
        per_token = 2 * heads * (getattr(own, "head_dim", None) or sizes.head_dim) * size
        out.append(float(n.double().mean()) * per_token if owner.sources[i] == i else 0.0)
    return out
