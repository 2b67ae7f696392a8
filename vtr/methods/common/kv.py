"""The bases of methods that act on the KV cache of a language model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from vtr.core.budget import Keep, check_keep, counts
from vtr.core.kv_site import Change
from vtr.core.method import Stage
from vtr.core.site import ModelInfo
from vtr.methods.common.kv_budget import adaptive_heads, pyramid
from vtr.methods.common.layers import Layered, is_whole
from vtr.methods.common.shares import largest

if TYPE_CHECKING:
    from vtr.core.kv_site import KVSite

EVICTED = ("visual", "all")
HEADS = ("uniform", "adaptive")
DEPTHS = ("uniform", "pyramid")
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
COLUMN = 4  # bytes of an entry's column in the store


class KVChoices:
    """The functions of methods at the site ``kv``, which choose the entries of a KV cache per layer and KV head.

    For methods that act at other sites as well; others derive from :class:`KVMethod`.

    Class attributes:
        whole: :meth:`compress` needs to know all layers: it is called at the end of the call for every layer,
            without queries. What it needs of them, :meth:`watch` notes.
    """

    whole: ClassVar[bool] = False

    @property
    def rescores(self) -> bool:
        """True if decoding steps attend by changed scores: :meth:`rescore`."""
        return False

    def rescore(self, site: KVSite, scores: Tensor) -> Tensor:
        """Change the scores of a decoding step, before the softmax.

        Args:
            site: the entries that are held, those of the step among them; what :meth:`watch` notes of a step is
                not yet there.
            scores: (B, H, 1, K) float32, scaled products of the query and the keys.

        Returns:
            (B, H, 1, K) float32.
        """
        raise NotImplementedError(f"{type(self).__name__} must define rescore(site, scores)")

    @property
    def while_decoding(self) -> bool:
        """True if entries are dropped or packed while an answer is written, and do not come back."""
        return False

    @property
    def bounded(self) -> bool:
        """True if the number of entries of a layer has a bound that does not grow with the conversation."""
        return False

    @property
    def acts_while_decoding(self) -> bool:
        """True if calls without new images or videos are looked at; else they pass at once."""
        cls = type(self)
        usual = (KVChoices.due, KVMethod.due, EvictionMethod.due)
        return self.while_decoding or cls.watch is not KVChoices.watch or cls.due not in usual

    @property
    def in_bytes(self) -> bool:
        """True if the budget is a number of bytes, so that caches have no room for entries to come."""
        return False

    def watch(self, site: KVSite) -> None:
        """Look at an attention call of a layer, in prompts and decoding steps; what is kept of it belongs into
        ``site.entries`` or ``site.state``."""

    def due(self, site: KVSite) -> bool:
        """Tell whether entries are chosen in this call of a layer, behind its attention."""
        return site.visited

    def compress(self, site: KVSite) -> Change | None:
        """Decide which entries stay and how they are stored; None leaves all as they are."""
        raise NotImplementedError(f"{type(self).__name__} must define compress(site)")

    def recall(self, site: KVSite) -> Tensor | None:
        """Decide which of the entries in CPU memory a layer is to hold, (B, Hk, M) bool, before its attention in
        a call without new images; ``site.aside`` has what was noted of them. None leaves all as they are."""
        return None


@dataclass(frozen=True, kw_only=True)
class KVMethod(KVChoices, Layered):
    """Base of the methods that decide what a KV cache holds, and nothing else.

    A subclass defines :meth:`compress`, or derives from :class:`EvictionMethod`, which defines it.

    Attributes (beside those of :class:`Layered`):
        every: 0 for a choice after each prompt with images or videos; n for another one after every n new
            tokens.
    """

    sites: ClassVar[tuple[str, ...]] = ("kv",)
    needs: ClassVar[Mapping[str, frozenset[str]]] = {"kv": frozenset({"entries"})}

    every: int = 0

    def validate(self) -> None:
        super().validate()
        if not is_whole(self.every):
            raise ValueError(f"every must be an int from 0 on (new tokens), got {self.every!r}")

    def check(self, info: ModelInfo) -> None:
        if type(self).compress is KVChoices.compress:
            raise TypeError(f"{type(self).__name__} must define compress(site) -> Change or None")
        super().check(info)

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        return tuple(Stage("kv", n) for n in self.working_layers(info, "kv"))

    @property
    def while_decoding(self) -> bool:
        return self.every > 0

    def due(self, site: KVSite) -> bool:
        return site.visited or bool(self.every and site.fresh >= self.every)


@dataclass(frozen=True, kw_only=True)
class EvictionMethod(KVMethod):
    """Base of the methods that drop entries by a score. The author writes :meth:`score`, and nothing else.

    Attributes (beside those of :class:`KVMethod`):
        keep: budget of each KV head, on average over layers and heads: visual tokens per image or video (int)
            or a share of the visual tokens (float). None is :attr:`DEFAULT`.
        bytes: budget of the whole cache of a call instead of ``keep``: a number, or a text such as
            ``"2GiB"`` or ``"500MB"``. Samples, layers and heads have equal parts of it. It is held while an
            answer is written, too.
        evict: ``"visual"``: text and generated tokens stay. ``"all"``: they may go as well, and ``keep``
            counts all tokens of the prompts (float: a share; int: a number per sample).
        first, recent: with ``evict="all"`` tokens at the beginning and at the end of a sample that stay.
        heads: ``"uniform"``, or ``"adaptive"``: heads of a layer share its budget by their scores (AdaKV,
            arXiv 2407.11550), each with at least ``floor`` of an equal part.
        floor: share of an equal part that each head has at least, in [0, 1], with ``heads="adaptive"``.
        depth: ``"uniform"``, or ``"pyramid"``: budgets fall from layer to layer (PyramidKV, arXiv
            2406.02069).
    """

    DEFAULT: ClassVar[Keep] = 0.25

    keep: Keep | None = field(default=None, kw_only=False)
    bytes: int | str | None = None
    evict: str = "visual"
    first: int = 4
    recent: int = 32
    heads: str = "uniform"
    floor: float = 0.2
    depth: str = "uniform"

    def validate(self) -> None:
        super().validate()
        if self.keep is not None:
            self._set("keep", check_keep(self.keep))
        if self.bytes is not None:
            parse_bytes(self.bytes)
            if self.keep is not None:
                raise ValueError("give a budget as keep or as bytes, not both")
            if self.heads == "adaptive":
                raise ValueError(
                    "bytes goes with heads='uniform': a layer is stored as large as its largest head, so "
                    "that unequal heads would pass the budget"
                )
        for name, known in (("evict", EVICTED), ("heads", HEADS), ("depth", DEPTHS)):
            if getattr(self, name) not in known:
                words = " or ".join(map(repr, known))
                raise ValueError(f"{name} must be {words}, got {getattr(self, name)!r}")
        for name in ("first", "recent"):
            if not is_whole(getattr(self, name)):
                raise ValueError(f"{name} must be an int from 0 on, got {getattr(self, name)!r}")
        if not isinstance(self.floor, (int, float)) or not 0 <= self.floor <= 1:
            raise ValueError(f"floor must be a number in [0, 1], got {self.floor!r}")

    def check(self, info: ModelInfo) -> None:
        cls = type(self)
        if cls.score is EvictionMethod.score and cls.compress is EvictionMethod.compress:
            raise TypeError(
                f"{cls.__name__} must define score(site): one number per entry, (B, Hk, K); the highest stay"
            )
        super().check(info)

    @property
    def while_decoding(self) -> bool:
        return self.every > 0 or self.in_bytes

    @property
    def in_bytes(self) -> bool:
        return self.bytes is not None

    @property
    def bounded(self) -> bool:
        if self.heads != "uniform" or self.depth != "uniform" or self.dense_layers:
            return False
        return self.bytes is not None or (self.evict == "all" and isinstance(self.keep, int))

    def score(self, site: KVSite) -> Tensor:
        """Compute (B, Hk, K) scores of the entries, in any dtype; the highest stay.

        Scores of padding and of entries that stay in any case are ignored.
        """
        raise NotImplementedError(f"{type(self).__name__} must define score(site)")

    def settle(self, site: KVSite, kept: Tensor) -> tuple[Tensor, Tensor] | None:
        """Compute what the entries that stay hold from now on, (B, Hk, K, D) keys and values: a method that
        merges adds what goes to what stays. None leaves them as they are."""
        return None

    def due(self, site: KVSite) -> bool:
        if super().due(site):
            return True
        return self.bytes is not None and site.k.shape[2] > self.places(site)

    def compress(self, site: KVSite) -> Change | None:
        kept = self.chosen(site, self.score(site))
        merges = type(self).settle is not EvictionMethod.settle
        if not merges or torch.equal(kept, site.valid):  # nothing goes, so that nothing is merged
            return Change(kept)
        made = self.settle(site, kept)
        return Change(kept) if made is None else Change(kept, *made)

    # ---- budgets ----------------------------------------------------------------------------

    def chosen(self, site: KVSite, score: Tensor) -> Tensor:
        """(B, Hk, K) bool, the entries that stay by a score (B, Hk, K)."""
        if score.shape != site.columns.shape:
            raise ValueError(
                f"{type(self).__name__}.score must return one number per entry, {tuple(site.columns.shape)} "
                f"(batch, KV heads, entries) here, got {tuple(score.shape)}: sum over the query heads of a KV head"
            )
        stays = self.protected(site)
        moving = site.valid & ~stays
        number = (self.number(site) - self._of_budget(site, stays)).clamp(min=0)
        score = score.float()
        if self.heads == "adaptive":
            several = adaptive_heads(score, moving, number, self.floor)
        else:
            several = number[:, None].expand(-1, score.shape[1])
        # NaN is the worst, and what may not stay is worse still.
        ranked = score.nan_to_num(nan=torch.finfo(torch.float32).min)
        best = largest(ranked.masked_fill(~moving, -torch.inf), several)
        return stays | (best & moving)

    def protected(self, site: KVSite) -> Tensor:
        """(B, Hk, K) bool, the entries that stay in any case."""
        if self.evict == "visual":
            return site.text
        return site.valid & ((site.order < self.first) | (site.age < self.recent))

    def number(self, site: KVSite) -> Tensor:
        """(B,) int64, the entries of a head that may stay: the visual ones, or with ``evict="all"`` all."""
        if self.bytes is not None:
            return self._in_bytes(site)
        keep = self.DEFAULT if self.keep is None else self.keep
        visual = self.evict == "visual"
        number = site.count(keep) if visual else counts(keep, site.prompt_tokens)
        if self.depth == "uniform":
            return number
        layers = self.working_layers(site.info, "kv")
        share = pyramid(0.5, len(layers))[layers.index(site.layer)] / 0.5
        return (number * share).round().long().clamp(min=1)

    def places(self, site: KVSite) -> int:
        """The entries of a head for which ``bytes`` has room in each layer and sample."""
        assert self.bytes is not None
        batch, heads, _, width = site.k.shape
        size = (width + site.v.shape[3]) * site.k.element_size()
        dense = site.layers - len(self.working_layers(site.info, "kv"))
        rest = parse_bytes(self.bytes) - dense * batch * heads * site.length * size
        noted = sum(x[:1, :1, :1].nbytes for x in site.entries.values())
        layers = site.layers - dense
        rest -= layers * sum(x.nbytes for x in site.state.values() if isinstance(x, Tensor))
        return max(0, rest // (layers * batch * heads * (size + COLUMN + noted)))

    def _in_bytes(self, site: KVSite) -> Tensor:
        room = torch.full((site.k.shape[0],), self.places(site), device=site.k.device)
        left = room - (self.protected(site) & site.valid)[:, 0].sum(1)
        if bool((left < 0).any()):
            more = "" if self.evict == "all" else ", or evict='all', so that text may go"
            raise RuntimeError(
                f"{self.name}: bytes={self.bytes!r} has room for {int(room[0])} entries per head, layer and "
                f"sample, and {int(room[0] - left.min())} of them must stay: give a larger budget{more}"
            )
        return left if self.evict == "visual" else room

    def _of_budget(self, site: KVSite, stays: Tensor) -> Tensor:
        """(B,) how much of the budget is taken by entries that stay."""
        if self.evict == "visual":
            return torch.zeros(len(stays), dtype=torch.long, device=stays.device)
        return stays.sum(2).amax(1)


def parse_bytes(value: int | str) -> int:
    """Read a number of bytes: ``2147483648``, ``"2GiB"``, ``"500MB"``. Raises ``ValueError``."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]i?)?b?\s*", str(value).lower())
    if not isinstance(value, str) or found is None or not float(found[1]):
        raise ValueError(
            f"bytes must be an int from 1 on or a text such as '2GiB' or '500MB', got {value!r}"
        )
    return int(float(found[1]) * UNITS[found[2] or ""])
