"""Qwen3-VL adds features of the tower to visual tokens after its first layers: to those that are left."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vtr.compat.transformers import DEEPSTACK, DEEPSTACK_FEATURES, DEEPSTACK_MASKS
from vtr.vision.vlm.sequence import SequenceLayout, between, follow

if TYPE_CHECKING:
    from vtr.vision.vlm.language import LanguageSession


def narrowed(given: dict[str, Any], layout: SequenceLayout) -> dict[str, Any]:
    """Masks and features among the arguments of a language model, for the tokens that are left."""
    stack, features = given.get(DEEPSTACK_MASKS), given.get(DEEPSTACK_FEATURES)
    if stack is None:
        return {}
    new: dict[str, Any] = {DEEPSTACK_MASKS: follow(stack, layout.index, layout.valid, False)}
    if features is not None:
        stays = _kept(layout, stack)
        new[DEEPSTACK_FEATURES] = [f[stays.to(f.device)] for f in features]
    return new


def deepstack(session: LanguageSession, hidden: Tensor, masks: Tensor, features: Tensor) -> Tensor:
    """Qwen3-VL adds features of the tower after its first layers, for tokens that are left."""
    call = session.call
    if call is not None and call.layout is not call.entered:
        call.to(hidden.device)
        masks = masks.to(hidden.device)
        index, valid = between(call.entered, call.layout)
        stays = torch.zeros_like(masks)
        b, s = valid.nonzero(as_tuple=True)
        stays[b.to(masks.device), index[b, s].to(masks.device)] = True
        features = features[stays[masks].to(features.device)]
        masks = follow(masks, index, valid, False)
    return getattr(type(session.module), DEEPSTACK)(session.module, hidden, masks, features)


def _kept(layout: SequenceLayout, visual: Tensor) -> Tensor:
    """(number of visual tokens,) bool: which of the entries of a (B, L) mask are left."""
    stays = torch.zeros_like(visual)
    b, s = layout.valid.nonzero(as_tuple=True)
    stays[b, layout.index[b, s]] = True
    return stays[visual]
