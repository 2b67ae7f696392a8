"""Image encoders: timm, open_clip, and the vision towers of transformers.

For an adapter of your own (``docs/custom-vit.md``): a :class:`BlockRunner` per block, an
:class:`EncoderWrapping` for the model, and ``vtr.register_adapter``.
"""

from vtr.vision.encoders.attention import Probe
from vtr.vision.encoders.blocks import (
    BlockRunner,
    EncoderRun,
    WholeBlock,
    block_flops,
    linear_flops,
    narrow_bias,
    narrow_rope,
    place_forward,
)
from vtr.vision.encoders.wrapping import EncoderWrapping

__all__ = [
    "BlockRunner",
    "EncoderRun",
    "EncoderWrapping",
    "Probe",
    "WholeBlock",
    "block_flops",
    "linear_flops",
    "narrow_bias",
    "narrow_rope",
    "place_forward",
]
