"""The bases of all methods, and what a method returns.

A method is a frozen dataclass: comparable, printable, serialisable, and checked when constructed. It
says at which sites it looks and cuts (:meth:`Method.stages`), and computes the cut from what the
site shows (:meth:`TokenMethod.reduce`). It never names a model class.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

from torch import Tensor, nn

from vtr.core.budget import Keep
from vtr.core.calibration import Fingerprint
from vtr.core.schedulable import Schedulable
from vtr.core.site import ModelInfo
from vtr.core.tokens import TokenMap
from vtr.core.trace import Trace
from vtr.errors import UnsupportedMethodError

PLACES: dict[str, tuple[str, ...]] = {
    "image": ("front",),
    "pixels": ("front",),
    "encoder": ("middle", "end"),
    "detector": ("start",),
    "windows": ("whole", "inside"),
    "prompt": ("entry",),
    "decoder": ("end", "start", "middle"),
    "attention": ("inside",),
    "kv": ("behind",),
    "block": ("around",),
    "logits": ("step",),
}
"""The places of a layer at which a method can visit each site; the first is the default.

- ``image``: in front of the patches; the cut is a smaller picture.
- ``pixels``: in front of a vision-language model's tower, which computes only the tokens that are left.
- ``encoder``: in the ``middle`` of a block, between attention and MLP, or at its ``end``, its output. If a
  block cannot be opened, the middle is the end.
- ``detector``: at the ``start`` of a layer of a detector's encoder, whose tokens all come back behind it.
- ``windows``: a block of a windowed encoder. ``whole``: what is kept are windows, whole; the others skip the
  block. ``inside``: in front of the block, the tokens of every window are merged, for this block and the
  following ones, until a method returns ``Reduction(None)`` at a later one, or until the last block.
- ``prompt``: the entry of a language model.
- ``decoder``: at the ``start`` of a layer of a language model (its input, with the q, k, v that it will
  compute), in its ``middle`` or at its ``end``, both with the q, k, v that it has used. The middle needs
  ``info.decoder_middle``.
- ``attention``: an attention call, of a diffusion transformer, of a language model or of a vision encoder.
  :data:`vtr.core.site.SIGNALS` tells them apart.
