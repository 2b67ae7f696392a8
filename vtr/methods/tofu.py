"""ToFu: drop similar tokens in the first blocks, merge them without loss of length in the others."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from vtr.methods.base import Examples, register
from vtr.methods.tome import ToMe


@register
@dataclass(frozen=True)
class ToFu(ToMe):
    r"""Token Fusion, "Bridging the Gap between Token Pruning and Token Merging" (WACV 2024, arXiv 2312.01026).

    Pairs are found as in :class:`ToMe`. Blocks that answer to a mixture of two inputs far from linearly drop the
    A token of a pair and leave the B token as it is (section 3.2, pruned merging); the others merge them with
    MLERP, the mean in direction with the largest norm of the group (section 3.3). A fixed depth separates the two,
    since early blocks are the less linear ones.

    .. math::

        x_{\mathrm{MLERP}} = \frac{\sum_i s_i x_i}{\lVert \sum_i s_i x_i \rVert} \, \max_i \lVert x_i \rVert

    The authors released no code, and the depth could not be found in public text. Half of the blocks is our
    reading; the re-implementation by the authors of PiToMe (hchautran/PiToMe) drops in one block more. That dropped
    tokens count in sizes is our reading too.

    Args:
        r, keep, inflection, prop_attn: as in :class:`ToMe`.
        drop_layers: blocks that drop: the first n (int), these (tuple of 0-based numbers), or the first half
            (None).
        keep_norm: MLERP; False merges to the plain mean.
    """

    name: ClassVar[str] = "tofu"
    paper: ClassVar[str] = (
        "ToFu: Token Fusion: Bridging the Gap between Token Pruning and Token Merging, WACV 2024, "
        "arXiv 2312.01026"
    )

    drop_layers: int | tuple[int, ...] | None = field(default=None, kw_only=True)
    keep_norm: bool = field(default=True, kw_only=True)

    @classmethod
    def examples(cls) -> Examples:
        return {"some": (cls(keep=0.4),), "everything": (cls(keep=1.0),)}
