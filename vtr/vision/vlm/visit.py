"""The site of a method at the prompt and in the decoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vtr.core.language_site import Frames, LanguageSite
from vtr.core.wrapping import Entry
from vtr.vision.vlm.rows import Seen, TextRows, VisualQKV
from vtr.vision.vlm.sequence import rows_of

if TYPE_CHECKING:
    from vtr.vision.vlm.call import LanguageCall


def language_site(
    call: LanguageCall, entry: Entry, name: str, layer: int, place: str, hidden: Tensor
) -> LanguageSite:
    """Build the site that a method sees at a visit.

    Args:
        name: ``prompt`` or ``decoder``.
        hidden: (B, L, C) hidden states of the sequence here.
    """
    layout, owner = call.layout, call.owner
    tokens = rows_of(hidden, layout.slots)
    text = layout.text()
    text_valid = text >= 0
    order = torch.where(text_valid, text, hidden.shape[1])
    first = torch.where(layout.valid_slots, layout.slots, hidden.shape[1]).amin(1, keepdim=True)
    key = owner.entries.index(entry)
    captures = owner.captures
    signals: dict[str, Any] = {"rows": None, "qkv": None}
    if name == "decoder" and not owner.closed:
        where = call.seen
        if place == "start" and call.rope is not None:
            where = Seen(layer, hidden, call.rope, layout, False)
        signals = {
            "rows": TextRows(call, where, text),
            "qkv": VisualQKV(call, where),
            "scale": owner.scale(layer),
        }
    spread = captures.spreader(call)
    return LanguageSite(
        site=name,
        layer=layer,
        info=owner.info,
        hidden=tokens,
        map=call.map,
        valid=layout.valid_slots if call.map.has_padding else None,
        grid=call.grid(),
        memory=call.memory.setdefault(key, captures.memory(key)),
        training=owner.root.training,
        modules=entry.modules_like(hidden),
        notes=owner.tracing.notes,
        entry=call.entry,
        text=rows_of(hidden, text),
        text_valid=text_valid,
        text_after=text_valid & (order > first),
        images=call.images(),
        frames=Moments(call, bool(entry.options.get("video"))),
        spread=spread,
        **signals,
    )


class Moments:
    """Frames of a call, made when a method asks for them."""

    def __init__(self, call: LanguageCall, joined: bool) -> None:
        self.call, self.joined = call, joined

    def __call__(self) -> Frames:
        return self.call.frames(self.joined)