- ``kv``: the entries of a layer's KV cache, ``behind`` its attention.
- ``block``: a block of a diffusion transformer.
- ``logits``: the logits of every ``step`` of generate, behind the head of a language model.
"""


# A signal of the site "attention" -> what a model without it is not.
_OTHER_ATTENTION = {
    "denoising": "it is no diffusion transformer",
    "prompt": "it is no language model",
    "patches": "its attention is not that of a vision encoder",
}


class _Visit(NamedTuple):
    site: str
    layer: int
    place: str
    cuts: bool


class Stage(_Visit):
    """One visit of a method.

    Args:
        site: one of :data:`PLACES`.
        layer: 0-based; 0 at ``image``, ``pixels`` and ``prompt``.
        place: in the layer; None is the site's default, the first of :data:`PLACES`.
        cuts: False if the visit only looks, and never shortens the sequence.
    """

    __slots__ = ()

    def __new__(cls, site: str, layer: int, place: str | None = None, cuts: bool = True) -> Stage:
        if place is None:
            place = PLACES.get(site, ("",))[0]
        return super().__new__(cls, site, layer, place, cuts)

    def __repr__(self) -> str:
        look = "" if self.cuts else ", cuts=False"
        return f"Stage({self.site!r}, {self.layer}, {self.place!r}{look})"


class Merging(Protocol):
    """A way to merge tokens and to give each its result, for what the slots of a map cannot say.

    Attributes:
        kept: (B, N_out) int64, for each merged token the input token whose place it has.

    It may have ``flops``: what merging and restoring cost for a sample; the report of a windowed encoder counts
    them.
    """

    @property
    def kept(self) -> Tensor: ...

    def merge(self, x: Tensor) -> Tensor:
        """Merge x (B, N_in, C) to (B, N_out, C), in its dtype."""

    def restore(self, y: Tensor) -> Tensor:
        """Give each input token its part of y (B, N_out, C): (B, N_in, C)."""


class Reduction(NamedTuple):
    """The decision of :meth:`TokenMethod.reduce`.

    Attributes:
        map: from the tokens of the site to those that are kept.
        weights: (B, N_in) merge weights; None means that tokens are gathered, not merged.
        normalize: weighted mean (True) or weighted sum (False).
        tokens: (B, N_out, C), the new hidden states, if the method computed them itself.
        absolute: the map starts at the model's input instead of the tokens here (freezing, where
            tokens come back); needs ``tokens``.
        policy: (B, N) weights in [0, 1] of the tokens as keys in the following layers, for training:
            every token stays, and always sees itself (DynamicViT's masked softmax). A policy of None
            in a reduction without a map ends it.
        grid: at the site ``image``, (rows, columns) of the smaller picture in tokens; ``map`` says which
            of the tokens before each of them covers. At the site ``windows``, (rows, columns) of a window of
            merged tokens.
        keep_norm: a slot of several tokens gets the largest of their norms, in the direction of their mean
            (MLERP of Token Fusion, WACV 2024, arXiv 2312.01026). Needs ``weights``.
        front: (B, prefix, C), new hidden states of the protected tokens of an encoder; None leaves them.
            Beside a map it needs ``tokens``.
        merging: at the sites ``block`` and ``windows``, what merges and restores in place of ``map``, which then
            says for each token where most of it went. At ``windows`` its rows are all windows of all images.
        mass: (B, N_out) float32, above 0, by how much each token here counts as a key and in a pooling in
            place of its size, from here on (DiffRate, whose merged tokens count by their similarity). Later
            merges add it up. Needs an encoder and ``size_weighted``.
        values: at the site ``detector``, (B, L, C) tokens that the layers read in place of the present ones.
    """

    map: TokenMap | None
    weights: Tensor | None = None
    normalize: bool = True
    tokens: Tensor | None = None
    absolute: bool = False
    policy: Tensor | None = None
    grid: tuple[int, int] | None = None
    keep_norm: bool = False
    merging: Merging | None = None
    front: Tensor | None = None
    mass: Tensor | None = None
    values: Tensor | None = None


class Calibrator(Protocol):
    """Measures numbers for a calibrated method while the dense model runs (:func:`vtr.calibrate`)."""

    def see(self, site: Any) -> None:
        """Look at one attention call: every layer of every batch, in order."""

    def finish(self) -> dict[str, Tensor]:
        """Return the method's table, when all batches have run."""


Examples = Mapping[str, "Sequence[Method]"]
"""Settings of a method, by what they are examples of."""


@dataclass(frozen=True)
class Method:
    """Base of all methods. A subclass is a frozen dataclass decorated with :func:`vtr.register`.

    What a method decides is in one of two bases: :class:`TokenMethod` (which tokens a model computes
    with) and :class:`vtr.methods.base.AttentionMethod` (what an attention call computes).

    Class attributes:
        name: for configs and command lines.
        paper: title, venue and arXiv number.
        sites: where it acts, for the table of methods.
        needs: signals that it reads, per site: ``{"encoder": frozenset({"cls_attention"})}``.
        training: ``"none"``, ``"optional"`` or ``"required"``.
        learned: whether :meth:`build` makes modules.
        alone: no other method may reduce at the same site (its maps start at the model's input).
        reads_cache: whether it computes attention of decoding steps over the whole KV cache.
        calibrated: whether :func:`vtr.calibrate` measures numbers for it on data, its table; it then defines
            :meth:`calibrator`.
        tabled: whether a plan may give it densities by group of steps, layer and head (:func:`vtr.search`).
    """

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    sites: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[Mapping[str, frozenset[str]]] = {}
    training: ClassVar[str] = "none"
    learned: ClassVar[bool] = False
    alone: ClassVar[bool] = False
    calibrated: ClassVar[bool] = False
    reads_cache: ClassVar[bool] = False
    tabled: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Check (and normalise, with :meth:`_set`) the options; raise ``ValueError``."""

    @classmethod
    def examples(cls) -> Examples:
        """Say which settings the laws of :mod:`vtr.testing` use, if they do not follow from the options.

        Keys, all optional: ``"some"`` (reduce a tiny model's tokens), ``"everything"`` (leave the model as it
        is; empty if no setting does) and ``"counted"`` (leave exactly ``keep`` tokens in the end). See
        :func:`vtr.testing.examples`.
        """
        return {}

    def __str__(self) -> str:
        """The method with those options that differ from their defaults: ``EViT(keep=0.5)``."""
        shown = []
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            # One token (1) is not all of them (1.0).
            other = value != f.default or isinstance(value, int) != isinstance(f.default, int)
            if f.init and other:
                shown.append(f"{f.name}={value!r}")
        return f"{type(self).__name__}({', '.join(shown)})"

    def _set(self, field: str, value: object) -> None:
        object.__setattr__(self, field, value)

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        """List the visits, in order. Raises ``ValueError`` for layers that do not exist."""
        raise NotImplementedError(f"{type(self).__name__} must define stages(info)")

    def build(self, info: ModelInfo) -> nn.Module | None:
        """Make the modules of a method that learns; the handle owns them, the model does not."""
        return None

    def origin(self) -> Fingerprint | None:
        """Return the model that the method's own weights were trained with; None without weights."""
        return None

    def needs_table(self, info: ModelInfo) -> bool:
        """Tell whether a calibrated method cannot work on this model without its table; True unless it says
        otherwise."""
        return self.calibrated

    def calibrator(self, info: ModelInfo) -> Calibrator:
        """Return an object that measures the numbers of a calibrated method on one model."""
        raise NotImplementedError(f"{type(self).__name__} must define calibrator(info)")

    def training_losses(self, trace: Trace, modules: nn.Module | None) -> dict[str, Tensor]:
        """Return the terms that the paper adds to the loss for this method alone, by name.

        Each is a scalar with gradients that has the paper's weight already. A budget on the cost and the
        distillation of a teacher are the trainer's own (:mod:`vtr.train`).

        Args:
            trace: of the training call.
            modules: the method's own, None without.
        """
        return {}

    def overhead(self, modules: nn.Module, tokens: int) -> int:
        """FLOPs of the method's own ``modules`` for a sample of ``tokens`` visual tokens."""
        return 0

    def check(self, info: ModelInfo) -> None:
        """Raise :class:`vtr.UnsupportedMethodError` if the model lacks a site or a signal."""
        if not set(self.sites) & set(info.depth):
            raise self._lacks(info, self.sites)
        for site, wanted in self.requirements(info).items():
            if site not in info.depth:
                raise self._lacks(info, (site,))
            lacking = sorted(wanted - info.signals.get(site, frozenset()))
            if lacking:
                raise UnsupportedMethodError(
                    f"{self.name} needs {' and '.join(lacking)} at the site '{site}', which "
                    f"{info.family} does not show"
                    + (" (it has no class token)" if "cls_attention" in lacking else "")
                    + (" (it makes single images)" if lacking == ["frames"] else "")
                    + "".join(f" ({w})" for name, w in _OTHER_ATTENTION.items() if name in lacking)
                )

    def _lacks(self, info: ModelInfo, sites: tuple[str, ...]) -> UnsupportedMethodError:
        why = "; ".join(info.closed[s] for s in sites if s in info.closed)
        names = " and ".join(map(repr, sites))
        return UnsupportedMethodError(
            f"{self.name} acts at {'the site ' if len(sites) == 1 else ''}{names}, which {info.family} "
            f"does not have (it has: {', '.join(sorted(info.depth)) or 'none'})"
            + (f": {why}" if why else "")
        )

    def requirements(self, info: ModelInfo) -> Mapping[str, frozenset[str]]:
        """Return :attr:`needs`, if it depends on the options or the model."""
        return self.needs

    def schedulable(self, info: ModelInfo) -> Schedulable:
        """Tell which schedules of tokens per layer the method can follow in a model.

        Raises:
            UnsupportedMethodError: none.
        """
        raise UnsupportedMethodError(
            f"{self.name} follows no schedule of tokens per layer: search its options, "
            "vtr.strategies.Grid({option: (value, value)})"
        )

    def scheduled(self, info: ModelInfo, kept: Sequence[Keep], tokens: int | None = None) -> Method:
        """Return the method with a schedule of tokens per layer.

        Args:
            info: the model.
            kept: visual tokens left after each layer of the site of :meth:`schedulable`, not rising: numbers
                (int), or shares of the tokens that enter the first layer (float).
            tokens: how many enter it; None is ``info.tokens``.

        Raises:
            UnsupportedMethodError: the method follows no schedule.
            ValueError: not this one.
        """
        self.schedulable(info)
        raise NotImplementedError(
            f"{type(self).__name__} must define scheduled(info, kept, tokens)"
        )

    def replace(self, **changes: Any) -> Method:
        """A copy with other options."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Name and options as plain JSON values; :func:`create` takes them back."""
        options = {}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Method):
                value = value.to_dict()
            options[f.name] = list(value) if isinstance(value, tuple) else value
        return {"name": self.name, **options}


