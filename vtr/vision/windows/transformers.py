"""transformers: Swin and Swin V2 (whole windows skip blocks), and the encoder of SAM (the tokens of every window
are merged).

They may be alone, under a classifier, or backbones; SAM's encoder also in its SamModel. Outputs have all tokens.
``attentions`` of Swin, if they are asked for, are those of the windows that a block has computed; ``hidden_states``
of SAM are those of merged tokens while there are some.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from vtr.compat.tested import explain
from vtr.compat.torch import kind_of
from vtr.compat.transformers import (
    SAM_LAYER,
    SAMS,
    SWIN_LAYER,
    SWINS,
    SWINS_V2,
    SWINV2_LAYER,
    TIMM,
)
from vtr.errors import UnsupportedModelError
from vtr.vision.encoders.transformers import class_named
from vtr.vision.windows import reasons
from vtr.vision.windows.sam import TransformersSam
from vtr.vision.windows.swin import TransformersSwin, TransformersSwinV2
from vtr.vision.windows.wrapping import WindowWrapping

FAMILIES = tuple(f"transformers {name}" for name in (*SWINS, *SWINS_V2, *SAMS))


def locate(target: Any) -> nn.Module | None:
    """The model itself, if it is one of :data:`FAMILIES`, or the timm model in it."""
    if class_named(target, TIMM) is not None:
        from vtr.vision.windows import timm

        return timm.locate(target.timm_model)
    return target if class_named(target, {**SWINS, **SWINS_V2, **SAMS}) else None


def wrap(root: Any) -> WindowWrapping:
    if not class_named(root, {**SWINS, **SWINS_V2, **SAMS}):  # what a TimmWrapper holds
        from vtr.vision.windows import timm

        return timm.wrap(root)
    family = f"transformers {kind_of(root).__name__}"
    name = class_named(root, SAMS)
    if name is not None:
        encoder: Any = root.get_submodule(SAMS[name])
        side = max(layer.window_size for layer in encoder.layers)
        if side < 1:
            raise UnsupportedModelError(f"{family} has no windows: its blocks see all tokens")
        last = len(encoder.layers) - 1
        sams = [TransformersSam(x, side, i == last) for i, x in enumerate(encoder.layers)]
        _check(family, sams, SAM_LAYER)
        return WindowWrapping(
            root,
            family,
            sams,
            signal="window_tokens",
            window=side,
            closed=reasons.closed(reasons.SAM),
        )
    v2 = class_named(root, SWINS_V2) is not None
    paths = SWINS_V2 if v2 else SWINS
    model: Any = root.get_submodule(paths[class_named(root, paths) or ""])
    kind = TransformersSwinV2 if v2 else TransformersSwin
    stages = enumerate(model.encoder.layers)
    runners = [kind(block, i, v2) for i, stage in stages for block in stage.blocks]
    _check(family, runners, SWINV2_LAYER if v2 else SWIN_LAYER)
    return WindowWrapping(
        root, family, runners, signal="whole_windows", closed=reasons.closed(reasons.SWIN)
    )


def _check(family: str, runners: Iterable[Any], wanted: str) -> None:
    """Refuse layers of another class."""
    for runner in runners:
        if type(runner.block).__name__ != wanted:
            raise UnsupportedModelError(
                explain(
                    "transformers",
                    f"the layers of {family} are {type(runner.block).__name__}, not {wanted}",
                )
            )
