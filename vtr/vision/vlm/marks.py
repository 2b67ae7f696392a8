"""The visual tokens among the columns of a KV cache, for methods inside the attention of later calls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.core.language_attention import Marks
from vtr.vision.vlm.cache import MARKS, follow_rows

if TYPE_CHECKING:
    from vtr.vision.vlm.call import LanguageCall
    from vtr.vision.vlm.sequence import SequenceLayout


class Columns(NamedTuple):
    """Marks of the columns of all layers from ``first`` on."""

    first: int
    marks: Marks


class MarkedCache:
    """The record that a cache carries. It holds columns up to the last prompt; what came later is text.

    Attributes:
        columns: in the order of layers.
        state: what methods keep, by method and layer; tensors have the batch first.
        counted: images and frames that came before the columns, if these were numbered anew.
    """

    def __init__(self) -> None:
        self.columns: list[Columns] = []
        self.state: dict[Any, dict[str, Any]] = {}
        self.counted = (0, 0)

    @property
    def rows(self) -> int | None:
        """Samples that are recorded."""
        return self.columns[0].marks.kind.shape[0] if self.columns else None

    def length(self, layer: int) -> int:
        """Columns of a layer up to the end of the last prompt with images or videos."""
        found = [c.marks for c in self.columns if c.first <= layer]
        return found[-1].kind.shape[1] if found else 0

    def before(self, layer: int, past: int, batch: int, device: torch.device) -> Marks:
        """The marks of the first ``past`` columns of a layer; what came after the last prompt is text."""
        found = [c.marks for c in self.columns if c.first <= layer]
        if not found:
            return nothing(batch, past, device)
        kind, image, frame = (x.to(device) for x in found[-1])
        more = past - kind.shape[1]  # negative if the cache was cropped
        return Marks(
            *(F.pad(x, (0, more), value=v) for x, v in ((kind, 0), (image, -1), (frame, -1)))
        )

    def take(self, rows: Tensor) -> None:
        """Row i becomes what row ``rows[i]`` was."""
        batch = self.rows
        self.columns = [
            Columns(first, Marks(*(x[rows.to(x.device)] for x in marks)))
            for first, marks in self.columns
        ]
        self.state = {
            key: {
                name: x[rows.to(x.device)] if isinstance(x, Tensor) and x.shape[:1] == (batch,) else x
                for name, x in held.items()
            }
            for key, held in self.state.items()
        }  # fmt: skip


def nothing(batch: int, columns: int, device: torch.device) -> Marks:
    """The marks of text."""
    kind = torch.zeros(batch, columns, dtype=torch.int64, device=device)
    return Marks(kind, kind - 1, kind - 1)


def marked(cache: Any) -> MarkedCache | None:
    """The record that a cache carries."""
    found = None if cache is None else cache.__dict__.get(MARKS)
    return found if isinstance(found, MarkedCache) else None


def mark(cache: Any, record: MarkedCache) -> None:
    """Let a cache carry the record."""
    cache.__dict__[MARKS] = record
    follow_rows(cache)


def joined(before: Marks, here: Marks, counted: tuple[int, int] = (0, 0)) -> Marks:
    """The marks of earlier columns and those of this call; images and frames are counted on, from ``counted``
    at least."""
    images, frames = counted
    return Marks(
        torch.cat([before.kind, here.kind], 1),
        _counted_on(before.image, here.image, images),
        _counted_on(before.frame, here.frame, frames),
    )


def _counted_on(before: Tensor, here: Tensor, least: int) -> Tensor:
    if not before.shape[1]:
        return here
    more = (before.amax(1, keepdim=True) + 1).clamp(min=least)
    return torch.cat([before, torch.where(here < 0, here, here + more)], 1)


def marks_here(call: LanguageCall, layout: SequenceLayout, video: bool | None) -> Marks:
    """The marks of the columns of this call, (B, L).

    Args:
        video: the option of :class:`VLMWrapping`, by which frames are found; None leaves images and frames
            out.
    """
    batch, length = layout.valid.shape
    none = nothing(batch, length, layout.valid.device)
    if call.visual is None:
        return none
    kind = call.kinds.long().gather(1, layout.index) * layout.visual
    if video is None:
        return none._replace(kind=kind)
    frames, token = call.frames(video), call.map.kept
    slots = torch.where(layout.slots < 0, length, layout.slots)

    def put(values: Tensor) -> Tensor:
        here = values.to(slots.device).gather(1, token.clamp(min=0))
        return F.pad(none.image, (0, 1)).scatter(1, slots, here)[:, :length]

    return Marks(kind, put(frames.video), put(frames.frame))
