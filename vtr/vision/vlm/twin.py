"""Tiny random twins of vision-language models: the same class and architecture, with small sizes.

A twin shows in milliseconds on a CPU how a class behaves, whatever its model costs. Its configuration is that of the
model with small numbers: options (norms, biases, kinds of layers, rotary embedding, placeholders) stay.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

from vtr.compat.transformers import SHARED_KEYS
from vtr.compat.twins import (
    CHANNELS,
    CONVOLUTIONS,
    DEPTHS,
    HEADS,
    IDS,
    INDICES,
    LAYERS,
    PATCH,
    SHAPES,
    SIDE,
    SIZES,
    TRANSFORMER,
    VOCABULARY,
    WIDTH,
)

SMALL_IDS = 32  # ids below stay: padding, beginning and end


def shrunk(config: Any) -> Any:
    """Return a copy of a configuration with small sizes, of all its parts."""
    config = copy.deepcopy(config)
    parts = list(_parts(config))
    layers = [_own_layers(part) for part in parts]
    for part, own in zip(parts, layers, strict=True):
        _fewer_layers(part, own)
    ids = sorted({i for part in parts for i in _ids(part) if i >= SMALL_IDS})
    new = {old: VOCABULARY - 100 + n for n, old in enumerate(ids)}
    for part in parts:
        _smaller(part, new)
    for part, own in zip(parts, layers, strict=True):
        if own:
            part.per_layer_config = own
    return config


def twin(cls: Any, config: Any) -> Any:
    """Build a tiny model of a class in evaluation mode, float32 on the CPU; always the same weights.

    Args:
        cls: class of transformers.
        config: of a model of this class, of any size.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        model = cls(shrunk(config)).eval().float()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:  # large enough that a lost token shows in the outputs
                    parameter.normal_(0, 0.08)
        for module in model.modules():
            _sections(module)
    return model.requires_grad_(False)


def _parts(config: Any) -> Any:
    """The configuration and those of its parts."""
    yield config
    for value in vars(config).values():
        if hasattr(value, "to_dict"):
            yield from _parts(value)


def _ids(part: Any) -> Any:
    """Ids of tokens among the entries of a configuration."""
    for name, value in vars(part).items():
        if name.endswith(IDS):
            yield from (
                v for v in (value if isinstance(value, (list, tuple)) else [value]) if _number(v)
            )


