"""The entry of the language model: cuts before it, in the pictures and in the towers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vtr.core.method import Reduction
from vtr.core.tokens import TokenMap, top_indices
from vtr.errors import UnsupportedMethodError
from vtr.vision.vlm.frames import KINDS
from vtr.vision.vlm.pictures import regrid
from vtr.vision.vlm.refusals import for_videos

if TYPE_CHECKING:
    from vtr.vision.vlm.call import LanguageCall
    from vtr.vision.vlm.wrapping import VLMWrapping


def without_repetitions(owner: VLMWrapping, call: LanguageCall, embeds: Tensor) -> Tensor:
    """The prompt with the tokens of smaller pictures, each once.

    Raises:
        UnsupportedMethodError: the processor has left out tokens of the larger pictures.
    """
    captures = owner.captures
    coarse = {kind: c.coarse for kind, c in captures.of.items() if c.coarse is not None}
    if not coarse:
        return embeds
    slots, valid = call.layout.slots, call.layout.valid_slots
    moves = torch.zeros(*slots.shape, 3, dtype=torch.long, device=embeds.device)
    for kind, found in coarse.items():
        if captures.of[kind].stays is not None:
            raise UnsupportedMethodError(
                f"{found.entry.method.name} makes the frames smaller, and the processor has left "
                "tokens of the larger ones out: pass it use_token_compression=False"
            )
        flat = found.moves.to(embeds.device, non_blocking=True)
        captures.spreader(call).write(moves, kind, flat)
    stays = valid & (moves[..., 0] == 0)
    kept, has_padding = top_indices(stays.float(), stays.sum(1), stays)
    place = torch.arange(slots.shape[1], device=embeds.device) + moves[..., 0]
    source = (stays.long().cumsum(1) - 1).gather(1, place.clamp(0, slots.shape[1] - 1))
    step = TokenMap.merged(kept, source.masked_fill(~valid, -1), has_padding)
    entry = next(iter(coarse.values())).entry
    embeds = call.commit(entry, "prompt", 0, embeds, Reduction(step))
    numbered = entry.options.get("positions") or entry.token_method.positions_at("prompt")
    if owner.mrope and numbered == "compact" and call.positions.dim() == 3:
        call.positions, call.layout.tail = regrid(
            call.positions.expand(-1, len(slots), -1), call.valid, slots, moves
        )
    return embeds


def cut_by_tower(owner: VLMWrapping, call: LanguageCall, embeds: Tensor) -> Tensor:
    """The prompt without the visual tokens whose patches were cut inside the vision tower.

    Raises:
        RuntimeError: the tower ran again, without a cache, and other tokens were chosen.
        UnsupportedMethodError: patches that are left and patches that are gone became one visual token.
    """
    captures = owner.captures
    cut = {kind: c for kind, c in captures.of.items() if c.left is not None}
    if not cut:
        return embeds
    left = torch.ones(call.layout.slots.shape, device=embeds.device)
    for kind, capture in cut.items():
        assert capture.left is not None
        captures.spreader(call).lay(left, kind, capture.left)
        left = left.nan_to_num(float(capture.separators))
    names = dict.fromkeys(name for capture in cut.values() for name in capture.cutters)
    joined = (left > 0) & (left < 1)
    if bool(joined.any()):
        _refuse_joined(owner, call, list(names), joined)
    keep = (left > 0.5) & call.layout.valid_slots
    kept, has_padding = top_indices(keep.float(), keep.sum(1), keep)
    entry = next(e for e in owner.active if e.method.name in names)
    step = TokenMap.keep(kept, call.map.n_out, has_padding)
    call.choices["tower"] = Reduction(step)
    if call.repeats is not None:
        before = call.repeats.get("tower")
        if before is None or before.map is None or not torch.equal(before.map.kept, kept):
            raise RuntimeError(
                f"{', '.join(names)} chose other tokens in the vision tower than in the call of "
                "generate before: without a cache this version of transformers runs the tower "
                "in every call. Use use_cache=True, or a method that chooses the same each time"
            )
    return call.commit(entry, "prompt", 0, embeds, Reduction(step))


def _refuse_joined(
    owner: VLMWrapping, call: LanguageCall, names: list[str], joined: Tensor
) -> None:
    """Patches that are left and patches that are gone became one visual token."""
    kinds = call.kinds.gather(1, call.arrived.clamp(min=0))
    if bool((joined & (kinds == KINDS["video"])).any()):
        raise UnsupportedMethodError(
            f"{', '.join(names)} cut inside the vision tower, which does not work for videos here: "
            f"{owner.family.pooled}. For videos use one of {for_videos(owner, names)}"
        )
    raise UnsupportedMethodError(
        f"{', '.join(names)} cut inside the vision tower, but the features of this image are resized to "
        "fewer tokens: use a smaller image, or a method that cuts at the prompt or in the language model"
    )
