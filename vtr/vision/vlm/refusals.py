"""Refuse options and methods that a vision-language model, or its videos, cannot take."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from vtr.compat.transformers import attention_implementation, masks_otherwise
from vtr.core.method import Method, TokenMethod
from vtr.core.registry import registry
from vtr.errors import UnsupportedMethodError
from vtr.vision.vlm.attention import runs_otherwise
from vtr.vision.vlm.masks import unknown_kinds
from vtr.vision.vlm.outputs import MODES

if TYPE_CHECKING:
    from vtr.vision.vlm.wrapping import VLMWrapping


def check_options(owner: VLMWrapping, options: dict[str, Any]) -> None:
    """Raise ``ValueError`` for options of ``vtr.apply`` that have no meaning for a model."""
    output = options.get("output", MODES[0])
    if output not in MODES:
        raise ValueError(f"output must be one of {MODES}, got {output!r}")
    positions = options.get("positions")
    if positions not in (None, "original", "compact"):
        raise ValueError(f"positions must be 'original', 'compact' or None, got {positions!r}")
    if positions == "compact" and owner.mrope:
        raise ValueError(
            f"positions='compact' is not defined for {owner.info.family}: its positions are "
            "two-dimensional (m-RoPE); use positions='original'"
        )


def check_flash(owner: VLMWrapping, options: dict[str, Any]) -> None:
    """Refuse FlashAttention in the language model unless the caller asked for it.

    Its inputs are right (no positions with gaps, which it reads as packed sequences), but
    its results after a cut have never been compared on a GPU.
    """
    if owner.flash and not options.get("flash_attention"):
        name = attention_implementation(owner.lm)
        raise UnsupportedMethodError(
            f"the language model runs {name!r}, whose results after a cut have not been proven on "
            "a GPU: call model.set_attn_implementation('sdpa') (it has its own flash kernels), "
            "or pass flash_attention=True to use it all the same"
        )


def check_method(owner: VLMWrapping, method: Method) -> None:
    """Raise ``UnsupportedMethodError`` if a method acts where a model cannot be cut, and ``ValueError`` if
    nothing comes after its cut."""
    # Tokens that a tower cuts are taken out of the prompt as well.
    stages = method.stages(owner.info)
    apart = ("attention", "kv", "logits")
    whole = [s for s in stages if s.site in apart or (s.site == "encoder" and not s.cuts)]
    shortens = len(whole) < len(stages)
    odd = runs_otherwise(owner.layers[0]) or masks_otherwise()
    if odd and shortens:
        odd = owner.why(f"{odd}, by which a cut is carried out")
        raise UnsupportedMethodError(f"{method.name} cannot cut for this language model: {odd}")
    if owner.sliding and any(s.site == "kv" for s in stages):
        raise UnsupportedMethodError(
            f"{method.name} cannot choose entries of the KV cache of a language model with sliding-window "
            "layers, whose caches hold their window alone"
        )
    if shortens and owner.mixed:
        check_masks(owner, method)
    for stage in stages:
        if stage.site == "encoder" and owner.family.cuts and stage.cuts:
            raise UnsupportedMethodError(
                f"{method.name} cuts inside the vision tower, which {owner.info.family} does not "
                f"allow: {owner.family.cuts}"
            )
        if stage[::2] == ("decoder", "middle") and not owner.info.decoder_middle:
            raise UnsupportedMethodError(
                f"{method.name} acts between attention and MLP of layer {stage.layer}, where "
                f"{type(owner.layers[0]).__name__} cannot be opened: use the layer's end"
            )
        if stage[:2] == ("decoder", len(owner.layers) - 1) and stage.place != "start":
            raise ValueError(
                f"{method.name}: nothing comes after layer {stage.layer}, the last of "
                f"{len(owner.layers)}"
            )


def check_masks(owner: VLMWrapping, method: Method) -> None:
    """Raise ``UnsupportedMethodError`` if the masks of a language model's layers cannot follow a cut."""
    odd = unknown_kinds(owner.kinds)
    if odd:
        raise UnsupportedMethodError(
            f"{method.name} cannot cut for {owner.info.family}: {odd}, through which a cut cannot be followed"
        )
    name = attention_implementation(owner.lm)
    if name not in ("sdpa", "eager") and (owner.sliding or owner.family.two_way):
        raise UnsupportedMethodError(
            f"{method.name} cannot cut for a language model with sliding windows or two-way pictures that runs "
            f"{name!r}, which takes no mask: call model.set_attn_implementation('sdpa')"
        )


def takes_videos(owner: VLMWrapping, method: Method) -> bool:
    """Tell whether a method that works on this model works for its videos, too."""
    if not owner.family.pooled or (isinstance(method, TokenMethod) and method.rejoins):
        return True
    return not any(s.site == "encoder" and s.cuts for s in method.stages(owner.info))


def for_videos(owner: VLMWrapping, without: Collection[str]) -> str:
    """Names of the methods that cut tokens of videos, without some of them."""
    names = []
    for name, cls in registry().items():
        if not issubclass(cls, TokenMethod):
            continue
        try:
            owner.check(cls(), dict(owner.options))
        except (UnsupportedMethodError, ValueError):
            continue
        if name not in without and takes_videos(owner, cls()):
            names.append(name)
    return ", ".join(names)


def note_on_videos(owner: VLMWrapping, method: Method) -> str:
    """A sentence if a method works for a model's images and not for its videos; else empty."""
    if takes_videos(owner, method):
        return ""
    return (
        "it cuts inside the vision tower, which works for images and not for videos "
        f"({owner.family.pooled}). For videos use one of {for_videos(owner, [method.name])}"
    )
