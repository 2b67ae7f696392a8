"""transformers' detectors: methods choose which tokens of the encoder a layer computes; all tokens come back.

Supported are Deformable DETR, Grounding DINO and MM Grounding DINO (their deformable layers), the pixel decoders of
Mask2Former and OneFormer, DETR and Conditional DETR, and the self-attention of RT-DETR, RT-DETRv2 and D-FINE.

The contract for methods
------------------------

``Stage("detector", layer)`` is the start of a layer. The site is a
:class:`vtr.core.detector_site.DetectorSite`: ``hidden`` (B, L, C) of all tokens, ``levels``, ``valid``, ``positions``,
``reference_points``. ``reduce`` returns a :class:`vtr.core.method.Reduction` whose ``map`` keeps some of **all**
tokens; the layer computes these as queries, and reads the values (in full self-attention: keys and values) of all
tokens. The others keep their value, and may be chosen again. The choice holds until the next reduction; one without a
map ends it. ``Reduction.tokens`` are new hidden states of the chosen tokens, and ``Reduction.values`` (B, L, C) what
the layers read in place of the present tokens.

In Grounding DINO the fusion with the text, in front of the deformable layer, computes all tokens as before. In RT-DETR
and its relatives one feature map of stride 32 goes through self-attention; the convolutions behind it, most of the
encoder, compute all of it.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from vtr.compat.detectors import DETECTORS
from vtr.core.wrapping import Wrapping
from vtr.vision.detection.wrapping import DetectorWrapping, family_of

FAMILIES = tuple(f"transformers {next(iter(family.models))}" for family in DETECTORS.values())


def locate(target: Any) -> nn.Module | None:
    """The detector to wrap, or None if ``target`` is none."""
    return target if family_of(target) is not None else None


def wrap(root: nn.Module) -> Wrapping:
    """Wrap a detector."""
    return DetectorWrapping(root)
