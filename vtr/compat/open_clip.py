"""open_clip: classes of its image towers, and the attributes of their blocks."""

from __future__ import annotations

_MODULE = "open_clip.transformer"
TOWER = f"{_MODULE}:VisionTransformer"
BLOCK, CUSTOM_BLOCK = f"{_MODULE}:ResidualAttentionBlock", f"{_MODULE}:CustomResidualAttentionBlock"
#: The attention of a custom block; the other's is ``nn.MultiheadAttention``.
ATTENTION = f"{_MODULE}:Attention"
#: A tower of timm, in the attribute ``trunk``.
TIMM_TOWER = "open_clip.timm_model:TimmModel"
#: The tower that has no sequence of tokens.
CONVOLUTIONAL = "ModifiedResNet"
#: The tower's method that pools without learned queries.
POOLING = "_global_pool"
#: The tower's method that turns pixels into the sequence.
EMBEDDING = "_embeds"
