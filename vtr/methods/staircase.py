"""A KV cache whose bits fall with age."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from vtr.methods.base import Change, Examples, KVMethod, KVSite, check_flag, register
from vtr.methods.common.bits import NATIVE, check_bits, stored
from vtr.methods.common.layers import is_whole


@register
@dataclass(frozen=True, kw_only=True)
class StaircaseKV(KVMethod):
    r"""Store tokens with fewer bits, the more tokens came after them.

    Nothing is dropped, and no attention is looked at. The idea is that of a staircase of bits in proposals for
    KV caches; no formula of them could be found, so that the steps are options, and their defaults are ours.
    Entries are packed as in :class:`vtr.ZipCache`. Those of a lower step are rounded a second time.

    .. math::

        \mathrm{bits}(j) = \mathrm{bits}_m, \qquad m = |\{a \in \mathrm{ages} : n - j \ge a\}|

    Args:
        ages: ascending numbers of tokens: an entry that is followed by fewer than ``ages[0]`` tokens has
            ``bits[0]``, by fewer than ``ages[1]`` ``bits[1]``, and so on.
        bits: of the steps, one more than ``ages``, falling: 16 (the model's dtype), 8, 4 or 2.
        every: new tokens after which ages are looked at again.
        text: False leaves text and generated tokens in the model's dtype.
    """

    name: ClassVar[str] = "staircase-kv"
    paper: ClassVar[str] = "baseline: bits that fall with age"

    ages: tuple[int, ...] = field(default=(64, 512), kw_only=False)
    bits: tuple[int, ...] = (16, 4, 2)
    every: int = 64
    text: bool = True

    @classmethod
    def examples(cls) -> Examples:
        some = cls((2, 6), every=0), cls((2, 6), bits=(8, 4, 2), text=False, every=2)
        return {"some": some, "everything": (cls(bits=(16, 16, 16)),)}

    def validate(self) -> None:
        super().validate()
        for name in ("ages", "bits"):
            value = getattr(self, name)
            if not isinstance(value, (tuple, list)):
                raise ValueError(f"{name} must be a tuple of ints, got {value!r}")
            self._set(name, tuple(value))
        if not all(map(is_whole, self.ages)) or list(self.ages) != sorted({*self.ages} - {0}):
            raise ValueError(f"ages must be ascending ints from 1 on (tokens), got {self.ages!r}")
        for n, value in enumerate(self.bits):
            check_bits(value, f"bits[{n}]")
        if list(self.bits) != sorted(self.bits, reverse=True):
            raise ValueError(f"bits must not rise with age, got {self.bits!r}")
        if len(self.bits) != len(self.ages) + 1:
            raise ValueError(
                f"bits must have one number more than ages, got {len(self.bits)} and {len(self.ages)}"
            )
        check_flag(self.text, "text")

    def compress(self, site: KVSite) -> Change:
        device = site.columns.device
        step = torch.bucketize(site.age, torch.tensor(self.ages, device=device), right=True)
        wanted = torch.tensor(self.bits, device=device)[step]
        return stored(site, wanted if self.text else wanted.masked_fill(site.text, NATIVE))