def _own_layers(part: Any) -> dict[int, dict[str, Any]]:
    """Take the entries that differ between layers out of a configuration, small ones: layer -> its own."""
    found = part.to_dict().get("per_layer_config")
    if not isinstance(found, dict):
        return {}
    part.per_layer_config = None
    values = vars(part)
    out = {}
    for layer, own in found.items():
        out[int(layer)] = {
            name: max(1, SIZES[name] * value // (values.get(name) or value))
            if name in SIZES and _number(value)
            else value
            for name, value in own.items()
        }
    return out


def _fewer_layers(part: Any, own: dict[int, dict[str, Any]]) -> None:
    """Leave at most two layers of each kind, and what is told of each layer."""
    values = vars(part)
    names = [n for n in DEPTHS if _number(values.get(n)) and values[n] > LAYERS]
    if not names:
        return
    depth = values[names[0]]
    lists = {n: v for n, v in values.items() if isinstance(v, (list, tuple)) and v}
    each = {n: v for n, v in lists.items() if len(v) == depth and not n.endswith(INDICES[0])}
    some = {
        n: v
        for n, v in lists.items()
        if n not in each and n.endswith(INDICES) and all(_number(i) and 0 <= i < depth for i in v)
    }
    first = depth - (values.get(SHARED_KEYS) or 0)
    kinds = [
        (
            *(repr(v[i]) for v in each.values()),
            *(i in v for v in some.values()),
            repr(own.get(i)),
            i < first,
        )
        for i in range(depth)
    ]
    chosen: list[int] = []
    for i, kind in enumerate(kinds):
        if sum(kinds[c] == kind for c in chosen) < 2:
            chosen.append(i)
    chosen = sorted(
        [*chosen, *(i for i in range(depth) if i not in chosen)][: max(LAYERS, len(chosen))]
    )
    for n, v in each.items():
        values[n] = type(v)(v[i] for i in chosen)
    for n, v in some.items():
        values[n] = type(v)(new for new, old in enumerate(chosen) if old in v)
    for n in names:
        values[n] = len(chosen)
    if SHARED_KEYS in values:
        values[SHARED_KEYS] = sum(i >= first for i in chosen)
    left = {new: own[old] for new, old in enumerate(chosen) if old in own}
    own.clear()
    own.update(left)


def _smaller(part: Any, ids: Mapping[int, int]) -> None:
    values = vars(part)
    tied = _tied(values)
    for name, value in values.items():
        if name.endswith(IDS):
            if isinstance(value, (list, tuple)):
                values[name] = type(value)(ids.get(i, i) for i in value)
            elif _number(value):
                values[name] = ids.get(value, value)
        elif name in SIZES:
            if _number(value) and value > 0:  # of a vocabulary the ids of tokens are given anew
                most = SIZES[name]
                values[name] = most if most == VOCABULARY else min(value, most)
            elif isinstance(value, (list, tuple)):
                values[name] = type(value)(SIZES[name] if _number(i) else i for i in value)
        elif name == "vision_feature_layer" and isinstance(value, (list, tuple)):
            values[name] = type(value)(max(-LAYERS, min(LAYERS - 1, i)) for i in value)
        elif name == "projector_patch_to_query_dict":
            values[name] = {SIDE * SIDE: SIDE * SIDE // 4}
        elif name == "image_grid_pinpoints" and value:
            side = PATCH * SIDE
            values[name] = [[side, 2 * side], [2 * side, side], [2 * side, 2 * side]]
    values.update(tied)
    values.update(copy.deepcopy(SHAPES.get(getattr(part, "model_type", ""), {})))
    _timm(values)
    _rope(part)


def _timm(values: dict[str, Any]) -> None:
    """A tower of timm becomes a small one with outputs of the same form: tokens, or a map of features."""
    if "architecture" not in values:
        return
    given = values.get("model_args") or {}
    if "embed_dim" in given:
        values["model_args"] = {**given, **TRANSFORMER}
    else:
        values.update(architecture=CONVOLUTIONS, model_args=None, hidden_size=CHANNELS)


def _tied(values: Mapping[str, Any]) -> dict[str, int]:
    """Sizes that follow from others in the model, and so in its twin."""
    width, heads, head = (values.get(n) for n in ("hidden_size", "num_attention_heads", "head_dim"))
    new: dict[str, int] = {}
    if not (_number(width) and _number(heads)):
        return new
    width, heads = width or 1, heads or 1
    small, fewer = min(width, WIDTH), min(heads, HEADS)
    axes = "mrope" in repr(values.get("rope_parameters"))
    if head and head == values.get("qk_rope_head_dim"):
        new["head_dim"] = min(head, SIZES["qk_rope_head_dim"])
    elif head == width // heads and not axes:
        new["head_dim"] = small // fewer
    if values.get("num_key_value_heads") == heads:
        new["num_key_value_heads"] = fewer
    if values.get("intermediate_size") == 4 * width:
        new["intermediate_size"] = 4 * small
    return new


def _sections(module: Any) -> None:
    """Sections of a rotary embedding that its class chose for heads of the usual size."""
    sections, frequencies = (
        getattr(module, "mrope_section", None),
        getattr(module, "inv_freq", None),
    )
    if sections and frequencies is not None and len(frequencies) < sum(sections):
        module.mrope_section = _rescaled(sections, len(frequencies))


def _rope(part: Any) -> None:
    """Sections of a rotary embedding with several axes, for the smaller heads."""
    rope = getattr(part, "rope_parameters", None)
    for found in [rope, *rope.values()] if isinstance(rope, dict) else []:
        sections = found.get("mrope_section") if isinstance(found, dict) else None
        if not sections:
            continue
        head = getattr(part, "qk_rope_head_dim", None) or getattr(part, "head_dim", None)
        head = head or part.hidden_size // part.num_attention_heads
        half = int(head * (found.get("partial_rotary_factor") or 1)) // 2
        found["mrope_section"] = _rescaled(sections, half)


def _rescaled(sections: Any, half: int) -> Any:
    """Sections of a smaller sum; those that are equal stay so, since some classes interleave them."""
    new = [max(1, s * half // sum(sections)) for s in sections]
    single = next((i for i, s in enumerate(sections) if list(sections).count(s) == 1), 0)
    new[single] += half - sum(new)
    return type(sections)(new)


def _number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