@dataclass(frozen=True)
class TokenMethod(Method):
    """Base of the methods that decide which visual tokens a model computes with.

    A subclass defines :meth:`Method.stages` and :meth:`reduce`. For a method that ranks tokens by a score,
    :class:`vtr.methods.base.ScoredMethod` defines both.

    Class attributes:
        size_weighted: tokens count by their sizes when the model pools them (merging methods).
        drops: whether a size-weighted method drops tokens as well, which then count nowhere.
        rejoins: all tokens of an encoder are there again behind it, so that nothing there has to know of
            its cuts. May be a property, as may be the next one.
        data_dependent: the number of tokens left depends on the image. No graph of fixed sizes can hold
            that, so that ``torch.export`` and ``torch.jit.trace`` are refused.
        carries_gradients: what a visit leaves in ``site.memory``, ``site.notes`` or a policy has gradients
            that later visits use; reentrant activation checkpointing would lose them, and is refused.
        positions: whether kept tokens keep their positions in a language model (``"original"``) or are
            numbered anew (``"compact"``), the paper's own choice; an option of ``apply``.
    """

    size_weighted: ClassVar[bool] = False
    drops: ClassVar[bool] = False
    rejoins: ClassVar[bool] = False
    data_dependent: ClassVar[bool] = False
    carries_gradients: ClassVar[bool] = False
    positions: ClassVar[str] = "original"

    def reduce(self, site: Any) -> Reduction | None:
        """Decide the cut at ``site``, or look and return None.

        Annotate ``site`` with what the method visits: :class:`vtr.Site` in an encoder,
        :class:`vtr.methods.base.LanguageSite` in a language model.
        """
        raise NotImplementedError(f"{type(self).__name__} must define reduce(site)")

    def positions_at(self, site: str) -> str:
        """:attr:`positions` after a cut at ``site``, for methods whose papers treat their cuts differently."""
        return self.positions

    def biased_layers(self, info: ModelInfo) -> frozenset[int]:
        """Encoder layers whose attention counts each key by its size (proportional attention)."""
        return frozenset()
