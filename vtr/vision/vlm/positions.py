"""A KV cache whose entries are numbered anew, so that positions do not grow with a stream."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from vtr.compat.transformers import rope_type
from vtr.core.language_attention import Marks
from vtr.errors import UnsupportedModelError
from vtr.vision.vlm.attention import rotate
from vtr.vision.vlm.marks import MarkedCache, marked
from vtr.vision.vlm.store import EntryStore, store_of

if TYPE_CHECKING:
    from vtr.vision.vlm.wrapping import VLMWrapping

FIXED = ("default", "linear", "llama3", "yarn")  # frequencies do not depend on the sequence


def why_not(owner: VLMWrapping) -> str:
    """Say why entries of a model's cache cannot be numbered anew; empty if they can."""
    if owner.mrope:
        return "its positions have several axes (m-RoPE)"
    if owner.closed:
        return owner.closed
    kind = rope_type(owner.lm.config)
    if kind not in FIXED:
        return f"its rotary embedding is of the type {kind!r}, which depends on the length"
    return ""


def stores_of(owner: VLMWrapping, cache: Any) -> list[EntryStore]:
    """The stores of all layers.

    Raises:
        UnsupportedModelError: a layer has none, or they hold different numbers of entries.
    """
    found = [store_of(cache, i) for i in range(len(owner.layers))]
    stores = [s for s in found if s is not None]
    if (
        len(stores) < len(found)
        or len({s.number for s in stores}) > 1
        or any(s.ragged for s in stores)
    ):
        raise UnsupportedModelError(
            "the entries of a cache can be numbered anew if all layers and heads hold equally many"
        )
    return stores


def renumber(owner: VLMWrapping, cache: Any) -> None:
    """Number the entries of a cache anew: those that each head holds become all columns of a shorter sequence,
    and keys are turned to their new positions (StreamingLLM, arXiv 2309.17453, section 3.2).

    For a cache of one sequence without padding.
    """
    record = marked(cache) or MarkedCache()
    counted = record.counted
    for i, store in enumerate(stores_of(owner, cache)):
        marks = record.before(i, store.length, store.keys.shape[0], store.device)
        if marks.image.numel():
            counted = tuple(  # type: ignore[assignment]
                max(n, int(x.max()) + 1) for n, x in zip(counted, marks[1:], strict=True)
            )
        columns = store.columns()
        own = [_of_entries(x, columns) for x in marks]
        if store.known is not None:
            old = columns < store.known.kind.shape[2]
            index = columns.clamp(max=store.known.kind.shape[2] - 1)
            own = [x.where(~old, y.gather(2, index)) for x, y in zip(own, store.known, strict=True)]

        def turn(keys: Tensor, by: Tensor) -> Tensor:
            batch, heads, number, width = keys.shape
            flat = keys.float().view(batch * heads, 1, number, width)
            cos, sin = owner.lm.rotary_emb(flat, by.reshape(batch * heads, number))
            # Keys have the factor of their attention once, and must not get it twice.
            scaling = getattr(owner.lm.rotary_emb, "attention_scaling", 1.0)
            return rotate(flat, cos / scaling, sin / scaling).view_as(keys).to(keys.dtype)

        store.renumber(turn, Marks(*own))
    record.columns, record.counted = [], counted


def _of_entries(x: Tensor, columns: Tensor) -> Tensor:
    found = x.gather(1, columns.clamp(min=0).flatten(1))
    return found.view_as(columns)
